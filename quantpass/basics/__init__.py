"""What every layer talks about: verdicts in words, sizes that may be symbolic, descriptions of tensors."""
