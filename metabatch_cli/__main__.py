"""`python -m metabatch_cli` is `metabatch`."""

from metabatch_cli.app import main

if __name__ == "__main__":
    main()
