"""`python -m gonka_poc`: the command line, for a Python whose scripts are not on PATH."""

from gonka_poc.cli.main import main

if __name__ == "__main__":
    main()
