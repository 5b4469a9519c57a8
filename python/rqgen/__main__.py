"""``python -m rqgen`` and ``rqgen`` are the command line."""

import sys


def main() -> None:
    try:
        from rqgen.cli.app import main as run
    except KeyboardInterrupt:
        print("interrupted: the same command starts over", file=sys.stderr)
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
