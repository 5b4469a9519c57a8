"""Options of the command line: each is a field of one dataclass."""

from __future__ import annotations

import ast
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import rqgen.cli
from rqgen import SamplingParams
from rqgen.cli import requests
from rqgen.cli.app import app
from rqgen.cli.field_help import field_help
from rqgen.cli.options import with_options
from rqgen.evaluation import SamplingConfig
from rqgen.inference import Engine
from rqgen.options import EngineOptions, SamplingOptions, option


@dataclass(frozen=True)
class Inner:
    """Fields of a dataclass within another."""

    weight: float | list[float] | None = None
    """Weight of an item."""
    quick: bool = option(True, name="--quick/--slow")
    """Take the fast path."""


@dataclass(kw_only=True)
class Outer:
    """A request."""

    kind: str = option(argument=True, metavar="KIND")
    """The kind."""
    sizes: list[tuple[int, int]] = option(
        [(1, 2)], name="--size", parse=lambda text: tuple(int(part) for part in text.split("x"))
    )
    """Sizes."""
    count: int = option(3, lowest=1, highest=9)
    """Number of items."""
    inner: Inner = field(default_factory=Inner)


def run(*arguments, fault=None):
    """Run a command that takes an `Outer`; give what it got and the result."""
    got = []
    small = typer.Typer(pretty_exceptions_enable=False)

    @small.command()
    @with_options
    def command(request: Outer) -> None:
        """Do something."""
        got.append(request)
        if fault is not None:
            raise fault

    return got, CliRunner().invoke(small, [*map(str, arguments)])


def test_fields_are_options_and_arguments():
    got, result = run("mine", "--size", "3x4", "--size", "5x6", "--weight", "0.5", "--slow", "--count", 9)
    assert result.exit_code == 0, result.output
    assert got == [Outer(kind="mine", sizes=[(3, 4), (5, 6)], count=9, inner=Inner(0.5, quick=False))]
    got, _ = run("mine")
    assert got == [Outer(kind="mine")] and got[0].sizes == [(1, 2)]
    assert run("mine", "--count", 10)[1].exit_code == run()[1].exit_code == 2


def test_help_is_the_string_below_the_field():
    said = " ".join(run("--help")[1].output.replace("│", " ").split())
    assert "Do something." in said and "Weight of an item." in said and "Take the fast path." in said
    assert "Sizes. Default: 1x2." in said and "[1<=x<=9]" in said


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("count: expected less", "--count: expected less"),
        ("sizes[1]: expected less", "--size[1]: expected less"),
        ("quick: no", "--quick: no"),
        ("kind: no", "KIND: no"),
        ("counter: no", "counter: no"),
        ("data.count: no", "data.count: no"),
        ("count of items", "count of items"),
    ],
)
def test_errors_name_the_option(said, shown):
    for kind in (ValueError, TypeError, FileNotFoundError):
        error = run("mine", fault=kind(said))[1].exception
        assert type(error) is kind and str(error) == shown
    error = run("mine", fault=OSError(2, "No such file", "count: x"))[1].exception
    assert error.filename == "count: x" and error.strerror == "No such file"


def test_a_value_that_cannot_be_parsed_names_the_option():
    assert str(run("mine", "--size", "3xa")[1].exception).startswith("--size: invalid literal")


def test_one_name_is_one_field():
    with pytest.raises(TypeError, match="expected each field once, got count, kind, quick, sizes, weight twice"):

        @with_options
        def command(one: Outer, other: Outer) -> None: ...


def test_a_setting_of_sampling_is_one_field():
    """Functions, files of settings and the command line take the fields of one dataclass."""
    names = {one.name for one in dataclasses.fields(SamplingOptions)}
    assert {one.name for one in dataclasses.fields(SamplingParams)} == names
    assert {one.name for one in dataclasses.fields(SamplingConfig)} == {*names, "count", "batch_size"}
    assert {one.name for one in dataclasses.fields(Engine)} == {one.name for one in dataclasses.fields(EngineOptions)}
    commands = typer.main.get_command(app).commands
    for command in ("sample", "edit"):
        assert names <= {one.name for one in commands[command].params}
    for cls in (SamplingParams, SamplingConfig, Engine):
        assert not set(vars(cls).get("__annotations__", {})) & {*names, "precision", "use_graphs"}


def test_every_option_has_help():
    def commands(group):
        for command in group.commands.values():
            yield from commands(command) if hasattr(command, "commands") else [command]

    for command in commands(typer.main.get_command(app)):
        for parameter in command.params:
            assert parameter.help, f"{command.name}: {parameter.name}"
    for cls in vars(requests).values():
        if isinstance(cls, type) and cls.__module__ == requests.__name__:
            assert "Attributes:" not in (cls.__doc__ or "") and field_help(cls)


def test_no_call_passes_more_than_three_arguments_by_position():
    long = []
    for path in sorted(Path(rqgen.cli.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and len(node.args) > 3:
                name = ast.unparse(node.func)
                if name not in ("logger.warning", "logger.info"):
                    long.append(f"{path.name}:{node.lineno}: {name}")
    assert long == []
