"""Settings: typed, nested, with errors that name the key and the nearest right one."""

import copy
import dataclasses
import importlib
import os
import pkgutil
import typing
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rqgen
from rqgen import config


@dataclass
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)
    warmup_steps: int = 10

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"lr: expected a positive number, got {self.lr}")


@dataclass
class Settings:
    steps: int
    optimizer: Optimizer = field(default_factory=Optimizer)
    ema: Optimizer | None = None
    kind: Literal["digits", "photos"] = "digits"
    folder: Path | None = None


def test_nested_values_arrive_typed():
    settings = config.from_dict(
        Settings, {"steps": 3, "optimizer": {"lr": 1, "betas": [0.5]}, "folder": "/x"}, where="here"
    )
    assert settings == Settings(3, Optimizer(lr=1.0, betas=(0.5,)), folder=Path("/x"))
    assert isinstance(settings.optimizer, Optimizer) and isinstance(settings.optimizer.betas, tuple)


def test_round_trip_through_plain_data():
    settings = Settings(3, ema=Optimizer(lr=0.25), folder=Path("a/b"))
    plain = config.to_dict(settings)
    assert plain["ema"] == {"lr": 0.25, "betas": [0.9, 0.95], "warmup_steps": 10}
    assert plain["folder"] == "a/b"
    assert config.from_dict(Settings, plain, where="here") == settings


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        (
            {"steps": 1, "optimizer": {"warmup_step": 5}},
            ["'optimizer.warmup_step'", "'optimizer.warmup_steps'"],
        ),
        ({"steps": 1, "warmup_steps": 5}, ["'warmup_steps'", "'optimizer.warmup_steps'"]),
        ({"steps": 1, "ema": {"betax": 5}}, ["'ema.betax'", "'ema.betas'"]),
        ({"steps": 1, "optimizer": {"warmup": 5}}, ["'optimizer.warmup'", "'optimizer.warmup_steps'"]),
        ({"steps": 1, "zzzzzz": 5}, ["'zzzzzz'", "known here: steps, optimizer, ema, kind, folder"]),
        ({"steps": 1.5}, ["'steps'", "1.5"]),
        ({"steps": 1, "optimizer": {"betas": 3}}, ["'optimizer.betas'"]),
        ({"steps": 1, "optimizer": 3}, ["Optimizer", "3"]),
        ({"steps": 1, "kind": "cats"}, ["'kind'", "cats", "photos"]),
        ({"steps": 1, "optimizer": {"lr": -1}}, ["lr", "positive"]),
        ({}, ["'steps'", "must be given"]),
    ],
)
def test_bad_settings_are_named(mapping, words):
    with pytest.raises(ValueError, match="somewhere") as caught:
        config.from_dict(Settings, mapping, where="somewhere")
    for word in words:
        assert word in str(caught.value)


def test_only_dataclasses_and_mappings():
    with pytest.raises(TypeError, match="dataclass"):
        config.from_dict(dict, {}, where="here")
    with pytest.raises(TypeError, match="mapping"):
        config.from_dict(Settings, [1], where="here")
    with pytest.raises(TypeError, match="instance"):
        config.to_dict(Settings)


def test_load_applies_file_then_overrides(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 5\noptimizer:\n  lr: 0.5\n  betas: [0.1, 0.2]\n")
    settings = config.load(Settings, path, ["optimizer.betas=[0.3]", "kind=photos", "folder=null", "steps=7"])
    assert settings == Settings(7, Optimizer(lr=0.5, betas=(0.3,)), kind="photos")
    assert config.load(Settings, None, ["steps=2", "optimizer.lr=1e-4"]).optimizer.lr == 1e-4


def test_defaults_stand_below_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 5\noptimizer:\n  lr: 0.5\n")
    defaults = {"steps": 1, "kind": "photos", "optimizer": {"lr": 0.1, "warmup_steps": 77}}
    settings = config.load(Settings, path, ["optimizer.lr=0.6"], defaults=defaults)
    assert settings == Settings(5, Optimizer(lr=0.6, warmup_steps=77), kind="photos")


@pytest.mark.parametrize("override", ["steps", "=3", "steps=[1", "optimizer.lrr=1", "steps.x=1"])
def test_bad_overrides(override, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("steps: 5\n")
    with pytest.raises(ValueError, match=r"override|steps"):
        config.load(Settings, path, [override])


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.yaml"):
        config.load(Settings, tmp_path / "missing.yaml")
    listing = tmp_path / "list.yaml"
    listing.write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match=r"list\.yaml: expected a mapping"):
        config.load(Settings, listing)
    broken = tmp_path / "broken.yaml"
    broken.write_text("steps: [1\n")
    with pytest.raises(ValueError, match=r"broken\.yaml: not a readable YAML"):
        config.load(Settings, broken)
    typo = tmp_path / "typo.yaml"
    typo.write_text("step: 1\n")
    with pytest.raises(ValueError, match=r"typo\.yaml: unknown key 'step'; did you mean 'steps'"):
        config.load(Settings, typo, ["steps=2"])


# --- Scalars are read as the setting's own type


class Colour(Enum):
    RED = "red"
    ONE = 1


@dataclass
class Every:
    """A setting of each type."""

    count: int = 0
    rate: float = 0.0
    on: bool = False
    name: str = ""
    title: str | None = "title"
    folder: Path = Path("x")
    other: Path | None = Path("x")
    precision: Literal["no", "bf16"] = "bf16"
    channels: Literal[1, 3] | None = 1
    colour: Colour = Colour.RED
    names: list[str] | None = None
    numbers: list[int] = field(default_factory=list)
    scales: list[int | list[int]] = field(default_factory=list)
    shape: tuple[int, int] = (1, 1)
    either: int | str = 0
    table: dict[str, float] = field(default_factory=dict)
    anything: Any = None
    inner: Optimizer = field(default_factory=Optimizer)


READ = [
    (
        "names=[010, no, 1:04, 2024, null, ~, 1e3, 0x10, on, '']",
        "names",
        ["010", "no", "1:04", "2024", "null", "~", "1e3", "0x10", "on", ""],
    ),
    ("precision=no", "precision", "no"),
    ("precision='no'", "precision", "no"),
    ("count=0100", "count", 100),
    ("count=-7", "count", -7),
    ("count=1e3", "count", 1000),
    ("count=9223372036854775807", "count", 2**63 - 1),
    ("rate=1e-4", "rate", 1e-4),
    ("rate=1", "rate", 1.0),
    ("rate=.5", "rate", 0.5),
    ("on=true", "on", True),
    ("on=FALSE", "on", False),
    ("folder=2024", "folder", Path("2024")),
    ("folder=/a #1", "folder", Path("/a #1")),
    ("folder=a: b", "folder", Path("a: b")),
    ("folder=[x]", "folder", Path("[x]")),
    ("folder=*x", "folder", Path("*x")),
    ("folder=it's", "folder", Path("it's")),
    ("folder='/a # b'", "folder", Path("/a # b")),
    ("folder=${oc.env:HOME}", "folder", Path("${oc.env:HOME}")),
    ("folder=a=b", "folder", Path("a=b")),
    ("other=null", "other", None),
    ("other=~", "other", None),
    ("other=", "other", None),
    ("other='null'", "other", Path("null")),
    ("title=null", "title", None),
    ('title="null"', "title", "null"),
    ("title=1:04", "title", "1:04"),
    ("name=null", "name", "null"),
    ("name=", "name", ""),
    ("channels=3", "channels", 3),
    ("channels=null", "channels", None),
    ("colour=red", "colour", Colour.RED),
    ("colour=1", "colour", Colour.ONE),
    ("numbers=[1, 02]", "numbers", [1, 2]),
    ("scales=[1, [2, 3]]", "scales", [1, [2, 3]]),
    ("shape=[4, 5]", "shape", (4, 5)),
    ("either=12", "either", 12),
    ("either=1x", "either", "1x"),
    ("table={a: 1, 010: 2}", "table", {"a": 1.0, "010": 2.0}),
    ("anything=[1, 1e3, true, null, no, 0x10, 0o10, .5]", "anything", [1, 1e3, True, None, "no", 16, 8, 0.5]),
    ("inner={lr: 2}", "inner", Optimizer(lr=2.0)),
]


@pytest.mark.parametrize(("override", "name", "value"), READ)
def test_a_scalar_is_what_its_setting_is(override, name, value, tmp_path):
    got = getattr(config.load(Every, None, [override]), name)
    assert got == value and type(got) is type(value)
    # And in a file, where a comment begins at " #" and a plain scalar is not everything.
    text = override.partition("=")[2]
    if not any(mark in text for mark in (" #", "a: b", "[x]", "*x")):
        path = tmp_path / "a.yaml"
        path.write_text(f"{name}: {text}\n")
        got = getattr(config.load(Every, path), name)
        assert got == value and type(got) is type(value)


def test_a_comment_in_a_file_is_a_comment(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("folder: /a #1\nname: '/a #1'\n")
    assert config.load(Every, path) == Every(folder=Path("/a"), name="/a #1")


REFUSED = [
    ("count=1:04", "'count': expected an integer, got '1:04'"),
    ("count=1.5", "'count': expected an integer, got '1.5'"),
    ("count=1_000", "expected an integer, got '1_000'"),
    ("count=0x10", "expected an integer, got '0x10'"),
    ("count=true", "expected an integer, got 'true'"),
    ("count=", "expected an integer, got nothing"),
    ("count=null", "expected an integer, got null"),
    ("count=???", "expected an integer, got '???'"),
    ("count=${oc.env:HOME}", "expected an integer, got '${oc.env:HOME}'"),
    ("count=9223372036854775808", "expected an integer of at most 64 bits"),
    ("count=1e400", "expected an integer"),
    ("count=1e999999999", "expected an integer"),
    ("count=1e-99999999999999999999", "expected an integer"),
    ("count=" + "9" * 5000, "expected an integer of at most 64 bits, got '9999"),
    ("count=[1]", "'count': expected an integer, got '[1]'"),
    ("rate=nan", "'rate': expected a finite number, got 'nan'"),
    ("rate=.inf", "expected a finite number, got '.inf'"),
    ("rate=-.INF", "expected a finite number, got '-.INF'"),
    ("rate=1e999", "expected a finite number, got '1e999'"),
    ("rate=fast", "expected a finite number, got 'fast'"),
    ("on=yes", "'on': expected true or false, got 'yes'"),
    ("on=1", "'on': expected true or false, got '1'"),
    ("precision=fp16", "'precision': expected one of no, bf16, got 'fp16'; did you mean 'bf16'?"),
    ("channels=2", "'channels': expected one of 1, 3 or null, got '2'"),
    ("channels=true", "expected one of 1, 3 or null, got 'true'"),
    ("colour=blue", "'colour': expected one of red, 1, got 'blue'"),
    ("folder=", "'folder': expected a path, got nothing"),
    ("folder=a\0b", "'folder': expected a path"),
    ("names=circle", "'names': expected a list such as [a, b] or null, got 'circle'"),
    ("names=a,b", "'names': expected a list such as [a, b] or null, got 'a,b'"),
    ("names=[[a]]", "'names[0]': expected text, got ['a']"),
    ("names=[a] # b", "expected one value, got '# b' behind it"),
    ("names=[a #1, b]", "not a readable YAML value"),
    ("names={a: 1}", "'names': expected a list such as [a, b] or null, got {'a': '1'}"),
    ("numbers=[1, x]", "'numbers[1]': expected an integer, got 'x'"),
    ("numbers=[1, 1.5]", "'numbers[1]': expected an integer, got '1.5'"),
    ("scales=[[1, x]]", "'scales[0][1]': expected an integer, got 'x'"),
    ("shape=[1]", "'shape': expected a list of 2 values, got ['1']"),
    ("table={a: x}", "'table.a': expected a finite number, got 'x'"),
    ("inner=x", "'inner': expected settings (Optimizer), got 'x'"),
    ("inner=", "'inner': expected settings (Optimizer), got nothing"),
    ("inner=null", "'inner': expected settings (Optimizer), got null"),
    ("inner=[1]", "'inner': expected settings (Optimizer), got ['1']"),
    ("inner={lrr: 1}", "unknown key 'inner.lrr'; did you mean 'inner.lr'?"),
    ("inner.lr=0", "inner.lr: expected a positive number, got 0"),
    ("count.x=1", "'count': expected an integer, got {'x': '1'}"),
    ("names=!!python/object/apply:os.system [ls]", "tags are not read, got !!python/object/apply:os.system"),
    ("names=*a", "alias *a"),
    ("names=" + "[" * 100_000, "nested more than 50 levels deep"),
    ("inner..lr=1", "expected the form section.key=value"),
    ("base=x", "unknown key 'base'; a file names what it starts from"),
]


@pytest.mark.parametrize(("override", "words"), REFUSED, ids=[words[:30] for _, words in REFUSED])
def test_what_is_refused_on_the_command_line(override, words):
    with pytest.raises(ValueError, match="override") as caught:
        config.load(Every, None, [override])
    message = str(caught.value)
    assert words in message and len(message) < 400 and "\n" not in message


PLAIN = [
    ({"count": True}, "expected an integer, got True"),
    ({"count": 2.5}, "expected an integer, got 2.5"),
    ({"count": 10**30}, "expected an integer"),
    ({"rate": 10**400}, "expected a finite number"),
    ({"rate": float("nan")}, "expected a finite number, got nan"),
    ({"rate": float("inf")}, "expected a finite number, got inf"),
    ({"rate": True}, "expected a finite number, got True"),
    ({"on": 1}, "expected true or false, got 1"),
    ({"name": 3}, "expected text, got 3"),
    ({"name": None}, "expected text, got null"),
    ({"folder": 3}, "expected a path, got 3"),
    ({"channels": True}, "expected one of 1, 3 or null, got True"),
    ({"numbers": "12"}, "expected a list such as [1, 2], got '12'"),
    ({"inner": []}, "expected settings (Optimizer), got []"),
]


@pytest.mark.parametrize(("mapping", "words"), PLAIN)
def test_plain_data_is_checked_by_the_same_types(mapping, words):
    with pytest.raises(ValueError, match="here: wrong value at") as caught:
        config.from_dict(Every, mapping, where="here")
    assert words in str(caught.value)


def test_plain_data_may_be_nested_no_deeper_than_files():
    deep: Any = 1
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ValueError, match="nested more than 50 levels"):
        config.from_dict(Every, {"anything": deep}, where="here")


# --- Files


def refusal(text: str | bytes, tmp_path: Path) -> str:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ValueError, match=r"mine\.yaml: ") as caught:
        config.load(Every, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


FILES = [
    ("inner: x\n", "'inner': expected settings (Optimizer), got 'x' (line 1)"),
    ("inner: null\n", "expected settings (Optimizer), got null (line 1)"),
    ("inner:\n  lr: fast\n", "'inner.lr': expected a finite number, got 'fast' (line 2)"),
    ("inner:\n  lr: -1\n", "inner.lr: expected a positive number, got -1.0 (line 2)"),
    ("# why\n\ncout: 1\n", "unknown key 'cout'; did you mean 'count'? (line 3)"),
    ("count: 1\ncount: 2\n", "key 'count' stands twice in one mapping (line 2)"),
    ("inner: {lr: 1, lr: 1}\n", "key 'lr' stands twice in one mapping (line 1)"),
    ("inner:\n\tlr: 1\n", "not a readable YAML file: line 2: "),
    ("count: 1\n---\ncount: 2\n", "holds several documents; one is expected (line 2)"),
    ("<<: {count: 1}\n", "merge keys (<<) are not read"),
    ("names: &a [*a]\n", "alias *a stands before the end of its anchor (line 1)"),
    ("? [a]\n: 1\n", "expected a name as key (line 1)"),
    ("count: !!int 3\n", "tags are not read, got !!int (line 1)"),
    ("count: !mine 3\n", "tags are not read, got !mine (line 1)"),
    ("count: [\n", "not a readable YAML file: line 2: "),
    ("count: 1: 2\n", "not a readable YAML file: line 1: "),
    ('name: "\\q"\n', "not a readable YAML file: line 1: "),
    ('name: "\\UFFFFFFFF"\n', "not a readable YAML file: "),
    ("name: \x07\n", "not a readable YAML file: character #x07 at position 6 is not allowed"),
    ("null\n", "expected a mapping, got null"),
    ("count\n", "expected a mapping, got str"),
    (b"\xff\xfec\x00", "expected UTF-8 text, got byte 0xff at position 0"),
    (b"name: caf\xe9\n", "expected UTF-8 text, got byte 0xe9 at position 9"),
    ("[" * 100_000, "nested more than 50 levels deep"),
    ("{a: " * 100_000, "nested more than 50 levels deep"),
    ("#" * 1_000_001, "1000001 bytes are too many for a YAML file of settings"),
    ("base: 3x\n", "base: config: no file and no shipped configuration is called '3x'"),
    ("base: [a]\n", "base: expected a recipe's name or a path, got ['a'] (line 1)"),
    ("base: mine.yaml\n", "base: the files name each other in a circle: mine.yaml -> mine.yaml"),
]


@pytest.mark.parametrize(("text", "words"), FILES, ids=[words[:40] for _, words in FILES])
def test_what_is_refused_in_a_file(text, words, tmp_path):
    assert words in refusal(text, tmp_path)


def test_a_few_lines_that_stand_for_billions_of_values(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    assert "stands for more than 100000 values (line 5)" in refusal("\n".join(lines), tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "# nothing\n", "inner:\n", "inner:\n  # lr: 1\n", "%YAML 1.2\n---\n{}\n", b"\xef\xbb\xbf{}\n"],
)
def test_files_that_say_nothing(text, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    assert config.load(Every, path) == Every()


def test_an_anchor_stands_for_its_value(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("numbers: &n [1, 2]\nscales: *n\n")
    assert config.load(Every, path) == Every(numbers=[1, 2], scales=[1, 2])


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="config file not found"):
        config.load(Every, tmp_path)


def test_untyped_files_are_read_by_the_core_schema(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("a: [1, 1e-4, True, no, ~, '1', 1:04, 010]\nb: {c: .inf}\n")
    assert config.read_yaml(path) == {"a": [1, 1e-4, True, "no", None, "1", "1:04", 10], "b": {"c": float("inf")}}


TEXT = st.text(min_size=1).filter(lambda text: "\0" not in text)
HARD = [
    "no",
    "010",
    "2024",
    "1:04",
    "null",
    "~",
    " #",
    "# a",
    "a: b",
    "- a",
    "true",
    "1e3",
    "'",
    '"',
    "",
    "\n",
    "\t",
    "é\u2028\ufeff",
]


@given(
    st.lists(st.one_of(st.sampled_from(HARD), st.text())),
    TEXT,
    st.one_of(st.none(), st.text()),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
@settings(max_examples=300, deadline=None)
def test_what_is_written_reads_back_equal(tmp_path_factory, names, folder, title, rate):
    instance = Every(names=names, name="".join(names), folder=Path(folder), title=title, rate=rate, scales=[1, [2, 3]])
    path = tmp_path_factory.getbasetemp() / "round.yaml"
    path.write_text(config.to_yaml(config.to_dict(instance)), encoding="utf-8")
    assert config.load(Every, path) == instance


def test_names_that_are_not_utf8_read_back_equal(tmp_path):
    instance = Every(folder=Path(os.fsdecode(b"caf\xe9")))
    path = tmp_path / "a.yaml"
    path.write_text(config.to_yaml(config.to_dict(instance)), encoding="utf-8")
    assert config.load(Every, path) == instance


# --- What a file starts from


@dataclass
class Part:
    recipe: ClassVar[str] = "part"
    width: int = 1
    depth: int = 1


@dataclass
class Whole:
    recipe: ClassVar[str] = "whole"
    part: Part = field(default_factory=Part)
    steps: int = 1
    rate: float = 1.0


@pytest.fixture
def recipes(tmp_path):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "part.yaml").write_text("base: null\nwidth: 10\ndepth: 10\n")
    (folder / "wide.yaml").write_text("base: part\nwidth: 99\n")
    (folder / "whole.yaml").write_text("base: null\npart:\n  base: part\n  depth: 20\nsteps: 10\n")
    (folder / "long.yaml").write_text("base: null\nsteps: 1000\n")
    return folder


def test_a_file_starts_from_the_recipe_that_overrides_start_from(recipes, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("rate: 3\n")
    assert config.load(Whole, None, recipes=recipes) == Whole(Part(10, 20), 10)
    assert config.load(Whole, path, recipes=recipes) == config.load(Whole, None, ["rate=3"], recipes=recipes)
    assert config.load(Whole, path, ["part.width=4"], recipes=recipes) == Whole(Part(4, 20), 10, 3.0)
    assert config.load(Whole, path) == Whole(rate=3.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base: null\n", Whole()),
        ("base: none\nsteps: 3\n", Whole(steps=3)),
        ("base: long\nrate: 2\n", Whole(steps=1000, rate=2.0)),
        ("base: whole\n", Whole(Part(10, 20), 10)),
        ("base: below/b.yaml\nrate: 2\n", Whole(Part(7, 20), 5, 2.0)),
        ("part:\n  base: wide\n", Whole(Part(99, 10), 10)),
        ("part:\n  base: null\n  width: 3\n", Whole(Part(3, 1), 10)),
        ("part: {width: 3}\n", Whole(Part(3, 20), 10)),
        ("part:\n  base: below/p.yaml\n", Whole(Part(10, 8), 10)),
    ],
)
def test_what_a_base_can_be(recipes, tmp_path, text, expected, monkeypatch):
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "b.yaml").write_text("base: ../c.yaml\nsteps: 5\n")
    (tmp_path / "below" / "p.yaml").write_text("depth: 8\n")
    (tmp_path / "c.yaml").write_text("part: {width: 7}\nsteps: 4\n")
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert config.load(Whole, path, recipes=recipes) == expected


def test_bases_in_a_circle_or_missing_are_named(recipes, tmp_path):
    for one, two in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{one}.yaml").write_text(f"base: {two}.yaml\n")
    with pytest.raises(ValueError, match=r"circle: a\.yaml -> b\.yaml -> c\.yaml -> a\.yaml"):
        config.load(Whole, tmp_path / "a.yaml", recipes=recipes)
    (tmp_path / "a.yaml").write_text("steps: 1\nbase: lung\n")
    with pytest.raises(ValueError, match=r"a\.yaml: base: .*'lung'; did you mean 'long'\? \(line 2\)"):
        config.load(Whole, tmp_path / "a.yaml", recipes=recipes)
    (tmp_path / "a.yaml").write_text("base: none.yaml\n")
    with pytest.raises(ValueError, match=r"a\.yaml: base: config file not found: .*none\.yaml \(line 1\)"):
        config.load(Whole, tmp_path / "a.yaml", recipes=recipes)


def test_an_error_names_the_file_that_holds_the_value(recipes, tmp_path):
    (recipes / "part.yaml").write_text("base: null\nwidth: wide\n")
    (tmp_path / "mine.yaml").write_text("rate: 3\n")
    with pytest.raises(ValueError, match=r"recipes/part\.yaml: wrong value at 'part\.width': .* \(line 2\)"):
        config.load(Whole, tmp_path / "mine.yaml", ["steps=3"], recipes=recipes)
    with pytest.raises(ValueError, match="override 'steps=x': wrong value at 'steps'"):
        config.load(Whole, tmp_path / "mine.yaml", ["part.width=1", "steps=x"], recipes=recipes)


# --- Settings that follow from others


@dataclass
class Model:
    size: int = 1
    colour: int = 1


@dataclass
class Follows:
    size: int = 2
    model: Model = field(default_factory=Model)

    @classmethod
    def implied(cls, given: config.Given) -> dict[str, Any]:
        if given.read("size") == 13:
            raise given.error("size", "13 brings bad luck")
        return {"model": {"size": given.read("size")}}


@dataclass
class Around:
    inner: Follows = field(default_factory=Follows)
    total: int = 0

    @classmethod
    def implied(cls, given: config.Given) -> dict[str, Any]:
        return {"total": given.read("inner.size")}


def test_what_is_not_given_follows(tmp_path):
    assert config.load(Follows, None, ["size=5", "model.colour=3"]) == Follows(5, Model(5, 3))
    assert config.load(Follows, None, ["size=5", "model.size=4"]) == Follows(5, Model(4))
    assert config.load(Around, None, ["inner.size=5"]) == Around(Follows(5, Model(5)), 5)
    assert config.from_dict(Follows, {"size": 7}, where="here") == Follows(7, Model(7))
    with pytest.raises(ValueError, match=r"override 'inner\.size=13': inner\.size: 13 brings bad luck"):
        config.load(Around, None, ["inner.size=13"])
    assert config.given(Around, None, ["inner.size=5"]).followed() == {"total", "inner.model.size"}
    assert config.given(Around, None, ["inner.size=5", "total=1"]).followed() == {"inner.model.size"}


def test_settings_can_be_looked_at_before_they_are_built():
    settings = config.given(Around, None, ["inner.size=5"])
    assert settings.has("inner.size") and not settings.has("inner.model.size") and not settings.has("total")
    assert settings.read("inner.size") == 5 and settings.read("inner.model.size") == 1
    assert settings.build({"inner": {"size": 8, "model": {"colour": 9}}}) == Around(Follows(5, Model(5, 9)), 5)
    with pytest.raises(ValueError, match=r"there: unknown key 'inner\.sise'"):
        settings.build({"inner": {"sise": 8}}, where="there")
    settings = config.given(Settings, None, ["steps=1"])  # whose section `ema` is None by default
    assert not settings.has("ema.lr") and settings.read("ema.lr") == 1e-3 and settings.read("ema") is None


# --- Bounds and seeds


@dataclass
class Bounded:
    width: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        config.check_bounds(self, width=(1, 10))
        config.check_seeds(self, "seed")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("width=0", "width: expected at least 1, got 0"),
        ("width=11", "width: expected at most 10, got 11"),
        ("seed=-1", "seed: expected a seed within 0..4294967295"),
        ("seed=4294967296", "seed: expected a seed within 0..4294967295"),
    ],
)
def test_bounds(override, words):
    with pytest.raises(ValueError, match="override") as caught:
        config.load(Bounded, None, [override])
    assert words in str(caught.value)
    assert config.load(Bounded, None, ["seed=4294967295", "width=10"]) == Bounded(10, 2**32 - 1)


def test_a_link_to_itself_is_no_file(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.symlink_to(path.name)
    with pytest.raises(FileNotFoundError, match=r"config file not found: .*loop\.yaml"):
        config.load(Settings, path)


# --- Numbers that are none


def float_settings() -> list[tuple[type, str]]:
    """Every field of rqgen's settings that holds a float."""
    found = []
    for module in pkgutil.walk_packages(rqgen.__path__, "rqgen."):
        if module.name == "rqgen.__main__":
            continue
        for value in vars(importlib.import_module(module.name)).values():
            is_settings = isinstance(value, type) and value.__module__ == module.name and "Config" in value.__name__
            if is_settings and dataclasses.is_dataclass(value):
                hints = typing.get_type_hints(value)
                found += [(value, name) for name, hint in hints.items() if float in (hint, *typing.get_args(hint))]
    return found


REQUIRED = {
    "RQTransformerConfig": {"code_shape": (2, 2, 2), "code_dim": 4, "codebook_size": 8, "embed_dim": 8},
    "TransformerConfig": {"layers": 1, "heads": 2},
}


def test_floats_of_every_settings_class_are_known() -> None:
    classes = {cls.__name__ for cls, _ in float_settings()}
    assert {"OptimizerConfig", "LoopConfig", "PriorConfig", "VARPriorConfig", "RQVAEConfig", "VARConfig"} <= classes
    assert {"QuantizerConfig", "MultiScaleConfig", "MultiScaleVQVAEConfig", "DataConfig", "SamplingConfig"} <= classes
    assert {"RQTransformerConfig", "TransformerConfig"} <= classes


@pytest.mark.parametrize(("cls", "name"), float_settings(), ids=lambda value: getattr(value, "__name__", value))
def test_a_float_that_is_nan_or_infinite_is_refused_by_name(cls: type, name: str) -> None:
    required = REQUIRED.get(cls.__name__, {})
    missing = {one.name for one in dataclasses.fields(cls) if one.default is one.default_factory} - required.keys()
    assert not missing, f"say in REQUIRED of this file what a {cls.__name__} may have as {missing}"
    for value in (float("nan"), float("inf"), -float("inf"), np.float32("nan")):
        with pytest.raises(ValueError, match=rf"^{name}: expected a finite number( or .+)?, got (nan|-?inf)"):
            cls(**{**required, name: value})


# --- Sections that a registry names


@dataclass
class DiskOptions:
    shorthand: ClassVar[str] = "path"
    path: Path | None = None
    rate: float = 1.0

    def __post_init__(self) -> None:
        config.check_finite(self)
        if self.rate < 0:
            raise ValueError(f"rate: expected at least 0, got {self.rate}")


class Disk:
    name, options = "disk", DiskOptions


class Tape:
    """Has no options."""

    name, options = "tape", None


@pytest.fixture
def places():
    """A registry, and settings that choose one of its entries."""
    registry = config.Registry("place")

    @config.open_sections(registry, chosen_by="kind")
    @dataclass
    class Open:
        moved: ClassVar[dict[str, str]] = {"speed": "disk.rate"}
        kind: str = "tape"
        size: int = 1
        options: dict[str, Any] = field(default_factory=dict)

        def __post_init__(self) -> None:
            config.fill_sections(self)

    registry.register(Tape)
    registry.register(Disk)
    return registry, Open


def test_options_of_what_is_registered_are_a_section(places, tmp_path):
    registry, cls = places
    path = tmp_path / "mine.yaml"
    path.write_text("disk:\n  path: /a\n  rate: 2\n")
    loaded = config.load(cls, path, ["disk.rate=3", "size=4"])
    assert loaded == cls(kind="disk", size=4, disk=DiskOptions(Path("/a"), 3.0))
    assert loaded.disk.path == Path("/a") and cls().disk == DiskOptions()
    assert config.setting_names(cls) == ["kind", "size", "disk"]
    plain = config.to_dict(loaded)
    assert plain == {"kind": "disk", "size": 4, "disk": {"path": "/a", "rate": 3.0}}
    assert config.from_dict(cls, plain, where="here") == loaded
    assert copy.deepcopy(loaded) == loaded == dataclasses.replace(loaded)
    assert config.to_dict(cls()) == {"kind": "tape", "size": 1}
    # What is registered later is a section from then on.
    registry.register(type("Net", (), {"name": "net", "options": Part}))
    assert config.load(cls, None, ["kind=net", "net.width=5"]).net == Part(width=5)
    registry.remove("net")
    with pytest.raises(ValueError, match=r"unknown key 'net'"):
        config.load(cls, None, ["net.width=5"])


@pytest.mark.parametrize("value", ["/a #1", "a: b", "[x]", "*x", "{x}", "a=b"])
def test_a_scalar_stands_for_a_field_of_its_section(places, tmp_path, value):
    _, cls = places
    assert config.load(cls, None, [f"disk={value}"]) == cls(kind="disk", disk=DiskOptions(Path(value)))
    path = tmp_path / "mine.yaml"
    path.write_text(f"disk: '{value}'\n")
    merged = config.load(cls, path, ["disk.rate=2"])
    assert (
        merged
        == config.load(cls, None, ["disk.rate=2", f"disk={value}"])
        == cls(kind="disk", disk={"path": value, "rate": 2})
    )
    assert config.from_dict(cls, {"disk": value}, where="here") == cls(kind="disk", disk=value)
    settings = config.given(cls, None, [f"disk={value}"])
    assert settings.has("disk.path") and settings.followed() == {"kind"}


def test_the_path_of_a_section_chooses_it_over_what_lies_below(places, tmp_path):
    _, cls = places
    path = tmp_path / "mine.yaml"
    path.write_text("kind: tape\nsize: 3\n")
    wanted = cls(kind="disk", size=3, disk=DiskOptions(Path("/a")))
    assert config.load(cls, path, ["disk=/a"]) == config.load(cls, path, ["disk.path=/a"]) == wanted
    assert config.load(cls, None, ["disk=/a", "size=3"], defaults={"kind": "tape"}) == wanted
    for override in ("disk.rate=2", "disk=null"):
        assert config.load(cls, path, [override]).kind == "tape"
    above = tmp_path / "above.yaml"
    above.write_text("base: mine.yaml\ndisk: /a\n")
    assert config.load(cls, above) == wanted
    # Said twice in one place it must agree.
    for overrides in (["kind=tape", "disk=/a"], ["disk=/a", "kind=tape"]):
        with pytest.raises(ValueError, match=r"disk: expected a path for kind 'disk' .* got /a; kind is 'tape'"):
            config.load(cls, path, overrides)


def test_only_the_chosen_section_must_be_there(places, tmp_path):
    _, cls = places
    for overrides, words in (
        (["kind=disk"], "disk: expected a path for kind 'disk' and none otherwise, got None"),
        (["kind=disk", "disk=null"], "disk: expected a path for kind 'disk' and none otherwise, got None"),
        (["kind=tape", "disk=x"], "disk: expected a path for kind 'disk' and none otherwise, got x"),
        (["kind=disc"], "wrong value at 'kind': expected one of tape, disk, got 'disc'; did you mean 'disk'?"),
        (["disk.rate=-1"], "override 'disk.rate=-1': disk.rate: expected at least 0, got -1.0"),
        (["disk.rat=1"], "unknown key 'disk.rat'; did you mean 'disk.rate'?"),
        (["disk=[x]", "disk.path=y", "tape=z"], "unknown key 'tape'"),
    ):
        with pytest.raises(ValueError) as caught:
            config.load(cls, None, overrides)
        assert words in str(caught.value)
    for arguments, words in (
        ({"kind": "disc"}, "kind: expected one of tape, disk, got 'disc'; did you mean 'disk'?"),
        ({"options": {"dsk": 1}}, "options: unknown section 'dsk'; did you mean 'disk'?"),
        ({"disk": {"rat": 1}}, "disk: unknown key 'disk.rat'"),
        ({"disk": DiskOptions("x")}, "disk: expected a path for kind 'disk' and none otherwise, got x"),
    ):
        with pytest.raises(ValueError) as caught:
            cls(**arguments)
        assert words in str(caught.value)
    # Each fault once, by its dotted name.
    for arguments, message in (
        ({"disk": {"rate": float("nan")}}, "disk.rate: expected a finite number, got nan"),
        ({"disk": {"rate": "fast"}}, "disk.rate: expected a finite number, got 'fast'"),
        ({"disk": {"rate": -1}}, "disk.rate: expected at least 0, got -1.0"),
        ({"disk": 7}, "disk.path: expected a path or null, got 7"),
    ):
        with pytest.raises(ValueError) as caught:
            cls(**arguments)
        assert str(caught.value) == message
    with pytest.raises(TypeError, match="options: expected a mapping of sections, got int"):
        cls(options=5)
    with pytest.raises(AttributeError, match="Open has no setting 'tape'"):
        cls().tape  # noqa: B018
    # What was said of an entry that is not chosen is kept, but for defaults.
    assert config.to_dict(config.load(cls, None, ["disk.rate=2"])) == {
        "kind": "tape",
        "size": 1,
        "disk": {"path": None, "rate": 2.0},
    }
    assert config.load(cls, None, ["disk.rate=1"]) == cls()
    path = tmp_path / "empty.yaml"
    path.write_text("size: 2\ndisk:\n  # path: x\n")
    assert config.load(cls, path) == cls(size=2)


def test_keys_of_older_versions_are_read_where_they_stand_now(places, tmp_path):
    _, cls = places
    path = tmp_path / "old.yaml"
    path.write_text("kind: disk\nspeed: 2\ndisk: x\n")
    assert config.load(cls, path) == cls(kind="disk", disk={"path": "x", "rate": 2})
    assert config.load(cls, path, ["speed=5"]) == config.load(cls, path, ["disk.rate=5"])
    assert config.from_dict(cls, {"speed": 1, "disk": None, "kind": "tape"}, where="here") == cls()
    path.write_text("speed: 2\ndisk: {rate: 3}\n")
    with pytest.raises(ValueError, match=r"old\.yaml: 'disk\.rate' is given twice, once by a key of older versions"):
        config.load(cls, path)


def test_what_a_registry_refuses(places):
    registry, _ = places
    required = dataclasses.make_dataclass("Required", [("count", int)])
    wrong = dataclasses.make_dataclass("Wrong", [("count", int, 1)], namespace={"shorthand": "cuont"})
    for name, options, words in (
        ("Tape", None, "expected a lower-case identifier such as 'mine', got 'Tape'"),
        (None, None, "expected a lower-case identifier"),
        ("size", None, "'size' is a setting that every place has"),
        ("moved", None, "'moved' is a setting that every place has"),
        ("disk", None, r"the place 'disk' is .*\.Disk already"),
    ):
        with pytest.raises(ValueError, match=words):
            registry.register(type("Mine", (), {"name": name, "options": options}))
    for options, words in (
        (3, "Mine.options: expected a dataclass or None, got 3"),
        (required, "Mine.options: Required.count has no default"),
        (wrong, "Mine.options: Wrong.shorthand: 'cuont' is no field"),
    ):
        with pytest.raises(TypeError, match=words):
            registry.register(type("Mine", (), {"name": "mine", "options": options}))
    assert registry.names() == ["tape", "disk"] and registry.register(Disk) is Disk
    with pytest.raises(ValueError, match="--place: unknown place 'dsk'; did you mean 'disk'"):
        registry.find("dsk", "--place")
    with pytest.raises(ValueError, match="tape: a place has this name"):
        registry.reserve(["tape"])


@pytest.mark.parametrize(
    ("known", "got", "message"),
    [
        (["rq", "independent"], "independant", "got 'independant'; did you mean 'independent'?"),
        (["rq", "var"], "VAR", "got 'VAR'; did you mean 'var'?"),
        (["rq", "var"], "transformer", "got 'transformer'"),
        ([1, 3], 2, "expected one of 1, 3, got 2"),
        ([1, "a"], None, "expected one of 1, a, got None"),
    ],
)
def test_a_name_near_one_of_a_few_is_suggested(known, got, message):
    assert config.one_of(known, got).endswith(message)


def test_what_is_registered_is_a_class():
    for entry in (Disk(), "disk", None):
        with pytest.raises(TypeError, match="entry: expected a class, got"):
            config.Registry("thing").register(entry)


def test_without_a_choice_every_section_is_there():
    registry = config.Registry("thing")
    registry.register(Disk)

    @config.open_sections(registry)
    @dataclass
    class All:
        options: dict[str, Any] = field(default_factory=dict)

        def __post_init__(self) -> None:
            config.fill_sections(self)

    assert config.to_dict(All()) == {"disk": {"path": None, "rate": 1.0}}
    assert config.load(All, None, ["disk=x"]).disk.path == Path("x")
    spoilt = All()
    spoilt.disk.rate = float("nan")
    with pytest.raises(ValueError, match=r"disk\.rate: expected a finite number"):
        config.check_finite(spoilt)


# --- Fields that were set in Python


@dataclass
class Checked(Every):
    def __post_init__(self) -> None:
        config.check_fields(self)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"count": "32"}, TypeError, "count: expected an integer, got '32'"),
        ({"count": 32.0}, TypeError, "count: expected an integer, got 32.0"),
        ({"count": True}, TypeError, "count: expected an integer, got True"),
        ({"count": None}, TypeError, "count: expected an integer, got None"),
        ({"count": 2**63}, ValueError, "count: expected an integer of at most 64 bits, got 9223372036854775808"),
        ({"rate": "a"}, TypeError, "rate: expected a finite number, got 'a'"),
        ({"rate": float("nan")}, ValueError, "rate: expected a finite number, got nan"),
        ({"rate": 1e39}, ValueError, r"rate: expected a finite number of at most 3\.4e\+38 \(float32\), got 1e\+39"),
        ({"on": "no"}, TypeError, "on: expected true or false, got 'no'"),
        ({"on": 1}, TypeError, "on: expected true or false, got 1"),
        ({"precision": "fp16"}, ValueError, "precision: expected one of no, bf16, got 'fp16'"),
        ({"precision": None}, TypeError, "precision: expected one of no, bf16, got None"),
        ({"channels": "3"}, TypeError, "channels: expected one of 1, 3, got '3'"),
        ({"channels": 2}, ValueError, "channels: expected one of 1, 3, got 2"),
        ({"colour": "red"}, TypeError, "colour: expected one of red, 1, got 'red'"),
        ({"numbers": [1, "2"]}, TypeError, r"numbers\[1\]: expected an integer, got '2'"),
        ({"numbers": 3}, TypeError, r"numbers: expected a list such as \[1, 2\], got 3"),
        ({"shape": (1, 2, 3)}, ValueError, r"shape: expected a list of 2 values, got \[1, 2, 3\]"),
        ({"table": {"a": "x"}}, TypeError, r"table\.a: expected a finite number, got 'x'"),
        ({"inner": {"lr": 1}}, TypeError, r"inner: expected settings \(Optimizer\), got \{'lr': 1\}"),
        ({"inner": Optimizer(warmup_steps="3")}, TypeError, r"inner\.warmup_steps: expected an integer, got '3'"),
    ],
)
def test_fields_are_checked_by_their_types(values, error, message):
    with pytest.raises(error, match=f"^{message}"):
        Checked(**values)


def test_fields_of_their_types_pass():
    assert Checked(count=np.int64(3), rate=np.float32(0.5), numbers=(1, 2), colour=Colour.RED, other=None).count == 3
    assert Checked(rate=3, folder="a/b", scales=[1, [2, 3]], channels=None).folder == Path("a/b")
    assert config.to_dict(Checked(count=np.int64(3)))["count"] == 3
    assert type(config.to_dict(Checked(count=np.int64(3)))["count"]) is int


@pytest.mark.parametrize("text", ["1e39", "-1e39", "3.5e38"])
def test_a_number_that_float32_does_not_hold_is_refused(text):
    with pytest.raises(ValueError, match=r"'rate': expected a finite number of at most 3\.4e\+38 \(float32\), got"):
        config.load(Every, None, [f"rate={text}"])
    assert config.load(Every, None, ["rate=3.4e38"]).rate == 3.4e38


# --- The setting to blame


@dataclass
class Groups:
    channels: int = 16
    groups: int = 8
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        if self.channels % self.groups:
            raise ValueError(f"groups: expected a divisor of {self.channels}, got {self.groups}")


@dataclass
class Both:
    first: Groups = field(default_factory=Groups)
    second: Groups = field(default_factory=Groups)

    def __post_init__(self) -> None:
        if self.first.seed != self.second.seed:
            raise ValueError(f"second.seed: expected {self.first.seed}, as the first has, got {self.second.seed}")


def test_an_error_names_the_override_at_fault(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("first:\n  groups: 4\n  name: x\nsecond:\n  channels: 8\n")
    for overrides, culprit in (
        (["first.channels=30", "first.seed=0"], "first.channels=30"),  # not the file, whose groups fit
        (["first.seed=0", "first.channels=30", "second.name=y"], "first.channels=30"),
        (["first.channels=30", "first.groups=8"], "first.channels=30"),
        (["first.channels=20", "first.groups=8"], "first.groups=8"),  # either is at fault: the one that is named
        (["first.groups=8", "first.channels=20"], "first.groups=8"),
        (["second.groups=3", "second.name=y"], "second.groups=3"),
        (["first.channels=30", "second.seed=x"], "first.channels=30"),
        (["first.seed=3", "first.name=z", "second.name=y"], "first.seed=3"),
        (["second.seed=3", "second.name=y", "first.name=z"], "second.seed=3"),
        (["first={channels: 30, seed: 0}", "first.name=z"], "first={channels: 30, seed: 0}"),
    ):
        with pytest.raises(ValueError) as caught:
            config.load(Both, path, overrides)
        assert str(caught.value).startswith(f"override '{culprit}': "), overrides


def test_an_error_names_the_file_and_line_at_fault(tmp_path):
    (tmp_path / "base.yaml").write_text("first:\n  groups: 4\n")
    path = tmp_path / "a.yaml"
    path.write_text("base: base.yaml\nfirst:\n  name: x\n  channels: 30\n")
    with pytest.raises(ValueError, match=r"a\.yaml: first\.groups: expected a divisor of 30, got 4 \(line 4\)"):
        config.load(Both, path, ["first.name=z", "second.groups=4"])
    with pytest.raises(ValueError, match=r"a\.yaml: first\.groups: expected a divisor of 30, got 4 \(line 4\)"):
        config.given(Both, path, ["first.name=z"]).read("first")
