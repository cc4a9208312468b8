"""The version, in one place: packaging, the command line and the compile-cache fingerprint read it."""

__version__ = "0.1.0"
