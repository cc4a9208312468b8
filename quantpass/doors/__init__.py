"""How users come in: torch.compile, torchair, explain, fuse, verify, preview, the command line."""
