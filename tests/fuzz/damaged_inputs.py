"""Damages files that the package reads and holds what it says of them.

    python tests/fuzz/damaged_inputs.py --cases 1500 --seed 0

Weights, configurations, codes, checkpoints, YAML, images and published files are made small and whole, then each case
damages one of them at random and reads it. Allowed: the very content of the whole file (the damage was harmless), or
one line that names the file. Not allowed: any other exception, several lines, a hang, a crash, and, of files that carry
a checksum, other content. The same seed gives the same cases; `make test` runs a few.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import faulthandler
import gzip
import hashlib
import io
import itertools
import json
import logging
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml  # type: ignore[import-untyped]
from PIL import Image
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent.parent / "data"
SECONDS_PER_CASE = 20
CASES_PER_PROCESS = 250
REFUSALS = (ValueError, OSError)  # OSError: FileNotFoundError, IsADirectoryError, PermissionError, ...


# --- whole files --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """One kind of file: how it is read, which files of its folder may be damaged, and by what.

    Attributes:
        read: from the folder to what it holds, for `digest`.
        files: relative to the folder.
        damages: names of `DAMAGES`.
        checksummed: other content than the whole file's may never be read without a word.
    """

    name: str
    read: Callable[[Path], Any]
    files: tuple[str, ...]
    damages: tuple[str, ...]
    checksummed: bool


IMAGES = (".png", ".jpg", ".webp", ".tif", ".gif")
BYTES = ("flip", "cut", "zeros", "insert", "foreign", "empty", "directory", "dangling", "missing")


def kinds() -> list[Kind]:
    from rqgen.config import load, to_dict
    from rqgen.convert import load_kakaobrain, load_var
    from rqgen.data import read_codes, read_image
    from rqgen.models import load_pretrained
    from rqgen.training.resume import read_state

    def model(folder: Path) -> Any:
        loaded = load_pretrained(folder)
        return to_dict(loaded.config), loaded.state_dict()

    def codes(folder: Path) -> Any:
        found = read_codes(folder / "codes.safetensors")
        return found.codes, found.labels, found.codebook_size, found.class_names

    def settings(folder: Path) -> Any:
        from rqgen.systems.rq import RQTokenizerRun

        return to_dict(load(RQTokenizerRun, folder / "run.yaml"))

    def picture(suffix: str) -> Callable[[Path], Any]:
        return lambda folder: read_image(folder / f"image{suffix}", channels=3)

    def kakaobrain(folder: Path) -> Any:
        return load_kakaobrain(folder / "model.pt").state_dict()

    def var(folder: Path) -> Any:
        vae, prior = load_var(folder / "vae.pth", folder / "var.pth", folder / "config.json")
        return vae.state_dict(), prior.state_dict()

    weights = ("config.json", "model.safetensors")
    return [
        Kind("model", model, weights, (*BYTES, "json", "tensors"), True),
        Kind("prior", model, weights, (*BYTES, "json", "tensors"), True),
        Kind("codes", codes, ("codes.safetensors",), (*BYTES, "tensors", "metadata"), True),
        Kind("checkpoint", read_state, ("state.pt", "info.json"), (*BYTES, "json", "pickle"), True),
        Kind("settings", settings, ("run.yaml",), (*BYTES, "yaml"), False),
        *(
            Kind(f"image{s}", picture(s), (f"image{s}",), BYTES, False)
            for s in (".png", ".jpg", ".webp", ".tif", ".gif")
        ),
        Kind("kakaobrain", kakaobrain, ("model.pt", "config.yaml"), (*BYTES, "yaml", "pickle"), False),
        Kind("var", var, ("vae.pth", "var.pth", "config.json"), (*BYTES, "json", "pickle"), False),
    ]


def make_whole(root: Path) -> None:
    """Writes a folder for each kind."""
    from rqgen.cli.app import main

    small = [
        "model.base_channels=8",
        "model.channel_multipliers=[1,1,1,1]",
        "model.z_channels=8",
        "model.embed_dim=8",
        "model.quantizer.codebook_size=16",
        "loop.batch_size=16",
        "loop.steps=1",
        "loop.tensorboard=false",
        "loop.checkpoint_every=1",
    ]
    prior = ["prior.embed_dim=16", "prior.spatial.layers=1", "prior.spatial.heads=2", "prior.depth.heads=2"]
    runs = root / "runs"
    model = runs / "tokenizer" / "model"
    for arguments in (
        ["train", "tokenizer", "--out", runs / "tokenizer", *small],
        ["train", "prior", "--out", runs / "prior", f"tokenizer={model}", *prior, *small[5:]],
        ["encode", "--tokenizer", model, "--out", runs / "codes.safetensors", "source=digits"],
    ):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            main([str(argument) for argument in arguments])
    shutil.copytree(model, root / "model")
    shutil.copytree(runs / "prior" / "model", root / "prior")
    (root / "codes").mkdir()
    shutil.copy(runs / "codes.safetensors", root / "codes")
    shutil.copytree(next((runs / "tokenizer" / "checkpoints").iterdir()), root / "checkpoint")
    (root / "settings").mkdir()
    shutil.copy(runs / "tokenizer" / "config.yaml", root / "settings" / "run.yaml")
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    for suffix in IMAGES:
        (root / f"image{suffix}").mkdir()
        Image.fromarray(pixels).save(root / f"image{suffix}" / f"image{suffix}")
    source = DATA / "kakaobrain" / "rqvae-shared-8x8x4"
    (root / "kakaobrain").mkdir()
    shutil.copy(source / "config.yaml", root / "kakaobrain")
    (root / "kakaobrain" / "model.pt").write_bytes(lzma.decompress((source / "model.pt.xz").read_bytes()))
    (root / "var").mkdir()
    shutil.copy(DATA / "var" / "config.json", root / "var")
    for name in ("vae.pth", "var.pth"):
        (root / "var" / name).write_bytes(lzma.decompress((DATA / "var" / f"{name}.xz").read_bytes()))
    shutil.rmtree(runs)


def digest(content: Any) -> str:
    """SHA-256 over nested tensors and plain data."""
    hashed = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            hashed.update(f"{value.dtype}{tuple(value.shape)}".encode())
            flat = value.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format)
            hashed.update(flat.view(torch.uint8).numpy().tobytes())
        elif isinstance(value, dict):
            for key, item in value.items():
                hashed.update(repr(key).encode())
                add(item)
        elif isinstance(value, (list, tuple)):
            hashed.update(f"[{len(value)}".encode())
            for item in value:
                add(item)
        else:
            hashed.update(repr(value).encode())

    add(content)
    return hashed.hexdigest()


# --- damage -------------------------------------------------------------------------------------------------

FOREIGN = {
    "an HTML page": b"<!DOCTYPE html>\n<html><head><title>404</title></head><body>not found</body></html>\n",
    "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n",
    "one byte": b"\x80",
    "text": b"nothing to see here\n",
    "gzip": gzip.compress(b"data", mtime=0),
    "zip": b"PK\x05\x06" + bytes(18),
    "pickle": b"\x80\x02}q\x00.",
    "zeros": bytes(4096),
    "JSON": b'{"a": [1, 2, 3]}',
}
HOSTILE = (
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    10**40,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "null",
    "no",
    "x" * 5000,
    "../../etc/passwd",
    "\u0000",
    "\ud7ff\u2028",
    [],
    [None],
    [1, 2],
    {},
    {"a": 1},
    "${oc.env:HOME}",
    "???",
)

Draw = random.Random
Damage = Callable[[Path, Draw], str]


def flip(path: Path, draw: Draw) -> str:
    content = bytearray(path.read_bytes())
    place, bit = draw.randrange(len(content)), draw.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {place}"


def cut(path: Path, draw: Draw) -> str:
    content = path.read_bytes()
    length = draw.randrange(len(content))
    path.write_bytes(content[:length])
    return f"cut to {length} of {len(content)} bytes"


def zeros(path: Path, draw: Draw) -> str:
    content = bytearray(path.read_bytes())
    start = draw.randrange(len(content))
    stop = min(len(content), start + draw.choice((1, 16, 512, 4096)))
    content[start:stop] = bytes(stop - start)
    path.write_bytes(content)
    return f"zeros in {start}..{stop}"


def insert(path: Path, draw: Draw) -> str:
    content = path.read_bytes()
    place = draw.choice((0, draw.randrange(len(content)), len(content)))
    added = draw.randbytes(draw.choice((1, 8, 100)))
    path.write_bytes(content[:place] + added + content[place:])
    return f"{len(added)} bytes inserted at {place}"


def foreign(path: Path, draw: Draw) -> str:
    name = draw.choice(sorted(FOREIGN))
    path.write_bytes(FOREIGN[name])
    return name


def empty(path: Path, draw: Draw) -> str:
    path.write_bytes(b"")
    return "empty"


def directory(path: Path, draw: Draw) -> str:
    path.unlink()
    path.mkdir()
    return "a folder in its place"


def dangling(path: Path, draw: Draw) -> str:
    path.unlink()
    path.symlink_to(draw.choice(("nowhere", path.name)))
    return f"a link to {os.readlink(path)}"


def missing(path: Path, draw: Draw) -> str:
    path.unlink()
    return "missing"


def mutate(tree: Any, draw: Draw) -> str:
    """Changes one entry of nested dictionaries and lists in place."""
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in entries:
            places.append((node, key))
            collect(value)

    collect(tree)
    if not places:
        return "nothing to change"
    node, key = draw.choice(places)
    how = draw.choice(("replace", "replace", "replace", "delete", "rename"))
    if how == "delete":
        del node[key]
    elif how == "rename" and isinstance(node, dict):
        node[draw.choice((f"{key}_", "x", ""))] = node.pop(key)
    else:
        node[key] = value = draw.choice(HOSTILE)
        return f"{key} = {value!r:.40}"
    return f"{how} {key}"


def break_json(path: Path, draw: Draw) -> str:
    text = path.read_text()
    how = draw.choice(("tree", "tree", "tree", "root", "deep", "twice", "comma"))
    if how == "root":
        path.write_text(json.dumps(value := draw.choice(HOSTILE)))
        return f"root is {value!r:.40}"
    if how == "deep":
        path.write_text("[" * 100_000 + "]" * 100_000)
        return "nested 100,000 times"
    if how == "twice":
        path.write_text(text.replace("{", '{"model_type": "x", ', 1))
        return "a key twice"
    if how == "comma":
        path.write_text(text.replace(",", "", 1))
        return "a comma missing"
    tree = json.loads(text)
    told = mutate(tree, draw)
    path.write_text(json.dumps(tree))
    return told


ALIASES = [f"{name}: &{name} [{', '.join([f'*{below}'] * 8)}]\n" for below, name in itertools.pairwise("abcdefghij")]
YAML_TEXTS = (
    "a: &a [x, x, x, x, x, x, x, x]\n" + "".join(ALIASES),
    "<<: *nothing\n",
    "--- 1\n--- 2\n",
    "\tdata: 1\n",
    "- 1\n- 2\n",
    "data: {resolution: 32, resolution: 64}\n",
    "? [a, b]\n: 1\n",
    "!!python/object/apply:os.system ['true']\n",
    "data: [" * 3000,
    "{" * 3000,
    "data: !!binary aGVsbG8=\n",
    "1: 2\n",
    "null: 1\n",
    "data:\n  resolution: 1:04\n",
)


def break_yaml(path: Path, draw: Draw) -> str:
    if draw.random() < 0.3:
        text = draw.choice(YAML_TEXTS)
        path.write_text(text)
        return f"{text[:40]!r}"
    if draw.random() < 0.1:
        path.write_bytes(path.read_text().encode(draw.choice(("utf-16", "utf-8-sig", "utf-32"))))
        return "another encoding"
    tree = yaml.safe_load(path.read_text())
    told = mutate(tree, draw)
    path.write_text(yaml.safe_dump(tree, allow_unicode=True))
    return told


def damaged_tensor(tensor: torch.Tensor, draw: Draw) -> tuple[str, torch.Tensor]:
    how = draw.choice(("float64", "float16", "int64", "bool", "nan", "inf", "longer", "flat", "one more axis", "none"))
    if how in ("nan", "inf"):
        broken = tensor.clone(memory_format=torch.contiguous_format).double()
        if not broken.numel():
            return how, broken
        broken.view(-1)[draw.randrange(broken.numel())] = float(how)
        return how, broken.to(tensor.dtype) if tensor.is_floating_point() else broken.float()
    if how in ("float64", "float16", "int64", "bool"):
        return how, tensor.nan_to_num().to(getattr(torch, how))
    if how == "longer":
        return how, torch.cat([tensor, tensor]) if tensor.dim() else tensor.repeat(2)
    if how == "flat":
        return how, tensor.flatten().repeat(2)
    return how, tensor[None] if how == "one more axis" else tensor.new_zeros(0)


def break_tensors(path: Path, draw: Draw) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    how = draw.choice(("damage", "damage", "drop", "rename", "add", "no metadata"))
    told = f"{how} {name}"
    if how == "damage":
        told, tensors[name] = damaged_tensor(tensors[name], draw)
        told = f"{name}: {told}"
    elif how == "drop":
        del tensors[name]
    elif how == "rename":
        tensors[f"{name}x"] = tensors.pop(name)
    elif how == "add":
        tensors["x"] = torch.zeros(3)
    else:
        metadata = None
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return told


def break_metadata(path: Path, draw: Draw) -> str:
    """Texts stored next to the tensors of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata() or {})
    tensors = load_file(path)
    key = draw.choice(sorted(metadata))
    try:
        tree = json.loads(metadata[key])
        if not isinstance(tree, (dict, list)):
            raise ValueError
        told = mutate(tree, draw)
        metadata[key] = json.dumps(tree)
    except ValueError:
        metadata[key] = told = draw.choice(("", "x", "-1", "[]", "{}", "1e9", "null", "9" * 50))
    if draw.random() < 0.2:
        del metadata[key]
        told = "missing"
    save_file(tensors, path, metadata)
    return f"{key}: {told}"


def break_pickle(path: Path, draw: Draw) -> str:
    """An entry of a pickled state, or a pickle that would run code."""

    class Runs:
        def __reduce__(self) -> tuple[Any, ...]:
            return (os.getcwd, ())

    state = torch.load(path, weights_only=True)
    if draw.random() < 0.1:
        torch.save({"state_dict": Runs()}, path)
        return "a pickle with a call"
    if draw.random() < 0.1:
        torch.save(draw.choice([*HOSTILE[:10], torch.zeros(3), [torch.zeros(1)]]), path)
        return "another root"
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key, value in node.items() if isinstance(node, dict) else ():
            places.append((node, key))
            collect(value)

    collect(state)
    node, key = draw.choice(places)
    if isinstance(node[key], torch.Tensor) and draw.random() < 0.7:
        told, node[key] = damaged_tensor(node[key], draw)
    elif draw.random() < 0.3:
        del node[key]
        told = "missing"
    else:
        node[key] = value = draw.choice(HOSTILE)
        told = f"= {value!r:.40}"
    torch.save(state, path)
    return f"{key}: {told}"


DAMAGES: dict[str, Damage] = {
    "flip": flip,
    "cut": cut,
    "zeros": zeros,
    "insert": insert,
    "foreign": foreign,
    "empty": empty,
    "directory": directory,
    "dangling": dangling,
    "missing": missing,
    "json": break_json,
    "yaml": break_yaml,
    "tensors": break_tensors,
    "metadata": break_metadata,
    "pickle": break_pickle,
}
ONLY_FOR = {"json": ".json", "yaml": ".yaml", "tensors": ".safetensors", "metadata": ".safetensors"}


# --- one case -----------------------------------------------------------------------------------------------


class Hang(BaseException):
    """A case that exceeded its time limit."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Verdict:
    """``fault`` is None where the case was met as it must be; ``outcome``: "refused", "harmless" or "other content"."""

    case: str
    outcome: str
    fault: str | None


def run_case(kind: Kind, whole: str, source: Path, target: Path, draw: Draw) -> Verdict:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    names = [name for name in DAMAGES if name in kind.damages]
    file = draw.choice(kind.files)
    fitting = [
        name
        for name in names
        if file.endswith(ONLY_FOR.get(name, "")) and (name != "pickle" or file.endswith((".pt", ".pth")))
    ]
    # Structural damage is rarer than its many ways deserve, if all names are alike.
    name = draw.choice([*fitting, *(name for name in fitting if name not in BYTES for _ in range(4))])
    told = DAMAGES[name](target / file, draw)
    case = f"{kind.name}/{file}: {name}: {told}"
    try:
        with time_limit(SECONDS_PER_CASE), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = digest(kind.read(target))
    except Hang:
        return Verdict(case, "hang", f"took longer than {SECONDS_PER_CASE} s")
    except REFUSALS as error:
        return Verdict(case, "refused", fault_of(error, target, file))
    except BaseException as error:
        return Verdict(case, "failed", f"{type(error).__name__}: {error}"[:300])
    if found == whole:
        return Verdict(case, "harmless", None)
    return Verdict(case, "other content", "read without a word" if kind.checksummed else None)


def fault_of(error: BaseException, target: Path, file: str) -> str | None:
    """The fault of a refusal: the file is not named, or it is not one line."""
    text = str(error)
    if "\n" in text.strip():
        return f"several lines: {text[:300]!r}"
    if target.name not in text or (file not in text and Path(file).stem not in text):
        return f"the file is not named: {type(error).__name__}: {text[:300]}"
    if "weights_only=False" in text:
        return f"advice to run what a file holds: {text[:300]}"
    return None


def run_cases(root: Path, seed: int, numbers: range) -> Iterator[Verdict]:
    logging.disable(logging.CRITICAL)
    all_kinds = kinds()
    whole = {kind.name: digest(kind.read(root / kind.name)) for kind in all_kinds}
    print("ready", flush=True)
    for number in numbers:
        draw = random.Random(f"{seed}-{number}")
        kind = draw.choice(all_kinds)
        yield run_case(kind, whole[kind.name], root / kind.name, root / f"damaged-{number}-{kind.name}", draw)
        shutil.rmtree(root / f"damaged-{number}-{kind.name}", ignore_errors=True)


# --- all cases ----------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="Damaged files, and what is said of them.")
    parser.add_argument("--cases", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one case, which is then shown with its error")
    parser.add_argument("--worker", nargs=3, metavar=("ROOT", "FIRST", "LAST"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    faulthandler.enable()
    torch.set_num_threads(1)
    if args.worker is not None:
        root, first, last = args.worker
        for number, verdict in enumerate(run_cases(Path(root), args.seed, range(int(first), int(last))), int(first)):
            print(json.dumps([number, verdict.case, verdict.outcome, verdict.fault]), flush=True)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        logging.disable(logging.CRITICAL)
        make_whole(root)
        if args.only is not None:
            for verdict in run_cases(root, args.seed, range(args.only, args.only + 1)):
                print(verdict)
            return 0
        outcomes: collections.Counter[str] = collections.Counter()
        faults = 0
        first = 0
        while first < args.cases:
            last = min(args.cases, first + CASES_PER_PROCESS)
            command = [sys.executable, __file__, "--seed", str(args.seed), "--worker", folder, str(first), str(last)]
            done = subprocess.run(command, capture_output=True, text=True)
            number = first - 1
            ready, *lines = done.stdout.splitlines() or [""]
            if ready != "ready":
                sys.exit(f"the whole files cannot be read:\n{done.stderr}")
            for line in lines:
                number, case, outcome, fault = json.loads(line)
                outcomes[outcome] += 1
                if fault is not None:
                    faults += 1
                    print(f"case {number}: {case}\n    {fault}", flush=True)
            if number + 1 < last:  # the process ended with the case after the last one it told of
                faults += 1
                outcomes["crashed"] += 1
                print(f"case {number + 1}: the process ended with {done.returncode}\n{done.stderr[-1500:]}", flush=True)
                number += 1
            first = number + 1
    print(f"{sum(outcomes.values())} cases: {dict(outcomes)}; {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
