"""Test tools of a host: each module is one tool, usable from Python; `commands` puts them on the command line."""
