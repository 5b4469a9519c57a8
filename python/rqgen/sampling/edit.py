"""Edit images: sample a part of an image again and keep the rest."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from rqgen.checks import check_tensor
from rqgen.inference import Engine, KnownRegion, SamplingParams, ScaleSampler, make_sampler
from rqgen.models import RQVAE, VAR, MultiScaleVQVAE, Prior, RQTransformer, Tokenizer
from rqgen.models.images import check_images
from rqgen.models.pretrained import eval_mode
from rqgen.quantizers import Codes

from .arguments import KnownRows, check_condition, check_models, finished_images
from .generate import generate

_NAMES = ("condition", "params", "precision")
# Corrections of the encoder's input, one encoding and one decoding each. After two the known half of a digit is closer
# than in the reconstruction of a whole one (docs/sampling.md).
_CORRECTIONS = 3


class EditOutput(NamedTuple):
    """Result of `edit`."""

    images: Tensor
    """(N, channels, H, W) in [-1, 1]: the given pixels where the mask is False, `decoded` where it is True."""
    codes: Codes
    """As `GenerateOutput.codes`."""
    decoded: Tensor
    """(N, channels, H, W) in [-1, 1]: what the tokenizer makes of `codes`, known part and sampled part."""


def edit(
    prior: Prior,
    vae: Tokenizer,
    images: Tensor,
    mask: Tensor,
    condition: Tensor | Sequence[Any] | None = None,
    *,
    params: SamplingParams | None = None,
    precision: str | Engine = "fp32",
    **sampling: Any,
) -> EditOutput:
    """Sample the masked part of images again, under a condition, and keep the rest.

    In-painting, out-painting and class-conditional editing are this one function with other masks and conditions
    (Tian et al. 2024, section 4.4), without any training for it. Pixels under the mask may have any value, NaN
    included: before anything is computed they are replaced by the mean of the image's other pixels. The others come
    back unchanged (`images`), and as the tokenizer decodes them (`decoded`).

    A VAR takes the code nearest to the image for every place of every scale of which at least half is known, and
    samples the others (see `ScaleSampler`). The sampled and the known part then go through the tokenizer as one image,
    and three more times, each time with the last error added to the known part; of the four results each
    image takes the one whose known part is closest.

    An RQ-Transformer samples in raster order: a position sees the positions above it and to its left, never those below
    or to its right. So it can complete images from the rows above, and nothing else.

    Args:
        prior, vae: as `generate` takes them.
        images: (N, channels, H, W), of the tokenizer's size and dtype, on its device. Pixels that are kept must be in
            [-1, 1], as they come back unchanged: clamp what resizing has moved beyond.
        mask: bool (H, W), or (N, H, W): True where an image is sampled again. For an RQ-Transformer all rows from some
            row on, the same for all images, and at least the last one; it samples from the row of codes on that holds
            the first of them.
        condition, params, precision, sampling: as in `generate`; smooth sampling is not possible.

    Raises:
        TypeError, ValueError, IndexError: an argument of the wrong kind, out of range or in contradiction to another
            one; a mask that covers an image whole, or that an RQ-Transformer cannot serve.
    """
    check_models(prior, vae)
    params = SamplingParams.of(params, sampling, beside=_NAMES)
    if params.smooth:
        raise ValueError("smooth: expected False for edit, whose known places hold codes and no mixtures, got True")
    engine = Engine.of(precision)
    known = _known_pixels(images, mask, vae)
    if condition is not None:
        condition = check_condition(condition, prior)
        if len(condition) != len(images):
            raise ValueError(f"condition: expected one per image ({len(images)}), got {len(condition)}")
    return _edit(prior, vae, _Job(images=images, known=known, condition=condition, params=params, engine=engine))


class _Job(NamedTuple):
    """Checked arguments of `edit`."""

    images: Tensor
    known: Tensor
    """The pixels that are kept, bool (N, 1, H, W)."""
    condition: Tensor | None
    params: SamplingParams
    engine: Engine


@functools.singledispatch
def _edit(prior: Prior, vae: Tokenizer, job: _Job) -> EditOutput:
    """Edit images by the function that is registered for the prior's class."""
    raise TypeError(f"prior: a {type(prior).__name__} cannot edit images; expected a VAR or an RQTransformer")


@_edit.register
def _edit_scales(prior: VAR, vae: MultiScaleVQVAE, job: _Job) -> EditOutput:
    images, known, condition, params, engine = job
    resolved, sampler = params.resolve(prior, condition), make_sampler(prior, engine)
    if not isinstance(sampler, ScaleSampler):
        raise TypeError(f"prior: expected one that a ScaleSampler samples, got a {type(sampler).__name__}")
    condition_nl = prior.condition_ids(condition, len(images))
    with torch.no_grad(), eval_mode(prior, vae):
        codes, decoded = [], []
        # On the CPU each image goes alone, see `ScaleSampler`.
        step = 1 if prior.device.type == "cpu" else len(images)
        for start in range(0, len(images), step):
            some, first_image = slice(start, start + step), params.offset + start
            latents = vae.encode_latents(_filled(images[some], known[some])).float()
            height, width = latents.shape[2:]
            share = F.adaptive_avg_pool2d(known[some].float(), (height, width))
            region = KnownRegion(latents, vae.quantizer.nearest, share)
            sampled = sampler.sample(condition_nl[some], resolved, first_image=first_image, region=region)
            start_images = finished_images(vae.decode(prior.layout.by_level(sampled.codes)), first_image)
            found = _refine_by_reencoding(vae, images[some], known[some], start_images.to(images.dtype))
            codes.append(found[0])
            decoded.append(finished_images(found[1], first_image))
    whole = torch.cat(decoded)
    return EditOutput(torch.where(known, images, whole.to(images.dtype)), prior.layout.concatenate(codes), whole)


def _refine_by_reencoding(
    vae: MultiScaleVQVAE, images: Tensor, known: Tensor, start: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Return token maps of images whose unknown part was sampled, and the images they decode to.

    Latents next to the mask were made without what is there now, coarse codes represent both parts, and norms take
    their statistics from both: the known part is reconstructed worse than from a whole image. So the encoder's input is
    moved against the error, as an integrating controller does it.
    """
    target, maps, decoded, errors = torch.where(known, images, start), [], [], []
    for _ in range(1 + _CORRECTIONS):
        # Not checked: the target may be moved out of range, and the image itself was checked.
        maps.append(vae.quantizer.encode(vae.encode_latents(target, check=False)))
        decoded.append(vae.decode(maps[-1]))
        error = torch.where(known, images - decoded[-1].to(images.dtype), 0)
        errors.append(error.float().square().sum(dim=(1, 2, 3)))
        target = target + error
    best = torch.stack(errors).argmin(dim=0), torch.arange(len(images), device=images.device)
    return [torch.stack(scale)[best] for scale in zip(*maps, strict=True)], torch.stack(decoded)[best]


@_edit.register
def _complete_rows(prior: RQTransformer, vae: RQVAE, job: _Job) -> EditOutput:
    images, known, condition, params, engine = job
    height = images.shape[2]
    rows = known[:, 0].all(dim=2)
    first = int(rows[0].long().sum())
    whole = torch.arange(height, device=known.device)[:, None].expand(known.shape[2:]) < first
    if not bool((known[:, 0] == whole).all()):
        raise ValueError(
            "mask: an RQTransformer samples in raster order and sees only what stands above and to the left: expected "
            "all rows from some row on, the same for all images; a VAR takes any mask"
        )
    if first == height:
        raise ValueError("mask: expected at least the last row to be sampled, got none")
    with torch.no_grad(), eval_mode(vae):
        codes = vae.encode(_filled(images, known))
    kept = KnownRows(codes, first // (height // prior.config.code_shape[0]))
    out = generate(prior, vae, condition, params=params, known=kept, precision=engine)
    return EditOutput(torch.where(known, images, out.images.to(images.dtype)), out.codes, out.images)


def _known_pixels(images: Any, mask: Any, vae: Tokenizer) -> Tensor:
    """The pixels that are kept, bool (N, 1, H, W)."""
    check_images(images, values=False)
    for name, value in (("images", images), ("mask", mask)):
        check_tensor(value, name, vae.device, "tokenizer")
    shape = (vae.config.image_channels, *vae.config.image_shape)
    if images.ndim != 4 or tuple(images.shape[1:]) != shape or len(images) == 0:
        raise ValueError(f"images: expected (N, {', '.join(map(str, shape))}), got shape {tuple(images.shape)}")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, got {mask.dtype}")
    if tuple(mask.shape) not in (shape[1:], (len(images), *shape[1:])):
        raise ValueError(f"mask: expected {shape[1:]} or {(len(images), *shape[1:])}, got {tuple(mask.shape)}")
    known = ~mask.expand(len(images), *shape[1:]).unsqueeze(1)
    if not bool(known.flatten(1).any(dim=1).all()):
        raise ValueError(
            "mask: expected a pixel to keep in every image, got an image that is masked as a whole; use generate"
        )
    kept = torch.where(known, images, 0)
    check_images(kept)
    if images.dtype != vae.dtype:
        raise TypeError(f"images: expected {vae.dtype}, as the tokenizer has, got {images.dtype}")
    if not bool((kept.abs() <= 1).all()):
        lowest, highest = (value.item() for value in kept.aminmax())
        raise ValueError(
            f"images: expected values in [-1, 1], got {lowest:.4g} .. {highest:.4g} where the mask is False; "
            "clamp them by images.clamp(-1, 1)"
        )
    return known


def _filled(images: Tensor, known: Tensor) -> Tensor:
    """Return images with the mean of their known pixels in the place of the others."""
    wide = torch.promote_types(images.dtype, torch.float32)  # float16 has no sums above 65504
    total = torch.where(known, images, 0).sum(dim=(2, 3), keepdim=True, dtype=wide)
    return torch.where(known, images, (total / known.sum(dim=(2, 3), keepdim=True)).to(images.dtype))
