"""``python -m rqgen`` is the command line."""

from rqgen.cli.app import main

if __name__ == "__main__":
    main()
