"""Error messages of Ascend's software, explained: operator, argument, rule, what is legal. No PyTorch, no device."""
