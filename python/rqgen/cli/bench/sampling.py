"""`rqgen bench sampling`: the paper's figure 4, beside the least time this machine could take."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from rqgen.models import RQVAE, RQTransformer, RQTransformerConfig, RQVAEConfig
from rqgen.models.sampler import PRECISIONS, make_sampler
from rqgen.models.transformer import TransformerConfig
from rqgen.quantizers import QuantizerConfig
from rqgen.report import draw_sampling_speed
from rqgen.sampling import sampling_cost

from .machine import (
    Peaks,
    describe_machine,
    interleaved_seconds,
    measure_peaks,
    peak_bytes,
    seconds,
)
from .published import PublishedSampling

CODE_DIM = 256
CLASSES = 1000
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}
# Keys and values stay float32 where weights are int8, bfloat16 where they are.
STATE_BYTES = {"fp32": 4, "bf16": 2, "int8": 4}
IMAGE_SIDE = 256


@dataclass
class SamplingBench:
    """What is measured. Weights are random: speed does not depend on them.

    Attributes:
        shapes: (h, w, D) of the code maps.
        preset: size of the prior, by the name of a preset; None: the next four fields give it.
        width, spatial_layers, depth_layers, heads: with one code per position the depth layers join the others.
        codebook_size: K.
        batch_sizes: images drawn together.
        precisions: of our sampler.
        published: also time the published formulation with the same weights (float32).
        top_k, top_p: for both.
        flat: also time a transformer over all T * D codes one by one, as the cost law has it.
        decoder_channels: base channels of the RQ-VAE decoder (128 as published); 0: none is timed.
        use_graphs: see `generate`.
        seconds: time for the rounds of one shape and batch size (two rounds at least).
    """

    shapes: list[tuple[int, int, int]]
    preset: str | None
    width: int
    spatial_layers: int
    depth_layers: int
    heads: int
    codebook_size: int
    batch_sizes: list[int]
    precisions: list[str]
    published: bool
    top_k: int | None
    top_p: float | None
    flat: bool
    decoder_channels: int
    use_graphs: bool
    seconds: float

    def __post_init__(self) -> None:
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise ValueError(f"--precision: expected one of {', '.join(PRECISIONS)}, got '{precision}'")

    def prior_config(self, shape: tuple[int, int, int]) -> RQTransformerConfig:
        """As the published class-conditional priors; the same number of layers whatever the shape."""
        settings: dict[str, Any] = {
            "code_shape": shape,
            "codebook_size": self.codebook_size,
            "code_dim": CODE_DIM,
            "condition": "class",
            "condition_vocab_size": CLASSES,
        }
        if self.preset is not None:
            # Of any depth but one: the preset's own split of its layers.
            config = RQTransformerConfig.preset(self.preset, **{**settings, "code_shape": (*shape[:2], 2)})
            width, heads = config.embed_dim, config.spatial.heads
            layers = config.spatial.layers, config.depth.layers
        else:
            width, heads, layers = self.width, self.heads, (self.spatial_layers, self.depth_layers)
        if shape[2] == 1:
            # One code per position leaves the depth stack nothing to attend to.
            layers = sum(layers), 0
        spatial, depth = (TransformerConfig(layers=count, heads=heads) for count in layers)
        return RQTransformerConfig(embed_dim=width, spatial=spatial, depth=depth, **settings)


def parse_shape(text: str) -> tuple[int, int, int]:
    """The numbers of a text like 8x8x4."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--shape: expected three numbers like 8x8x4, got '{text}'")
    height, width, depth = map(int, parts)
    return height, width, depth


def run_sampling_bench(bench: SamplingBench, out: Path, *, device: torch.device, console: Console) -> dict[str, Any]:
    """Measures, and writes `out`/sampling.json (after every shape and batch size) and, at the end, `out`/sampling.png.
    Returns what the JSON holds.

    Of every contender: milliseconds per image of drawing codes (AR) in batches, interleaved with the other
    contenders of its shape and batch size; the floor, max(bytes / copy bandwidth, operations / matmul rate) of the two
    stacks one after the other (see `sampling_cost`; weights count in the precision's size); the decoder's milliseconds
    per image. A floor can be undercut where weights or states stay in a cache between steps.

    Raises:
        RuntimeError: float32 contenders that do not draw the same greedy codes.
    """
    configs = {shape: bench.prior_config(shape) for shape in bench.shapes}  # settings that do not fit: known at once
    peaks = measure_peaks(device)
    result: dict[str, Any] = {
        "machine": describe_machine(device),
        "settings": asdict(bench),
        "peaks": asdict(peaks),
        "cases": [],
        "cost_law": [],
    }
    out.mkdir(parents=True, exist_ok=True)
    decoder_ms: dict[tuple[int, int, int, int], float | None] = {}
    for shape, config in configs.items():
        prior = _random_prior(config, device)
        law = _cost_law(bench, shape)
        result["cost_law"].append(law)
        for batch in bench.batch_sizes:
            contenders = _contenders(bench, prior)
            if batch == bench.batch_sizes[0]:
                _check_greedy(contenders, prior)
            decoded = 1 if device.type == "cpu" else batch
            decoder = (*shape, decoded)
            if decoder not in decoder_ms:
                decoder_ms[decoder] = _decoder_ms(bench, shape, decoded, device)
            condition_bl = _conditions(prior, batch)
            calls = [partial(contender.draw, condition_bl, bench.top_k, bench.top_p) for contender in contenders]
            times = interleaved_seconds(calls, device, bench.seconds)
            for contender, call, time in zip(contenders, calls, times, strict=True):
                case = _case(config, contender, batch, time, decoder_ms[decoder], peaks)
                case["peak_bytes"] = peak_bytes(call, device)
                result["cases"].append(case)
                console.print(_line(case))
            _write(result, out)
        if bench.flat and shape[2] > 1:
            law["measured"] = _measure_flat(bench, prior, device)
            _write(result, out)
    draw_sampling_speed(result["cases"], out / "sampling.png")
    return result


# --- contenders --------------------------------------------------------------------------------------------


@dataclass
class Contender:
    """One way to draw: `draw(condition_bl, top_k, top_p)` gives codes (B, T, D)."""

    name: str
    precision: str
    prepare_ms: float
    draw: Callable[[Tensor, int | None, float | None], Tensor]


def _contenders(bench: SamplingBench, prior: RQTransformer) -> list[Contender]:
    return [
        *(_ours(bench, prior, precision) for precision in bench.precisions),
        *([_published(prior)] if bench.published else []),
    ]


def _ours(bench: SamplingBench, prior: RQTransformer, precision: str) -> Contender:
    made = []
    prepare = seconds(lambda: made.append(make_sampler(prior, precision, bench.use_graphs)), prior.device)

    def draw(condition_bl: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
        known_btd = condition_bl.new_empty(len(condition_bl), 0, prior.depth)
        settings = {"temperature": [1.0], "top_k": [top_k], "top_p": [top_p]}
        return made[0].sample(condition_bl, known_btd, **{k: v * prior.depth for k, v in settings.items()}, seed=0)

    return Contender("rqgen", precision, 1e3 * prepare, draw)


def _published(prior: RQTransformer) -> Contender:
    sampling = PublishedSampling(prior)

    def draw(condition_bl: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
        return sampling.draw(condition_bl, top_k=top_k, top_p=top_p)

    return Contender("published formulation", "fp32", 0.0, draw)


def _check_greedy(contenders: list[Contender], prior: RQTransformer) -> None:
    """All that compute in float32 must draw the same likeliest codes."""
    exact = [contender for contender in contenders if contender.precision == "fp32"]
    codes = [contender.draw(_conditions(prior, 1), 1, None) for contender in exact]
    for contender, other in zip(exact, codes, strict=True):
        if not torch.equal(other, codes[0]):
            raise RuntimeError(f"greedy codes of '{contender.name}' are not those of '{exact[0].name}'")


def _conditions(prior: RQTransformer, batch: int) -> Tensor:
    return prior.condition_ids(torch.arange(batch, device=prior.device) % CLASSES, batch)


def _random_prior(config: RQTransformerConfig, device: torch.device) -> RQTransformer:
    torch.manual_seed(0)
    with torch.device(device):
        return RQTransformer(config, torch.randn(config.codebook_size, CODE_DIM)).eval()


# --- the decoder -------------------------------------------------------------------------------------------


def _decoder_ms(bench: SamplingBench, shape: tuple[int, int, int], batch: int, device: torch.device) -> float | None:
    """Milliseconds per image of the decoder of the published layout for images of 256 x 256."""
    if not bench.decoder_channels:
        return None
    height, width, depth = shape
    if height != width or IMAGE_SIDE % height or (IMAGE_SIDE // height).bit_count() != 1:
        return None
    # Published: a level per factor of two, (1, 1, 2, 2, 4, 4) down to 8 x 8, and one less down to 16 x 16.
    multipliers = [1, 1, 2, 2, 4, 4, 4, 4, 4][: (IMAGE_SIDE // height).bit_length()]
    torch.manual_seed(0)
    with torch.device(device):
        vae = RQVAE(
            RQVAEConfig(
                resolution=IMAGE_SIDE,
                base_channels=bench.decoder_channels,
                norm_groups=min(32, bench.decoder_channels),
                channel_multipliers=multipliers,
                attention_resolutions=[height],
                code_shape=list(shape),
                quantizer=QuantizerConfig(codebook_size=bench.codebook_size, depth=depth),
            )
        ).eval()
        codes = torch.randint(bench.codebook_size, (batch, height, width, depth))
    with torch.no_grad():
        (time,) = interleaved_seconds([lambda: vae.decode(codes)], device, bench.seconds / 10)
    return 1e3 * time["median"] / batch


# --- what is written ---------------------------------------------------------------------------------------


def _case(
    config: RQTransformerConfig,
    contender: Contender,
    batch: int,
    time: dict[str, Any],
    decoder_ms: float | None,
    peaks: Peaks,
) -> dict[str, Any]:
    ar_ms = 1e3 * time["median"] / batch
    floor_ms = _floor_ms(config, batch, contender.precision, peaks)
    return {
        "shape": list(config.code_shape),
        "layers": [config.spatial.layers, config.depth.layers],
        "batch": batch,
        "contender": contender.name,
        "precision": contender.precision,
        "ar_ms_per_image": ar_ms,
        "ar_ms_per_image_min_max": [1e3 * time[key] / batch for key in ("min", "max")],
        "rounds": time["rounds"],
        "prepare_ms": contender.prepare_ms,
        "floor_ms_per_image": floor_ms,
        "percent_of_floor": 100 * floor_ms / ar_ms,
        "decoder_ms_per_image": decoder_ms,
        "images_per_s": 1e3 / (ar_ms + (decoder_ms or 0.0)),
        "images_per_s_ar_only": 1e3 / ar_ms,
    }


def _floor_ms(config: RQTransformerConfig, batch: int, precision: str, peaks: Peaks) -> float:
    """Per image: the stacks take turns, so each has its own limit."""
    total = 0.0
    for stack in sampling_cost(config, batch):
        moved = stack.weights * BYTES[precision] + stack.states * STATE_BYTES[precision]
        operations = stack.products + stack.attention
        total += max(moved / peaks.copy_bytes_per_s, operations / peaks.operations_per_s[precision])
    return 1e3 * total / batch


def _cost_law(bench: SamplingBench, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Operations per image as counted, beside those of N_s + N_d layers over all T * D codes one by one."""
    law: dict[str, Any] = {"shape": list(shape)}
    for name, config in (("stacked", bench.prior_config(shape)), ("flat", bench.prior_config(_flat(shape)))):
        cost = sampling_cost(config, 1)
        law[name] = {
            "attention": sum(stack.attention for stack in cost),
            "products": sum(stack.products for stack in cost),
        }
    law["flat_over_stacked_attention"] = law["flat"]["attention"] / law["stacked"]["attention"]
    law["flat_over_stacked"] = sum(law["flat"].values()) / sum(law["stacked"].values())
    return law


def _measure_flat(bench: SamplingBench, prior: RQTransformer, device: torch.device) -> dict[str, Any]:
    """AR time per image of the stacked prior and of the flat one, at the largest batch size."""
    height, width, depth = prior.config.code_shape
    flat = _random_prior(bench.prior_config(_flat((height, width, depth))), device)
    batch, precision = max(bench.batch_sizes), bench.precisions[0]
    calls = [
        partial(_ours(bench, model, precision).draw, _conditions(model, batch), bench.top_k, bench.top_p)
        for model in (prior, flat)
    ]
    stacked_ms, flat_ms = (1e3 * time["median"] / batch for time in interleaved_seconds(calls, device, bench.seconds))
    return {
        "batch": batch,
        "precision": precision,
        "stacked_ar_ms_per_image": stacked_ms,
        "flat_ar_ms_per_image": flat_ms,
        "flat_over_stacked": flat_ms / stacked_ms,
    }


def _flat(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    height, width, depth = shape
    return height, width * depth, 1


def _line(case: dict[str, Any]) -> str:
    decoder = case["decoder_ms_per_image"]
    return (
        f"{'x'.join(map(str, case['shape'])):>8}  batch {case['batch']:>3}  {case['contender']} {case['precision']}: "
        f"AR {case['ar_ms_per_image']:.4g} ms per image ({case['percent_of_floor']:.0f} % of the floor)"
        f"{'' if decoder is None else f', decoder {decoder:.4g} ms'}, {case['images_per_s']:.4g} images/s"
    )


def _write(result: dict[str, Any], out: Path) -> None:
    partial_file = out / "sampling.json.partial"
    partial_file.write_text(json.dumps(result, indent=1) + "\n")
    os.replace(partial_file, out / "sampling.json")
