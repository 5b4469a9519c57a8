"""Images from an RQ-Transformer and the RQ-VAE whose codes it models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

import rqkernels
from rqgen.models import RQVAE, RQTransformer
from rqgen.models.rqtransformer import check_range

DEFAULT_BATCH_SIZE = 256
# A matrix product's last bits depend on its number of rows, and a code on the last bits of its logits. On the
# CPU rows are therefore computed in blocks of this many, each image in the same place of the same block.
# (At 64 a block costs 12 % more than one batch of all rows, at 32 half as much again.)
CPU_BLOCK_ROWS = 64


class GenerateOutput(NamedTuple):
    """What `generate` draws."""

    codes: Tensor
    """int64 (num, h, w, D)."""
    images: Tensor
    """(num, channels, H, W) in [-1, 1]."""


class _Settings(NamedTuple):
    """How codes are drawn; the lists hold one entry per depth."""

    temperature: list[float]
    top_k: list[int | None]
    top_p: list[float | None]
    guidance: float
    seed: int


def generate(
    prior: RQTransformer,
    vae: RQVAE,
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
    progress: bool = False,
) -> GenerateOutput:
    """Draws code maps from `prior`, position by position and depth by depth, and decodes them with `vae`.

    With guidance scale g the codes come from `(1 + g) * logits(condition) - g * logits(null condition)`
    (Ho and Salimans 2022, in the form where 0 is no guidance). Each code is drawn by `sample_logits` with
    row = offset + the image's index and stream = t * D + d, so an image depends on its number, the seed, the
    model and its condition, not on how the batch is split. On the CPU it is the same to the last bit for every
    split; on CUDA a code may change where its uniform falls between the roundings of two batch sizes.

    Both models are used in eval mode, without gradients, and left in the mode they came in.

    Args:
        prior, vae: on the same device; the prior's codebooks must be the tokenizer's.
        condition: labels (num,) or (num, 1), or token ids (num, L), as the prior's config says; a tensor on any
            device, or a list. None: no condition, or the null condition of a prior that learned one.
        num: how many images, only without a condition (and not needed with `partial_codes`).
        temperature, top_k, top_p: one value, or one per depth; see `rqkernels.sample_logits`.
        cfg_scale: g >= 0; None or 0 is off.
        seed: in [0, 2^64).
        offset: index of the first image, >= 0.
        batch_size: images drawn and decoded together; None is 256.
        partial_codes: (num, h, w, D): rows above `start_row` are kept, the others ignored.
        start_row: first row that is drawn, in [0, h).
        progress: whether to show a progress bar.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range or against another one.
    """
    _check_models(prior, vae)
    if condition is not None:
        condition = _check_condition(condition, prior)
    height, width, depth = prior.config.code_shape
    _check_integer(start_row, "start_row", 0, height - 1)
    if partial_codes is not None:
        partial_codes = _check_partial_codes(partial_codes, start_row, prior)
    elif start_row > 0:
        raise ValueError(f"start_row: {start_row} needs partial_codes, which hold the rows above it")
    num = _number_of_images(condition, num, partial_codes)
    settings = _Settings(
        temperature=_per_depth(temperature, "temperature", depth, _check_temperature),
        top_k=_per_depth(top_k, "top_k", depth, _check_top_k),
        top_p=_per_depth(top_p, "top_p", depth, _check_top_p),
        guidance=_check_guidance(cfg_scale, prior, condition),
        seed=_check_integer(seed, "seed", 0, 2**64 - 1),
    )
    _check_integer(offset, "offset", 0, 2**62)
    batch_size = DEFAULT_BATCH_SIZE if batch_size is None else _check_integer(batch_size, "batch_size", 1)

    condition_nl = prior.condition_ids(condition, num)
    known = 0 if partial_codes is None else start_row * width
    known_ntd = torch.empty(num, 0, depth, dtype=torch.int64, device=prior.device)
    if partial_codes is not None:
        known_ntd = partial_codes.reshape(num, -1, depth)[:, :known]
    codes, images = [], []
    with torch.no_grad(), _eval_mode(prior, vae), _progress_bar(progress, num, height * width - known) as advance:
        for start in range(0, num, batch_size):
            stop = min(start + batch_size, num)
            batch = _sample(prior, condition_nl, known_ntd, start, stop, offset, settings, advance)
            codes.append(batch.reshape(-1, height, width, depth))
            # Convolutions too sum in an order that depends on the batch: on the CPU each image goes alone.
            together = 1 if prior.device.type == "cpu" else stop - start
            images += [vae.decode(some) for some in codes[-1].split(together)]
    return GenerateOutput(torch.cat(codes), torch.cat(images))


def _sample(
    prior: RQTransformer,
    condition_nl: Tensor,
    known_ntd: Tensor,
    start: int,
    stop: int,
    offset: int,
    settings: _Settings,
    advance: Callable[[int], None],
) -> Tensor:
    """Codes (stop - start, T, D) of the images start .. stop-1."""
    first, last = start, stop
    block_rows = stop - start
    if prior.device.type == "cpu":
        # A block begins at a multiple of its size, counted in image numbers, so that no split moves an image.
        block_rows = CPU_BLOCK_ROWS
        first = start - (offset + start) % block_rows
        last = stop + -(offset + stop) % block_rows
    blocks = []
    for row in range(first, last, block_rows):
        # Places of a block that this batch does not fill repeat one of its images.
        rows = torch.arange(row, row + block_rows, device=prior.device).clamp(start, stop - 1)
        filled = min(row + block_rows, stop) - max(row, start)
        blocks.append(
            _sample_block(
                prior, condition_nl[rows], known_ntd[rows], offset + row, settings, lambda n=filled: advance(n)
            )
        )
    return torch.cat(blocks)[start - first : stop - first]


def _sample_block(
    prior: RQTransformer,
    condition_bl: Tensor,
    known_btd: Tensor,
    first_row: int,
    settings: _Settings,
    advance: Callable[[], None],
) -> Tensor:
    """Codes (B, T, D) of the images with numbers first_row .. first_row + B - 1."""
    guidance = settings.guidance
    # With guidance the second half of the batch is the same images under the null condition.
    copies = 2 if guidance else 1
    if guidance:
        condition_bl = torch.cat([condition_bl, prior.condition_ids(None, condition_bl.shape[0])])
    spatial_cache, depth_cache = prior.new_caches(condition_bl.shape[0])
    position = known_btd.shape[1]

    def draw(logits: Tensor, d: int) -> Tensor:
        if guidance:
            conditional, null = logits.chunk(2)
            logits = (1 + guidance) * conditional - guidance * null
        codes = rqkernels.sample_logits(
            logits,
            temperature=settings.temperature[d],
            top_k=settings.top_k[d],
            top_p=settings.top_p[d],
            seed=settings.seed,
            offset=first_row,
            stream=position * prior.depth + d,
        )
        return codes.repeat(copies)

    stacks = [known_btd]
    new_bnd = known_btd.repeat(copies, 1, 1)
    outputs = prior.spatial_outputs(new_bnd, condition_bl, spatial_cache)
    while True:
        stack_bd = prior.sample_stack(outputs[:, -1], draw, depth_cache)
        stacks.append(stack_bd[: known_btd.shape[0], None])
        advance()
        position += 1
        if position == prior.positions:
            return torch.cat(stacks, dim=1)
        outputs = prior.spatial_outputs(stack_bd[:, None], cache=spatial_cache)


def _check_models(prior: Any, vae: Any) -> None:
    for name, model, kind in (("prior", prior, RQTransformer), ("vae", vae, RQVAE)):
        if not isinstance(model, kind):
            raise TypeError(f"{name}: expected an {kind.__name__}, got {type(model).__name__}")
    for name, ours, theirs in (
        ("code_shape", prior.config.code_shape, vae.code_shape),
        ("codebook_size", prior.config.codebook_size, vae.codebook_size),
        ("device", prior.device, vae.device),
    ):
        if ours != theirs:
            raise ValueError(f"vae: its {name} is {theirs}, the prior's is {ours}: they must be the same")
    prior.check_codebooks()
    if prior.codebooks is None:
        return
    ours, theirs = prior.codebooks, vae.codebooks
    # One of the two may have been rounded to a shorter type.
    if ours.shape != theirs.shape or not (
        torch.equal(ours.to(theirs.dtype), theirs) or torch.equal(ours, theirs.to(ours.dtype))
    ):
        raise ValueError("vae: its codebooks are not the ones the prior was made with")


def _check_condition(condition: Any, prior: RQTransformer) -> Tensor:
    try:
        condition = torch.as_tensor(condition, device=prior.device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"condition: expected a tensor or a list of integers ({error})") from error
    if condition.dim() == 0 or condition.shape[0] == 0:
        raise ValueError(f"condition: expected at least one row, got shape {tuple(condition.shape)}")
    prior.condition_ids(condition, condition.shape[0])
    check_range(condition, prior.config.condition_vocab_size, "condition")
    return condition


def _check_partial_codes(partial_codes: Any, start_row: int, prior: RQTransformer) -> Tensor:
    if not isinstance(partial_codes, Tensor):
        raise TypeError(f"partial_codes: expected a tensor, got {type(partial_codes).__name__}")
    if partial_codes.dtype != torch.int64:
        raise TypeError(f"partial_codes: expected int64, got {partial_codes.dtype}")
    if partial_codes.shape[1:] != prior.config.code_shape or partial_codes.shape[0] == 0:
        expected = ", ".join(map(str, prior.config.code_shape))
        raise ValueError(f"partial_codes: expected shape (num, {expected}), got {tuple(partial_codes.shape)}")
    check_range(partial_codes[:, :start_row], prior.config.codebook_size, "partial_codes above start_row")
    return partial_codes.to(prior.device)


def _number_of_images(condition: Tensor | None, num: int | None, partial_codes: Tensor | None) -> int:
    if num is not None:
        _check_integer(num, "num", 1)
        if condition is not None:
            raise ValueError("num: only without a condition, whose length says how many images")
    counts = {
        name: count
        for name, count in (
            ("num", num),
            ("condition", None if condition is None else condition.shape[0]),
            ("partial_codes", None if partial_codes is None else partial_codes.shape[0]),
        )
        if count is not None
    }
    if not counts:
        raise ValueError("num: expected the number of images, as there is no condition; got None")
    if len(set(counts.values())) > 1:
        raise ValueError(f"partial_codes: the number of images differs: {counts}")
    return next(iter(counts.values()))


def _per_depth(value: Any, name: str, depth: int, check: Callable[[Any, str], Any]) -> list[Any]:
    if isinstance(value, Tensor):
        value = value.tolist()
    if not isinstance(value, (list, tuple)):
        return [check(value, name)] * depth
    if len(value) != depth:
        raise ValueError(f"{name}: expected one value, or {depth} (one per depth), got {len(value)}")
    return [check(item, f"{name}[{d}]") for d, item in enumerate(value)]


def _check_temperature(value: Any, name: str) -> float:
    if not _is_number(value):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")
    return float(value)


def _check_top_k(value: Any, name: str) -> int | None:
    return None if value is None else _check_integer(value, name, 1)


def _check_top_p(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if not _is_number(value):
        raise TypeError(f"{name}: expected a number or None, got {value!r}")
    if not 0 < value <= 1:
        raise ValueError(f"{name}: expected a number in (0, 1], got {value}")
    return float(value)


def _check_guidance(cfg_scale: Any, prior: RQTransformer, condition: Tensor | None) -> float:
    if cfg_scale is None:
        return 0.0
    if not _is_number(cfg_scale):
        raise TypeError(f"cfg_scale: expected a number or None, got {cfg_scale!r}")
    if not (math.isfinite(cfg_scale) and cfg_scale >= 0):
        raise ValueError(f"cfg_scale: expected a finite number >= 0, got {cfg_scale}")
    if cfg_scale > 0 and not prior.config.has_null_condition:
        raise ValueError(
            "cfg_scale: guidance needs a prior with a null condition, and this one was not trained with "
            "condition_dropout"
        )
    if cfg_scale > 0 and condition is None:
        raise ValueError("cfg_scale: guidance needs a condition, got None")
    return float(cfg_scale)


def _check_integer(value: Any, name: str, lowest: int, highest: int | None = None) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if value < lowest or (highest is not None and value > highest):
        bound = f">= {lowest}" if highest is None else f"in [{lowest}, {highest}]"
        raise ValueError(f"{name}: expected an integer {bound}, got {value}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextmanager
def _eval_mode(*models: nn.Module) -> Iterator[None]:
    modules = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modules:
            module.training = training


@contextmanager
def _progress_bar(shown: bool, num: int, positions: int) -> Iterator[Callable[[int], None]]:
    """Yields what to call with the number of images that moved on by one position."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(f"sampling {num} images", total=num * positions)
        yield lambda images: bar.advance(task, images)
