"""Counter-based uniforms."""

from __future__ import annotations

import pytest
import torch

from rqkernels.reference import philox_uniform


@pytest.mark.parametrize(
    ("counter", "key", "word0"),
    # Known answers of the generator's authors (Random123, kat_vectors, philox4x32 10).
    [
        ((0, 0, 0, 0), (0, 0), 0x6627E8D5),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, 0x408F276D),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0), 0xD16CFE09),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, int], word0: int) -> None:
    row = counter[0] | counter[1] << 32
    row -= (row >> 63) << 64  # the same bits as a signed integer
    u = philox_uniform(torch.tensor(row), seed=key[0] | key[1] << 32, stream=counter[2], op_id=counter[3])
    assert u.item() == (word0 + 0.5) * 2**-32


def test_uniform_and_different_in_every_argument() -> None:
    rows = torch.arange(100_000)
    u = philox_uniform(rows, seed=1, stream=2, op_id=3)
    assert u.min() > 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.005 and abs(u.var() - 1 / 12) < 0.002
    for other in ({"seed": 2}, {"stream": 3}, {"op_id": 4}, {"seed": 1 + 2**32}):
        v = philox_uniform(rows, **{"seed": 1, "stream": 2, "op_id": 3, **other})
        assert (u == v).float().mean() < 0.001
        assert abs(torch.corrcoef(torch.stack([u, v]))[0, 1]) < 0.02
    assert torch.equal(philox_uniform(rows[5000:5010], seed=1, stream=2, op_id=3), u[5000:5010])


@pytest.mark.parametrize("bad", [{"seed": -1}, {"seed": 2**64}, {"stream": -1}, {"stream": 2**32}, {"op_id": 2**32}])
def test_bad_arguments_are_named(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        philox_uniform(torch.arange(3), **{"seed": 0, "stream": 0, "op_id": 0, **bad})
    with pytest.raises(TypeError, match="rows must be int64"):
        philox_uniform(torch.arange(3.0), seed=0, stream=0, op_id=0)
