"""VAR: what a scale sees, the cache, conditions, presets; and its tokenizer."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch

from rqgen.inference.kv_cache import scale_cache
from rqgen.models import VAR, MultiScaleVQVAE, VARConfig, var_loss
from rqgen.quantizers import MultiScaleConfig, MultiScaleQuantizer

TOKENS = 1 + 6 + 20


QUANTIZER: dict[str, Any] = {"scales": [1, [2, 3], [4, 5]]}


def quantizer_config() -> MultiScaleConfig:
    return tiny.multiscale_config(**QUANTIZER)


def make(**settings: Any) -> VAR:
    # Away from an initialisation that lets nothing through.
    return tiny.perturb_weights(tiny.var(quantizer=QUANTIZER, **settings), std=0.2)


@pytest.fixture
def codes() -> list[torch.Tensor]:
    return [torch.randint(12, (2, h, w)) for h, w in ((1, 1), (2, 3), (4, 5))]


@pytest.mark.parametrize("settings", [{}, {"shared_adaptive_norm": True}, {"normalize_attention": False}])
@torch.no_grad()
def test_scales_one_by_one_with_a_cache_give_the_same_logits(
    codes: list[torch.Tensor], settings: dict[str, Any]
) -> None:
    prior = make(**settings)
    labels = torch.tensor([2, 0])
    expected = prior(codes, labels).logits
    cache, modulation = scale_cache(prior, 2), prior.modulation(labels)
    features = [None, *prior.quantizer.next_inputs(codes)]
    parts = [prior.scale_logits(k, features[k], modulation, cache) for k in range(3)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=2e-5, rtol=1e-5)
    assert cache.length == TOKENS


@torch.no_grad()
def test_a_token_sees_the_scales_before_and_no_other(codes: list[torch.Tensor]) -> None:
    prior = make()
    labels = torch.tensor([1, 1])
    before = prior(codes, labels).logits
    for k, end in enumerate((1, 7, 27)):
        changed = [tokens.clone() for tokens in codes]
        changed[k] = (changed[k] + 1) % 12
        differs = (prior(changed, labels).logits != before).any(dim=-1).any(dim=0)
        assert not differs[:end].any()  # not even its own scale: tokens of a scale are sampled at once
        assert differs[end:].all()
    other = prior(codes, torch.tensor([1, 0])).logits
    assert torch.equal(other[0], before[0]) and (other[1] != before[1]).any(dim=-1).all()


def test_conditions(codes: list[torch.Tensor]) -> None:
    prior = make()
    with torch.no_grad():
        null = prior(codes).logits
        prior.class_embedding.weight[-1] += 1
        assert not torch.equal(prior(codes).logits, null)
        assert torch.equal(prior(codes, torch.tensor([1, 2])).logits, prior(codes, torch.tensor([[1], [2]])).logits)
    assert prior(codes, torch.tensor([1, 2])).condition_dropped is None
    with pytest.raises(ValueError, match="it has no null condition"):
        make(condition_dropout=0.0)(codes)
    with pytest.raises(IndexError, match=r"condition: expected values in \[0, 3\), got 3"):
        prior(codes, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"condition: expected shape \(2,\) or \(2, 1\), got \(3,\)"):
        prior(codes, torch.tensor([0, 1, 2]))


def test_in_training_classes_are_dropped_at_their_rate() -> None:
    prior = make(condition_dropout=0.25).train()
    codes = [torch.zeros(400, h, w, dtype=torch.int64) for h, w in ((1, 1), (2, 3), (4, 5))]
    dropped = prior(codes, torch.zeros(400, dtype=torch.int64)).condition_dropped
    assert 60 < int(dropped.sum()) < 140


def test_drop_path_leaves_out_whole_images_and_keeps_the_mean(codes: list[torch.Tensor]) -> None:
    prior = make(drop_path=0.5, condition_dropout=0.0).train()
    assert [block.drop_path for block in prior.blocks] == [0.0, 0.5]
    y = torch.ones(2000, 2, 3)
    kept = prior.blocks[1]._dropped(y)
    assert set(kept.unique().tolist()) == {0.0, 2.0} and abs(float(kept.mean()) - 1) < 0.1
    assert (kept.flatten(1).amax(1) == kept.flatten(1).amin(1)).all()
    assert torch.equal(prior.blocks[0]._dropped(y), y)
    assert torch.equal(prior.eval().blocks[1]._dropped(y), y)


def test_gradients_reach_all_but_what_the_tokenizer_gave(codes: list[torch.Tensor]) -> None:
    prior = make().train()
    loss = var_loss(prior(codes, torch.tensor([0, 1])), codes)
    loss.total.backward()
    for name, parameter in prior.named_parameters():
        assert (parameter.grad is None) == name.startswith("quantizer."), name
    tokens = torch.tensor([1.0, 6.0, 20.0])
    torch.testing.assert_close((loss.per_scale * tokens).sum() / TOKENS, loss.total.detach())


def test_targets_of_the_loss_are_codes_in_range(codes: list[torch.Tensor]) -> None:
    prior = make()
    output = prior(codes, torch.tensor([0, 1]))
    size = prior.config.quantizer.codebook_size
    for wrong in (-1, size):
        with pytest.raises(IndexError, match=rf"codes: expected values in \[0, {size}\), got {wrong}"):
            var_loss(output, [*codes[:-1], codes[-1].index_fill(0, torch.tensor(1), wrong)])
    with pytest.raises(TypeError, match=r"codes: expected int64, got torch\.float32"):
        var_loss(output, [tokens.float() for tokens in codes])


def test_both_models_compile_into_one_graph() -> None:
    """NumPy's choice of a refinement was traced as a number that only data decide."""
    vae = tiny.multiscale_vqvae()
    prior, images, labels = tiny.var(vae), torch.rand(2, 1, 8, 8) * 2 - 1, torch.tensor([0, 2])
    codes = vae.encode(images)
    compiled = torch.compile(prior, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(codes, labels).logits, prior(codes, labels).logits)
    compiled = torch.compile(vae, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images).reconstruction, vae(images).reconstruction)
    torch._dynamo.reset()


@pytest.mark.parametrize("depth", [16, 24])
def test_presets_have_the_published_number_of_parameters(depth: int) -> None:
    config = VARConfig.preset(f"d{depth}", quantizer=quantizer_config(), code_dim=6, num_classes=3)
    with torch.device("meta"):
        blocks = VAR(config).blocks
    count = sum(parameter.numel() for parameter in blocks.parameters())
    assert abs(count / (73728 * depth**3) - 1) < 0.002  # biases come on top
    assert (config.embed_dim, config.heads, config.drop_path) == (64 * depth, depth, 0.1 * depth / 24)


def test_initialisation_starts_near_the_identity(codes: list[torch.Tensor]) -> None:
    prior = VAR(tiny.var_config(quantizer=QUANTIZER, embed_dim=64))
    with pytest.raises(ValueError, match="prior: it has no codebook yet"):
        prior(codes)
    prior.set_quantizer(MultiScaleQuantizer(quantizer_config(), 6))
    loss = var_loss(prior(codes, torch.tensor([0, 1])), codes).total
    assert abs(float(loss.detach()) - float(torch.tensor(12.0).log())) < 0.05  # nearly uniform
    assert prior.blocks[0].modulation.weight[:128].abs().max() < 1e-4


def test_bad_settings_are_named() -> None:
    def preset(name: str, **settings: Any) -> VARConfig:
        return VARConfig.preset(name, quantizer=quantizer_config(), code_dim=6, num_classes=3, **settings)

    with pytest.raises(ValueError, match=r"name: expected d16.*got 'x16'"):
        preset("x16")
    with pytest.raises(ValueError, match=r"name: expected d16, .* or another dN, got .d1111"):
        preset("d" + "1" * 5000)
    with pytest.raises(ValueError, match="heads: decided by preset 'd4'"):
        preset("d4", heads=2)
    for settings, message in (
        ({"heads": 3}, "embed_dim: expected a multiple of heads, 3, got"),
        ({"layers": 0}, "layers: expected a number >= 1"),
        ({"drop_path": 1.0}, r"drop_path: expected a number in \[0, 1\)"),
        ({"mlp_ratio": 0.0}, "mlp_ratio: expected a number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            VARConfig(**settings)


def test_a_quantizer_of_another_tokenizer_is_refused() -> None:
    prior = make()
    other = MultiScaleConfig(codebook_size=12, scales=[1, 2, 4], refinements=2)
    with pytest.raises(ValueError, match=r"quantizer: expected scales \[\[1, 1\], \[2, 3\], \[4, 5\]\], got"):
        prior.set_quantizer(MultiScaleQuantizer(other, 6))
    with pytest.raises(ValueError, match="quantizer: expected code_dim 6, got 5"):
        prior.set_quantizer(MultiScaleQuantizer(quantizer_config(), 5))
    broken = MultiScaleQuantizer(quantizer_config(), 6)
    broken.codebook.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="expected a finite codebook"):
        prior.set_quantizer(broken)


# --- the tokenizer


def make_tokenizer(**settings: Any) -> MultiScaleVQVAE:
    return tiny.multiscale_vqvae(attention=True, quantizer=QUANTIZER, **settings)


def test_tokenizer_trains_and_comes_back() -> None:
    vae = make_tokenizer().train()
    images = torch.rand(4, 1, 8, 10) * 2 - 1
    loss = vae.loss(images)
    parts = loss.reconstruction + loss.codebook + 0.25 * loss.commitment
    torch.testing.assert_close(loss.total, parts)
    loss.total.backward()
    assert vae.encoder.conv_in.weight.grad.abs().sum() > 0 and vae.codebooks.grad.abs().sum() > 0

    vae.eval()
    codes = vae.encode(images)
    assert [tuple(tokens.shape) for tokens in codes] == [(4, 1, 1), (4, 2, 3), (4, 4, 5)]
    decoded = vae.decode(codes)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    with torch.no_grad():
        torch.testing.assert_close(vae(images).reconstruction.clamp(-1, 1), decoded)
    assert torch.equal(vae.decode_partial(codes, 3), decoded)
    assert not torch.equal(vae.decode_partial(codes, 1), decoded)
    with pytest.raises(ValueError, match=r"images: expected \(B, 1, 8, 10\), got shape \(4, 1, 10, 8\)"):
        vae.encode(images.transpose(2, 3))


def test_bad_tokenizer_settings_are_named() -> None:
    for settings, message in (
        ({"latent_kernel": 2}, "latent_kernel: expected an odd number"),
        ({"norm_groups": 3}, "norm_groups: expected a divisor"),
        ({"channel_multipliers": []}, "channel_multipliers: expected one number"),
        ({"commitment_weight": -1.0}, "commitment_weight: expected a number >= 0"),
        ({"reconstruction_loss": "psnr"}, "reconstruction_loss: expected one of mse, l1"),
        ({"dropout": 1.0}, "dropout: expected 0 <= dropout < 1"),
        ({"z_channels": 0}, "z_channels: expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            make_tokenizer(**settings)
