"""Residual nearest-code search."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arguments import FLOAT_DTYPES, check_depth, check_flag
from .._library import call, check_tensor
from ..reference.residual_search import ResidualCodes, check_packable, check_shapes
from .code_statistics import statistics

_OP = "residual_search"


class PackedCodebook:
    """A shared codebook packed once, for encoding much data; takes the place of `codebooks` in `residual_search`.

    Codes, quantized vectors, norms, residuals and statistics are those of the plain codebook, bit for bit. A call
    neither packs the codebook nor compares it with a cached one. On a CPU with int8 instructions (level avx512), from
    32 channels and 128 codes on, depths also share scans: with the products of codes `G[k, j] = <e_k, e_j>` at one byte
    each (`has_gram`), adding a row of G turns the scores of one residual into those of the next, K operations instead
    of K*C. G takes about K^2 bytes (256 MiB at K = 16384) and K^2 C multiplications once, which at K = 16384, C = 256
    is amortised over some 10,000 rows of 16 depths, or 30,000 of 4. A search then holds the scores of 96 rows per
    thread, two bytes per code (3.2 MiB at K = 16384).

    If G would exceed 320 MiB (K > 18304), at other levels, and for codes of extreme size (no norm above 1e-10, or one
    above 1e10) the codebook is packed without G; on CUDA it is kept as it is. Both serve the ordinary search.

    The codebook is copied: changes to the original have no effect, and the copy must not be changed. It is pickled and
    copied as the plain codebook, and packed again for the machine it arrives on.

    Args:
        codebook: (K, C), float32, float16 or bfloat16, on cpu or cuda; kept in float32.

    Raises:
        TypeError: codebook of another dtype (float64 among them), or not a tensor.
        ValueError: a wrong shape, an empty codebook; on a CPU one that is not finite.
    """

    def __init__(self, codebook: Tensor) -> None:
        check_tensor("PackedCodebook", "codebook", codebook, FLOAT_DTYPES)
        check_packable("PackedCodebook", codebook)
        # A tensor made in inference mode could not be used outside it.
        with torch.inference_mode(False), torch.no_grad():
            self._codebook = codebook.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
            self._packed = None
            if codebook.device.type == "cpu":
                self._packed = call("PackedCodebook", torch.ops.rqkernels.pack_codebook, self._codebook)
        self._version = self._codebook._version

    @property
    def codebook(self) -> Tensor:
        """Codebook (K, C), float32, read-only."""
        return self._codebook

    @property
    def has_gram(self) -> bool:
        """True if the products of codes are stored."""
        return self._packed is not None and torch.ops.rqkernels.packed_has_gram(self._packed)

    @property
    def nbytes(self) -> int:
        """Bytes held: the copy of the codebook and its packed form."""
        return self._codebook.nbytes + (0 if self._packed is None else self._packed.nbytes)

    def _parts(self) -> tuple[Tensor, Tensor | None]:
        # Tensors of a compiled graph have no version.
        if not torch.compiler.is_compiling() and self._codebook._version != self._version:
            raise ValueError("residual_search: the codebook of a PackedCodebook was changed in place; make a new one")
        return self._codebook, self._packed

    def __reduce__(self) -> tuple[type[PackedCodebook], tuple[Tensor]]:
        return PackedCodebook, (self._codebook,)

    def __repr__(self) -> str:
        num_codes, channels = self._codebook.shape
        prepared = "Gram rows" if self.has_gram else "as it is" if self._packed is None else "packed"
        return (
            f"PackedCodebook({num_codes} codes of {channels} channels, {self._codebook.device}, {prepared}, "
            f"{self.nbytes / 2**20:.1f} MiB)"
        )


def residual_search(
    x: Tensor,
    codebooks: Tensor | PackedCodebook,
    depth: int | None = None,
    *,
    return_residuals: bool = False,
    return_statistics: bool = False,
) -> ResidualCodes:
    """Nearest codes of successive residuals, all depths in one call (Lee et al. 2022, equations 3-5).

        r_0 = x;   k_d = argmin_k |r_{d-1} - e_d(k)|^2;   r_d = r_{d-1} - e_d(k_d)

    Naively, for each depth: `k = torch.cdist(r, e).argmin(-1); r = r - e[k]`. Here no array of rows x codes is ever
    formed, and the codes are certified: for every finite row, `k_d` has the smallest float64 sum of
    `(float64(r_c) - float64(e_c))^2` on the values as given, the lowest index where sums are equal, and `r_d` is
    computed in float32. So codes are the same on every device, instruction set, thread count, batch size and position
    in the batch. `rqkernels.reference.residual_search` is the definition in plain PyTorch.

    Not differentiable: inputs are detached (a model adds the straight-through gradient). Autocast does not affect it.

    On a CPU the codebooks are packed for the scan, which takes as long as the search of a small batch. Codebooks that
    are seen twice are cached packed: the most recent 8 (or stacks of them), at most 96 MiB per process; larger ones are
    not cached. A cached one is found by comparing all of its contents, bit for bit, so that every change is noticed;
    codebooks that change from call to call are not copied. Any number of threads may search at once; a forked child
    starts with an empty cache.

    Args:
        x: (..., C), float32, float16 or bfloat16, any strides, on cpu or cuda. Searched as float32.
        codebooks: (K, C), shared by all depths, or (D, K, C), one per depth; float32, float16 or bfloat16 (need not
            be the dtype of x). Or a `PackedCodebook`: one shared by all depths, prepared for encoding much data.
        depth: D. Required with a shared codebook; otherwise None or the number of codebooks.
        return_residuals: also return r_0 .. r_{D-1}.
        return_statistics: also return counts and sums of the residuals by code (see `code_statistics`): over all
            depths together for a shared codebook, stacked by depth for one per depth. This materialises the residuals,
            rows * D * C floats, once; they are not part of the result unless requested.

    Returns:
        `ResidualCodes`: codes int64 (..., D); quantized (..., C) in the dtype of x, the float32 sum of the chosen codes
        in depth order, cast once; residual_sq_norms float32 (..., D), |r_d|^2 after each depth; residuals float32
        (..., D, C) or None; statistics or None.

        A row that is not finite gets code -1 at every depth, NaN quantized and NaN norms. A row whose residual
        overflows float32 gets -1 from that depth on (and NaN quantized).

    Raises:
        TypeError: x or codebooks of another dtype (float64 among them), depth not an integer, a flag not a bool.
        ValueError: shapes or devices that do not match, an empty codebook, a depth that contradicts the codebooks; on a
            CPU a codebook that is not finite (on CUDA its bad codes are never chosen).
    """
    check_tensor(_OP, "x", x, FLOAT_DTYPES)
    packed = None
    if isinstance(codebooks, PackedCodebook):
        codebooks, packed = codebooks._parts()
    check_tensor(_OP, "codebooks", codebooks, FLOAT_DTYPES)
    depth = check_depth(_OP, depth)
    return_residuals = check_flag(_OP, "return_residuals", return_residuals)
    return_statistics = check_flag(_OP, "return_statistics", return_statistics)
    codes, quantized, residual_sq_norms, residuals = call(
        _OP,
        torch.ops.rqkernels.residual_search,
        x.detach(),
        codebooks.detach(),
        depth,
        return_residuals or return_statistics,
        packed,
    )
    found = None
    if return_statistics:
        found = statistics(_OP, residuals, codes, codebooks.shape[-2], by_depth=codebooks.dim() == 3)
    return ResidualCodes(codes, quantized, residual_sq_norms, residuals if return_residuals else None, found)


def fake_codes(
    op: str, x: Tensor, codebooks: Tensor, depth: int | None, return_residuals: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return empty tensors of the shapes and dtypes that the operator of a residual search returns."""
    depth = check_shapes(op, x, codebooks, depth)
    leading, channels = x.shape[:-1], x.shape[-1]
    return (
        x.new_empty((*leading, depth), dtype=torch.int64),
        x.new_empty(x.shape),
        x.new_empty((*leading, depth), dtype=torch.float32),
        x.new_empty((*leading, depth, channels) if return_residuals else (0,), dtype=torch.float32),
    )


@torch.library.register_fake("rqkernels::residual_search")
def _fake(
    x: Tensor, codebooks: Tensor, depth: int | None, return_residuals: bool, packed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fake_codes(_OP, x, codebooks, depth, return_residuals)


@torch.library.register_fake("rqkernels::pack_codebook")
def _fake_pack(codebook: Tensor) -> Tensor:
    # The size depends on the instruction set; only the library knows it.
    return codebook.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)
