"""`rqgen bench sampling`: the paper's figure 4, next to this machine's lower bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from rqgen.checks import check_choices, check_integer
from rqgen.config import check_finite, one_of
from rqgen.files import write_json
from rqgen.inference import PRECISIONS, Engine, SamplingParams, cast_prior, make_sampler
from rqgen.inference.cuda_graph import CapturedSampler
from rqgen.models import RQVAE, RQTransformer, RQTransformerConfig, RQVAEConfig
from rqgen.models.transformer import TransformerConfig
from rqgen.quantizers import QuantizerConfig
from rqgen.report import plot_sampling_speed
from rqgen.sampling import sampling_cost

from .machine import Peaks, Rates, Times, check_runs, environment, floor_seconds, interleave, peak_bytes, time_call
from .published import PublishedSampling
from .settings import SamplingBenchSettings

CODE_DIM = 256
CLASSES = 1000
IMAGE_SIDE = 256
# Largest distance of a greedy code from the likeliest one, in standard deviations of its logits, due to rounding.
# Codes of other weights lie about four below.
GREEDY_GAP = {"fp32": 1e-3, "bf16": 0.5, "int8": 0.5}


@dataclass(kw_only=True)
class SamplingBench(SamplingBenchSettings):
    """The checked settings of a benchmark.

    Raises ValueError, which names the option, for a value that is out of range.
    """

    def __post_init__(self) -> None:
        check_finite(self)
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise ValueError(f"--precision: {one_of(PRECISIONS, precision)}")

    def prior_config(self, shape: tuple[int, int, int]) -> RQTransformerConfig:
        """Return the config of a prior like the published class-conditional ones; the number of layers is the same for
        all shapes."""
        settings: dict[str, Any] = {
            "code_shape": shape,
            "codebook_size": self.codebook_size,
            "code_dim": CODE_DIM,
            "condition": "class",
            "condition_vocab_size": CLASSES,
        }
        if self.preset is not None:
            # A depth other than one gives the preset's own split of its layers.
            config = RQTransformerConfig.preset(self.preset, **{**settings, "code_shape": (*shape[:2], 2)})
            width, heads = config.embed_dim, config.spatial.heads
            layers = config.spatial.layers, config.depth.layers
        else:
            width, heads, layers = self.width, self.heads, (self.spatial_layers, self.depth_layers)
        if shape[2] == 1:
            # With one code per position the depth stack has nothing to attend to.
            layers = sum(layers), 0
        spatial, depth = (TransformerConfig(layers=count, heads=heads) for count in layers)
        return RQTransformerConfig(embed_dim=width, spatial=spatial, depth=depth, **settings)


def run_sampling_bench(bench: SamplingBench, out: Path, *, device: torch.device, console: Console) -> dict[str, Any]:
    """Measure, and write `out`/sampling.json and `out`/sampling.png after every shape and batch size. Return the
    content of the JSON file.

    Of every contender: milliseconds per image of sampling codes (AR) in batches, interleaved with the other contenders
    of its shape and batch size; the lower bound, max(bytes / copy bandwidth, operations / matmul rate) of the two
    stacks one after the other (see `sampling_cost`; weights count in the precision's size); the decoder's milliseconds
    per image; on a GPU the bytes of its weights and of what its first call of that batch size allocates, with keys and
    values. A time may be below the bound if weights or states stay in a cache between steps. A run that does not fit
    into a GPU's memory is named under "out_of_memory", and has no case.

    Raises:
        TypeError, ValueError: settings that cannot be measured.
        RuntimeError: a contender whose greedy codes are not those of its weights.
    """
    check_runs(bench.batch_sizes, bench.precisions, bench.seconds)
    check_choices(bench.shapes, "--shape")
    for shape in bench.shapes:
        if len(shape) != 3:
            raise ValueError(f"--shape: expected (h, w, D), got {shape}")
        for size in shape:
            check_integer(size, "--shape", 1)
    # Here, so that settings are refused before the first measurement.
    configs = {shape: bench.prior_config(shape) for shape in bench.shapes}
    rates = Peaks(device).rates
    result: dict[str, Any] = {
        "environment": environment(device),
        "settings": asdict(bench),
        "peaks": rates.described(),
        "cases": [],
        "out_of_memory": [],
        "cost_law": [],
    }
    out.mkdir(parents=True, exist_ok=True)
    for config in configs.values():
        # A call for each shape and batch size: nothing of one stays in memory for the next.
        _run_shape(bench, config, rates, result, out, device=device, console=console)
    return result


def _run_shape(
    bench: SamplingBench,
    config: RQTransformerConfig,
    rates: Rates,
    result: dict[str, Any],
    out: Path,
    *,
    device: torch.device,
    console: Console,
) -> None:
    shape = config.code_shape
    prior = random_prior(config, device)
    result["cost_law"].append(law := _cost_law(bench, shape))
    agreement = {
        (contender.name, contender.precision): _check_greedy(contender, prior)
        for contender in _contenders(bench, prior)
    }
    decoder_ms: dict[int, float | None] = {}
    for batch in bench.batch_sizes:
        decoded = 1 if device.type == "cpu" else batch
        if decoded not in decoder_ms:
            decoder_ms[decoded] = rqvae_decoder_ms(
                shape,
                IMAGE_SIDE,
                decoded,
                device,
                channels=bench.decoder_channels,
                codebook_size=bench.codebook_size,
                budget=bench.seconds / 10,
            )
        cases, missing = _measure(bench, prior, batch, decoder_ms[decoded], rates)
        for case in cases:
            case["greedy_agreement"] = agreement[case["contender"], case["precision"]]
            result["cases"].append(case)
            console.print(_line(case))
        for name, precision in missing:
            result["out_of_memory"].append(
                {"shape": list(shape), "batch": batch, "contender": name, "precision": precision}
            )
            console.print(f"{_name(shape)}  batch {batch:>3}  {name} {precision}: out of memory")
        _write(result, out)
    if bench.flat and shape[2] > 1:
        law["measured"] = _measure_flat(bench, prior, device)
        _write(result, out)


def _measure(
    bench: SamplingBench, prior: RQTransformer, batch: int, decoder_ms: float | None, rates: Rates
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """Return the measurements of each contender, and names and precisions of those that did not fit into memory."""
    condition_bl, device = _conditions(prior, batch), prior.device
    waiting, fitting, missing = _contenders(bench, prior), [], []
    while waiting:
        contender = waiting.pop(0)
        call = partial(contender.sample, condition_bl, bench.top_k, bench.top_p)
        try:
            fitting.append((contender, call, peak_bytes(call, device)))
        except torch.OutOfMemoryError:
            missing.append((contender.name, contender.precision))
        del contender, call  # frees the memory of a contender that does not fit
    # On a GPU the first call, for the memory, was the warm-up.
    times = interleave([call for _, call, _ in fitting], device, bench.seconds, warm_up=device.type != "cuda")
    return [
        {**_case(prior.config, contender, batch, time, decoder_ms, rates), "peak_bytes": peak}
        for (contender, _, peak), time in zip(fitting, times, strict=True)
    ], missing


# --- contenders --------------------------------------------------------------------------------------------


@dataclass
class Contender:
    """A way to sample: `sample(condition_bl, top_k, top_p)` returns codes (B, T, D).

    Attributes:
        weight_bytes: bytes of the weights on a GPU; None on a CPU.
    """

    name: str
    precision: str
    prepare_ms: float
    weight_bytes: int | None
    sample: Callable[[Tensor, int | None, float | None], Tensor]


def _contenders(bench: SamplingBench, prior: RQTransformer) -> list[Contender]:
    published = [precision for precision in bench.precisions if precision != "int8"] or ["fp32"]
    return [
        *(_ours(bench, prior, precision) for precision in bench.precisions),
        *(_published(prior, precision) for precision in published if bench.published),
    ]


def _ours(bench: SamplingBench, prior: RQTransformer, precision: str) -> Contender:
    made, engine = [], Engine(precision, bench.use_graphs)
    prepare_ns, _ = time_call(lambda: made.append(make_sampler(prior, engine)), prior.device)
    (sampler,) = made

    def sample(condition_bl: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
        params = SamplingParams(top_k=top_k, top_p=top_p).resolve(prior, condition_bl)
        codes = sampler.sample(condition_bl, params).codes
        return prior.layout.flatten(codes).unflatten(1, (prior.positions, prior.depth))

    weights = _weight_bytes(sampler.prior) if isinstance(sampler, CapturedSampler) else None
    return Contender("rqgen", precision, prepare_ns / 1e6, weights, sample)


def _published(prior: RQTransformer, precision: str) -> Contender:
    """Return the published formulation. At "bf16" all of it is bfloat16; the published code converts float32 weights by
    autocast at every call."""
    cast = cast_prior(prior, precision)
    sampling = PublishedSampling(cast)

    def sample(condition_bl: Tensor, top_k: int | None, top_p: float | None) -> Tensor:
        return sampling.sample(condition_bl, top_k=top_k, top_p=top_p)

    weights = _weight_bytes(cast) if prior.device.type == "cuda" else None
    return Contender("published formulation", precision, 0.0, weights, sample)


def _weight_bytes(prior: RQTransformer) -> int:
    return sum(tensor.nbytes for tensor in (*prior.parameters(), *prior.buffers()))


@torch.no_grad()
def _check_greedy(contender: Contender, prior: RQTransformer) -> float:
    """Return the share of greedy codes that are the likeliest, given the codes before, in one float32 pass over the
    map.

    Raises:
        RuntimeError: one lies further below the likeliest than rounding explains.
    """
    condition_bl = _conditions(prior, 1)
    codes = contender.sample(condition_bl, 1, None).view(1, *prior.config.code_shape)
    logits = prior(codes, condition_bl).logits
    gaps = (logits.amax(-1) - logits.gather(-1, codes[..., None])[..., 0]) / logits.std(-1)
    if not bool((gaps <= GREEDY_GAP[contender.precision]).all()):
        raise RuntimeError(
            f"greedy codes of '{contender.name}' in {contender.precision} are not those of its weights: "
            f"{gaps.max():.2g} standard deviations below the likeliest"
        )
    return (gaps == 0).double().mean().item()


def _conditions(prior: RQTransformer, batch: int) -> Tensor:
    return prior.condition_ids(torch.arange(batch, device=prior.device) % CLASSES, batch)


def random_prior(config: RQTransformerConfig, device: torch.device) -> RQTransformer:
    torch.manual_seed(0)
    with torch.device(device):
        return RQTransformer(config, torch.randn(config.codebook_size, CODE_DIM)).eval()


# --- the decoder -------------------------------------------------------------------------------------------


def rqvae_decoder_ms(
    shape: tuple[int, int, int],
    side: int,
    batch: int,
    device: torch.device,
    *,
    channels: int,
    codebook_size: int,
    budget: float,
) -> float | None:
    """Return milliseconds per image of the decoder of the published layout for images of side x side; None without
    channels, if there is no such layout for the shape, and if it does not fit into memory."""
    if not channels:
        return None
    height, width, depth = shape
    if height != width or side % height or (side // height).bit_count() != 1:
        return None
    # Published: a level per factor of two, (1, 1, 2, 2, 4, 4) down to 8 x 8, and one less down to 16 x 16.
    multipliers = [1, 1, 2, 2, 4, 4, 4, 4, 4][: (side // height).bit_length()]
    torch.manual_seed(0)
    with torch.device(device):
        vae = RQVAE(
            RQVAEConfig(
                resolution=side,
                base_channels=channels,
                norm_groups=min(32, channels),
                channel_multipliers=multipliers,
                attention_resolutions=[height],
                code_shape=list(shape),
                quantizer=QuantizerConfig(codebook_size=codebook_size, depth=depth),
            )
        ).eval()
        codes = torch.randint(codebook_size, (batch, height, width, depth))
    try:
        with torch.no_grad():
            (times,) = interleave([lambda: vae.decode(codes)], device, budget)
    except torch.OutOfMemoryError:
        return None
    return times.median / 1e6 / batch


# --- what is written ---------------------------------------------------------------------------------------


def _case(
    config: RQTransformerConfig,
    contender: Contender,
    batch: int,
    times: Times,
    decoder_ms: float | None,
    rates: Rates,
) -> dict[str, Any]:
    ar_ms = times.median / 1e6 / batch
    floor_ms = 1e3 * floor_seconds(rates, sampling_cost(config, batch), contender.precision) / batch
    return {
        "shape": list(config.code_shape),
        "layers": [config.spatial.layers, config.depth.layers],
        "batch": batch,
        "contender": contender.name,
        "precision": contender.precision,
        "ar_ms_per_image": ar_ms,
        "ar_ms_per_image_min_max": [ns / 1e6 / batch for ns in (times.least, times.most)],
        "rounds": len(times.samples),
        "prepare_ms": contender.prepare_ms,
        "weight_bytes": contender.weight_bytes,
        "floor_ms_per_image": floor_ms,
        "percent_of_floor": 100 * floor_ms / ar_ms,
        "decoder_ms_per_image": decoder_ms,
        "images_per_s": 1e3 / (ar_ms + (decoder_ms or 0.0)),
        "images_per_s_ar_only": 1e3 / ar_ms,
    }


def _cost_law(bench: SamplingBench, shape: tuple[int, int, int]) -> dict[str, Any]:
    """Return the counted operations per image, and those of N_s + N_d layers over all T * D codes one by one."""
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
    """Return the time per image of sampling codes by the stacked prior and by the flat one, at the largest batch
    size."""
    height, width, depth = prior.config.code_shape
    flat = random_prior(bench.prior_config(_flat((height, width, depth))), device)
    batch, precision = max(bench.batch_sizes), bench.precisions[0]
    calls = [
        partial(_ours(bench, model, precision).sample, _conditions(model, batch), bench.top_k, bench.top_p)
        for model in (prior, flat)
    ]
    stacked_ms, flat_ms = (times.median / 1e6 / batch for times in interleave(calls, device, bench.seconds))
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
        f"{_name(case['shape'])}  batch {case['batch']:>3}  {case['contender']} {case['precision']}: "
        f"AR {case['ar_ms_per_image']:.4g} ms per image ({case['percent_of_floor']:.0f} % of the floor)"
        f"{'' if decoder is None else f', decoder {decoder:.4g} ms'}, {case['images_per_s']:.4g} images/s"
    )


def _name(shape: Sequence[int]) -> str:
    return f"{'x'.join(map(str, shape)):>8}"


def _write(result: dict[str, Any], out: Path) -> None:
    write_json(out / "sampling.json", result)
    if result["cases"]:
        plot_sampling_speed(result["cases"], out / "sampling.png")
