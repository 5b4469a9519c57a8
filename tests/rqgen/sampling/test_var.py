"""Token maps sampled scale by scale, and parts of images kept."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import rqkernels
from rqgen.inference import SamplingParams, ScaleSampler
from rqgen.inference.kv_cache import KVCache
from rqgen.models import (
    VAR,
    MultiScaleVQVAE,
)
from rqgen.sampling import KnownRows, edit, generate, sampling_cost
from rqgen.sampling.edit import _refine_by_reencoding

K = 12
CLASSES = 3
LABELS = torch.tensor([0, 2, 1, 0, 2])
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def vae() -> MultiScaleVQVAE:
    torch.manual_seed(1)
    return tiny.multiscale_vqvae(channel_multipliers=[1, 1])


@pytest.fixture(scope="module")
def prior(vae: MultiScaleVQVAE) -> VAR:
    torch.manual_seed(2)
    return tiny.perturb_weights(tiny.var(vae, num_classes=CLASSES), std=0.3)


def flat(codes: list[Tensor]) -> Tensor:
    return torch.cat([maps.flatten(1) for maps in codes], dim=1)


@torch.no_grad()
def draw_plainly(prior: VAR, label: int, image: int, *, seed: int, guidance: float = 0.0, **options: Any) -> Tensor:
    """One image's tokens, every scale from a pass over all of them, every token by itself."""
    codes = [torch.zeros(1, h, w, dtype=torch.int64) for h, w in prior.scales]
    count = len(codes)
    for k, (begin, end) in enumerate(zip([0, *prior.ends], prior.ends, strict=False)):
        logits = prior(codes, torch.tensor([label])).logits[0, begin:end]
        g = guidance * k / (count - 1)
        logits = (1 + g) * logits - g * prior(codes).logits[0, begin:end]
        settings = {name: value[k] if isinstance(value, tuple) else value for name, value in options.items()}
        tokens = [
            rqkernels.reference.sample_logits(logits[i], seed=seed, offset=image, stream=begin + i, **settings)
            for i in range(end - begin)
        ]
        codes[k] = torch.stack(tokens).view(1, *prior.scales[k])
    return flat(codes)[0]


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, {}),
        ({"cfg_scale": 2.0}, {"guidance": 2.0}),
        ({"top_k": 3, "temperature": 0.7}, {"top_k": 3, "temperature": 0.7}),
        ({"top_p": [1.0, 0.5, None]}, {"top_p": (1.0, 0.5, None)}),
        ({"temperature": 0}, {"temperature": 0}),
    ],
)
def test_tokens_are_drawn_as_said(
    prior: VAR, vae: MultiScaleVQVAE, options: dict[str, Any], plain: dict[str, Any]
) -> None:
    drawn = generate(prior, vae, LABELS, seed=7, offset=20, **options)
    for i, label in enumerate(LABELS.tolist()):
        assert torch.equal(flat(drawn.codes)[i], draw_plainly(prior, label, 20 + i, seed=7, **plain))
    assert torch.equal(
        drawn.images, torch.cat([vae.decode([maps[i : i + 1] for maps in drawn.codes]) for i in range(5)])
    )


def test_images_do_not_depend_on_the_batch(prior: VAR, vae: MultiScaleVQVAE) -> None:
    whole = generate(prior, vae, LABELS, seed=3, cfg_scale=1.0)
    split = generate(prior, vae, LABELS, seed=3, cfg_scale=1.0, batch_size=2)
    assert torch.equal(whole.images, split.images) and torch.equal(flat(whole.codes), flat(split.codes))
    part = generate(prior, vae, LABELS[3:], seed=3, offset=3, cfg_scale=1.0)
    assert torch.equal(whole.images[3:], part.images)
    assert not torch.equal(whole.images, generate(prior, vae, LABELS, seed=4, cfg_scale=1.0).images)


class Work(TorchFunctionMode):
    """Every product with weights as (weight, rows), every attention as (rows, queries, keys)."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[Tensor, int]] = []
        self.attentions: list[tuple[int, int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            x, weight = args[:2]
            self.products.append((weight, x.shape[:-1].numel()))
        elif func is F.scaled_dot_product_attention:
            q, k, _ = args
            self.attentions.append((q.shape[0], q.shape[2], k.shape[2]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("guidance", [0.0, 2.0])
@torch.no_grad()
def test_weights_are_read_once_per_scale_and_nothing_is_computed_twice(
    prior: VAR, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[int, int, int]] = []
    write = KVCache.write

    def watched_write(cache: KVCache, layer: int, k_bhnd: Tensor, v_bhnd: Tensor) -> tuple[Tensor, Tensor]:
        written.append((layer, cache.length, cache.length + k_bhnd.shape[2]))
        return write(cache, layer, k_bhnd, v_bhnd)

    monkeypatch.setattr(KVCache, "write", watched_write)
    params = SamplingParams(cfg_scale=guidance).resolve(prior, LABELS[:1])
    with Work() as work:
        ScaleSampler(prior).sample(LABELS[:1, None], params)
    rows, tokens, ends = 2 if guidance else 1, (1, 4, 16), (1, 5, 21)
    # Each linear layer once per scale, for that scale's tokens alone; the condition's once, for one token.
    seen: dict[str, list[int]] = {}
    names = {parameter.data_ptr(): name for name, parameter in prior.named_parameters()}
    for weight, count in work.products:
        seen.setdefault(names[weight.data_ptr()].removesuffix(".weight"), []).append(count)
    of_tokens = [rows * count for count in tokens]
    linear = [name for name, module in prior.named_modules() if isinstance(module, torch.nn.Linear)]
    assert seen.keys() == set(linear)
    for name in linear:
        expected = of_tokens[1:] if name == "word_embedding" else [rows] if "modulation" in name else of_tokens
        assert seen[name] == expected, name
    # Keys and values are written once each, and read by every later scale in one go.
    assert written == [(layer, end - new, end) for new, end in zip(tokens, ends, strict=True) for layer in range(2)]
    assert Counter(work.attentions) == Counter({(rows, q, k): 2 for q, k in zip(tokens, ends, strict=True)})
    # It is what the cost says.
    cost, width = sampling_cost(prior.config, rows), prior.config.embed_dim
    assert sum(weight.numel() for weight, _ in work.products) == sum(scale.weights for scale in cost)
    assert sum(2 * weight.numel() * count for weight, count in work.products) == sum(scale.products for scale in cost)
    assert sum(4 * width * b * q * k for b, q, k in work.attentions) == sum(scale.attention for scale in cost)
    moved = sum(2 * width * b * (q + k) for b, q, k in work.attentions)
    assert moved == sum(scale.states for scale in cost)


def test_without_a_condition_the_null_condition_is_drawn(prior: VAR, vae: MultiScaleVQVAE) -> None:
    drawn = generate(prior, vae, num=2, seed=1)
    assert drawn.images.shape == (2, *SHAPE)
    with pytest.raises(ValueError, match="cfg_scale: guidance needs a condition"):
        generate(prior, vae, num=2, cfg_scale=1.0)


def test_smooth_mixtures(prior: VAR, vae: MultiScaleVQVAE) -> None:
    smooth = generate(prior, vae, LABELS, seed=3, smooth=True)
    assert torch.equal(smooth.images, generate(prior, vae, LABELS, seed=3, smooth=True, batch_size=1).images)
    assert not torch.equal(smooth.images, generate(prior, vae, LABELS, seed=3).images)
    assert not torch.equal(smooth.images, generate(prior, vae, LABELS, seed=4, smooth=True).images)
    # With one code left nothing is mixed.
    greedy = generate(prior, vae, LABELS, seed=3, top_k=1)
    mixed = generate(prior, vae, LABELS, seed=3, top_k=1, smooth=True)
    assert torch.equal(flat(greedy.codes), flat(mixed.codes))
    torch.testing.assert_close(greedy.images, mixed.images, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"known": KnownRows(torch.zeros(1, 2, 2, 2), 1)}, "known: a VAR samples whole token maps; rqgen.edit"),
        ({"precision": "int8"}, "precision: a VAR is sampled in 'fp32', got 'int8'"),
        ({"top_k": [1, 2]}, r"top_k: expected one value, or 3 \(one per scale\), got 2"),
    ],
)
def test_bad_arguments_are_named(prior: VAR, vae: MultiScaleVQVAE, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(prior, vae, [0], **options)


def test_a_tokenizer_of_another_prior_is_refused(prior: VAR, vae: MultiScaleVQVAE) -> None:
    other = MultiScaleVQVAE(vae.config)
    with pytest.raises(ValueError, match="expected the codebooks that the prior was made with"):
        generate(prior, other, [0])
    with pytest.raises(TypeError, match="vae: expected an MultiScaleVQVAE, got VAR"):
        generate(prior, prior, [0])


# --- what weights do not tell


def mixed(module: Any, inputs: Any, output: Any) -> Any:
    return output + 0.7 * output.roll(1, -1)


class Adapted(torch.nn.Module):
    """An adapter around a layer, with the attributes by which the layer's own would go on being read."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    weight = property(lambda self: self.base_layer.weight)
    bias = property(lambda self: self.base_layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return mixed(self, None, self.base_layer(x))


class Bare(torch.nn.Module):
    """Another layer, without a weight that could be asked for its dtype."""

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base

    def forward(self, x: Tensor) -> Tensor:
        return mixed(self, None, self.base_layer(x))


class Sharper(VAR):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        return output._replace(logits=3 * output.logits)


def hook_on(path: str) -> Any:
    return lambda prior: prior.get_submodule(path).register_forward_hook(mixed)


def replace(path: str, cls: type[torch.nn.Module]) -> Any:
    return lambda prior: prior.set_submodule(path, cls(prior.get_submodule(path)))


LINEAR = ("blocks.1.attention.qkv", "blocks.0.mlp.2", "blocks.1.modulation", "classifier", "word_embedding")
PARTS = {
    **{f"hook on {path}": hook_on(path) for path in (*LINEAR, "blocks.0", "level_embedding", "class_embedding")},
    **{
        f"{cls.__name__} {path}": replace(path, cls) for path in (*LINEAR, "level_embedding") for cls in (Adapted, Bare)
    },
}


def assert_draws_what_it_computes(prior: VAR, vae: MultiScaleVQVAE, before: Tensor) -> None:
    drawn = flat(generate(prior, vae, LABELS, seed=7, cfg_scale=2.0).codes)
    expected = [draw_plainly(prior, label, i, seed=7, guidance=2.0) for i, label in enumerate(LABELS.tolist())]
    assert torch.equal(drawn, torch.stack(expected)) and not torch.equal(drawn, before)


@pytest.mark.parametrize("part", PARTS)
def test_parts_that_are_changed_count(prior: VAR, vae: MultiScaleVQVAE, part: str) -> None:
    before, changed = flat(generate(prior, vae, LABELS, seed=7, cfg_scale=2.0).codes), copy.deepcopy(prior)
    PARTS[part](changed)
    assert_draws_what_it_computes(changed, vae, before)


def test_a_quantized_prior_is_drawn_from(prior: VAR, vae: MultiScaleVQVAE) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(prior, {torch.nn.Linear}, torch.qint8)
    assert generate(quantized, vae, LABELS, seed=7).images.isfinite().all()


@pytest.mark.parametrize("kind", ["hook", "hook on all modules", "forward of its own", "subclass"])
def test_a_prior_that_is_changed_as_a_whole_is_called_as_a_whole(
    prior: VAR, vae: MultiScaleVQVAE, images: Tensor, kind: str
) -> None:
    def sharpen(module: torch.nn.Module, inputs: Any, output: Any) -> Any:
        return output._replace(logits=3 * output.logits) if isinstance(module, VAR) else None

    before, changed = flat(generate(prior, vae, LABELS, seed=7, cfg_scale=2.0).codes), copy.deepcopy(prior)
    with contextlib.ExitStack() as stack:
        if kind == "hook":
            changed.register_forward_hook(sharpen)
        elif kind == "hook on all modules":
            stack.callback(torch.nn.modules.module.register_module_forward_hook(sharpen).remove)
        elif kind == "subclass":
            changed = Sharper(prior.config, vae.quantizer).eval()
            changed.load_state_dict(prior.state_dict())
        else:
            forward = changed.forward
            changed.forward = lambda *inputs: sharpen(changed, None, forward(*inputs))
        with pytest.warns(UserWarning, match="prior: it has forward hooks or a forward of its own") as warned:
            assert_draws_what_it_computes(changed, vae, before)
            edited = edit(changed, vae, images, lower_half(), LABELS[:3], seed=2)
            assert edited.images.shape == images.shape
            assert generate(changed, vae, num=2).images.shape == (2, *SHAPE)
        assert len(warned) == 1
        with pytest.raises(ValueError, match="smooth: mixtures of codes do not pass through forward"):
            generate(changed, vae, LABELS, smooth=True)


def test_the_tokenizer_s_refinements_are_its_own(prior: VAR, vae: MultiScaleVQVAE) -> None:
    """The prior has a copy of them, for what it sees; images are the tokenizer's."""
    changed = copy.deepcopy(vae)
    changed.quantizer.refinements[1].register_forward_hook(lambda module, inputs, output: 0.5 * output)
    drawn = generate(prior, changed, LABELS[:2], seed=7)
    one_by_one = [changed.decode([maps[i : i + 1] for maps in drawn.codes]) for i in range(2)]
    assert torch.equal(drawn.images, torch.cat(one_by_one))
    for smooth in (False, True):
        ours, theirs = (generate(prior, some, LABELS[:2], seed=7, smooth=smooth).images for some in (changed, vae))
        assert not torch.equal(ours, theirs)


def test_a_parametrized_quantizer_of_the_tokenizer(prior: VAR, vae: MultiScaleVQVAE) -> None:
    """Codes stand for the value of a parametrized codebook; a prior carries that value."""
    changed = copy.deepcopy(vae)
    torch.nn.utils.parametrizations.weight_norm(changed.quantizer.refinements[0])
    torch.nn.utils.parametrize.register_parametrization(changed.quantizer, "codebook", torch.nn.Hardtanh())
    with pytest.raises(ValueError, match="vae: expected the codebooks that the prior was made with"):
        generate(prior, changed, LABELS)
    other = VAR(prior.config, changed.quantizer)
    assert torch.equal(other.quantizer.codebook, vae.codebooks.clamp(-1, 1))
    drawn = generate(other, changed, LABELS[:1], seed=7)
    assert torch.equal(drawn.images, changed.decode(drawn.codes))


# --- editing


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(5)) * 2 - 1


def lower_half() -> Tensor:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[4:] = True
    return mask


def test_nothing_under_the_mask_is_looked_at(prior: VAR, vae: MultiScaleVQVAE, images: Tensor) -> None:
    mask = lower_half()
    hidden = torch.where(mask, torch.rand_like(images), images)
    # The fill is a mean of what is known, so what is hidden cannot matter to the last bit.
    first, second = (edit(prior, vae, some, mask, LABELS[:3], seed=2) for some in (images, hidden))
    assert torch.equal(first.images, second.images)
    other = edit(prior, vae, images.flip(3), mask, LABELS[:3], seed=2)
    assert not torch.equal(first.images, other.images)


def test_what_is_known_comes_back(prior: VAR, vae: MultiScaleVQVAE, images: Tensor) -> None:
    edited = edit(prior, vae, images, lower_half(), LABELS[:3], seed=2)
    assert torch.equal(edited.images[:, :, :4], images[:, :, :4])
    assert torch.equal(edited.images[:, :, 4:], edited.decoded[:, :, 4:])
    assert torch.equal(vae.decode(edited.codes), edited.decoded)


def test_known_places_are_as_close_as_the_tokenizer_comes(prior: VAR, vae: MultiScaleVQVAE, images: Tensor) -> None:
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[7, 7] = True  # so little that every place is kept
    edited = edit(prior, vae, images, mask, LABELS[:3])
    error = (edited.decoded - images)[:, :, :6].square().mean()
    assert error < (vae.decode(vae.encode(images)) - images)[:, :, :6].square().mean()


@torch.no_grad()
def test_each_image_takes_the_correction_that_brings_its_known_part_closest(vae: MultiScaleVQVAE) -> None:
    images, drawn = torch.rand(2, 12, *SHAPE, generator=torch.Generator().manual_seed(6)) * 2 - 1
    known = ~lower_half().expand(12, 1, 8, 8)
    maps, decoded = _refine_by_reencoding(vae, images, known, drawn)
    assert torch.equal(vae.decode(maps), decoded)
    target, errors = torch.where(known, images, drawn), []
    for _ in range(4):
        error = (images - vae.decode(vae.encode(target))) * known
        errors.append(error.square().mean(dim=(1, 2, 3)))
        target = target + error
    found = ((images - decoded) * known).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(found, torch.stack(errors).amin(dim=0))
    assert found.mean() < 0.95 * errors[0].mean()


def test_places_under_the_mask_are_drawn(prior: VAR, vae: MultiScaleVQVAE, images: Tensor) -> None:
    mask = lower_half()
    one, two = (edit(prior, vae, images, mask, LABELS[:3], seed=seed) for seed in (0, 1))
    assert (one.codes[-1][:, 2:] != two.codes[-1][:, 2:]).any()
    assert not torch.equal(one.images[:, :, 4:], two.images[:, :, 4:])


def test_edits_do_not_depend_on_the_batch(prior: VAR, vae: MultiScaleVQVAE, images: Tensor) -> None:
    masks = torch.stack([lower_half(), ~lower_half(), lower_half().t()])
    whole = edit(prior, vae, images, masks, LABELS[:3], seed=2, cfg_scale=1.0).images
    for i in range(3):
        one = edit(prior, vae, images[i : i + 1], masks[i], LABELS[i : i + 1], seed=2, offset=i, cfg_scale=1.0)
        assert torch.equal(one.images[0], whole[i])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": torch.zeros(8, 8)}, TypeError, "mask: expected bool"),
        ({"mask": torch.ones(8, 8, dtype=torch.bool)}, ValueError, "mask: expected a pixel to keep in every image"),
        ({"mask": torch.zeros(4, 8, dtype=torch.bool)}, ValueError, r"mask: expected \(8, 8\) or \(3, 8, 8\)"),
        ({"images": torch.zeros(3, 1, 8, 4)}, ValueError, r"images: expected \(N, 1, 8, 8\)"),
        ({"images": torch.full((3, 1, 8, 8), 2.0)}, ValueError, r"images: expected values in \[-1, 1\]"),
        (
            {"images": torch.zeros(3, 1, 8, 8).double()},
            TypeError,
            "images: expected torch.float32, as the tokenizer has",
        ),
        ({"images": None}, TypeError, "images: expected a tensor, got NoneType"),
        ({"condition": [0]}, ValueError, r"condition: expected one per image \(3\), got 1"),
        ({"condition": [0, 1, 3]}, IndexError, "condition: expected values in"),
    ],
)
def test_bad_edits_are_named(
    prior: VAR, vae: MultiScaleVQVAE, images: Tensor, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"images": images, "mask": lower_half(), "condition": LABELS[:3], **change}
    with pytest.raises(error, match=message):
        edit(prior, vae, **arguments)


def test_an_rqtransformer_completes_from_the_rows_above() -> None:
    rqvae = tiny.rqvae(channel_multipliers=[1, 1])
    rows_prior = tiny.rq_prior(rqvae)
    images = torch.rand(2, *SHAPE) * 2 - 1
    edited = edit(rows_prior, rqvae, images, lower_half(), seed=3)
    filled = images.clone()
    filled[:, :, 4:] = images[:, :, :4].mean(dim=(2, 3), keepdim=True)
    codes = rqvae.encode(filled)
    assert torch.equal(edited.codes[:, :2], codes[:, :2])
    again = generate(rows_prior, rqvae, known=KnownRows(codes, 2), seed=3)
    assert torch.equal(edited.decoded, again.images)
    assert torch.equal(edited.images, torch.where(lower_half(), again.images, images))
    with pytest.raises(ValueError, match="mask: expected at least the last row to be sampled, got none"):
        edit(rows_prior, rqvae, images, torch.zeros(8, 8, dtype=torch.bool))
    for mask in (~lower_half(), lower_half().t()):
        with pytest.raises(ValueError, match="mask: an RQTransformer samples in raster order and sees only what"):
            edit(rows_prior, rqvae, images, mask)


@pytest.mark.parametrize("smooth", [False, True])
def test_logits_without_a_distribution_are_an_error(
    prior: VAR, vae: MultiScaleVQVAE, monkeypatch: pytest.MonkeyPatch, smooth: bool
) -> None:
    """On a GPU the code is -1, and nothing is said at once."""
    monkeypatch.setattr(
        rqkernels, "sample_logits", lambda logits, offset, **_: torch.full(logits.shape[:-1], -int(offset == 6))
    )
    with pytest.raises(ValueError, match="prior: the logits of image 6 have NaN"):
        generate(prior, vae, [0, 1], offset=5, smooth=smooth)
