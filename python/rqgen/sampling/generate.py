"""Images from a prior and the tokenizer whose codes it models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from rqgen.models import RQVAE, VAR, MultiScaleVQVAE, RQTransformer
from rqgen.models.pretrained import eval_mode
from rqgen.models.sampler import make_sampler

from .arguments import (
    Prior,
    Tokenizer,
    check_condition,
    check_flag,
    check_integer,
    check_models,
    check_partial_codes,
    check_settings,
    number_of_images,
)
from .draw import DrawSettings, finished_images
from .scales import sample_scales

DEFAULT_BATCH_SIZE = 256


class GenerateOutput(NamedTuple):
    """What `generate` draws."""

    codes: Tensor | list[Tensor]
    """int64 (num, h, w, D); of a VAR a list of token maps (num, h_k, w_k), from coarse to fine."""
    images: Tensor
    """(num, channels, H, W), what the tokenizer decodes clamped to [-1, 1]."""


def generate(
    prior: Prior,
    vae: Tokenizer,
    condition: Tensor | Sequence[Any] | None = None,
    num: int | None = None,
    *,
    temperature: float | Sequence[float] = 1.0,
    top_k: int | Sequence[int | None] | None = None,
    top_p: float | Sequence[float | None] | None = None,
    cfg_scale: float | None = None,
    seed: int = 0,
    offset: int = 0,
    batch_size: int | None = None,
    partial_codes: Tensor | None = None,
    start_row: int = 0,
    smooth: bool = False,
    precision: str = "fp32",
    use_graphs: bool = True,
    progress: bool = False,
) -> GenerateOutput:
    """Draws codes from `prior` and decodes them with `vae`: an RQ-Transformer's position by position and depth by
    depth, a VAR's scale by scale.

    With guidance scale g the codes come from `(1 + g) * logits(condition) - g * logits(null condition)`
    (Ho and Salimans 2022, in the form where 0 is no guidance); of a VAR scale k = 0 .. K-1 has g k / (K - 1). Each code
    is drawn as by `rqkernels.sample_logits` with row = offset + the image's index and stream = t * D + d (VAR: the
    token's index, counted through all scales), so an image depends on its number, the seed, the model and its
    condition, not on how the batch is split. On the CPU it is the same to the last bit for every split, and an
    RQ-Transformer's for every number of threads (the decoder's part of that rests on oneDNN, see
    `rqgen.quantizers.Convolution`); the matrix products of a VAR are torch's, whose roundings may depend on the number
    of threads. There, and on CUDA between two batch sizes, a code may change where its uniform falls between two
    roundings; with and without graphs it is the same.

    Hooks, adapters (LoRA), parametrizations, replaced modules and overridden methods count. Packed weights and graphs
    do not know of them, so the modules of such a prior are called, which takes longer and is said once, by a warning.
    They see one position at a time; a prior that itself has hooks or overridden methods is called as a whole for every
    code (a VAR for every scale), and so is every prior while torch has hooks on all modules. Products are then torch's:
    a code may change with the split of the batch where its uniform falls between two roundings.

    Keys and values are kept, and never concatenated or moved. An RQ-Transformer's position is on the CPU one
    `rqkernels.transformer_step` and one `rqkernels.depth_decode`, over weights that are packed at the first call and
    kept while the prior lives and stays as it is (beside a copy of it, that tells; see `rqgen.models.packed`). On a GPU
    it is one CUDA graph. A VAR's scale is one pass over its tokens alone.

    Both models are used in eval mode, without gradients, and left in the mode they came in.

    Args:
        prior, vae: on the same device; the prior's codebooks must be the tokenizer's.
        condition: labels (num,) or (num, 1), or token ids (num, L), as the prior's config says; a tensor on any
            device, or a list. In a list a class may also be given by its name (of `prior.config.class_names`) or by its
            number as text; where names are numbers themselves, text is always a name. None: no condition, or the null
            condition of a prior that learned one.
        num: how many images, only without a condition (and not needed with `partial_codes`).
        temperature, top_k, top_p: one value, or one per depth (VAR: per scale); see
            `rqkernels.reference.sample_logits`.
        cfg_scale: g >= 0; None or 0 is off.
        seed: in [0, 2^64).
        offset: index of the first image, >= 0.
        batch_size: images drawn and decoded together; None is 256.
        partial_codes: (num, h, w, D): rows above `start_row` are kept, the others ignored.
        start_row: first row that is drawn, in [0, h). Both for an RQTransformer; `edit` keeps parts of images.
        smooth: for a VAR: mixtures of codes instead of codes, see `sample_scales`; smoother pictures, fewer details.
        precision: of an RQTransformer. "fp32"; "bf16": weights rounded to bfloat16 (on a GPU all arithmetic is, on the
            CPU products are float32); "int8", on the CPU alone: weights in 8 bits with a scale per output, activations
            in 16. See `rqgen.evaluation.evaluate_precision` for what that costs. Autocast has no say. Where modules are
            called "bf16" is all arithmetic on the CPU too, and "int8" is refused.
        use_graphs: capture the steps of a position in CUDA graphs and replay them, where the device has them; a prior
            on the CPU has none, and draws the same either way.
        progress: whether to show a progress bar.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range or against another one.
        ValueError: logits without a distribution (NaN, +inf, nothing but -inf), decoded images that are not finite.
    """
    check_models(prior, vae)
    if condition is not None:
        condition = check_condition(condition, prior)
    smooth, progress = check_flag(smooth, "smooth"), check_flag(progress, "progress")
    use_graphs = check_flag(use_graphs, "use_graphs")
    start_row = check_integer(
        start_row, "start_row", 0, None if isinstance(prior, VAR) else prior.config.code_shape[0] - 1
    )
    if isinstance(prior, VAR):
        if partial_codes is not None or start_row != 0:
            raise ValueError("partial_codes: a VAR draws whole token maps; rqgen.edit keeps parts of an image")
        if precision != "fp32":
            raise ValueError(f"precision: a VAR is sampled in 'fp32', got {precision!r}")
    else:
        if smooth:
            raise ValueError("smooth: only a VAR has it, and the prior is an RQTransformer")
        partial_codes = check_partial_codes(partial_codes, start_row, prior)
    num = number_of_images(condition, num, partial_codes)
    settings = check_settings(
        prior, condition, temperature=temperature, top_k=top_k, top_p=top_p, cfg_scale=cfg_scale, seed=seed
    )
    offset = check_integer(offset, "offset", 0, 2**62)
    batch_size = DEFAULT_BATCH_SIZE if batch_size is None else check_integer(batch_size, "batch_size", 1)
    condition_nl = prior.condition_ids(condition, num)
    with torch.no_grad(), eval_mode(prior, vae):
        drawer: _Drawer
        if isinstance(prior, VAR):
            drawer = _ScaleDrawer(prior, vae, condition_nl, settings, smooth)
        else:
            known_ntd = _known_stacks(prior, partial_codes, start_row, num)
            drawer = _StackDrawer(prior, vae, condition_nl, settings, known_ntd, precision, use_graphs)
        codes, images = [], []
        with progress_bar(progress, num, drawer.steps) as advance:
            for start in range(0, num, batch_size):
                some = slice(start, min(start + batch_size, num))
                drawn, decode = drawer.draw(some, offset + start, advance)
                codes.append(drawn)
                count = some.stop - some.start
                # Convolutions sum in an order that depends on the batch: on the CPU each image goes alone.
                step = 1 if prior.device.type == "cpu" else count
                for first in range(0, count, step):
                    images.append(finished_images(decode(slice(first, first + step)), offset + start + first))
    return GenerateOutput(drawer.joined(codes), torch.cat(images))


# From some of the images that were drawn together, counted from their first, to what the tokenizer makes of them.
_Decode = Callable[[slice], Tensor]


class _Drawer(Protocol):
    """Draws codes from a prior and decodes them: what the two systems have in common."""

    steps: int
    """Of one image, for the progress bar."""

    def draw(self, some: slice, first_image: int, advance: Callable[[int], None]) -> tuple[Any, _Decode]:
        """Codes of these images, the first of which has that number, and what decodes them."""
        ...

    def joined(self, codes: list[Any]) -> Any:
        """The codes of several draws as those of one."""
        ...


class _StackDrawer:
    """An RQ-Transformer, position by position and depth by depth."""

    def __init__(
        self,
        prior: RQTransformer,
        vae: RQVAE,
        condition_nl: Tensor,
        settings: DrawSettings,
        known_ntd: Tensor,
        precision: str,
        use_graphs: bool,
    ) -> None:
        self._condition_nl, self._settings, self._known_ntd = condition_nl, settings, known_ntd
        self._shape = prior.config.code_shape
        self._sampler = make_sampler(prior, precision, use_graphs)
        self.steps = prior.positions - known_ntd.shape[1]
        self._vae = vae
        self.joined = torch.cat

    def draw(self, some: slice, first_image: int, advance: Callable[[int], None]) -> tuple[Tensor, _Decode]:
        stacks_btd = self._sampler.sample(
            self._condition_nl[some],
            self._known_ntd[some],
            **self._settings._asdict(),
            offset=first_image,
            advance=lambda: advance(some.stop - some.start),
        )
        codes = stacks_btd.reshape(-1, *self._shape)
        return codes, lambda rows: self._vae.decode(codes[rows])


class _ScaleDrawer:
    """A VAR, scale by scale."""

    def __init__(
        self, prior: VAR, vae: MultiScaleVQVAE, condition_nl: Tensor, settings: DrawSettings, smooth: bool
    ) -> None:
        self._prior, self._vae = prior, vae
        self._labels_n, self._settings, self._smooth = condition_nl[:, 0], settings, smooth
        self.steps = len(prior.scales)

    def draw(self, some: slice, first_image: int, advance: Callable[[int], None]) -> tuple[list[Tensor], _Decode]:
        codes, mixtures = sample_scales(
            self._prior,
            self._labels_n[some],
            self._settings,
            first_image=first_image,
            smooth=self._smooth,
            advance=advance,
        )

        def decode(rows: slice) -> Tensor:
            if mixtures is None:
                return self._vae.decode([maps[rows] for maps in codes])
            return self._vae.decode_latents(self._vae.quantizer.combine([vectors[rows] for vectors in mixtures]))

        return codes, decode

    def joined(self, codes: list[list[Tensor]]) -> list[Tensor]:
        return [torch.cat(maps) for maps in zip(*codes, strict=True)]


def _known_stacks(prior: RQTransformer, partial_codes: Tensor | None, start_row: int, num: int) -> Tensor:
    """(num, t, D): the positions that are kept."""
    _, width, depth = prior.config.code_shape
    if partial_codes is None:
        return torch.empty(num, 0, depth, dtype=torch.int64, device=prior.device)
    return partial_codes.reshape(num, -1, depth)[:, : start_row * width]


@contextmanager
def progress_bar(shown: bool, num: int, steps: int) -> Iterator[Callable[[int], None]]:
    """Yields what to call with the number of images that moved on by one step."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(f"sampling {num} images", total=num * steps)
        yield lambda images: bar.advance(task, images)
