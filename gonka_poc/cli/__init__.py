"""The command line: one module per tool, each usable from Python too."""
