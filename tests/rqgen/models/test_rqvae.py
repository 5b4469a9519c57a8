from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch.nn import functional as F

from rqgen.config import from_dict, to_dict
from rqgen.models import RQVAE, RQVAEConfig
from rqgen.quantizers import QuantizerConfig


def config(quantizer: dict[str, Any] | None = None, **changes: Any) -> RQVAEConfig:
    settings = {
        "image_channels": 3,
        "resolution": 16,
        "channel_multipliers": [1, 1, 2],
        "attention_resolutions": [4],
        "z_channels": 8,
        "code_shape": [4, 4, 3],
        "quantizer": {"codebook_size": 16, "restart_dead_codes": False, **(quantizer or {})},
        **changes,
    }
    return tiny.rqvae_config(**settings)


SHAPES = [
    pytest.param({}, (16, 16), id="plain"),
    pytest.param({"code_shape": [2, 2, 3]}, (16, 16), id="coarse"),
    pytest.param({"image_size": [16, 24], "code_shape": [4, 6, 2]}, (16, 24), id="wide"),
    pytest.param({"image_size": [8, 16], "code_shape": [2, 1, 2]}, (8, 16), id="wide-uneven"),
    pytest.param({"code_shape": [4, 4, 1]}, (16, 16), id="vq"),
    pytest.param({"image_channels": 1}, (16, 16), id="grey"),
    pytest.param({"quantizer": {"shared_codebook": False}}, (16, 16), id="separate"),
]


@pytest.mark.parametrize(("changes", "size"), SHAPES)
def test_shapes_and_round_trips(changes: dict[str, Any], size: tuple[int, int], device: torch.device) -> None:
    cfg = config(**changes)
    vae = RQVAE(cfg).to(device).eval()
    images = torch.rand(2, cfg.image_channels, *size, device=device) * 2 - 1
    h, w, depth = vae.code_shape
    assert (h, w, depth) == tuple(cfg.code_shape)
    assert vae.depth == depth
    assert vae.codebook_size == 16
    assert vae.codebooks.shape[-2:] == (16, cfg.code_dim)
    latents = vae.encode_latents(images)
    assert latents.shape == (2, h, w, cfg.code_dim)
    codes = vae.encode(images)
    assert codes.shape == (2, h, w, depth)
    assert codes.dtype == torch.int64
    output = vae(images)
    assert torch.equal(output.codes, codes)
    decoded = vae.decode(codes)
    assert decoded.shape == images.shape
    torch.testing.assert_close(output.reconstruction, decoded)
    torch.testing.assert_close(vae.decode_partial(codes, depth), decoded)
    assert not decoded.requires_grad
    if depth > 1:
        assert not torch.allclose(vae.decode_partial(codes, 1), decoded)


def test_a_code_vector_is_its_latents_row_by_row() -> None:
    fine, coarse = RQVAE(config()).eval(), RQVAE(config(code_shape=[2, 4, 3])).eval()
    names = fine.state_dict().keys()
    coarse.load_state_dict({k: v for k, v in fine.state_dict().items() if not k.startswith("quantizer.")}, strict=False)
    assert names == coarse.state_dict().keys()
    images = torch.randn(2, 3, 16, 16)
    latents, patches = fine.encode_latents(images), coarse.encode_latents(images)
    expected = torch.cat([latents[:, 0::2], latents[:, 1::2]], dim=-1)
    torch.testing.assert_close(patches, expected)
    torch.testing.assert_close(coarse.decode_latents(patches), fine.decode_latents(latents))


def test_other_image_sizes_give_proportional_codes() -> None:
    vae = RQVAE(config()).eval()
    images = torch.randn(1, 3, 32, 8)
    assert vae.encode(images).shape == (1, 8, 2, 3)
    assert vae.decode(vae.encode(images)).shape == images.shape


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_loss_terms(kind: str) -> None:
    vae = RQVAE(config(reconstruction_loss=kind, commitment_weight=0.7)).eval()
    images = torch.randn(2, 3, 16, 16)
    loss = vae.loss(images)
    difference = loss.output.reconstruction - images
    expected = difference.square().mean() if kind == "mse" else difference.abs().mean()
    torch.testing.assert_close(loss.reconstruction, expected)
    torch.testing.assert_close(loss.total, expected + 0.7 * loss.output.commitment_loss)
    assert loss.commitment is loss.output.commitment_loss


def test_loss_is_float32_under_autocast(device: torch.device) -> None:
    vae = RQVAE(config()).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = vae.loss(torch.randn(2, 3, 16, 16, device=device))
    assert loss.output.reconstruction.dtype == torch.bfloat16
    assert {loss.total.dtype, loss.reconstruction.dtype, loss.commitment.dtype} == {torch.float32}
    assert vae.codebooks.dtype == torch.float32
    loss.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


def test_a_bfloat16_model_works() -> None:
    vae = RQVAE(config()).to(torch.bfloat16).eval()
    images = torch.randn(2, 3, 16, 16, dtype=torch.bfloat16)
    assert vae.codebooks.dtype == torch.float32
    codes = vae.encode(images)
    assert vae.decode(codes).dtype == torch.bfloat16
    torch.testing.assert_close(vae(images).reconstruction, vae.decode(codes))


def test_gradient_passes_the_quantizer_to_every_parameter() -> None:
    vae = RQVAE(config())
    reconstruction = vae(torch.randn(2, 3, 16, 16)).reconstruction
    reconstruction.square().mean().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None, name
        # A key's bias shifts all scores of a query alike, which softmax ignores.
        assert name.endswith("key.bias") or parameter.grad.abs().sum() > 0, name


def test_training_lowers_the_loss_and_moves_the_codebook() -> None:
    small = {"resolution": 8, "channel_multipliers": [1, 1], "attention_resolutions": []}
    vae = RQVAE(config({"decay": 0.9, "restart_dead_codes": True}, **small))
    images = F.interpolate(torch.randn(8, 3, 2, 2), size=(8, 8), mode="bilinear")
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = vae.loss(images)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.reconstruction.item())
    assert losses[-1] < 0.4 * losses[0]
    assert (vae.quantizer.usage.perplexity() > 3).all()


def test_only_calling_in_train_mode_changes_state() -> None:
    vae = RQVAE(config())
    images = torch.randn(2, 3, 16, 16)
    before = copy.deepcopy(vae.state_dict())
    codes = vae.encode(images)
    vae.decode(codes)
    vae.decode_partial(codes, 1)
    vae.soft_codes(images, 0.5)
    vae.encode_latents(images)
    vae.eval()
    vae.loss(images)
    for name, tensor in vae.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    vae.train()
    vae(images)
    assert not torch.equal(vae.codebooks, before["quantizer.codebook"])


@pytest.mark.parametrize("shared", [True, False])
def test_soft_codes(shared: bool) -> None:
    vae = RQVAE(config({"shared_codebook": shared})).eval()
    images = torch.randn(2, 3, 16, 16)
    soft, codes = vae.soft_codes(images, 0.3)
    assert soft.shape == (2, 4, 4, 3, 16)
    assert torch.equal(codes, vae.encode(images))
    latents = vae.encode_latents(images).detach()
    book = vae.codebooks if shared else vae.codebooks[1]
    residual = latents - vae.quantizer.embed(codes)[..., 0, :]
    expected = torch.softmax(-torch.cdist(residual.reshape(-1, 4), book).square() / 0.3, dim=-1)
    torch.testing.assert_close(soft[..., 1, :].reshape(-1, 16), expected)
    assert torch.equal(soft[..., 0, :].argmax(-1), codes[..., 0])


def test_stochastic_soft_codes_depend_on_seed_and_position_only() -> None:
    vae = RQVAE(config()).eval()
    images = torch.randn(3, 3, 16, 16)
    _, codes = vae.soft_codes(images, 5.0, stochastic=True, seed=1)
    torch.rand(5)
    _, again = vae.soft_codes(images, 5.0, stochastic=True, seed=1)
    assert torch.equal(codes, again)
    _, last = vae.soft_codes(images[2:], 5.0, stochastic=True, seed=1, offset=32)
    assert torch.equal(last, codes[2:])
    _, other = vae.soft_codes(images, 5.0, stochastic=True, seed=2)
    assert not torch.equal(codes, other)
    assert not torch.equal(codes, vae.encode(images))
    with pytest.raises(ValueError, match="tau"):
        vae.soft_codes(images, 0.0)


def test_save_and_load(tmp_path: Path) -> None:
    vae = RQVAE(config(code_shape=[2, 4, 2], image_size=[16, 16]))
    images = torch.randn(2, 3, 16, 16)
    vae(images)
    vae.save_pretrained(tmp_path / "vae")
    loaded = RQVAE.from_pretrained(tmp_path / "vae")
    assert loaded.config == vae.config
    for name, tensor in vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    vae.eval()
    assert torch.equal(vae.encode(images), loaded.encode(images))
    assert torch.equal(vae(images).reconstruction, loaded(images).reconstruction)


def test_config_as_plain_data() -> None:
    cfg = config(image_size=[16, 24], code_shape=[4, 6, 2])
    assert from_dict(RQVAEConfig, to_dict(cfg), where="test") == cfg
    default = RQVAEConfig()
    assert default.latent_shape == (8, 8, 256)
    assert default.code_dim == 256
    assert default.attention_levels == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_channels": 0}, "image_channels: expected at least 1, got 0"),
        ({"num_res_blocks": 0}, "num_res_blocks: .*got 0"),
        ({"resolution": 18}, "resolution: expected a multiple of 4 .*got 18"),
        ({"image_size": [16, 18]}, r"image_size: expected a multiple of 4 .*got \[16, 18\]"),
        ({"image_size": [16]}, r"image_size: expected \[height, width\]"),
        ({"channel_multipliers": []}, "channel_multipliers"),
        ({"channel_multipliers": [1, 0]}, "channel_multipliers"),
        ({"code_shape": [4, 4]}, "code_shape"),
        ({"code_shape": [3, 4, 3]}, r"code_shape: .*divide the latents' \[4, 4\], got \[3, 4\]"),
        ({"code_shape": [8, 8, 3]}, "code_shape"),
        ({"quantizer": QuantizerConfig(depth=2)}, r"quantizer\.depth: expected .* 3, got 2"),
        ({"norm_groups": 3}, "norm_groups: .*got 3 for 8"),
        ({"dropout": 1.0}, "dropout"),
        ({"commitment_weight": -1.0}, "commitment_weight"),
        ({"reconstruction_loss": "huber"}, "reconstruction_loss: expected one of mse, l1, got 'huber'"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], message: str) -> None:
    good = {**vars(config())}
    with pytest.raises(ValueError, match=message):
        RQVAEConfig(**{**good, **changes})


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (3, 16, 16), (2, 3, 16, 18), (2, 3, 0, 16)])
def test_wrong_images_are_named(shape: tuple[int, ...]) -> None:
    vae = RQVAE(config())
    for call in (vae, vae.encode, vae.loss, vae.encode_latents):
        with pytest.raises(ValueError, match="images: expected"):
            call(torch.zeros(shape))


def test_wrong_codes_are_named() -> None:
    vae = RQVAE(config())
    for shape in ((4, 4, 3), (1, 4, 4, 2)):
        with pytest.raises(ValueError, match=r"codes: expected \(B, h, w, 3\), got shape"):
            vae.decode(torch.zeros(shape, dtype=torch.int64))
        with pytest.raises(ValueError, match="codes: expected"):
            vae.decode_partial(torch.zeros(shape, dtype=torch.int64), 1)
    codes = torch.zeros(1, 4, 4, 3, dtype=torch.int64)
    for depth in (0, 4):
        with pytest.raises(ValueError, match="depth: expected"):
            vae.decode_partial(codes, depth)
    codes[0, 1, 2, 1] = 16
    with pytest.raises(IndexError, match="codes"):
        vae.decode(codes)
    with pytest.raises(ValueError, match="latents_bhwc: expected"):
        vae.decode_latents(torch.zeros(1, 4, 4, 5))
