"""`python -m veneer` is the `veneer` command."""

from veneer.cli.main import main

if __name__ == "__main__":
    main()
