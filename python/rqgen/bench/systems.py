"""`rqgen bench systems`: scale by scale, stacks of codes, code by code: three priors for the same images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from rqgen.config import check_finite
from rqgen.files import write_json
from rqgen.models import VAR, MultiScaleVQVAE, MultiScaleVQVAEConfig, RQTransformer, RQTransformerConfig, VARConfig
from rqgen.models.sampler import PRECISIONS, make_sampler
from rqgen.models.transformer import TransformerConfig
from rqgen.quantizers import MultiScaleConfig, MultiScaleQuantizer
from rqgen.quantizers.multiscale import SCALES_256, SCALES_512
from rqgen.report import draw_systems
from rqgen.sampling import sampling_cost
from rqgen.sampling.draw import DrawSettings
from rqgen.sampling.scales import sample_scales

from .machine import Peaks, environment, floor_seconds, interleave, peak_bytes
from .sampling import CLASSES, CODE_DIM, random_prior, rqvae_decoder_ms

SCALE_CODE_DIM = 32
# As published.
RQ_DECODER_CHANNELS, SCALES_DECODER_CHANNELS = 128, 160


class Codes(NamedTuple):
    """What the systems make of an image."""

    scales: tuple[int, ...]
    stacks: tuple[int, int, int]
    flat: tuple[int, int, int]


# By the side of an image; each system's features have the published sizes.
CODES = {
    256: Codes(SCALES_256, (8, 8, 4), (16, 16, 1)),
    512: Codes(SCALES_512, (16, 16, 4), (32, 32, 1)),
}


@dataclass
class SystemsBench:
    """What is measured. Weights are random: speed does not depend on them.

    Attributes:
        image_side: see `CODES`.
        width, heads: of every transformer.
        spatial_layers, depth_layers: of the RQ-Transformer; the others have their sum in one stack.
        codebook_size, var_codebook_size: K of the RQ-Transformer and the flat prior, and of the VAR.
        batch_sizes: images drawn together.
        precisions: of the RQ-Transformer and the flat prior; a VAR is drawn from in float32.
        guidance: also time every system with this strength, in the first precision; None: no.
        decoder: also time the decoders of the published layouts.
        use_graphs: see `generate`.
        seconds: time for the rounds of one batch size, see `rqkernels._measure.interleave`.
    """

    image_side: int
    width: int
    heads: int
    spatial_layers: int
    depth_layers: int
    codebook_size: int
    var_codebook_size: int
    batch_sizes: list[int]
    precisions: list[str]
    guidance: float | None
    decoder: bool
    use_graphs: bool
    seconds: float

    def __post_init__(self) -> None:
        check_finite(self)
        if self.image_side not in CODES:
            raise ValueError(f"--image-side: expected one of {', '.join(map(str, CODES))}, got {self.image_side}")
        for precision in self.precisions:
            if precision not in PRECISIONS:
                raise ValueError(f"--precision: expected one of {', '.join(PRECISIONS)}, got '{precision}'")
        if self.guidance is not None and not self.guidance > 0:
            raise ValueError(f"--cfg: expected a number > 0, got {self.guidance}")

    def configs(self) -> dict[str, VARConfig | RQTransformerConfig]:
        """The systems by name."""
        codes, layers = CODES[self.image_side], (self.spatial_layers, self.depth_layers)
        scales = MultiScaleConfig(codebook_size=self.var_codebook_size, scales=list(codes.scales))
        return {
            "VAR": VARConfig(
                quantizer=scales,
                code_dim=SCALE_CODE_DIM,
                embed_dim=self.width,
                layers=sum(layers),
                heads=self.heads,
                num_classes=CLASSES,
            ),
            "RQ-Transformer": self._rq_config(codes.stacks, layers),
            "flat": self._rq_config(codes.flat, (sum(layers), 0)),
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
    """Measures, and writes `out`/systems.json (after every batch size) and, at the end, `out`/systems.png. Returns what
    the JSON holds.

    Of every system: its codes, layers, parameters, steps, and the work that `sampling_cost` counts, per image of each
    batch size. Of every contender of a batch size, in turns: milliseconds per image of drawing codes, the floor (see
    `floor_seconds`), and the decoder's milliseconds per image.
    """
    configs = bench.configs()  # settings that do not fit: known at once
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
    priors = {name: _random_prior(config, device) for name, config in configs.items()}
    for name, prior in priors.items():
        systems.append(_describe(name, prior, bench.batch_sizes))
    decoder_ms: dict[tuple[str, int], float | None] = {}
    for batch in bench.batch_sizes:
        contenders = [
            Contender(name, precision, guidance)
            for name, config in configs.items()
            for precision, guidance in _ways(bench, config)
        ]
        calls = [contender.prepared(priors[contender.system], batch, bench.use_graphs) for contender in contenders]
        # The first call of each on a GPU: what a later one keeps from it would not be seen.
        needed = [peak_bytes(call, device) for call in calls]
        times = interleave(calls, device, bench.seconds, warm_up=device.type != "cuda")
        for contender, time, peak in zip(contenders, times, needed, strict=True):
            config = configs[contender.system]
            decoded = contender.system, 1 if device.type == "cpu" else batch
            if decoded not in decoder_ms:
                decoder_ms[decoded] = _decoder_ms(bench, config, decoded[1], device) if bench.decoder else None
            ms, decoder = time.median / 1e6 / batch, decoder_ms[decoded]
            cost = sampling_cost(config, batch * (2 if contender.guidance else 1))
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
    draw_systems(systems, result["cases"], out / "systems.png")
    return result


# --- contenders --------------------------------------------------------------------------------------------


class Contender(NamedTuple):
    """A system, and how it is drawn from."""

    system: str
    precision: str
    guidance: float

    def prepared(self, prior: VAR | RQTransformer, batch: int, use_graphs: bool) -> Callable[[], object]:
        """Draws the codes of `batch` images when called."""
        condition_bl = prior.condition_ids(torch.arange(batch, device=prior.device) % CLASSES, batch)
        if isinstance(prior, VAR):
            return partial(_draw_scales, prior, condition_bl[:, 0], self.guidance)
        sampler, depth = make_sampler(prior, self.precision, use_graphs), prior.depth
        return partial(
            sampler.sample,
            condition_bl,
            condition_bl.new_empty(batch, 0, depth),
            temperature=[1.0] * depth,
            top_k=[None] * depth,
            top_p=[None] * depth,
            guidance=self.guidance,
            seed=0,
        )


def _ways(bench: SystemsBench, config: VARConfig | RQTransformerConfig) -> list[tuple[str, float]]:
    """Precisions and strengths of guidance that a system is drawn with."""
    first, *others = ["fp32"] if isinstance(config, VARConfig) else bench.precisions
    guided = [] if bench.guidance is None else [(first, bench.guidance)]
    return [(first, 0.0), *guided, *((precision, 0.0) for precision in others)]


@torch.no_grad()
def _draw_scales(prior: VAR, labels_b: Tensor, guidance: float) -> None:
    count = len(prior.scales)
    settings = DrawSettings([1.0] * count, [None] * count, [None] * count, guidance, seed=0)
    sample_scales(prior, labels_b, settings, first_image=0)


def _random_prior(config: VARConfig | RQTransformerConfig, device: torch.device) -> VAR | RQTransformer:
    if isinstance(config, RQTransformerConfig):
        return random_prior(config, device)
    torch.manual_seed(0)
    with torch.device(device):
        return VAR(config, MultiScaleQuantizer(config.quantizer, config.code_dim)).eval()


def _decoder_ms(
    bench: SystemsBench, config: VARConfig | RQTransformerConfig, batch: int, device: torch.device
) -> float | None:
    """Milliseconds per image of the decoder of the system's published layout."""
    budget = bench.seconds / 10
    if isinstance(config, RQTransformerConfig):
        channels, size = RQ_DECODER_CHANNELS, config.codebook_size
        shape = config.code_shape
        return rqvae_decoder_ms(
            shape, bench.image_side, batch, device, channels=channels, codebook_size=size, budget=budget
        )
    torch.manual_seed(0)
    height, width = config.quantizer.scales[-1]
    with torch.device(device):
        vae = MultiScaleVQVAE(
            MultiScaleVQVAEConfig(
                base_channels=SCALES_DECODER_CHANNELS,
                norm_groups=min(32, SCALES_DECODER_CHANNELS),
                channel_multipliers=[1, 1, 2, 2, 4][: (bench.image_side // height).bit_length()],
                z_channels=config.code_dim,
                quantizer=config.quantizer,
            )
        ).eval()
        latents = torch.randn(batch, config.code_dim, height, width)
    with torch.no_grad():
        (times,) = interleave([lambda: vae.decode_latents(latents)], device, budget)
    return times.median / 1e6 / batch


# --- what is written ---------------------------------------------------------------------------------------


def _describe(name: str, prior: VAR | RQTransformer, batch_sizes: list[int]) -> dict[str, Any]:
    config = prior.config
    if isinstance(config, VARConfig):
        tokens = config.quantizer.tokens
        codes = "+".join(f"{height}x{width}" for height, width in config.quantizer.scales)
        layers, steps, count, size = [config.layers], [len(tokens)], sum(tokens), config.quantizer.codebook_size
    else:
        height, width, depth = config.code_shape
        positions, count, size = height * width, height * width * depth, config.codebook_size
        codes, layers, steps = "x".join(map(str, config.code_shape)), [config.spatial.layers], [positions]
        if config.depth.layers:
            layers, steps = [*layers, config.depth.layers], [*steps, count]
    return {
        "name": name,
        "codes": codes,
        "number_of_codes": count,
        "codebook_size": size,
        "layers": layers,
        "parameters": sum(parameter.numel() for parameter in prior.parameters() if parameter.requires_grad),
        "steps": steps,
        "counted_per_image": [
            {
                "batch": batch,
                **{
                    kind: sum(getattr(part, kind) for part in sampling_cost(config, batch)) / batch
                    for kind in ("products", "attention", "weights", "states")
                },
            }
            for batch in batch_sizes
        ],
    }


def _line(case: dict[str, Any]) -> str:
    decoder = case["decoder_ms_per_image"]
    guided = f" guidance {case['guidance']:g}" if case["guidance"] else ""
    return (
        f"{case['system']:>14}  batch {case['batch']:>3}  {case['precision']}{guided}: "
        f"{case['ar_ms_per_image']:.4g} ms per image ({case['percent_of_floor']:.0f} % of the floor)"
        f"{'' if decoder is None else f', decoder {decoder:.4g} ms'}, {case['images_per_s']:.4g} images/s"
    )
