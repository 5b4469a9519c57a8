from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from rqgen.models.autoencoder import (
    AttentionBlock,
    AutoencoderLayout,
    Decoder,
    Downsample,
    Encoder,
    ResidualBlock,
    Upsample,
)


def layout(**changes: Any) -> AutoencoderLayout:
    settings = {
        "image_channels": 3,
        "z_channels": 6,
        "base_channels": 8,
        "channel_multipliers": [1, 2, 3],
        "num_res_blocks": 2,
        "attention": [False, True, False],
        "resample_with_conv": True,
        "dropout": 0.0,
        "norm_groups": 4,
        "gradient_checkpointing": False,
        **changes,
    }
    return AutoencoderLayout(**settings)


def block(in_channels: int = 8, out_channels: int = 8, **changes: Any) -> ResidualBlock:
    settings = {"dropout": 0.0, "norm_groups": 4, "gradient_checkpointing": False, **changes}
    return ResidualBlock(in_channels, out_channels, **settings)


@pytest.mark.parametrize("multipliers", [[1], [1, 2], [2, 1, 3]])
@pytest.mark.parametrize("with_conv", [True, False])
def test_shapes(multipliers: list[int], with_conv: bool) -> None:
    settings = layout(
        channel_multipliers=multipliers, attention=[True] * len(multipliers), resample_with_conv=with_conv
    )
    stride = 2 ** (len(multipliers) - 1)
    z = Encoder(settings)(torch.randn(2, 3, 8, 12))
    assert z.shape == (2, 6, 8 // stride, 12 // stride)
    assert Decoder(settings)(z).shape == (2, 3, 8, 12)


def test_attention_stands_at_the_levels_asked_for() -> None:
    encoder, decoder = Encoder(layout()), Decoder(layout())
    assert [len(level.attentions) for level in encoder.levels] == [0, 2, 0]
    assert [len(level.blocks) for level in encoder.levels] == [2, 2, 2]
    # The decoder runs from the coarsest level, here symmetric, with one block more.
    assert [len(level.attentions) for level in decoder.levels] == [0, 3, 0]
    assert [len(level.blocks) for level in decoder.levels] == [3, 3, 3]
    decoder = Decoder(layout(attention=[True, False, False]))
    assert [len(level.attentions) for level in decoder.levels] == [0, 0, 3]


def test_residual_block() -> None:
    same, wider = block(), block(8, 12)
    x = torch.randn(2, 8, 5, 5)
    for module, shortcut in ((same, x), (wider, wider.shortcut(x))):
        module.conv2.weight.data.zero_()
        module.conv2.bias.data.zero_()
        assert torch.equal(module(x), shortcut)


def test_dropout_acts_in_training_only() -> None:
    module = block(dropout=0.5)
    x = torch.randn(2, 8, 5, 5)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_checkpointing_changes_no_gradient() -> None:
    """Dropout included: the recomputation must sample the same mask."""
    plain, checkpointed = block(dropout=0.5), block(dropout=0.5, gradient_checkpointing=True)
    checkpointed.load_state_dict(plain.state_dict())
    saved_tensors: dict[bool, int] = {}
    gradients = []
    x = torch.randn(2, 8, 5, 5)
    for module in (plain, checkpointed):
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += 1
            return tensor

        torch.manual_seed(4)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = module(x).square().sum()
        saved_tensors[module.gradient_checkpointing] = count
        loss.backward()
        gradients.append([p.grad for p in module.parameters()])
    for left, right in zip(*gradients, strict=True):
        assert torch.equal(left, right)
    assert saved_tensors[True] < saved_tensors[False]


def test_attention_is_softmax_over_all_positions() -> None:
    module = AttentionBlock(8, norm_groups=4)
    x = torch.randn(2, 8, 3, 5)
    h = module.norm(x)
    q, k, v = (layer(h).flatten(2) for layer in (module.query, module.key, module.value))
    weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / 8**0.5, dim=-1)
    attended = torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape)
    torch.testing.assert_close(module(x), x + module.output(attended))


def test_downsample_pads_right_and_below() -> None:
    module = Downsample(4, with_conv=True)
    x = torch.randn(1, 4, 6, 6)
    padded = torch.zeros(1, 4, 7, 7)
    padded[:, :, :6, :6] = x
    torch.testing.assert_close(module(x), F.conv2d(padded, module.conv.weight, module.conv.bias, stride=2))
    torch.testing.assert_close(Downsample(4, with_conv=False)(x), x.reshape(1, 4, 3, 2, 3, 2).mean(dim=(3, 5)))


def test_upsample_repeats() -> None:
    x = torch.randn(1, 4, 3, 2)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.equal(Upsample(4, with_conv=False)(x), repeated)
    module = Upsample(4, with_conv=True)
    torch.testing.assert_close(module(x), module.conv(repeated))


@torch.no_grad()
def test_the_same_bits_on_any_number_of_threads() -> None:
    torch.manual_seed(0)
    # Wide enough for parts of convolutions and activations to be shared out.
    wide = layout(base_channels=64, channel_multipliers=[1, 2], attention=[False, True], z_channels=128)
    encoder, decoder = Encoder(wide), Decoder(wide)
    images, latents = torch.randn(1, 3, 36, 36), torch.randn(1, 128, 18, 18)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append((encoder(images), decoder(latents)))
    finally:
        torch.set_num_threads(before)
    for z, image in found[1:]:
        assert torch.equal(z, found[0][0]) and torch.equal(image, found[0][1])
