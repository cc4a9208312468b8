"""Checkpoints as they lie in a folder: dtypes and shapes of tensors, schemes of tools, and a verdict on each linear."""
