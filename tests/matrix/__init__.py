"""The versions matrix: an environment for each PyTorch, tests with each torchair, ``docs/versions.md``."""
