"""The grammar of the fuzz tests: random quantized graphs, what they are fed, and what happens to their weights."""
