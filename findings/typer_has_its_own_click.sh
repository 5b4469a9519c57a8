#!/usr/bin/env bash
# typer 0.29.2: its commands and errors are no longer click's, though click may be installed beside it.
#
# Guess: typer stands on click: get_command gives a click.Command, and a click.UsageError raised in a command ends in the
# usual line and exit status 2.
# Seen: typer carries a copy of click. A click.UsageError leaves the program as a traceback, and `except
# click.ClickException` does not catch typer's own errors.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check typer==0.29.2 click==8.5.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import click
import typer
from importlib.metadata import version
from typer.main import get_command

app = typer.Typer()


@app.command()
def run(count: int) -> None:
    raise click.UsageError("count: expected an even number")


command = get_command(app)
try:
    command(["1"])
except click.UsageError as error:
    raised = f"left as {type(error).__module__}.{type(error).__name__}"
except SystemExit as error:
    raised = f"exit {error.code}"
try:
    command(["--nope"], standalone_mode=False)
except Exception as error:
    own = error
print(f"typer {version('typer')}, click {version('click')}: a click.UsageError {raised}")
print(f"get_command is a click.Command: {isinstance(command, click.Command)}; an unknown option is {type(own)}")
assert raised == "left as click.exceptions.UsageError", "the behaviour changed"
assert not isinstance(command, click.Command) and not isinstance(own, click.ClickException), "the behaviour changed"
PYTHON
