"""The discriminator of image patches (Isola et al. 2017), as the published RQ-VAE trains against it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm as with_spectral_norm
from torch.nn.utils.parametrize import is_parametrized

from rqgen.checks import check_flag, check_integer
from rqgen.config import one_of

from .batches import check_batch, check_finite

NORMS = ("batch", "actnorm")
_KERNEL, _LARGEST_MULTIPLIER, _SLOPE, _STD = 4, 8, 0.2, 0.02
_ACTNORM_EPSILON = 1e-6


class ActNorm(nn.Module):
    """A scale and a shift per channel, `scale * (x + loc)`, set from the first batch in train mode (Kingma and Dhariwal
    2018):

        loc = -mean(x)    scale = 1 / (std(x) + 1e-6)

    over batch, height and width, std with n - 1 in the denominator, in float32; under a process group over the batches
    of all ranks, so that all start alike. From then on both are parameters like others. `initialized` (uint8, saved)
    says whether that has happened: a loaded state is kept, and in eval mode nothing is set. x is (N, C, H, W). A first
    batch of one value per channel, or with values that are not finite, is a ValueError: all later ones would be NaN.
    """

    loc: Tensor
    scale: Tensor
    initialized: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.uint8))
        # Once True, the buffer is not read again: on a GPU that would wait for the device in every pass.
        self._is_initialized = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self._is_initialized:
            if not bool(self.initialized):
                self._initialize(x.detach())
            self._is_initialized = True
        return self.scale * (x + self.loc)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        rows_cn = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).flatten(1)
        count = _summed(torch.tensor(float(rows_cn.shape[1]), dtype=rows_cn.dtype, device=rows_cn.device))
        if bool(count < 2):
            raise ValueError(
                f"x: expected at least two values of each channel to start from, got shape {tuple(x.shape)}"
            )
        mean = _summed(rows_cn.sum(dim=1)) / count
        squares = _summed((rows_cn - mean.unsqueeze(1)).square_().sum(dim=1))
        std = (squares / (count - 1)).sqrt()
        if not bool((mean.isfinite() & std.isfinite()).all()):
            raise ValueError("x: expected finite values to start from, got NaN or infinity among them")
        self.loc.copy_(-mean.view_as(self.loc))
        self.scale.copy_(1 / (std + _ACTNORM_EPSILON).view_as(self.scale))
        self.initialized.fill_(1)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._is_initialized = False  # as the loaded buffer says


def _summed(values: Tensor) -> Tensor:
    """The sum over the ranks of an initialised process group; `values` themselves without one."""
    if dist.is_available() and dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values


class PatchDiscriminator(nn.Module):
    """Convolutions that judge overlapping patches: images (B, channels, H, W) to logits (B, 1, h, w), high where a
    patch looks real.

    `num_layers` convolutions 4x4 of stride 2, each with twice the channels of the one before (up to eight times
    base_channels), one of stride 1, and one of stride 1 to a single channel; LeakyReLU(0.2) between them, and a norm
    after all but the first and the last. h = H / 2^num_layers - 2 (halves rounded down), so that images have at least
    3 * 2^num_layers pixels a side. Names (`main.*`) and, for the same state of torch's generator, initial weights are
    those of the published code: convolutions N(0, 0.02) with torch's own biases, batch norm N(1, 0.02) with zeros.

    Images are in [-1, 1], of any floating-point dtype (what comes in is cast to the weights'; autocast does as always).
    `nn.SyncBatchNorm.convert_sync_batchnorm` serves several processes, and leaves the state dict as it is.

    Args:
        channels: of an image.
        base_channels: after the first convolution.
        num_layers: convolutions of stride 2.
        norm: "batch", or "actnorm" (`ActNorm`; convolutions then have a bias), which does not mix images.
        spectral_norm: divide every convolution's weight by its largest singular value (Miyato et al. 2018), found by
            one power iteration per pass in train mode. The state dict then has torch's names of a parametrization.

    Raises:
        TypeError, ValueError: a setting out of range.
        ValueError in a call: images of another shape or too small; in train mode, no images or NaN or infinity among
            them, which would stay in the running statistics.

    Warns:
        UserWarning: a batch of one in train mode with batch norm: it is normalised by itself alone, so that its
            brightness and contrast are hidden from the discriminator.
    """

    def __init__(
        self,
        channels: int = 3,
        base_channels: int = 64,
        num_layers: int = 3,
        norm: str = "batch",
        *,
        spectral_norm: bool = False,
    ) -> None:
        super().__init__()
        self.channels = check_integer(channels, "channels", 1, 2**16)
        self.num_layers = check_integer(num_layers, "num_layers", 1, 16)
        self.spectral_norm = check_flag(spectral_norm, "spectral_norm")
        width = check_integer(base_channels, "base_channels", 1, 2**16)
        if norm not in NORMS:
            raise ValueError(f"norm: {one_of(NORMS, norm)}")
        self.norm = norm

        layers: list[nn.Module] = [_convolution(channels, width, stride=2), nn.LeakyReLU(_SLOPE, inplace=True)]
        before = width
        for index in range(1, num_layers + 1):
            after = width * min(2**index, _LARGEST_MULTIPLIER)
            stride = 2 if index < num_layers else 1
            layers += [
                _convolution(before, after, stride=stride, bias=norm == "actnorm"),
                nn.BatchNorm2d(after) if norm == "batch" else ActNorm(after),
                nn.LeakyReLU(_SLOPE, inplace=True),
            ]
            before = after
        layers.append(_convolution(before, 1, stride=1))
        self.main = nn.Sequential(*layers)
        self._initialize()

    def _initialize(self) -> None:
        for layer in self.main:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, _STD)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, _STD)
                nn.init.zeros_(layer.bias)
        if self.spectral_norm:
            for layer in self.main:
                if isinstance(layer, nn.Conv2d):
                    with_spectral_norm(layer)

    @property
    def smallest(self) -> int:
        """Pixels that an image has at least along each side."""
        return 3 * 2**self.num_layers

    def forward(self, images: Tensor) -> Tensor:
        bias = self.main[0].bias
        assert isinstance(bias, Tensor)  # the first convolution has one; its weight may be computed by spectral norm
        check_batch(
            images,
            "images",
            channels=(self.channels,),
            smallest=self.smallest,
            device=bias.device,
            owner="discriminator",
        )
        if self.training:
            if len(images) == 0:
                raise ValueError(f"images: expected at least one to train on, got shape {tuple(images.shape)}")
            check_finite(images, "images")
            if len(images) == 1 and any(_is_alone(norm) for norm in self._batch_norms()):
                warnings.warn(
                    "PatchDiscriminator: batch norm over a batch of one normalises each image by itself alone: use "
                    "larger batches, SyncBatchNorm over several processes, or norm='actnorm'",
                    stacklevel=2,
                )
        logits: Tensor = self.main(images.to(bias.dtype))
        return logits

    # --- one pass in the place of two

    @property
    def is_repeatable(self) -> bool:
        """True if a second pass over the images of the last one would give the same logits, and `repeat_statistics` can
        move the running statistics as that pass would."""
        fixed = all(norm.momentum is not None for norm in self._batch_norms())
        return fixed and all(map(_is_plain, (self, self.main))) and all(map(_is_known, self.main))

    def running_statistics(self) -> list[Tensor]:
        """Copies of the running means and variances, for `repeat_statistics`."""
        return [tensor.clone() for norm in self._batch_norms() for tensor in _statistics_of(norm)]

    @torch.no_grad()
    def repeat_statistics(self, before: list[Tensor]) -> None:
        """Moves the running statistics as a second pass, in train mode, over the images of the last one would.

        A pass moves r to `r' = r + m (s - r)`, s the batch's statistics; the next one, over the same batch, moves r' by
        `m (s - r') = (1 - m) (r' - r)`.

        Args:
            before: `running_statistics` before the last pass.
        """
        if not self.training:
            return
        remaining = iter(before)
        for norm in self._batch_norms():
            assert norm.momentum is not None  # see is_repeatable
            for now in _statistics_of(norm):
                # Through .data, as a pass itself moves them: the graph of the last one still holds them, unused.
                now.data.add_(now.data - next(remaining), alpha=1 - norm.momentum)
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(1)

    def _batch_norms(self) -> list[nn.modules.batchnorm._BatchNorm]:
        """The batch norms, SyncBatchNorm included."""
        return [layer for layer in self.main if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def _convolution(before: int, after: int, *, stride: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(before, after, _KERNEL, stride=stride, padding=1, bias=bias)


def _statistics_of(norm: nn.modules.batchnorm._BatchNorm) -> list[Tensor]:
    return [tensor for tensor in (norm.running_mean, norm.running_var) if tensor is not None]


def _is_plain(module: nn.Module) -> bool:
    """True if a call is the module's forward and nothing else."""
    return not (module._forward_hooks or module._forward_pre_hooks or is_parametrized(module))


def _is_known(layer: nn.Module) -> bool:
    """True for layers of which a second pass over the same images gives the same, and moves nothing but statistics."""
    kinds = (nn.Conv2d, nn.modules.batchnorm._BatchNorm, ActNorm, nn.LeakyReLU)
    return isinstance(layer, kinds) and _is_plain(layer)


def _is_alone(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """True if a batch norm sees the batch of this process alone."""
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return norm.training and not (several and isinstance(norm, nn.SyncBatchNorm))
