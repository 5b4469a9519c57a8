"""Settings of the benchmarks, which are also their options on the command line. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from rqgen.options import option


def parse_shape(text: str) -> tuple[int, int, int]:
    """Return the numbers of a text like 8x8x4."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"expected three numbers like 8x8x4, got '{text}'")
    height, width, depth = map(int, parts)
    return height, width, depth


@dataclass(kw_only=True)
class SamplingBenchSettings:
    """Settings of `rqgen bench sampling`. Weights are random: speed does not depend on them."""

    preset: str | None = None
    """Size of the prior: 90M, 350M, 480M, 800M or 1.4B; by default the next four options give it."""
    width: int = option(512, lowest=1, highest=2**16)
    """Width of the prior."""
    spatial_layers: int = option(12, lowest=0, highest=1024)
    """Layers of the spatial transformer; with one code per position the depth layers join them."""
    depth_layers: int = option(4, lowest=0, highest=1024)
    """Layers of the depth transformer."""
    heads: int = option(8, lowest=1, highest=2**16)
    """Heads of each attention layer."""
    shapes: list[tuple[int, int, int]] = option(
        [(8, 8, 4), (8, 8, 8), (8, 8, 16), (16, 16, 1)], name="--shape", metavar="HxWxD", parse=parse_shape
    )
    """Shape of an image's codes; may be repeated."""
    codebook_size: int = option(16384, lowest=1, highest=2**24)
    """Number of codes in the codebook."""
    batch_sizes: list[int] = option([1, 16, 64], name="--batch", lowest=1, highest=2**24)
    """Images sampled together; may be repeated."""
    precisions: list[str] = option(["fp32"], name="--precision")
    """Precision of our sampler: fp32, bf16 or int8; may be repeated."""
    published: bool = False
    """Also time the published formulation with the same weights, in each precision that PyTorch's modules have (fp32
    if int8 is the only one)."""
    flat: bool = False
    """Also time one transformer over all codes one by one, as the cost law has it."""
    top_k: int | None = option(None, lowest=1)
    """Sample among the k likeliest codes."""
    top_p: float | None = None
    """Sample among the likeliest codes of this total mass."""
    decoder_channels: int = option(128, lowest=0, highest=2**16)
    """Base channels of the decoder, 128 as published; 0: the decoder is not timed."""
    use_graphs: bool = option(True, name="--graphs/--no-graphs")
    """Replay CUDA graphs on a GPU."""
    seconds: float = option(20.0, lowest=0)
    """Time for the rounds of one shape and batch size."""


@dataclass(kw_only=True)
class SystemsBenchSettings:
    """Settings of `rqgen bench systems`. Weights are random: speed does not depend on them."""

    image_side: int = 256
    """Side of an image, 256 or 512: decides each system's codes."""
    width: int = option(512, lowest=1, highest=2**16)
    """Width of every transformer."""
    heads: int = option(8, lowest=1, highest=2**16)
    """Heads of each attention layer."""
    spatial_layers: int = option(12, lowest=0, highest=1024)
    """Layers of the RQ-Transformer's spatial transformer."""
    depth_layers: int = option(4, lowest=1, highest=1024)
    """Layers of its depth transformer; the other systems have all layers in one stack."""
    codebook_size: int = option(16384, lowest=1, highest=2**24)
    """Number of codes of the RQ-Transformer and the flat prior."""
    var_codebook_size: int = option(4096, lowest=1, highest=2**24)
    """Number of codes of the VAR."""
    batch_sizes: list[int] = option([1, 16], name="--batch", lowest=1, highest=2**24)
    """Images sampled together; may be repeated."""
    precisions: list[str] = option(["fp32"], name="--precision")
    """Precision of all systems but the VAR, which is sampled in fp32; may be repeated."""
    cfg_scale: float | None = None
    """Also time every system with guidance of this strength, in the first precision."""
    decoder: bool = False
    """Also time the decoders of the published layouts."""
    use_graphs: bool = option(True, name="--graphs/--no-graphs")
    """Replay CUDA graphs on a GPU."""
    seconds: float = option(60.0, lowest=0)
    """Time for the rounds of one batch size."""
