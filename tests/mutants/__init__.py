"""Mutation testing of the pass's own code: `make mutants`."""
