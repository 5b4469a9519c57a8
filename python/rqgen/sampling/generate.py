"""Images from a prior and the tokenizer whose codes it models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from rqgen.checks import check_flag, check_integer
from rqgen.inference import Engine, SamplingParams, make_sampler
from rqgen.models import Prior, Tokenizer
from rqgen.models.pretrained import eval_mode
from rqgen.quantizers import Codes

from .arguments import KnownRows, check_condition, check_known, check_models, finished_images, number_of_images

DEFAULT_BATCH_SIZE = 256
SECONDS_PER_LINE = 10.0
"""Time between two lines of progress where the output is a log and no terminal."""
_NAMES = ("condition", "num", "params", "batch_size", "known", "precision", "progress")


class GenerateOutput(NamedTuple):
    """Result of `generate`."""

    codes: Codes
    """int64 (num, h, w, D); of a VAR a list of token maps (num, h_k, w_k), from coarse to fine."""
    images: Tensor
    """(num, channels, H, W), what the tokenizer decodes clamped to [-1, 1]."""


def generate(
    prior: Prior,
    vae: Tokenizer,
    condition: Tensor | Sequence[Any] | None = None,
    num: int | None = None,
    *,
    params: SamplingParams | None = None,
    batch_size: int | None = None,
    known: KnownRows | None = None,
    precision: str | Engine = "fp32",
    progress: bool = False,
    **sampling: Any,
) -> GenerateOutput:
    """Sample codes from `prior` and decode them with `vae`: an RQ-Transformer's position by position and depth by
    depth, a VAR's scale by scale.

        generate(prior, vae, [3, "seven"], cfg_scale=1.5, top_p=0.95, seed=1)

    Each code is sampled as by `rqkernels.sample_logits` with row = offset + the image's index and stream = t * D + d
    (VAR: the token's index, counted through all scales), so an image depends on its number, the seed, the model and its
    condition, not on how the batch is split. On the CPU it is the same to the last bit for every split, and an
    RQ-Transformer's for every number of threads (the decoder's part of that rests on oneDNN, see
    `rqgen.quantizers.Convolution`); the matrix products of a VAR are torch's, whose roundings may depend on the number
    of threads. There, and on CUDA between two batch sizes, a code may change where its uniform falls between two
    roundings; with and without graphs it is the same.

    Hooks, adapters (LoRA), parametrizations, replaced modules and overridden methods count. Packed weights and graphs
    ignore them, so the modules of such a prior are called, which takes longer; a warning says so once. They see one
    position at a time; a prior that itself has hooks or overridden methods is called as a whole for every code (a VAR
    for every scale), and so is every prior while torch has hooks on all modules. Products are then torch's: a code may
    change with the split of the batch where its uniform falls between two roundings.

    Keys and values are kept, and never concatenated or moved. An RQ-Transformer's position is on the CPU one
    `rqkernels.transformer_step` and one `rqkernels.depth_decode`, over weights that are packed at the first call and
    kept while the prior lives and is unchanged (a copy of its weights shows that; see `rqgen.inference.packed`). On a
    GPU it is one CUDA graph. A VAR's scale is one pass over its tokens alone.

    Both models are used in eval mode, without gradients, and left in the mode they came in.

    Args:
        prior, vae: on the same device; the prior's codebooks must be the tokenizer's.
        condition: labels (num,) or (num, 1), or token ids (num, L), as the prior's config says; a tensor on any
            device, or a list. In a list a class may also be given by its name (of `prior.class_names`) or by its number
            as text; where names are numbers themselves, text is always a name. None: no condition, or the null
            condition of a prior that learned one.
        num: number of images, only without a condition (and not needed with `known`).
        params: settings of sampling.
        batch_size: images sampled and decoded together; None is 256.
        known: rows of codes that are kept, for priors over stacks of codes; `edit` keeps parts of images.
        precision: "fp32", "bf16" or "int8", or an `Engine`, which says what they are.
        progress: show a progress bar.
        sampling: fields of `SamplingParams` (temperature, top_k, top_p, cfg_scale, seed, offset, smooth), which replace
            those of `params`.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range or in contradiction to another
            one.
        ValueError: logits without a distribution (NaN, +inf, nothing but -inf), decoded images that are not finite.
    """
    check_models(prior, vae)
    params = SamplingParams.of(params, sampling, beside=_NAMES)
    engine = Engine.of(precision)
    if condition is not None:
        condition = check_condition(condition, prior)
    progress = check_flag(progress, "progress")
    known_nl = check_known(known, prior)
    num = number_of_images(condition, num, known_nl)
    resolved = params.resolve(prior, condition)
    batch_size = DEFAULT_BATCH_SIZE if batch_size is None else check_integer(batch_size, "batch_size", 1)
    condition_nl = prior.condition_ids(condition, num)
    layout = prior.layout
    with torch.no_grad(), eval_mode(prior, vae):
        sampler = make_sampler(prior, engine)
        codes, images = [], []
        steps = sampler.steps(0 if known_nl is None else known_nl.shape[1])
        with progress_bar(progress, num, steps) as advance:
            for start in range(0, num, batch_size):
                some, first_image = slice(start, min(start + batch_size, num)), params.offset + start
                sampled = sampler.sample(
                    condition_nl[some],
                    resolved,
                    first_image=first_image,
                    known=None if known_nl is None else known_nl[some],
                    advance=advance,
                )
                codes.append(sampled.codes)
                count = some.stop - some.start
                # Convolutions sum in an order that depends on the batch: on the CPU each image goes alone.
                step = 1 if prior.device.type == "cpu" else count
                for first in range(0, count, step):
                    rows = slice(first, first + step)
                    if sampled.vectors is None:
                        decoded = vae.decode(layout.select(sampled.codes, rows))
                    else:
                        decoded = vae.decode_vectors([vectors[rows] for vectors in sampled.vectors])
                    images.append(finished_images(decoded, first_image + first))
    return GenerateOutput(layout.concatenate(codes), torch.cat(images))


@contextmanager
def progress_bar(shown: bool, num: int, steps: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar; yield the function to call with the number of images that moved on by one step."""
    console = Console(stderr=True)
    if shown and not console.is_terminal:
        yield _progress_lines(console, num, num * steps)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not shown) as bar:
        task = bar.add_task(f"sampling {num} images", total=num * steps)
        yield lambda images: bar.advance(task, images)


def _progress_lines(console: Console, num: int, total: int) -> Callable[[int], None]:
    """Return `advance` for a log: it prints a line every `SECONDS_PER_LINE` seconds, and one at the end."""
    began = printed = time.monotonic()
    done = 0

    def advance(images: int) -> None:
        nonlocal done, printed
        done, now = done + images, time.monotonic()
        if now - printed >= SECONDS_PER_LINE or done >= total:
            printed = now
            left = (now - began) / done * (total - done)
            time_left = f", {left:.0f} s left" if done < total else f" in {now - began:.1f} s"
            line = f"sampling {num} images: {done / total:.0%}{time_left}"
            console.print(line, soft_wrap=True, highlight=False)

    return advance
