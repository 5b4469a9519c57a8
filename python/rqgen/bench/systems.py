"""`rqgen bench systems`: priors of scales, of stacks of codes and of single codes, for images of the same size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console

from rqgen.config import check_finite, one_of
from rqgen.files import write_json
from rqgen.inference import PRECISIONS, Engine, SamplingParams, make_sampler
from rqgen.models import VAR, MultiScaleVQVAE, MultiScaleVQVAEConfig, Prior, RQTransformerConfig, VARConfig
from rqgen.models.transformer import TransformerConfig
from rqgen.quantizers import MultiScaleConfig, MultiScaleQuantizer
from rqgen.quantizers.multiscale import SCALES_256, SCALES_512
from rqgen.report import plot_systems
from rqgen.sampling import sampling_cost

from .machine import Peaks, check_runs, environment, floor_seconds, interleave, peak_bytes
from .sampling import CLASSES, CODE_DIM, random_prior, rqvae_decoder_ms
from .settings import SystemsBenchSettings

SCALE_CODE_DIM = 32
# As published.
RQ_DECODER_CHANNELS, SCALES_DECODER_CHANNELS = 128, 160


class Codes(NamedTuple):
    """Codes of an image in each system."""

    scales: tuple[int, ...]
    stacks: tuple[int, int, int]
    flat: tuple[int, int, int]


# Side of an image -> codes; each system's features have the published sizes.
CODES = {
    256: Codes(SCALES_256, (8, 8, 4), (16, 16, 1)),
    512: Codes(SCALES_512, (16, 16, 4), (32, 32, 1)),
}


class BenchedSystem(NamedTuple):
    """Prior to make, and the decoder to time with it."""

    config: Any
    make_prior: Callable[[Any, torch.device], Prior]
    decoder_ms: Callable[[SystemsBench, Any, int, torch.device], float | None]
    """Milliseconds per image of the decoder of the system's published layout, in batches."""
    layers: list[int]
    """Layers of each of the prior's stacks."""


@dataclass(kw_only=True)
class SystemsBench(SystemsBenchSettings):
    """The checked settings of a benchmark; image sides are those of `CODES`.

    Raises ValueError, which names the option, for a value that is out of range.
    """

    def __post_init__(self) -> None:
        check_finite(self)
        if self.image_side not in CODES:
            raise ValueError(f"--image-side: {one_of(CODES, self.image_side)}")
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise ValueError(f"--precision: {one_of(PRECISIONS, precision)}")
        if self.cfg_scale is not None and not self.cfg_scale > 0:
            raise ValueError(f"--cfg-scale: expected a number > 0, got {self.cfg_scale}")

    def systems(self) -> dict[str, BenchedSystem]:
        """Return the systems by name."""
        codes, layers = CODES[self.image_side], (self.spatial_layers, self.depth_layers)
        scales = VARConfig(
            quantizer=MultiScaleConfig(codebook_size=self.var_codebook_size, scales=list(codes.scales)),
            code_dim=SCALE_CODE_DIM,
            embed_dim=self.width,
            layers=sum(layers),
            heads=self.heads,
            num_classes=CLASSES,
        )
        stacks, flat = self._rq_config(codes.stacks, layers), self._rq_config(codes.flat, (sum(layers), 0))
        return {
            "VAR": BenchedSystem(scales, _random_var, _scales_decoder_ms, [sum(layers)]),
            "RQ-Transformer": BenchedSystem(stacks, random_prior, _stacks_decoder_ms, list(layers)),
            "flat": BenchedSystem(flat, random_prior, _stacks_decoder_ms, [sum(layers)]),
        }

    def _rq_config(self, shape: tuple[int, int, int], layers: tuple[int, int]) -> RQTransformerConfig:
        spatial, depth = (TransformerConfig(layers=count, heads=self.heads) for count in layers)
        return RQTransformerConfig(
            code_shape=shape,
            codebook_size=self.codebook_size,
            code_dim=CODE_DIM,
            embed_dim=self.width,
            spatial=spatial,
            depth=depth,
            condition="class",
            condition_vocab_size=CLASSES,
            condition_dropout=0.1,  # so that there is a null condition
        )


def run_systems_bench(bench: SystemsBench, out: Path, *, device: torch.device, console: Console) -> dict[str, Any]:
    """Measure, and write `out`/systems.json (after every batch size) and, at the end, `out`/systems.png. Return the
    content of the JSON file.

    Of every system: its codes, layers, parameters, steps, and the work that `sampling_cost` counts, per image of each
    batch size. Of every contender of a batch size, in turns: milliseconds per image of sampling codes, the lower bound
    (see `floor_seconds`), and the decoder's milliseconds per image.
    """
    check_runs(bench.batch_sizes, bench.precisions, bench.seconds)
    benched = bench.systems()  # refuses settings before the first measurement
    rates = Peaks(device).rates
    systems: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "environment": environment(device),
        "settings": asdict(bench),
        "peaks": rates.described(),
        "systems": systems,
        "cases": [],
    }
    out.mkdir(parents=True, exist_ok=True)
    priors = {name: system.make_prior(system.config, device) for name, system in benched.items()}
    for name, prior in priors.items():
        systems.append(_describe(name, prior, benched[name].layers, bench.batch_sizes))
    decoder_ms: dict[tuple[str, int], float | None] = {}
    for batch in bench.batch_sizes:
        contenders = [
            Contender(name, precision, cfg_scale)
            for name, prior in priors.items()
            for precision, cfg_scale in _ways(bench, prior)
        ]
        calls = [contender.prepared(priors[contender.system], batch, bench.use_graphs) for contender in contenders]
        # The first call of each on a GPU: a later one would not count memory kept from it.
        needed = [peak_bytes(call, device) for call in calls]
        times = interleave(calls, device, bench.seconds, warm_up=device.type != "cuda")
        for contender, time, peak in zip(contenders, times, needed, strict=True):
            system = benched[contender.system]
            decoded = contender.system, 1 if device.type == "cpu" else batch
            if decoded not in decoder_ms:
                decoder_ms[decoded] = (
                    system.decoder_ms(bench, system.config, decoded[1], device) if bench.decoder else None
                )
            ms, decoder = time.median / 1e6 / batch, decoder_ms[decoded]
            cost = sampling_cost(system.config, batch * (2 if contender.cfg_scale else 1))
            floor_ms = 1e3 * floor_seconds(rates, cost, contender.precision) / batch
            case = {
                **contender._asdict(),
                "batch": batch,
                "ar_ms_per_image": ms,
                "ar_ms_per_image_min_max": [ns / 1e6 / batch for ns in (time.least, time.most)],
                "rounds": len(time.samples),
                "floor_ms_per_image": floor_ms,
                "percent_of_floor": 100 * floor_ms / ms,
                "decoder_ms_per_image": decoder,
                "images_per_s": 1e3 / (ms + (decoder or 0.0)),
                "images_per_s_ar_only": 1e3 / ms,
                "peak_bytes": peak,
            }
            result["cases"].append(case)
            console.print(_line(case), soft_wrap=True)
        write_json(out / "systems.json", result)
    plot_systems(systems, result["cases"], out / "systems.png")
    return result


# --- contenders --------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """System with its precision and guidance."""

    system: str
    precision: str
    cfg_scale: float

    def prepared(self, prior: Prior, batch: int, use_graphs: bool) -> Callable[[], object]:
        """Return a function that samples the codes of `batch` images."""
        condition_ids = prior.condition_ids(torch.arange(batch, device=prior.device) % CLASSES, batch)
        sampler = make_sampler(prior, Engine(self.precision, use_graphs))
        params = SamplingParams(cfg_scale=self.cfg_scale).resolve(prior, condition_ids)
        return partial(sampler.sample, condition_ids, params)


def _ways(bench: SystemsBench, prior: Prior) -> list[tuple[str, float]]:
    """Return the precisions and guidance strengths of a system."""
    precisions = [name for name in bench.precisions if name in prior.precisions] or [prior.precisions[0]]
    first, *others = precisions
    guided = [] if bench.cfg_scale is None else [(first, bench.cfg_scale)]
    return [(first, 0.0), *guided, *((precision, 0.0) for precision in others)]


def _random_var(config: VARConfig, device: torch.device) -> VAR:
    torch.manual_seed(0)
    with torch.device(device):
        return VAR(config, MultiScaleQuantizer(config.quantizer, config.code_dim)).eval()


def _stacks_decoder_ms(
    bench: SystemsBench, config: RQTransformerConfig, batch: int, device: torch.device
) -> float | None:
    return rqvae_decoder_ms(
        config.code_shape,
        bench.image_side,
        batch,
        device,
        channels=RQ_DECODER_CHANNELS,
        codebook_size=config.codebook_size,
        budget=bench.seconds / 10,
    )


def _scales_decoder_ms(bench: SystemsBench, config: VARConfig, batch: int, device: torch.device) -> float | None:
    torch.manual_seed(0)
    side = CODES[bench.image_side].scales[-1]
    with torch.device(device):
        vae = MultiScaleVQVAE(
            MultiScaleVQVAEConfig(
                base_channels=SCALES_DECODER_CHANNELS,
                norm_groups=min(32, SCALES_DECODER_CHANNELS),
                channel_multipliers=[1, 1, 2, 2, 4][: (bench.image_side // side).bit_length()],
                z_channels=config.code_dim,
                quantizer=config.quantizer,
            )
        ).eval()
        latents = torch.randn(batch, config.code_dim, side, side)
    with torch.no_grad():
        (times,) = interleave([lambda: vae.decode_latents(latents)], device, bench.seconds / 10)
    return times.median / 1e6 / batch


# --- what is written ---------------------------------------------------------------------------------------


def _describe(name: str, prior: Prior, layers: list[int], batch_sizes: list[int]) -> dict[str, Any]:
    layout = prior.layout
    sizes = ["x".join(map(str, size)) if isinstance(size, list) else str(size) for size in layout.to_json()]
    # A step of the first of two stacks is a position, of the second one a code.
    steps = [layout.count // layout.levels, layout.count] if len(layers) > 1 else [len(prior.steps)]
    return {
        "name": name,
        "codes": ("x" if layout.kind == "stacks" else "+").join(sizes),
        "number_of_codes": layout.count,
        "codebook_size": layout.codebook_size,
        "layers": layers,
        "parameters": sum(parameter.numel() for parameter in prior.parameters() if parameter.requires_grad),
        "steps": steps,
        "counted_per_image": [
            {
                "batch": batch,
                **{
                    kind: sum(getattr(part, kind) for part in sampling_cost(prior.config, batch)) / batch
                    for kind in ("products", "attention", "weights", "states")
                },
            }
            for batch in batch_sizes
        ],
    }


def _line(case: dict[str, Any]) -> str:
    decoder = case["decoder_ms_per_image"]
    guided = f" cfg_scale {case['cfg_scale']:g}" if case["cfg_scale"] else ""
    return (
        f"{case['system']:>14}  batch {case['batch']:>3}  {case['precision']}{guided}: "
        f"{case['ar_ms_per_image']:.4g} ms per image ({case['percent_of_floor']:.0f} % of the floor)"
        f"{'' if decoder is None else f', decoder {decoder:.4g} ms'}, {case['images_per_s']:.4g} images/s"
    )
