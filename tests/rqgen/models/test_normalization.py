"""GroupNorm in both layouts against float64: results and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rqgen.models.autoencoder import AutoencoderLayout, Decoder, Encoder
from rqgen.models.normalization import GroupNorm

LAYOUTS = [torch.contiguous_format, torch.channels_last]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPE, GROUPS = (2, 24, 9, 11), 4

MAPS: dict[str, Callable[[], Tensor]] = {
    "centred": lambda: torch.randn(SHAPE),
    "mean 1": lambda: torch.randn(SHAPE) + 1,
    "mean 100": lambda: torch.randn(SHAPE) + 100,
    "mean -1000": lambda: torch.randn(SHAPE) - 1000,
    "nearly flat": lambda: 3 + 1e-5 * torch.randn(SHAPE),
    "groups far apart": lambda: torch.randn(SHAPE) + 1000 * torch.randn(2, 24, 1, 1).sign(),
    "an outlier": lambda: torch.randn(SHAPE).index_fill(3, torch.tensor([0]), 1e4),
}


def results(norm: nn.GroupNorm, x: Tensor, weights: Tensor, *, to_input: bool = True) -> list[Tensor]:
    """Output, and the gradients of its product with `weights`: to the input (where asked for), weight and bias."""
    x = x.detach().requires_grad_(to_input)
    y = norm(x)
    assert y.dtype == x.dtype
    leaves = [x, norm.weight, norm.bias] if to_input else [norm.weight, norm.bias]
    return [y.detach(), *torch.autograd.grad((y.double() * weights).sum(), leaves)]


def plain(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def errors(found: list[Tensor], truth: list[Tensor]) -> list[float]:
    pairs = zip(found, truth, strict=True)
    return [((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-5)).item() for a, b in pairs]


def norms(dtype: torch.dtype) -> tuple[GroupNorm, nn.GroupNorm, nn.GroupNorm]:
    """Ours, torch's with the same parameters, and the same in float64."""
    ours, theirs, exact = (kind(GROUPS, SHAPE[1], eps=1e-6) for kind in (GroupNorm, nn.GroupNorm, nn.GroupNorm))
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn_like(parameter).to(dtype))
    for norm in (theirs, exact):
        norm.load_state_dict(ours.state_dict())
    return ours.to(dtype), theirs.to(dtype), exact.double()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAPS)
def test_as_exact_in_every_layout_as_torch_in_the_plain_one(
    name: str, dtype: torch.dtype, layout: torch.memory_format, device: torch.device
) -> None:
    ours, theirs, exact = (norm.to(device) for norm in norms(dtype))
    x, weights = MAPS[name]().to(device, dtype), torch.randn(SHAPE, device=device).double()
    truth = results(exact, x.double(), weights)
    allowed = errors(results(theirs, x, weights), truth)
    x = x.contiguous(memory_format=layout)
    for found, most in zip(errors(results(ours, x, weights), truth), allowed, strict=True):
        # In half precision a nearly flat map is a flat one: its weight has a gradient of 0 and no relative error.
        assert found <= 3 * most + 4 * torch.finfo(dtype).eps
    with torch.no_grad():
        (found,) = errors([ours(x)], truth[:1])
        assert found <= 3 * allowed[0] + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_the_layout_is_kept(dtype: torch.dtype) -> None:
    ours, _, _ = norms(dtype)
    for layout in LAYOUTS:
        for to_input in (True, False):
            x = torch.randn(SHAPE).to(dtype).contiguous(memory_format=layout).requires_grad_(to_input)
            y = ours(x)
            assert y.dtype == dtype and y.shape == x.shape
            assert y.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_that_need_no_gradient(dtype: torch.dtype) -> None:
    """The first norm behind frozen layers; torch's backward ends the process."""
    ours, _, exact = norms(dtype)
    x = torch.randn(SHAPE).to(dtype).contiguous(memory_format=torch.channels_last)
    weights = torch.randn(SHAPE).double()
    truth = results(exact, plain(x).double(), weights, to_input=False)
    assert max(errors(results(ours, x, weights, to_input=False), truth)) < 8 * torch.finfo(dtype).eps


def views() -> dict[str, Tensor]:
    last = torch.randn(4, 48, 10, 12).contiguous(memory_format=torch.channels_last) + 300
    return {
        "a part of the channels": last[:, 24:],
        "every other channel": last[:, ::2],
        "every other pixel": last[:, :24, ::2, ::3],
        "a transposed map": last[:, :24].transpose(2, 3),
        "one pixel": last[:, :24, :1, :1],
        "one column": last[:, :24, :, :1],
        "one image": last[:1, :24],
        "a video": (torch.randn(2, 24, 3, 4, 5) + 300).contiguous(memory_format=torch.channels_last_3d),
        "a sequence": torch.randn(2, 30, 24).transpose(1, 2) + 300,
        "vectors": torch.randn(2, 24) + 300,
    }


@pytest.mark.parametrize("name", views())
def test_views(name: str) -> None:
    ours, theirs, exact = norms(torch.float32)
    x = views()[name]
    weights = torch.randn(x.shape).double()
    truth = results(exact, plain(x).double(), weights)
    allowed = errors(results(theirs, plain(x), weights), truth)
    for found, most in zip(errors(results(ours, x, weights), truth), allowed, strict=True):
        assert found <= 3 * most + 4 * torch.finfo(torch.float32).eps


def test_no_images() -> None:
    ours, _, _ = norms(torch.float32)
    for layout in LAYOUTS:
        x = torch.randn(0, *SHAPE[1:]).contiguous(memory_format=layout).requires_grad_()
        y = ours(x)
        y.sum().backward()
        assert y.shape == x.shape and ours.weight.grad.eq(0).all()


def test_under_autocast(device: torch.device) -> None:
    ours, _, exact = (norm.to(device) for norm in norms(torch.float32))
    x = (torch.randn(SHAPE, device=device) + 100).bfloat16()
    truth = exact(x.double())
    for layout in LAYOUTS:
        with torch.autocast(device.type, torch.bfloat16):
            y = ours(x.contiguous(memory_format=layout))
        assert ((y.double() - truth).abs().max() / truth.abs().max()).item() < 0.01


def test_compiled_and_derived_twice() -> None:
    ours, _, exact = norms(torch.float32)
    x = (torch.randn(SHAPE) + 100).contiguous(memory_format=torch.channels_last).requires_grad_()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), ours(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), ours(x))
    found, expected = [], []
    for norm, given, into in ((ours, x, found), (exact, x.detach().double().requires_grad_(), expected)):
        (first,) = torch.autograd.grad(norm(given).pow(3).sum(), given, create_graph=True)
        into += [first, torch.autograd.grad(first.pow(2).sum(), given)[0]]
    for ours_of, exact_of in zip(found, expected, strict=True):
        assert errors([ours_of], [exact_of])[0] < 1e-4


def test_state_and_other_devices() -> None:
    ours, theirs, _ = norms(torch.float32)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "bias"]
    x = torch.randn(SHAPE, device="meta").to(memory_format=torch.channels_last)
    assert ours.to("meta")(x).shape == SHAPE


def test_encoder_and_decoder_use_it() -> None:
    layout = AutoencoderLayout(
        image_channels=3,
        z_channels=6,
        base_channels=8,
        channel_multipliers=[1, 2],
        num_res_blocks=1,
        attention=[False, True],
        resample_with_conv=True,
        dropout=0.0,
        norm_groups=4,
        gradient_checkpointing=False,
    )
    for model in (Encoder(layout), Decoder(layout)):
        kinds = {type(module) for module in model.modules() if isinstance(module, nn.GroupNorm)}
        assert kinds == {GroupNorm}
