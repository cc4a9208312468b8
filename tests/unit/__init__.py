"""Tests of one module each, beside the end-to-end ones."""
