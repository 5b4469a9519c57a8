"""The CUDA kernel of drawing from logits, on the CPU, against the definition.

Both are float64 but for the integers that weights are rounded to; a uniform so near a boundary that it shows does not
come up among these.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rqkernels import reference

from .harness import Emulation, ragged_grid


def draw(
    emulation: Emulation,
    logits_nk: np.ndarray,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int = 7,
    offset: int = 0,
    stream: int = 0,
    streams: int = 1,
    on_device: bool = False,
) -> np.ndarray:
    (codes,) = emulation.run(
        "sample_logits",
        logits=logits_nk,
        temperature=temperature,
        top_k=logits_nk.shape[1] if top_k is None else top_k,
        top_p=top_p,
        seed=seed,
        offset=offset,
        stream=stream,
        streams=streams,
        on_device=on_device,
    )
    return codes


def check(emulation: Emulation, logits_nk: np.ndarray, **options: object) -> np.ndarray:
    """Compare the kernel's codes with the definition's, and return them."""
    codes = draw(emulation, logits_nk, **options)
    options.pop("on_device", None)
    expected = reference.sample_logits(torch.from_numpy(logits_nk), **{"seed": 7, **options})
    np.testing.assert_array_equal(codes, expected.numpy())
    return codes


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


SETTINGS = (
    dict(),
    dict(temperature=0),
    dict(top_k=1),
    dict(top_k=20),
    dict(top_p=0.8),
    dict(top_k=30, top_p=0.9, temperature=2.0),
)


@pytest.mark.parametrize(("n", "k"), ragged_grid(N=(0, 3), K=(1, 31, 32, 33, 257)))
def test_shapes(emulation: Emulation, n: int, k: int) -> None:
    # Each run of a sanitized build is a process of its own.
    for settings in SETTINGS if emulation.build == "plain" else SETTINGS[::5]:
        check(emulation, normal(n, k), **settings)


@pytest.mark.parametrize("k", [600, 3000])
def test_several_rounds_of_parts(emulation: Emulation, k: int) -> None:
    # 512 codes are 16 warps of 32: more take two rounds.
    for settings in (dict(), dict(top_k=k // 3), dict(top_p=0.9), dict(top_k=k // 2, top_p=0.7)):
        check(emulation, 2 * normal(2, k, seed=k), **settings)


@pytest.mark.parametrize("kind", ["equal", "integers", "both zeros", "forbidden", "huge", "denormal", "exponents"])
def test_hard_logits(emulation: Emulation, kind: str) -> None:
    x, generator = normal(2, 300, seed=1), np.random.default_rng(2)
    if kind == "equal":
        x[:] = -3.5
    elif kind == "integers":
        x = np.round(x)
    elif kind == "both zeros":
        x = np.where(x > 0, np.float32(0), np.float32(-0.0))
    elif kind == "forbidden":
        x[generator.random(x.shape) < 0.9] = -np.inf
        x[:, 150] = 1
    elif kind == "huge":
        x *= 1e37
    elif kind == "denormal":
        x *= 1e-42
    elif kind == "exponents":
        x = np.sign(x) * np.exp2(generator.integers(-140, 127, x.shape)).astype(np.float32)
    hard = (dict(top_k=290, temperature=1e-42, top_p=0.99), dict(temperature=1e30, top_p=0.5))
    for settings in (*SETTINGS, *hard) if emulation.build == "plain" else hard:
        check(emulation, x, **settings)


def test_cuts_among_equal_logits_are_exact(emulation: Emulation) -> None:
    rows = {"plain": 40, "asan": 5, "race": 5}[emulation.build]
    for settings, kept in ((dict(top_p=0.3), 3), (dict(top_k=4), 4), (dict(top_k=8, top_p=0.5), 4)):
        codes = check(emulation, np.full((rows, 10), 2, np.float32), **settings)
        assert codes.max() < kept
        assert emulation.build != "plain" or len(np.unique(codes)) == kept


def test_extreme_settings(emulation: Emulation) -> None:
    x = normal(3, 100, seed=3)
    for settings in (
        dict(temperature=1e-320, top_p=1 - 1e-16),
        dict(temperature=1e308, top_k=50),
        dict(top_p=1e-300),
        dict(top_k=2**62),
        dict(top_k=99, top_p=1 - 1e-16),
    ):
        check(emulation, x, **settings)


def test_counters(emulation: Emulation) -> None:
    x = normal(4, 70, seed=4)
    plain = check(emulation, x)
    counters = (dict(offset=2**32 - 3, stream=2**32 - 1), dict(seed=2**64 - 1), dict(offset=2**63 - 20))
    for options in counters if emulation.build == "plain" else counters[:1]:
        codes = check(emulation, x, **options)
        assert not np.array_equal(codes, plain)
        np.testing.assert_array_equal(draw(emulation, x, **options, on_device=True), codes)
    np.testing.assert_array_equal(check(emulation, x[2:], offset=2), plain[2:])
    assert not np.array_equal(check(emulation, x, streams=2), plain)


@pytest.mark.parametrize("bad", [np.nan, np.inf, "nothing"])
def test_rows_that_nothing_can_be_drawn_from(emulation: Emulation, bad: float | str) -> None:
    x = normal(6, 90, seed=5)
    for settings in (dict(), dict(temperature=0), dict(top_k=30, top_p=0.9)):
        expected = draw(emulation, x, **settings)
        broken = x.copy()
        # Two after one another, so that one block may meet both.
        if bad == "nothing":
            broken[2:4] = -np.inf
        else:
            broken[2, 0] = broken[3, 89] = bad
        expected[2:4] = -1
        np.testing.assert_array_equal(draw(emulation, broken, **settings), expected)
