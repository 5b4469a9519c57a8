"""Options of a command from the dataclasses that its function takes."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from rqgen.options import CLI, OnCommandLine

from .errors import naming
from .field_help import field_help


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Make a command of a function: each parameter that is annotated with a dataclass becomes an option or argument for
    each of its fields, those of dataclasses within it included.

    A list field is an option that may be repeated. An error that opens with the name of a field opens with the name of
    its option instead, wherever the command raises it.

    Raises TypeError where two fields have one name.
    """
    hints = {name: hint for name, hint in get_type_hints(function).items() if name != "return"}
    fields = [one for hint in hints.values() for one in _fields(hint)]
    names = [one.name for one in fields]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise TypeError(f"{function.__name__}: expected each field once, got {', '.join(twice)} twice")

    def command(**values: Any) -> None:
        with naming({one.name: one.shown for one in fields}):
            function(**{name: _built(hint, values) for name, hint in hints.items()})

    parameters = [one.parameter() for one in fields]
    command.__name__, command.__doc__ = function.__name__, function.__doc__
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    command.__annotations__ = {one.name: one.annotation for one in parameters}
    return command


@dataclasses.dataclass(frozen=True)
class _Field:
    """A field of a dataclass, as the command line has it."""

    field: dataclasses.Field[Any]
    hint: Any
    help: str

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def look(self) -> OnCommandLine:
        found = self.field.metadata.get(CLI, OnCommandLine())
        assert isinstance(found, OnCommandLine)
        return found

    @property
    def shown(self) -> str:
        """The option as the user types it, or the argument as the help shows it."""
        if self.look.argument:
            return (self.look.metavar or self.name.upper()).strip("[].")
        return (self.look.name or f"--{self.name.replace('_', '-')}").partition("/")[0]

    @property
    def is_list(self) -> bool:
        return get_origin(self.hint) is list

    def parameter(self) -> inspect.Parameter:
        """Return the parameter that typer makes an option or argument of."""
        look, scalar, text, default = self.look, _scalar(self.hint), self.help, self.field.default
        if default is dataclasses.MISSING:
            default = inspect.Parameter.empty
        if self.field.default_factory is not dataclasses.MISSING:
            default = None
            if usual := self.field.default_factory():
                text = f"{text} Default: {' '.join(map(_text, usual))}."
        kind = str if look.parse is not None else scalar
        annotation: Any = list[kind] if self.is_list else kind  # type: ignore[valid-type]  # made at run time
        annotation = annotation | None if default is None else annotation
        declared = [] if look.argument or look.name is None else [look.name]
        make: Callable[..., Any] = typer.Argument if look.argument else typer.Option
        info = make(*declared, help=text, metavar=look.metavar, min=look.lowest, max=look.highest)
        kind_of = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(self.name, kind_of, default=default, annotation=Annotated[annotation, info])

    def value(self, given: Any) -> Any:
        """Return the field's value for what typer read. Raises ValueError that names the option."""
        if self.look.parse is None:
            return given
        try:
            return [self.look.parse(item) for item in given] if self.is_list else self.look.parse(given)
        except ValueError as error:
            raise ValueError(f"{self.shown}: {error}") from error


def _fields(cls: type) -> Iterator[_Field]:
    hints, help_of = get_type_hints(cls), field_help(cls)
    for one in dataclasses.fields(cls):
        hint = hints[one.name]
        if dataclasses.is_dataclass(hint):
            yield from _fields(typing.cast(type, hint))
        else:
            yield _Field(one, hint, help_of.get(one.name, ""))


def _built(cls: type, values: Mapping[str, Any]) -> Any:
    hints, given = get_type_hints(cls), {}
    for one in dataclasses.fields(cls):
        hint = hints[one.name]
        if dataclasses.is_dataclass(hint):
            given[one.name] = _built(typing.cast(type, hint), values)
        # An option that was not given, such as a list: the dataclass has the default.
        elif values[one.name] is not None and values[one.name] != []:
            given[one.name] = _Field(one, hint, "").value(values[one.name])
    return cls(**given)


def _scalar(hint: Any) -> type:
    """Return the type of one value: int of ``int | Sequence[int | None] | None``, str of ``list[str]``."""
    if get_origin(hint) is list:
        return _scalar(get_args(hint)[0])
    if get_origin(hint) not in (typing.Union, types.UnionType):
        return typing.cast(type, hint)
    (scalar,) = [one for one in get_args(hint) if one is not types.NoneType and get_origin(one) is None]
    return typing.cast(type, scalar)


def _text(value: Any) -> str:
    """Return a value of a list as the user types it, such as 8x8x4."""
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
