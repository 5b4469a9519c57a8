"""Codes equal the float64 definition on the sets where a fast search goes wrong, at every level of this CPU.

The definition is slow, so it is computed once and every level, a process each, is held against it. As a script, this
file is that process: `python test_certified_codes.py FILE`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rqkernels as rqk

LEVELS = ["default", "avx2", "avx512"]
AVAILABLE = LEVELS[: LEVELS.index(rqk.info()["cpu_capability"]) + 1]

CHANNELS = [1, 8, 17, 32, 64, 128, 256, 512]
CODES = [1, 255, 256, 1024, 4096, 16384]
# Terms of the definition's sums that one set may cost: few rows where codes and channels are many.
TERMS = 1 << 21
# Codebooks from this size on: each meets three of the sets, and each set one or two of them.
LARGE = 1 << 21
# A packed codebook of more codes takes long to make.
MOST_FROZEN = 1024

Draw = Callable[[torch.Generator, int, int, int], tuple[Tensor, Tensor]]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def gaussian(g: torch.Generator, n: int, k: int, c: int) -> tuple[Tensor, Tensor]:
    return normal(g, n, c), normal(g, k, c) * torch.rand(k, 1, generator=g)


def clustered(g: torch.Generator, n: int, k: int, c: int) -> tuple[Tensor, Tensor]:
    """Clusters whose sizes and spreads follow a power law; codes and vectors from the same ones."""
    centres = normal(g, 40, c)
    rank = torch.arange(1, 41).float()

    def draw(count: int) -> Tensor:
        which = torch.multinomial(rank**-1.5, count, replacement=True, generator=g)
        return centres[which] + 0.3 * rank[which, None] ** -1.0 * normal(g, count, c)

    return draw(n), draw(k)


def image_patches(g: torch.Generator, n: int, k: int, c: int) -> tuple[Tensor, Tensor]:
    """Neighbouring pixels of a photograph, eight bits each: smooth, and full of exact ties."""
    from sklearn.datasets import load_sample_image

    pixels = torch.from_numpy(np.ascontiguousarray(load_sample_image("china.jpg")[..., 1])).reshape(-1).float() / 128

    def draw(count: int) -> Tensor:
        start = torch.randint(0, len(pixels) - c, (count, 1), generator=g)
        return pixels[start + torch.arange(c)] - 1

    return draw(n), draw(k)


def near_duplicates(g: torch.Generator, n: int, k: int, c: int) -> tuple[Tensor, Tensor]:
    few = normal(g, max(1, k // 50), c)
    codes = few[torch.randint(0, len(few), (k,), generator=g)] + 1e-6 * normal(g, k, c)
    return codes[torch.randint(0, k, (n,), generator=g)] + 1e-3 * normal(g, n, c), codes


def offset(size: float) -> Draw:
    return lambda g, n, k, c: (normal(g, n, c) + size, normal(g, k, c) + size)


def one_large_channel(g: torch.Generator, n: int, k: int, c: int) -> tuple[Tensor, Tensor]:
    x, e = normal(g, n, c), normal(g, k, c)
    x[:, c // 2] *= 100
    e[:, c // 2] *= 100
    return x, e


def several_large_channels(g: torch.Generator, n: int, k: int, c: int) -> tuple[Tensor, Tensor]:
    """Up to six channels of 5 to 1000 times the size of the others, around an offset; some rows lie far outside."""
    size = torch.ones(c)
    many = min(c, int(torch.randint(1, 7, (), generator=g)))
    size[torch.randperm(c, generator=g)[:many]] = 5 * 200 ** torch.rand(many, generator=g)
    middle = 3 * size * normal(g, c)
    x, e = middle + size * normal(g, n, c), middle + size * normal(g, k, c)
    x[::5] *= 100
    return x, e


def collapsed(g: torch.Generator, n: int, k: int, c: int) -> tuple[Tensor, Tensor]:
    """A collapsed codebook: nearly all codes are equal, a few live ones lie anywhere among them."""
    e = normal(g, 1, c).expand(k, c).clone()
    live = torch.randint(0, k, (5,), generator=g)
    e[live] = normal(g, 5, c)
    return normal(g, n, c), e


def duplicates(g: torch.Generator, n: int, k: int, c: int) -> tuple[Tensor, Tensor]:
    e = normal(g, k, c)
    return normal(g, n, c), e[torch.randint(0, max(1, k // 3), (k,), generator=g)]


SETS: dict[str, Draw] = {
    "gaussian": gaussian,
    "clustered": clustered,
    "image patches": image_patches,
    "near-duplicates": near_duplicates,
    "offset 0": offset(0),
    "offset 100": offset(100),
    "offset 1000": offset(1000),
    "one channel x100": one_large_channel,
    "several large channels": several_large_channels,
    "collapsed": collapsed,
    "duplicates": duplicates,
}


class Problem(NamedTuple):
    name: str
    x: Tensor
    codebooks: Tensor  # (K, C) or (D, K, C)
    depth: int
    codes: Tensor  # by the definition


def draw(name: str, seed: int, n: int, k: int, c: int, depth: int, shared: bool) -> tuple[Tensor, Tensor]:
    """Vectors of a set with one codebook of it, or with one for each depth."""
    generator = torch.Generator().manual_seed(seed)
    x, first = SETS[name](generator, n, k, c)
    if shared:
        return x, first
    return x, torch.stack([first, *(SETS[name](generator, 1, k, c)[1] for _ in range(1, depth))])


def problem(name: str, seed: int, k: int, c: int, depth: int, shared: bool) -> Problem:
    n = max(1, min(30, TERMS // (k * c * depth)))
    x, codebooks = draw(name, seed, n, k, c, depth, shared)
    codes = rqk.reference.residual_search(x, codebooks, depth).codes
    return Problem(f"{name}, N={n}, K={k}, C={c}, D={depth}, shared={shared}", x, codebooks, depth, codes)


def wrong(problems: list[Problem]) -> list[str]:
    """Problems whose codes differ from the definition: searched with a fresh, a cached and a packed codebook."""
    failed = []
    for name, x, codebooks, depth, codes in problems:
        ways = {f"call {i}": codebooks for i in (1, 2, 3)}
        if codebooks.dim() == 2 and codebooks.shape[0] <= MOST_FROZEN:
            ways["packed"] = rqk.PackedCodebook(codebooks)
        for way, searched in ways.items():
            found = rqk.residual_search(x, searched, depth).codes
            if not torch.equal(found, codes):
                failed.append(f"{name}, {way}: {(found != codes).any(1).sum()} of {len(x)} rows")
    return failed


@settings(max_examples=40, deadline=None, database=None)
@given(
    name=st.sampled_from(sorted(SETS)),
    k=st.integers(1, 400),
    c=st.integers(1, 70),
    depth=st.integers(1, 6),
    shared=st.booleans(),
    scale=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
)
def check_property(name: str, k: int, c: int, depth: int, shared: bool, scale: int, seed: int) -> None:
    """Any of the sets, of any size and scale."""
    x, codebooks = (tensor * 10.0**scale for tensor in draw(name, seed, 20, k, c, depth, shared))
    codes = rqk.reference.residual_search(x, codebooks, depth).codes
    assert not wrong([Problem(name, x, codebooks, depth, codes)])


def all_problems() -> Iterator[Problem]:
    """Every set in every number of channels and codes, then in every second depth."""
    large = [(k, c) for c in CHANNELS for k in CODES if k * c >= LARGE]
    assert 3 * len(large) >= len(SETS)
    for i, name in enumerate(SETS):
        for j, c in enumerate(CHANNELS):
            for k in CODES:
                if k * c >= LARGE and (i - 3 * large.index((k, c))) % len(SETS) > 2:
                    continue
                depth = 1 + (i + j) % 4 if k * c < 1 << 16 else 1
                yield problem(name, i, k, c, depth, shared=(i + j) % 3 > 0)
        for depth in range(1 + i % 2, 33, 2):
            yield problem(name, depth, 255, (17, 33, 64)[(depth + i) % 3], depth, shared=depth // 2 % 2 == 0)


@pytest.fixture(scope="module")
def problems(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of all problems."""
    path = tmp_path_factory.mktemp("problems") / "problems.pt"
    torch.save([tuple(one) for one in all_problems()], path)
    yield path
    path.unlink()  # some 250 MB, which pytest would keep


@pytest.mark.parametrize("level", AVAILABLE)
def test_codes_equal_the_definition(level: str, problems: Path) -> None:
    environment = {**os.environ, "RQK_CPU_CAPABILITY": level}
    run = subprocess.run(
        [sys.executable, __file__, problems], env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert run.stdout.split() == [level, "all", "right"]


if __name__ == "__main__":
    failures = wrong([Problem(*one) for one in torch.load(sys.argv[1], mmap=True)])
    if failures:
        sys.exit("\n".join(failures))
    check_property()
    print(rqk.info()["cpu_capability"], "all right")
