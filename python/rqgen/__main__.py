"""Run the command line: ``python -m rqgen`` and ``rqgen``."""

import signal
import sys

try:
    from rqgen.cli.interrupts import interruptions, stop
except KeyboardInterrupt:
    print("interrupted: the same command starts over", file=sys.stderr)
    sys.exit(128 + signal.SIGINT)


def main() -> None:
    """Run the command line and exit, see `rqgen.cli.app.main`. An interrupt is one line, also while modules are
    imported and while the interpreter ends."""
    try:
        _run()
    finally:
        # All is said: the functions that modules registered for the end need not print a traceback.
        if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _run() -> None:
    with interruptions() as came:
        try:
            from rqgen.cli.app import main as run

            if not came:
                run()
        except (Exception, KeyboardInterrupt):
            if not came:
                raise
        stop(came[0])


if __name__ == "__main__":
    main()
