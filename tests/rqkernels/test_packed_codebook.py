"""A PackedCodebook finds the codes of its codebook, bit for bit, by every method of search."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

import rqkernels as rqk

Draw = Callable[[str, int, int, int, torch.device], tuple[torch.Tensor, torch.Tensor]]

INT8 = rqk.info()["cpu_capability"] == "avx512"


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit in value; NaN equals NaN."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


def assert_same_as_plain(
    x: torch.Tensor, codebook: torch.Tensor, depth: int, packed: rqk.PackedCodebook | None = None
) -> rqk.ResidualCodes:
    packed = rqk.PackedCodebook(codebook) if packed is None else packed
    ours = rqk.residual_search(x, packed, depth, return_residuals=True, return_statistics=True)
    plain = rqk.residual_search(x, codebook, depth, return_residuals=True, return_statistics=True)
    for a, b in zip((*ours[:4], *ours.statistics), (*plain[:4], *plain.statistics), strict=True):
        assert same(a, b)
    return ours


@pytest.mark.parametrize(("n", "k", "c"), [(129, 257, 64), (97, 1000, 65), (40, 257, 256), (129, 300, 17)])
def test_same_as_the_plain_codebook(draw: Draw, kind: str, n: int, k: int, c: int, device: torch.device) -> None:
    x, e = draw(kind, n, k, c, device)
    x[n // 2, c // 2] = torch.nan
    for depth in (1, 4, 32):
        assert_same_as_plain(x, e, depth)


@pytest.mark.parametrize("kind", ["gaussian", "power-law", "offset", "integers"])
def test_same_as_the_definition(draw: Draw, kind: str, device: torch.device) -> None:
    x, e = draw(kind, 60, 600, 64, device)
    ours = rqk.residual_search(x, rqk.PackedCodebook(e), 16)
    assert torch.equal(ours.codes, rqk.reference.residual_search(x, e, 16).codes)
    twin = rqk.reference.PackedCodebook(e)
    assert torch.equal(ours.codes, rqk.reference.residual_search(x, twin, 16).codes)


@pytest.mark.parametrize("n", [0, 1, 13, 700])
@pytest.mark.parametrize("k", [1, 127, 128, 129, 255, 256, 257, 1153])
def test_sizes_around_those_of_blocks_and_tiles(n: int, k: int, device: torch.device) -> None:
    assert_same_as_plain(torch.randn(n, 64, device=device), torch.randn(k, 64, device=device), 5)


def test_residuals_that_shrink_by_orders_of_magnitude(device: torch.device) -> None:
    # Codes of every size, as a trained codebook of many depths has them: the first scores do not resolve the last.
    e = torch.randn(2048, 64, device=device) * torch.logspace(0, -6, 2048, device=device)[:, None]
    e[0] = 0
    x = e[torch.randint(0, 2048, (200, 6), device=device)].sum(1)
    out = assert_same_as_plain(x, e, 16)
    assert out.residual_sq_norms[:, -1].median() < 1e-2 * out.residual_sq_norms[:, 0].median()


def test_residuals_that_grow(device: torch.device) -> None:
    # Every code leads away from zero, so that scores leave the range they were stored for.
    e = torch.randn(300, 64, device=device) + 30
    out = assert_same_as_plain(torch.randn(50, 64, device=device), e, 12)
    assert out.residual_sq_norms[:, -1].min() > 10 * out.residual_sq_norms[:, 0].max()


def test_a_residual_that_overflows(device: torch.device) -> None:
    x = torch.randn(40, 64, device=device)
    x[3] = 3e38
    x[4] = -3e38
    e = torch.randn(200, 64, device=device)
    assert_same_as_plain(x, e, 3)
    e[7] = 3e38
    assert_same_as_plain(x, e, 3)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("codebook_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_types_and_strides(x_dtype: torch.dtype, codebook_dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(3, 64, 20, device=device).to(x_dtype).transpose(1, 2)
    e = torch.randn(64, 400, device=device).to(codebook_dtype).T[::2]
    packed = rqk.PackedCodebook(e)
    assert packed.codebook.dtype == torch.float32 and torch.equal(packed.codebook, e.float())
    assert assert_same_as_plain(x, e, 4, packed).quantized.dtype == x_dtype


def test_codes_do_not_depend_on_batch_or_threads() -> None:
    x, e = torch.randn(1000, 64), torch.randn(700, 64)
    packed = rqk.PackedCodebook(e)
    whole = rqk.residual_search(x, packed, 6)
    for size in (1, 7, 333):
        parts = [rqk.residual_search(part, packed, 6) for part in x[: 3 * size].split(size)]
        assert torch.equal(torch.cat([p.codes for p in parts]), whole.codes[: 3 * size])
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            again = rqk.residual_search(x, rqk.PackedCodebook(e), 6)
            assert torch.equal(again.codes, whole.codes) and torch.equal(again.quantized, whole.quantized)
    finally:
        torch.set_num_threads(threads)


_DIGEST = """
import hashlib, torch, rqkernels as rqk
torch.manual_seed(1)
digest = hashlib.sha256()
for n, k, c in ((129, 257, 64), (50, 1000, 65), (5, 5, 1), (133, 640, 256)):
    for offset in (0.0, 500.0):
        x, e = torch.randn(n, c) + offset, torch.randn(k, c) + offset
        packed = rqk.PackedCodebook(e)
        ours, plain = rqk.residual_search(x, packed, 8), rqk.residual_search(x, e, 8)
        for a, b in zip(ours[:3], plain[:3]):
            assert torch.equal(a, b)
            digest.update(a.numpy().tobytes())
print(rqk.info()["cpu_capability"], packed.has_gram, digest.hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits() -> None:
    levels = ["default", "avx2", "avx512"]
    digests = set()
    for level in levels[: levels.index(rqk.info()["cpu_capability"]) + 1]:
        environment = {**os.environ, "RQK_CPU_CAPABILITY": level}
        command = [sys.executable, "-c", _DIGEST]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        used, has_gram, digest = result.stdout.split()
        assert used == level and has_gram == str(level == "avx512")
        digests.add(digest)
    assert len(digests) == 1


def test_the_original_may_change(device: torch.device) -> None:
    x, e = torch.randn(100, 64, device=device), torch.randn(300, 64, device=device)
    before = e.clone()
    packed = rqk.PackedCodebook(e)
    e.mul_(-3)
    assert_same_as_plain(x, before, 4, packed)


def test_the_copy_must_not_change(device: torch.device) -> None:
    packed = rqk.PackedCodebook(torch.randn(300, 64, device=device))
    packed.codebook[3] += 1
    with pytest.raises(ValueError, match="was changed in place"):
        rqk.residual_search(torch.randn(10, 64, device=device), packed, 2)


def test_pickled_and_copied_by_its_codebook(device: torch.device) -> None:
    x, e = torch.randn(100, 64, device=device), torch.randn(300, 64, device=device)
    packed = rqk.PackedCodebook(e)
    assert len(pickle.dumps(packed)) < 2 * e.nbytes
    for other in (pickle.loads(pickle.dumps(packed)), copy.deepcopy(packed)):
        assert other.codebook is not packed.codebook and other.nbytes == packed.nbytes
        assert_same_as_plain(x, e, 4, other)


def test_made_in_inference_mode_used_outside(device: torch.device) -> None:
    with torch.inference_mode():
        e = torch.randn(300, 64, device=device)
        packed = rqk.PackedCodebook(e)
        inside = rqk.residual_search(e[:50] + 1, packed, 3).codes
    assert torch.equal(rqk.residual_search(e[:50].clone() + 1, packed, 3).codes, inside)


def test_what_it_holds() -> None:
    k, c = 1024, 64
    e = torch.randn(k, c)
    packed = rqk.PackedCodebook(e)
    assert packed.has_gram == INT8
    added = packed.nbytes - e.nbytes
    assert (k * k if INT8 else 0) <= added <= (k * k if INT8 else 0) + 1.2 * e.nbytes + 64 * k
    assert f"{k} codes of {c} channels, cpu, {'Gram rows' if INT8 else 'packed'}" in repr(packed)


@pytest.mark.parametrize(
    ("k", "c", "scale"),
    [(18305, 64, 1), (1024, 31, 1), (127, 64, 1), (1024, 64, 1e-20), (1024, 64, 1e20), (1024, 64, 0)],
    ids=["too large", "few channels", "few codes", "tiny", "huge", "zero"],
)
def test_where_gram_rows_would_not_serve(k: int, c: int, scale: float) -> None:
    e = torch.randn(k, c) * scale
    packed = rqk.PackedCodebook(e)
    assert not packed.has_gram
    assert packed.nbytes < 2.5 * e.nbytes + 64 * k
    assert_same_as_plain(torch.randn(20, c) * scale, e, 3, packed)


_PEAK = """
import resource, torch, rqkernels as rqk
x, packed = torch.randn(65536, 64), rqk.PackedCodebook(torch.randn(2048, 64))
rqk.residual_search(x[:64], packed, 2)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
rqk.residual_search(x, packed, 2)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_nothing_of_rows_times_codes_is_allocated() -> None:
    result = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    extra_kib = int(result.stdout)
    assert extra_kib < 64 * 1024  # rows x codes would be 128 MiB even at one byte each


@pytest.mark.parametrize(
    ("codebook", "error", "message"),
    [
        (torch.zeros(8, 4, dtype=torch.float64), TypeError, "codebook must be float32, float16, bfloat16, got float64"),
        ([[1.0]], TypeError, "codebook must be a torch.Tensor, got list"),
        (torch.zeros(3, 8, 4), ValueError, r"codebook must be \(K, C\), not empty, got \(3, 8, 4\)"),
        (torch.zeros(0, 4), ValueError, r"codebook must be \(K, C\), not empty, got \(0, 4\)"),
        (torch.zeros(8, 4, device="meta"), ValueError, "codebook must be on cpu or cuda, got meta"),
        (torch.full((8, 4), torch.inf), ValueError, "PackedCodebook: codebook must be finite, got inf in code 0"),
    ],
)  # fmt: skip
def test_bad_codebooks_are_named(codebook: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rqk.PackedCodebook(codebook)


def test_the_search_checks_its_arguments_as_ever() -> None:
    packed = rqk.PackedCodebook(torch.zeros(8, 4))
    with pytest.raises(ValueError, match="depth is required with a shared codebook"):
        rqk.residual_search(torch.zeros(2, 4), packed)
    with pytest.raises(ValueError, match=r"x \(2, 5\) has 5 channels, codebooks \(8, 4\) have 4"):
        rqk.residual_search(torch.zeros(2, 5), packed, 2)
    with pytest.raises(TypeError, match="x must be float32"):
        rqk.residual_search(torch.zeros(2, 4).double(), packed, 2)


def test_memory_that_is_not_of_this_codebook_is_refused() -> None:
    op = torch.ops.rqkernels.residual_search
    x, e = torch.randn(4, 64), torch.randn(300, 64)
    packed = torch.ops.rqkernels.pack_codebook(e)
    for other in (packed[:-1], packed[64:], packed[:8], torch.zeros_like(packed)):
        with pytest.raises(ValueError, match="packed was not made of this codebook"):
            op(x, e, 2, False, other.clone())
    with pytest.raises(ValueError, match="packed was not made of this codebook"):
        op(x, e[:299], 2, False, packed)
    for wrong in (packed.float(), packed[None], packed[::2]):
        with pytest.raises(ValueError, match="packed must be what pack_codebook made"):
            op(x, e, 2, False, wrong)
    with pytest.raises(ValueError, match="packed must be what pack_codebook made"):
        op(x, e[None], None, False, packed)
    assert torch.ops.rqkernels.packed_has_gram(packed) == INT8
    assert not torch.ops.rqkernels.packed_has_gram(packed[:8])
    with pytest.raises(ValueError, match="packed must be what pack_codebook made"):
        torch.ops.rqkernels.packed_has_gram(packed.float())


def test_opcheck() -> None:
    e = torch.randn(300, 64)
    torch.library.opcheck(torch.ops.rqkernels.pack_codebook.default, (e,))
    packed = torch.ops.rqkernels.pack_codebook(e)
    torch.library.opcheck(torch.ops.rqkernels.residual_search.default, (torch.randn(7, 64), e, 3, True, packed))


def test_compiles_as_one_graph(device: torch.device) -> None:
    packed = rqk.PackedCodebook(torch.randn(300, 64, device=device))

    def quantize(x: torch.Tensor) -> torch.Tensor:
        out = rqk.residual_search(x * 2, packed, 3, return_statistics=True)
        return out.quantized + out.statistics[0].sum()

    x = torch.randn(50, 64, device=device)
    assert torch.equal(torch.compile(quantize, fullgraph=True)(x), quantize(x))
