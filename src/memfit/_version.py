"""The version, alone in a file: the build and `memfit --version` read it without importing anything else."""

__version__ = "0.1.0.dev0"
