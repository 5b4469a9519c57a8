"""All four models in every dtype, mode and layout, with the inputs people have at hand: right, or one clear line."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rqkernels
from rqgen.evaluation import evaluate_reconstruction
from rqgen.inference.kv_cache import scale_cache, stack_caches
from rqgen.models import (
    RQVAE,
    VAR,
    MultiScaleVQVAE,
    RQTransformer,
    SoftLabels,
    load_pretrained,
    prior_loss,
    var_loss,
)
from rqgen.quantizers import MultiScaleConfig, MultiScaleQuantizer, QuantizerConfig, ResidualQuantizer, code_fingerprint
from rqgen.sampling import edit, generate

K, C, CLASSES = 16, 8, 3
IMAGE = (3, 8, 8)
SHORT = [torch.float16, torch.bfloat16]
DTYPES = [*SHORT, torch.float64]
TOKENIZERS = ["rqvae", "separate", "multiscale"]
PRIORS = ["rqtransformer", "var"]
LABELS = torch.tensor([2, 0])

Codes = Tensor | list[Tensor]


def make_vae(kind: str = "rqvae", **settings: Any) -> RQVAE | MultiScaleVQVAE:
    common = {"image_channels": 3, "z_channels": C, **settings}
    if kind == "multiscale":
        return tiny.multiscale_vqvae(attention=True, quantizer={"codebook_size": K, "init": "random"}, **common)
    quantizer = {"codebook_size": K, "shared_codebook": kind == "rqvae", "init": "random"}
    return tiny.rqvae(attention_resolutions=[4], embed_dim=C, code_shape=[4, 4, 3], quantizer=quantizer, **common)


def make_prior(kind: str, vae: RQVAE | MultiScaleVQVAE, **settings: Any) -> RQTransformer | VAR:
    build = tiny.var if kind == "var" else tiny.rq_prior
    # Larger weights than the first ones: condition and codes must matter.
    return tiny.perturb_weights(build(vae, embed_dim=32, num_classes=CLASSES, **settings), std=0.1)


def make_pair(kind: str, **settings: Any) -> tuple[RQTransformer | VAR, RQVAE | MultiScaleVQVAE]:
    vae = make_vae("multiscale" if kind == "var" else "rqvae")
    return make_prior(kind, vae, **settings), vae


def make_images(count: int = 2) -> Tensor:
    return torch.rand(count, *IMAGE) * 2 - 1


def random_codes(kind: str, count: int = 2) -> Codes:
    if kind in ("multiscale", "var"):
        return [torch.randint(K, (count, side, side)) for side in (1, 2, 4)]
    return torch.randint(K, (count, 4, 4, 3))


def as_list(codes: Codes) -> list[Tensor]:
    return [codes] if isinstance(codes, Tensor) else list(codes)


def same_codes(left: Codes, right: Codes) -> bool:
    return all(torch.equal(a, b) for a, b in zip(as_list(left), as_list(right), strict=True))


def loss_of(prior: RQTransformer | VAR, codes: Codes, labels: Tensor | None = None) -> Tensor:
    output = prior(codes, labels)
    return prior_loss(output, codes=codes).total if isinstance(prior, RQTransformer) else var_loss(output, codes).total


def state(model: nn.Module) -> dict[str, Tensor]:
    return copy.deepcopy(model.state_dict())


def assert_same_state(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def relative_error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


# --- models that were cast


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_cast_tokenizer(kind: str, dtype: torch.dtype) -> None:
    plain = make_vae(kind)
    vae = copy.deepcopy(plain).to(dtype)
    assert vae.dtype == dtype and plain.dtype == torch.float32
    assert_same_state(state(plain.quantizer), state(vae.quantizer))
    images, codes = make_images(), random_codes(kind)

    latents = vae.encode_latents(images)
    assert latents.dtype == dtype
    assert relative_error(latents, plain.encode_latents(images)) < 50 * torch.finfo(dtype).eps + 1e-5
    assert same_codes(vae.encode(images), vae.quantizer.encode(latents.float()))
    assert same_codes(vae.encode(images), vae.encode(images.to(dtype)))

    for call in (lambda model: model.decode(codes), lambda model: model.decode_partial(codes, 2)):
        assert call(vae).dtype == dtype
        assert relative_error(call(vae), call(plain)) < 50 * torch.finfo(dtype).eps + 1e-5

    vae.train()
    loss = vae.loss(images)
    assert loss.output.reconstruction.dtype == dtype
    assert loss.total.dtype == torch.float32
    loss.total.backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all(), name
    assert vae.codebooks.dtype == torch.float32


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_every_way_of_casting_leaves_quantizers_float32(cast: Callable[[nn.Module], nn.Module]) -> None:
    for kind in TOKENIZERS:
        vae = make_vae(kind)
        before = state(vae.quantizer)
        assert_same_state(before, state(cast(vae).quantizer))
        assert_same_state(before, state(vae.float().quantizer))
    quantizer = MultiScaleQuantizer(MultiScaleConfig(codebook_size=K, scales=[1, 2]), C)
    assert {p.dtype for p in cast(quantizer).parameters()} == {torch.float32}
    assert quantizer.to("meta").codebook.is_meta


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"shared_adaptive_norm": True}, {"normalize_attention": False}])
def test_a_cast_var(settings: dict[str, Any], dtype: torch.dtype) -> None:
    check_cast_prior("var", dtype, settings)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"spatial_embedding": "table", "depth_embedding": "table"}])
def test_a_cast_rqtransformer(settings: dict[str, Any], dtype: torch.dtype) -> None:
    check_cast_prior("rqtransformer", dtype, settings)


def check_cast_prior(kind: str, dtype: torch.dtype, settings: dict[str, Any]) -> None:
    plain, _ = make_pair(kind, **settings)
    prior, codes = copy.deepcopy(plain).to(dtype), random_codes(kind)
    logits = prior(codes, LABELS).logits
    assert logits.dtype == torch.float32
    assert relative_error(logits, plain(codes, LABELS).logits) < 50 * torch.finfo(dtype).eps + 1e-5
    loss_of(prior.train(), codes, LABELS).backward()
    for name, parameter in prior.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            assert parameter.grad.dtype == dtype and parameter.grad.isfinite().all(), name
    assert sum(parameter.grad is not None for parameter in prior.parameters()) > 10


@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("kind", PRIORS)
def test_sampling_from_cast_models(kind: str, dtype: torch.dtype) -> None:
    prior, vae = (model.to(dtype) for model in make_pair(kind))
    out = generate(prior, vae, LABELS, seed=3, cfg_scale=1.0)
    assert out.images.dtype == dtype and out.images.shape == (2, *IMAGE) and out.images.isfinite().all()
    again = generate(prior, vae, LABELS[1:], seed=3, cfg_scale=1.0, offset=1)
    assert same_codes([tokens[1:] for tokens in as_list(out.codes)], as_list(again.codes))


@pytest.mark.parametrize("kind", PRIORS)
def test_sampling_from_float64_models(kind: str) -> None:
    prior, vae = (model.double() for model in make_pair(kind))
    plain, plain_vae = copy.deepcopy(prior).float(), copy.deepcopy(vae).float()
    for options in ({}, {"cfg_scale": 1.0}, *([{"smooth": True}] if kind == "var" else [])):
        drawn = generate(prior, vae, LABELS, **options)
        assert drawn.images.dtype == torch.float64
        assert same_codes(drawn.codes, generate(plain, plain_vae, LABELS, **options).codes)


def test_a_float64_prior_is_computed_in_float64() -> None:
    """No copy of its weights in float32 is sampled from."""
    prior, vae = (model.double() for model in make_pair("rqtransformer"))
    seen = set()
    linear = torch.nn.functional.linear

    class Recorded(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is linear:
                seen.add(args[1].dtype)
            return func(*args, **(kwargs or {}))

    with Recorded():
        generate(prior, vae, LABELS)
    assert seen == {torch.float64}
    for precision in ("bf16", "int8"):
        words = f"^precision: a float64 prior is sampled in float64 at \"fp32\" alone, got '{precision}'; cast it by"
        with pytest.raises(ValueError, match=words):
            generate(prior, vae, LABELS, precision=precision)


@pytest.mark.parametrize("kind", PRIORS)
def test_weights_that_do_not_fit_together_are_named(kind: str) -> None:
    prior, vae = make_pair(kind)
    prior.classifier.double()
    with pytest.raises(
        TypeError, match=r"^prior: expected weights of torch\.float32 like the first, got float64 \(class"
    ):
        generate(prior, vae, LABELS)
    prior, vae = make_pair(kind)
    prior.classifier.to("meta")
    with pytest.raises(ValueError, match=r"^prior: classifier\.\S+ is on the meta device and has no values"):
        generate(prior, vae, LABELS)


@pytest.mark.parametrize("kind", PRIORS)
def test_shapes_on_the_meta_device(kind: str) -> None:
    prior, vae = make_pair(kind)
    codes = vae.encode(make_images())
    logits = prior(codes, LABELS).logits
    prior.to("meta"), vae.to("meta")
    found = vae.encode(make_images().to("meta"))
    assert [part.shape for part in as_list(found)] == [part.shape for part in as_list(codes)]
    assert vae(make_images().to("meta")).reconstruction.shape == (2, *IMAGE)
    assert prior(found, LABELS.to("meta")).logits.shape == logits.shape
    with pytest.raises(ValueError, match=r"^prior: it is on the meta device and has no values"):
        generate(prior, vae, LABELS)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tangents_without_gradients(kind: str) -> None:
    """torch.no_grad keeps tangents, which the convolutions for the same bits on any number of threads do not have."""
    vae = make_vae(kind)
    latents = vae.encode_latents(make_images()).detach()
    direction = torch.randn_like(latents)
    _, expected = torch.func.jvp(vae.decode_latents, (latents,), (direction,))
    with torch.no_grad():
        _, found = torch.func.jvp(vae.decode_latents, (latents,), (direction,))
    assert relative_error(found, expected) < 1e-5 and found.abs().sum() > 0


def test_editing_a_large_white_image_in_float16() -> None:
    """The sum of its pixels is beyond float16."""
    vae = tiny.multiscale_vqvae(channel_multipliers=[1] * 6, quantizer={"scales": [1, 2, 9]})
    prior = tiny.var(vae)
    images = torch.ones(1, 1, 288, 288, dtype=torch.float16)
    mask = torch.zeros(288, 288, dtype=torch.bool)
    mask[-4:] = True
    out = edit(prior.half(), vae.half(), images, mask, [0])
    assert out.decoded.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_editing_with_cast_models(dtype: torch.dtype) -> None:
    prior, vae = (model.to(dtype) for model in make_pair("var"))
    images, mask = make_images().to(dtype), torch.arange(8).expand(8, 8) >= 4
    out = edit(prior, vae, images, mask, LABELS)
    assert out.images.dtype == dtype
    assert torch.equal(out.images[..., :4], images[..., :4])


def test_a_cast_model_is_saved_and_comes_back_as_float32(tmp_path: Path) -> None:
    for kind in TOKENIZERS:
        vae = make_vae(kind)
        half = copy.deepcopy(vae).half()
        half.save_pretrained(tmp_path / kind)
        loaded = load_pretrained(tmp_path / kind)
        assert {tensor.dtype for tensor in loaded.state_dict().values()} <= {torch.float32, torch.bool, torch.int64}
        assert_same_state(state(vae.quantizer), state(loaded.quantizer))


# --- images


def calls_with_images(vae: RQVAE | MultiScaleVQVAE) -> list[Callable[[Any], Any]]:
    calls = [vae, vae.loss, vae.encode, vae.encode_latents]
    return [*calls, lambda images: vae.soft_codes(images, 0.5)] if isinstance(vae, RQVAE) else calls


BYTES = torch.randint(256, (2, *IMAGE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "uint8": (BYTES, TypeError, r"got torch\.uint8; convert 0\.\.255 by images / 127\.5 - 1"),
    "int64": (BYTES.long(), TypeError, r"got torch\.int64; convert"),
    "bool": (BYTES > 100, TypeError, r"got torch\.bool; convert"),
    "complex": (BYTES.to(torch.complex64), TypeError, r"got torch\.complex64"),
    "numpy bytes": (BYTES.numpy(), TypeError, r"got a numpy array of uint8; convert .*permute"),
    "numpy floats": (make_images().numpy(), TypeError, r"a numpy array of float32; convert"),
    "a list": ([make_images()[0]], TypeError, "expected a tensor, got list"),
    "nothing": (None, TypeError, "expected a tensor, got NoneType"),
    "0..255": (BYTES.float(), ValueError, r"expected values in \[-1, 1\], got 0 \.\. 255; convert 0\.\.255 by"),
    "0..255 in half": (BYTES.half(), ValueError, r"expected values in \[-1, 1\], got"),
    "0..16": (BYTES.float() / 16, ValueError, r"expected values in \[-1, 1\], got"),
    "-5..5": (BYTES.float() / 25.5 - 5, ValueError, r"expected values in \[-1, 1\], got -5 \.\. 5"),
    "nearly black": (BYTES.float() * (BYTES > 250), ValueError, r"expected values in \[-1, 1\], got 0 \.\. 255"),
    "one of many": (torch.cat([make_images(50), BYTES.float()]), ValueError, r"expected values in \[-1, 1\], got"),
    "and one NaN": (BYTES.float().index_fill(3, torch.tensor([0]), torch.nan), ValueError, r"got 0 \.\. 255"),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["rqvae", "multiscale"])
@pytest.mark.parametrize("name", REFUSED)
def test_images_that_no_tokenizer_was_made_for(name: str, kind: str, training: bool) -> None:
    images, error, message = REFUSED[name]
    vae = make_vae(kind).train(training)
    before = state(vae)
    for call in calls_with_images(vae):
        with pytest.raises(error, match=rf"^images: .*{message}") as raised:
            call(images)
        assert "\n" not in str(raised.value)
    assert_same_state(before, state(vae))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", PRIORS)
def test_images_that_no_edit_takes(kind: str, name: str) -> None:
    images, error, message = REFUSED[name]
    prior, vae = make_pair(kind)
    mask = torch.arange(8)[:, None].expand(8, 8) >= 4
    with pytest.raises(error, match=rf"^images: .*{message}"):
        edit(prior, vae, images, mask, LABELS)


def test_evaluation_refuses_them_too() -> None:
    class Bytes:
        def __len__(self) -> int:
            return 2

        def item(self, index: int, epoch: int) -> tuple[Tensor, int]:
            return BYTES[index].float(), 0

    for kind in TOKENIZERS:
        with pytest.raises(ValueError, match=r"^images: expected values in \[-1, 1\], got 0 \.\. 255"):
            evaluate_reconstruction(make_vae(kind), Bytes())


PACKED = {
    "sparse_coo": lambda x: x.to_sparse(),
    "_mkldnn": lambda x: x.to_mkldnn(),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "nested": lambda x: torch.nested.nested_tensor(list(x), layout=torch.strided),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_images_without_values_or_in_another_layout(kind: str) -> None:
    vae = make_vae(kind)
    for call in calls_with_images(vae):
        with pytest.raises(ValueError, match=r"^images: expected on cpu, where the model is, got meta$"):
            call(make_images().to("meta"))
        for layout, pack in PACKED.items():
            with pytest.raises(TypeError, match=f"^images: expected a dense tensor, got {layout}$"):
                call(pack(make_images()))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_latents_are_checked(kind: str) -> None:
    vae = make_vae(kind)
    latents = vae.encode_latents(make_images())
    name = "features" if kind == "multiscale" else "latents_bhwc"
    for wrong, error, words in (
        ("x", TypeError, "expected a tensor, got str"),
        (latents.to("meta"), ValueError, "expected on cpu, where the model is, got meta"),
        (latents.to_sparse(), TypeError, "expected a dense tensor, got sparse_coo"),
        (latents[0], ValueError, "expected shape .*8.*, got"),
        (latents.int(), TypeError, "expected floating point, got torch.int32"),
    ):
        with pytest.raises(error, match=f"^{name}: {words}"):
            vae.decode_latents(wrong)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_losses_of_no_images_are_zero(kind: str) -> None:
    output = make_vae(kind)(make_images(0))
    assert output.commitment_loss.item() == 0.0 and output.commitment_loss.dtype == torch.float32
    if kind == "multiscale":
        assert output.codebook_loss.item() == 0.0
    output.commitment_loss.backward()


ALLOWED = {
    "8 bits": (make_images() * 4).round().div(4).to(torch.float8_e5m2),
    "white": torch.ones(2, *IMAGE),
    "a little beyond": make_images() * 1.2,
    "noisy": make_images() + 0.3 * torch.randn(2, *IMAGE),
    "normal numbers": torch.randn(2, *IMAGE),
    "float64": make_images().double(),
    "float16": make_images().half(),
    "bfloat16": make_images().bfloat16(),
    "with a gradient": make_images().requires_grad_(),
    "channels_last": make_images().contiguous(memory_format=torch.channels_last),
    "a view": make_images(4)[::2].flip(3),
    "broadcast": make_images(1).expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", ALLOWED)
def test_images_that_are_taken(name: str, kind: str) -> None:
    images, vae = ALLOWED[name], make_vae(kind)
    plain = images.detach().float().clone(memory_format=torch.contiguous_format)
    assert same_codes(vae.encode(images), vae.encode(plain))
    loss, expected = vae.loss(images), vae.loss(plain)
    torch.testing.assert_close(loss.total, expected.total)
    assert loss.total.dtype == torch.float32 and loss.output.reconstruction.dtype == torch.float32
    if images.requires_grad:
        (gradient,) = torch.autograd.grad(loss.total, images)
        assert gradient.abs().sum() > 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_images_that_are_not_finite_have_no_codes(kind: str, bad: float) -> None:
    vae, images = make_vae(kind), make_images(3)
    expected = vae.encode(images)
    images[1, 0, 2, 3] = bad
    codes = vae.encode(images)
    for found, clean in zip(as_list(codes), as_list(expected), strict=True):
        assert (found[1] == -1).all()
        assert torch.equal(found[[0, 2]], clean[[0, 2]])
    with pytest.raises(IndexError, match=r"codes.*-1"):
        vae.decode(codes)


# --- codes and labels


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32, torch.bool])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_codes_of_another_dtype(kind: str, dtype: torch.dtype) -> None:
    vae, codes = make_vae(kind), random_codes(kind)
    wrong = [tokens.to(dtype) for tokens in as_list(codes)]
    for call in (vae.decode, lambda some: vae.decode_partial(some, 1)):
        with pytest.raises(TypeError, match=rf"^codes(\[0\])?: expected int64, got {dtype}$"):
            call(wrong[0] if isinstance(codes, Tensor) else wrong)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_codes_that_cannot_be_decoded_are_named(kind: str) -> None:
    vae, codes = make_vae(kind), random_codes(kind)
    for change, error, words in (
        (lambda part: part.to("meta"), ValueError, "expected on cpu, where the codebook is, got meta"),
        (lambda part: part.to_sparse(), TypeError, "expected a dense tensor, got sparse_coo"),
        (lambda part: torch.full_like(part, K), IndexError, rf"expected values in \[0, {K}\), got {K}"),
        (lambda part: torch.full_like(part, -1), IndexError, rf"expected values in \[0, {K}\), got -1"),
    ):
        wrong = vae.layout.map(change, codes)
        for call in (vae.decode, lambda some: vae.decode_partial(some, 1)):
            with pytest.raises(error, match=rf"^codes(\[0\])?: {words}$"):
                call(wrong)
    for wrong in ("codes", None, 3):
        with pytest.raises(TypeError, match=r"^codes: expected a"):
            vae.decode(wrong)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_levels_to_decode_are_checked(kind: str) -> None:
    vae, codes = make_vae(kind), random_codes(kind)
    name = "scales" if kind == "multiscale" else "depth"
    for wrong in ("1", True, 2.0, None, [1]):
        with pytest.raises(TypeError, match=rf"^decode_partial: {name}: expected an integer, got "):
            vae.decode_partial(codes, wrong)
    for wrong in (0, 4, -1):
        with pytest.raises(
            ValueError, match=rf"^decode_partial: {name}: expected an integer in \[1, 3\], got {wrong}$"
        ):
            vae.decode_partial(codes, wrong)
    assert torch.equal(vae.decode_partial(codes, np.int64(3)), vae.decode(codes))


def test_arguments_of_soft_codes_are_named() -> None:
    vae = make_vae()
    for settings, error, words in (
        ({"tau": "1"}, TypeError, "tau: expected a number, got '1'"),
        ({"tau": 0.0}, ValueError, "tau: expected a finite number > 0, got 0.0"),
        ({"tau": 1.0, "stochastic": True, "seed": "x"}, TypeError, "seed: expected an integer, got 'x'"),
        ({"tau": 1.0, "stochastic": 1}, TypeError, "stochastic: expected True or False, got 1"),
    ):
        with pytest.raises(error, match=f"^{words}$"):
            vae.soft_codes(make_images(), **settings)


INTEGERS = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("kind", PRIORS)
def test_labels_of_every_integer_dtype(kind: str, dtype: torch.dtype) -> None:
    prior, vae = make_pair(kind)
    codes = random_codes(kind)
    expected = prior(codes, LABELS).logits
    for labels in (LABELS.to(dtype), LABELS.to(dtype)[:, None]):
        assert torch.equal(prior(codes, labels).logits, expected)
        assert same_codes(generate(prior, vae, labels).codes, generate(prior, vae, LABELS).codes)
    with pytest.raises(IndexError, match=r"^condition: expected values in \[0, 3\), got 3$"):
        prior(codes, (LABELS + 1).to(dtype))


def test_token_conditions_of_another_integer_dtype() -> None:
    vae = make_vae()
    prior, _ = make_pair("rqtransformer")
    config = copy.deepcopy(prior.config)
    config.condition, config.condition_length = "tokens", 3
    prior, codes = RQTransformer(config, vae.codebooks).eval(), random_codes("rqvae")
    tokens = torch.randint(CLASSES, (2, 3))
    expected = prior_loss(prior(codes, tokens), codes=codes, condition=tokens)
    found = prior_loss(prior(codes, tokens.int()), codes=codes, condition=tokens.int())
    assert torch.equal(found.total, expected.total)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (LABELS > 1, TypeError, "condition: expected int64, got torch.bool"),
        (LABELS.float(), TypeError, "condition: expected int64, got torch.float32"),
        (LABELS[0], ValueError, r"condition: expected .* got (shape )?\(\)"),
        (LABELS.expand(3, 2), ValueError, r"condition: expected shape .*, got \(3, 2\)"),
    ],
)
@pytest.mark.parametrize("kind", PRIORS)
def test_labels_that_are_none(kind: str, labels: Tensor, error: type[Exception], message: str) -> None:
    prior, vae = make_pair(kind)
    with pytest.raises(error, match=f"^{message}"):
        prior(random_codes(kind), labels)
    with pytest.raises(error, match=f"^{message}"):
        generate(prior, vae, labels)


# --- torch's defaults


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def built(kind: str) -> list[nn.Module]:
    torch.manual_seed(5)
    prior, vae = make_pair(kind)
    return [prior, vae]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", PRIORS)
def test_models_do_not_follow_the_default_dtype(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    expected, images = built(kind), make_images()
    codes = expected[1].encode(images)
    drawn = generate(*expected, LABELS, cfg_scale=0.5, top_p=0.9)
    decoded, fingerprint = drawn.images, code_fingerprint(*expected[1].quantizer.code_tensors())
    logits = expected[0](codes, LABELS).logits
    with default_dtype(dtype):
        models = built(kind)
        for model, plain in zip(models, expected, strict=True):
            assert_same_state(state(plain), state(model))
            model.save_pretrained(tmp_path / model.model_type)
        for prior, vae in (models, [load_pretrained(tmp_path / model.model_type) for model in models]):
            assert_same_state(state(expected[0]), state(prior))
            assert_same_state(state(expected[1]), state(vae))
            assert same_codes(vae.encode(images), codes)
            assert code_fingerprint(*vae.quantizer.code_tensors()) == fingerprint
            assert torch.equal(prior(codes, LABELS).logits, logits)
            out = generate(prior, vae, LABELS, cfg_scale=0.5, top_p=0.9)
            assert same_codes(out.codes, drawn.codes) and torch.equal(out.images, decoded)
            caches = stack_caches(prior, 2) if isinstance(prior, RQTransformer) else [scale_cache(prior, 2)]
            assert {cache.keys.dtype for cache in caches} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_training_does_not_follow_the_default_dtype(kind: str, dtype: torch.dtype) -> None:
    def trained() -> tuple[Tensor, dict[str, Tensor]]:
        torch.manual_seed(1)
        vae = make_vae(kind).train()
        vae.quantizer.initialized.fill_(False)
        total = vae.loss(images).total
        total.backward()
        return total.detach(), state(vae)

    images = make_images(8)
    total, expected = trained()
    with default_dtype(dtype):
        found, after = trained()
    assert found.dtype == torch.float32 and torch.equal(found, total)
    assert_same_state(expected, after)


def test_dropped_conditions_do_not_follow_the_default_dtype() -> None:
    """In bfloat16 a uniform number has 256 values, and 0.1 is not among them."""
    codes = [torch.zeros(4000, side, side, dtype=torch.int64) for side in (1, 1)]
    quantizer = {"codebook_size": 4, "scales": [1, 1], "refinements": 0}
    sizes = {"layers": 1, "heads": 1, "embed_dim": 8, "code_dim": C, "num_classes": 2, "drop_path": 0.1}
    prior = tiny.var(quantizer=quantizer, **sizes).train()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        with default_dtype(dtype):
            output = prior(codes, torch.zeros(4000, dtype=torch.int64))
        results.append((output.condition_dropped, output.logits))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizers_do_not_follow_the_default_dtype(dtype: torch.dtype) -> None:
    def made() -> list[nn.Module]:
        torch.manual_seed(2)
        settings = {"codebook_size": K, "depth": 2}
        separate = QuantizerConfig(**settings, shared_codebook=False, init="kmeans", dead_code_threshold=2)
        return [
            ResidualQuantizer(QuantizerConfig(**settings), C),
            ResidualQuantizer(separate, C),
            MultiScaleQuantizer(MultiScaleConfig(codebook_size=K, scales=[1, 2]), C),
        ]

    expected = [state(quantizer) for quantizer in made()]
    with default_dtype(dtype):
        for quantizer, plain in zip(made(), expected, strict=True):
            assert_same_state(plain, state(quantizer))


@pytest.mark.parametrize("kind", PRIORS)
def test_models_are_loaded_and_used_under_another_default_device(kind: str, tmp_path: Path) -> None:
    expected, images = built(kind), make_images()
    codes, drawn = expected[1].encode(images), generate(*expected, LABELS, seed=4)
    for model in expected:
        model.save_pretrained(tmp_path / model.model_type)
    with torch.device("meta"):
        prior, vae = (load_pretrained(tmp_path / model.model_type) for model in expected)
        assert same_codes(vae.encode(images), codes)
        assert torch.equal(prior(codes, LABELS).logits, expected[0](codes, LABELS).logits)
        out = generate(prior, vae, LABELS, seed=4)
    assert same_codes(out.codes, drawn.codes) and torch.equal(out.images, drawn.images)
    assert_same_state(state(expected[0]), state(prior))


# --- activation checkpointing


def gradients(model: nn.Module, total: Tensor) -> dict[str, Tensor]:
    total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def vae_total(output: Any, images: Tensor) -> Tensor:
    reconstruction, commitment, _, *codebook = output  # a plain tuple where reentrant checkpointing made it
    return (reconstruction - images).square().mean() + commitment + sum(codebook)


def assert_same_gradients(left: dict[str, Tensor], right: dict[str, Tensor], *, exact: bool) -> None:
    assert left.keys() == right.keys()
    for name, gradient in left.items():
        # The reentrant kind has its first forward without gradients, where convolutions round otherwise.
        tolerances = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-3, "atol": 1e-6}
        torch.testing.assert_close(gradient, right[name], **tolerances, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["rqvae", "separate"])
def test_a_checkpointed_codebook_is_not_averaged_twice(kind: str, reentrant: bool) -> None:
    vae, images = make_vae(kind).train(), make_images().requires_grad_()
    output = checkpoint(vae, images, use_reentrant=reentrant)
    after = state(vae)
    with pytest.raises(RuntimeError, match=r"^ResidualQuantizer: activation checkpointing runs") as e:
        vae_total(output, images).backward()
    assert "\n" not in str(e.value) and "gradient_checkpointing=True" in str(e.value)
    assert_same_state(after, state(vae))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_checkpointing_a_tokenizer_that_does_not_learn(kind: str, reentrant: bool) -> None:
    vae, images = make_vae(kind), make_images().requires_grad_()
    other = copy.deepcopy(vae)
    expected = gradients(vae, vae_total(vae(images), images))
    found = gradients(other, vae_total(checkpoint(other, images, use_reentrant=reentrant), images))
    assert_same_gradients(expected, found, exact=not reentrant)


@pytest.mark.parametrize("initialized", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_multiscale_tokenizer_trains_the_same(reentrant: bool, initialized: bool) -> None:
    vae, images = make_vae("multiscale").train(), make_images(40).requires_grad_()
    vae.quantizer.initialized.fill_(initialized)
    other = copy.deepcopy(vae)
    torch.manual_seed(1)
    expected = gradients(vae, vae_total(vae(images), images))
    torch.manual_seed(1)
    found = gradients(other, vae_total(checkpoint(other, images, use_reentrant=reentrant), images))
    assert_same_gradients(expected, found, exact=not reentrant)
    torch.testing.assert_close(state(vae), state(other))
    assert torch.equal(vae.quantizer.usage.counts(), other.quantizer.usage.counts())
    assert vae.quantizer.usage.counts().sum() == 40 * (1 + 4 + 16)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", PRIORS)
def test_a_checkpointed_prior_trains_the_same(kind: str, reentrant: bool) -> None:
    """With all that is sampled in training: dropped conditions, paths, activations."""
    settings = {"dropout": 0.2, "drop_path": 0.3} if kind == "var" else {"embedding_dropout": 0.2}
    prior, _ = make_pair(kind, **settings)
    prior.train()
    other, codes = copy.deepcopy(prior), random_codes(kind)
    torch.manual_seed(1)
    expected = gradients(prior, prior(codes, LABELS).logits.square().mean())
    torch.manual_seed(1)
    anchor = torch.zeros((), requires_grad=True)  # the reentrant kind needs an input with a gradient

    def run(codes: Codes, anchor: Tensor) -> Tensor:
        return other(codes, LABELS).logits + anchor

    logits = checkpoint(run, codes, anchor, use_reentrant=reentrant)
    assert_same_state(expected, gradients(other, logits.square().mean()))


def test_the_models_own_checkpointing_leaves_the_codebook_alone() -> None:
    for kind in TOKENIZERS:
        plain, other = (make_vae(kind, gradient_checkpointing=some, dropout=0.1).train() for some in (False, True))
        other.load_state_dict(plain.state_dict())
        images, results = make_images(), []
        for vae in (plain, other):
            torch.manual_seed(3)
            results.append(gradients(vae, vae.loss(images).total))
        assert_same_state(*results)
        assert_same_state(state(plain), state(other))


# --- nothing at all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_no_images(kind: str, dtype: torch.dtype) -> None:
    vae = make_vae(kind).to(dtype)
    images = make_images(0)
    codes = vae.encode(images)
    assert [tuple(found.shape) for found in as_list(codes)] == [
        tuple(some.shape) for some in as_list(random_codes(kind, 0))
    ]
    assert all(tokens.dtype == torch.int64 for tokens in as_list(codes))
    for decoded in (vae.decode(codes), vae.decode_partial(codes, 1), vae(images).reconstruction):
        assert decoded.shape == (0, *IMAGE) and decoded.dtype == dtype
    assert same_codes(vae(images).codes, codes)
    if isinstance(vae, RQVAE):
        soft, codes = vae.soft_codes(images, 0.5)
        assert soft.shape == (0, 4, 4, 3, K) and codes.shape == (0, 4, 4, 3)
        assert vae.encode(images, vae.pack_codebook(100)).shape == (0, 4, 4, 3)
    message = r"^images: expected at least one to train on, got shape \(0, 3, 8, 8\)$"
    before = state(vae)
    with pytest.raises(ValueError, match=message):
        vae.loss(images)
    vae.train()
    for call in (vae, vae.loss):
        with pytest.raises(ValueError, match=message):
            call(images)
    assert same_codes(vae.encode(images), codes)
    assert_same_state(before, state(vae))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("mode", ["after_all_depths", "per_depth"])
def test_no_vectors(shared: bool, mode: str) -> None:
    config = QuantizerConfig(codebook_size=K, depth=2, shared_codebook=shared, ema_update=mode)
    quantizer = ResidualQuantizer(config, C)
    before, z = state(quantizer), torch.empty(0, 5, C)
    message = rf"^z: expected at least one vector in train mode, got shape \(0, 5, {C}\)$"
    with pytest.raises(ValueError, match=message):
        quantizer(z)
    quantizer.initialized.fill_(True)
    with pytest.raises(ValueError, match=message):
        quantizer(z)
    quantizer.initialized.fill_(False)
    assert quantizer.encode(z).shape == (0, 5, 2)
    quantizer.eval()
    output = quantizer(z)
    assert output.quantized.shape == z.shape and output.codes.shape == (0, 5, 2)
    assert quantizer.decode(output.codes).shape == z.shape
    assert quantizer.embed(output.codes).shape == (0, 5, 2, C)
    assert_same_state(before, state(quantizer))


@pytest.mark.parametrize("normalize", [False, True])
def test_no_features(normalize: bool) -> None:
    quantizer = MultiScaleQuantizer(MultiScaleConfig(codebook_size=K, scales=[1, 2, 4], normalize=normalize), C)
    before, features = state(quantizer), torch.empty(0, C, 4, 4)
    with pytest.raises(ValueError, match=r"^features: expected at least one map in train mode, got shape \(0, 8,"):
        quantizer(features)
    quantizer.eval()
    output = quantizer(features)
    assert output.quantized.shape == features.shape
    assert same_codes(output.codes, random_codes("multiscale", 0))
    assert same_codes(quantizer.encode(features), output.codes)
    assert quantizer.decode(output.codes).shape == features.shape
    assert_same_state(before, state(quantizer))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", PRIORS)
def test_no_codes(kind: str, training: bool) -> None:
    prior, vae = make_pair(kind)
    prior.train(training)
    codes, labels = random_codes(kind, 0), LABELS[:0]
    output = prior(codes, labels)
    assert output.logits.shape == ((0, 21, K) if kind == "var" else (0, 4, 4, 3, K))
    message = r"^codes: expected those of at least one image to train on, got"
    with pytest.raises(ValueError, match=message):
        loss_of(prior, codes, labels)
    if isinstance(prior, RQTransformer):
        soft = SoftLabels(torch.empty(0, 4, 4, 3, C), vae.codebooks, 1.0)
        with pytest.raises(ValueError, match=message):
            prior(codes, labels, soft)
        with pytest.raises(ValueError, match=message):
            prior_loss(output, **soft._asdict())
    with pytest.raises(ValueError, match="condition: expected at least one row"):
        generate(prior, vae, labels)


# --- modes and layouts


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_encoding_in_train_mode(kind: str) -> None:
    """Without dropout, as in eval mode, and nothing has changed afterwards: neither state nor mode."""
    vae = make_vae(kind, dropout=0.5, gradient_checkpointing=True)
    images = make_images()
    codes = vae.encode(images)
    decoded, partial = vae.decode(codes), vae.decode_partial(codes, 1)
    vae.train()
    vae.decoder.middle.eval()
    before, modes = state(vae), [module.training for module in vae.modules()]
    assert same_codes(vae.encode(images), codes)
    assert torch.equal(vae.decode(codes), decoded) and torch.equal(vae.decode_partial(codes, 1), partial)
    if isinstance(vae, RQVAE):
        assert same_codes(vae.soft_codes(images, 0.5)[1], codes)
    with pytest.raises(ValueError, match="images"):
        vae.encode(images[0])
    assert [module.training for module in vae.modules()] == modes and len(set(modes)) == 2
    assert_same_state(before, state(vae))
    # Called, it does drop.
    assert not torch.equal(vae(images).reconstruction, vae(images).reconstruction)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_channels_last_tokenizer(kind: str) -> None:
    vae = make_vae(kind)
    other, images = copy.deepcopy(vae).to(memory_format=torch.channels_last), make_images()
    assert_same_state(state(vae), state(other))
    codes = vae.encode(images)
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        assert same_codes(other.encode(given), codes)
        torch.testing.assert_close(other.decode(codes), vae.decode(codes))
        torch.testing.assert_close(other.loss(given).total, vae.loss(images).total)
    for module in (vae, other):
        module.train().loss(images).total.backward()
    for (name, left), right in zip(vae.named_parameters(), other.parameters(), strict=True):
        # Of a key's bias there is nothing but rounding.
        torch.testing.assert_close(left.grad, right.grad, rtol=1e-3, atol=1e-5, msg=name)
    if kind != "separate":
        prior = make_prior("var" if kind == "multiscale" else "rqtransformer", vae.eval())
        codes = generate(prior, vae, LABELS).codes
        assert same_codes(generate(prior.to(memory_format=torch.channels_last), vae, LABELS).codes, codes)


def test_inference_mode_leaves_models_that_can_be_trained() -> None:
    for kind in PRIORS:
        prior, vae = make_pair(kind)
        images = make_images()
        with torch.inference_mode():
            codes = vae.encode(images)
            vae.decode(codes)
            generate(prior, vae, LABELS)
        vae.train().loss(images).total.backward()
        loss_of(prior.train(), vae.encode(images), LABELS).backward()


# --- copies


def round_trips() -> dict[str, Callable[[Any], Any]]:
    def saved(thing: Any) -> Any:
        buffer = io.BytesIO()
        torch.save(thing, buffer)
        buffer.seek(0)
        return torch.load(buffer, weights_only=False)

    return {"deepcopy": copy.deepcopy, "pickle": lambda thing: pickle.loads(pickle.dumps(thing)), "torch.save": saved}


@pytest.mark.parametrize("how", round_trips())
@pytest.mark.parametrize("kind", PRIORS)
def test_copies_of_models(kind: str, how: str) -> None:
    prior, vae = make_pair(kind)
    images = make_images()
    with torch.no_grad():
        vae.train()(images)
    vae.eval()
    prior = make_prior(kind, vae)
    drawn = generate(prior, vae, LABELS)  # what is kept of a prior for the next call is not part of it
    other_prior, other = (round_trips()[how](model) for model in (prior, vae))
    assert type(other) is type(vae) and other.config == vae.config
    assert_same_state(state(vae), state(other))
    again = generate(other_prior, other, LABELS)
    assert same_codes(again.codes, drawn.codes) and torch.equal(again.images, drawn.images)
    # They share nothing, and the copy can be cast and trained.
    before = state(vae)
    with torch.no_grad():
        for tensor in [*other.parameters(), *other.buffers()]:
            tensor.zero_()
    assert_same_state(before, state(vae))
    assert {p.dtype for p in other.half().quantizer.state_dict().values()} <= {torch.float32, torch.bool, torch.int64}


@pytest.mark.parametrize("how", round_trips())
def test_copies_of_quantizers_and_packed_codebooks(how: str) -> None:
    copied = round_trips()[how]
    quantizer = ResidualQuantizer(QuantizerConfig(codebook_size=256, depth=3), 32)
    z = torch.randn(400, 32)
    quantizer(z)
    other = copied(quantizer)
    assert_same_state(state(quantizer), state(other))
    assert torch.equal(other.encode(z), quantizer.encode(z))
    for packed in (rqkernels.PackedCodebook(quantizer.codebook), quantizer.pack_codebook(10_000)):
        if packed is not None:
            assert torch.equal(other.encode(z, copied(packed)), quantizer.encode(z))
    scales = MultiScaleQuantizer(MultiScaleConfig(codebook_size=K, scales=[1, 2, 4]), C)
    features = torch.randn(20, C, 4, 4)
    scales(features)
    assert same_codes(copied(scales).encode(features), scales.encode(features))


def test_numpy_has_nothing_to_do_with_the_labels() -> None:
    prior, vae = make_pair("rqtransformer")
    for labels in (LABELS.numpy(), LABELS.numpy().astype(np.int32), [2, 0], (np.int64(2), 0)):
        assert same_codes(generate(prior, vae, labels).codes, generate(prior, vae, LABELS).codes)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_what_is_no_tensor_at_all(kind: str) -> None:
    vae = make_vae(kind)
    for codes in (None, 3, {}, np.zeros((2, 4, 4, 3), dtype=np.int64)):
        for call in (vae.decode, lambda some: vae.decode_partial(some, 1), vae.quantizer.decode):
            with pytest.raises(TypeError, match=r"^codes: expected a (tensor|list of token maps), got "):
                call(codes)
    for latents in (None, [1.0], np.zeros((1, 8, 4, 4), dtype=np.float32), torch.zeros(1, 8, 4, 4, dtype=torch.int64)):
        for call in (vae.quantizer, vae.quantizer.encode):
            with pytest.raises(TypeError, match=r"^(z|features): expected a (tensor|floating-point tensor), got "):
                call(latents.transpose(1, 3) if isinstance(latents, Tensor) and kind != "multiscale" else latents)
