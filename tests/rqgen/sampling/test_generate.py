from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

import rqkernels
from rqgen.inference import Engine, LevelParams, cuda_graph, make_sampler
from rqgen.inference.cuda_graph import CapturedSampler
from rqgen.inference.packed import PackedPrior
from rqgen.models import RQVAE, RQTransformer
from rqgen.sampling import KnownRows, generate

K, C, W = 11, 4, 48
SHAPE = (2, 2, 3)
ZEROS = torch.zeros(2, *SHAPE, dtype=torch.int64)
CLASS = {"condition": "class", "condition_vocab_size": 5, "condition_dropout": 0.1}
TOKENS = {"condition": "tokens", "condition_vocab_size": 6, "condition_length": 3, "condition_dropout": 0.1}


def make_vae() -> RQVAE:
    return tiny.rqvae(
        resolution=4, attention_resolutions=[2], embed_dim=C, code_shape=SHAPE, quantizer={"codebook_size": K}
    )


def make_prior(vae: RQVAE, **settings: Any) -> RQTransformer:
    prior = tiny.rq_prior(vae, embed_dim=W, heads=4, **settings)
    # Larger weights than the initial ones: the condition and the codes before must matter.
    return tiny.resample_weights(prior, std=0.2)


@pytest.fixture(scope="module")
def vae() -> RQVAE:
    torch.manual_seed(1)
    return make_vae()


@pytest.fixture(scope="module")
def prior(vae: RQVAE) -> RQTransformer:
    torch.manual_seed(2)
    return make_prior(vae, **CLASS)


@pytest.fixture(scope="module")
def unconditional(vae: RQVAE) -> RQTransformer:
    torch.manual_seed(3)
    return make_prior(vae)


LABELS = torch.arange(20) % 5


def draw_plainly(
    prior: RQTransformer,
    condition: Tensor | None,
    num: int,
    *,
    seed: int,
    offset: int = 0,
    guidance: float = 0.0,
    temperature: tuple[float, ...] = (1.0, 1.0, 1.0),
    top_k: tuple[int | None, ...] = (None, None, None),
    top_p: tuple[float | None, ...] = (None, None, None),
    start: Tensor | None = None,
    start_row: int = 0,
) -> Tensor:
    """One whole forward pass for every code: no cache, no blocks."""
    height, width, depth = prior.config.code_shape
    codes = torch.zeros(num, height, width, depth, dtype=torch.int64)
    if start is not None:
        codes[:, :start_row] = start[:, :start_row]
    with torch.no_grad():
        for t in range(start_row * width, height * width):
            for d in range(depth):
                logits = prior(codes, condition).logits[:, t // width, t % width, d]
                if guidance:
                    null = prior(codes).logits[:, t // width, t % width, d]
                    logits = (1 + guidance) * logits - guidance * null
                codes[:, t // width, t % width, d] = rqkernels.reference.sample_logits(
                    logits,
                    temperature=temperature[d],
                    top_k=top_k[d],
                    top_p=top_p[d],
                    seed=seed,
                    offset=offset,
                    stream=t * depth + d,
                )
    return codes


@pytest.mark.parametrize(
    ("ours", "plain"),
    [
        ({}, {}),
        ({"offset": 1000}, {"offset": 1000}),
        ({"temperature": 0.7}, {"temperature": (0.7, 0.7, 0.7)}),
        ({"temperature": [0.0, 1.0, 2.0]}, {"temperature": (0.0, 1.0, 2.0)}),
        ({"top_k": 3}, {"top_k": (3, 3, 3)}),
        ({"top_k": (2, None, 100)}, {"top_k": (2, None, 100)}),
        ({"top_p": 0.6}, {"top_p": (0.6, 0.6, 0.6)}),
        ({"top_p": [0.3, 1.0, None], "top_k": 5}, {"top_p": (0.3, 1.0, None), "top_k": (5, 5, 5)}),
        ({"cfg_scale": 1.5}, {"guidance": 1.5}),
        ({"cfg_scale": 0.5, "top_p": 0.8}, {"guidance": 0.5, "top_p": (0.8, 0.8, 0.8)}),
        ({"cfg_scale": 0.0}, {}),
    ],
    ids=str,
)
def test_codes_are_drawn_as_said(prior: RQTransformer, vae: RQVAE, ours: dict[str, Any], plain: dict[str, Any]) -> None:
    drawn = generate(prior, vae, LABELS, seed=7, **ours)
    assert torch.equal(drawn.codes, draw_plainly(prior, LABELS, 20, seed=7, **plain))


def test_images_are_the_decoded_codes(prior: RQTransformer, vae: RQVAE) -> None:
    drawn = generate(prior, vae, LABELS, seed=1)
    assert drawn.codes.shape == (20, *SHAPE) and drawn.codes.dtype == torch.int64
    assert drawn.images.shape == (20, 1, 4, 4) and not drawn.images.requires_grad
    torch.testing.assert_close(drawn.images, vae.decode(drawn.codes), atol=1e-4, rtol=0)


def test_without_a_condition(unconditional: RQTransformer, prior: RQTransformer, vae: RQVAE) -> None:
    drawn = generate(unconditional, vae, num=6, seed=4)
    assert torch.equal(drawn.codes, draw_plainly(unconditional, None, 6, seed=4))
    null = generate(prior, vae, num=6, seed=4)
    assert torch.equal(null.codes, draw_plainly(prior, None, 6, seed=4))


def test_with_tokens(vae: RQVAE) -> None:
    prior = make_prior(vae, **TOKENS)
    tokens = torch.randint(0, 6, (5, 3))
    drawn = generate(prior, vae, tokens, seed=2, cfg_scale=2.0, batch_size=2)
    assert torch.equal(drawn.codes, draw_plainly(prior, tokens, 5, seed=2, guidance=2.0))


def test_conditions_in_other_shapes(prior: RQTransformer, vae: RQVAE) -> None:
    expected = generate(prior, vae, LABELS, seed=3).codes
    assert torch.equal(generate(prior, vae, LABELS[:, None], seed=3).codes, expected)
    assert torch.equal(generate(prior, vae, LABELS.tolist(), seed=3).codes, expected)


def test_seeds_and_labels_matter(prior: RQTransformer, vae: RQVAE) -> None:
    first = generate(prior, vae, LABELS, seed=3).codes
    assert torch.equal(generate(prior, vae, LABELS, seed=3).codes, first)
    assert not torch.equal(generate(prior, vae, LABELS, seed=4).codes, first)
    assert not torch.equal(generate(prior, vae, LABELS.flip(0), seed=3).codes, first)
    assert not torch.equal(generate(prior, vae, LABELS, seed=3, cfg_scale=3.0).codes, first)


# --- the split of the batch


@pytest.mark.parametrize("cfg_scale", [None, 1.5])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 19, 64])
def test_the_same_images_however_the_batch_is_split(
    prior: RQTransformer, vae: RQVAE, batch_size: int, cfg_scale: float | None
) -> None:
    settings = {"seed": 11, "cfg_scale": cfg_scale, "top_p": 0.9, "top_k": 8}
    whole = generate(prior, vae, LABELS, **settings)
    split = generate(prior, vae, LABELS, batch_size=batch_size, **settings)
    assert torch.equal(split.codes, whole.codes)
    assert torch.equal(split.images, whole.images)


def test_an_image_is_known_by_its_number(prior: RQTransformer, vae: RQVAE) -> None:
    whole = generate(prior, vae, LABELS, seed=5, offset=100)
    part = generate(prior, vae, LABELS[13:], seed=5, offset=113)
    assert torch.equal(part.codes, whole.codes[13:]) and torch.equal(part.images, whole.images[13:])


@pytest.mark.parametrize("cfg_scale", [None, 1.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_contexts_have_the_same_bits_however_the_batch_is_split(
    prior: RQTransformer, vae: RQVAE, precision: str, cfg_scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes may hide a difference in last bits; what they are sampled from does not."""
    depth_decode = rqkernels.depth_decode
    seen: dict[tuple[int, int], Tensor] = {}

    def record(context: Tensor, decoder: Any, *, offset: int, stream: int, **settings: Any) -> Tensor:
        codes = depth_decode(context, decoder, offset=offset, stream=stream, **settings)
        for row in range(len(codes)):
            seen[offset + row, stream] = context[row :: len(codes)].clone()
        return codes

    monkeypatch.setattr(rqkernels, "depth_decode", record)
    settings = {"cfg_scale": cfg_scale, "precision": precision}
    labels, offset = torch.arange(70) % 5, 20
    generate(prior, vae, labels, offset=offset, **settings)
    whole = dict(seen)
    assert len(whole) == len(labels) * 4
    for first, last in [(0, 1), (41, 47), (3, 69)]:
        seen.clear()
        generate(prior, vae, labels[first:last], offset=offset + first, **settings)
        assert len(seen) == (last - first) * 4
        assert all(torch.equal(context, whole[key]) for key, context in seen.items())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_the_same_images_on_any_number_of_threads(prior: RQTransformer, vae: RQVAE, precision: str) -> None:
    drawn = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            # What is packed with so many threads counts too.
            drawn.append(generate(copy.deepcopy(prior), vae, LABELS[:4], seed=12, precision=precision, top_p=0.9))
    finally:
        torch.set_num_threads(before)
    for other in drawn[1:]:
        assert torch.equal(other.codes, drawn[0].codes) and torch.equal(other.images, drawn[0].images)


# --- precisions and ways of sampling


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        ({}, {}),
        ({}, {"start_row": 1}),
        (CLASS, {}),
        (CLASS, {"cfg_scale": 1.5, "start_row": 1}),
        (TOKENS, {"cfg_scale": 0.5}),
    ],
    ids=lambda value: value.get("condition", str(value)),
)
def test_the_step_that_a_gpu_captures_draws_the_same(
    vae: RQVAE, config: dict[str, Any], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step a CUDA graph replays (positions in memory, one shape for all of them), here without a capture."""
    monkeypatch.setattr(cuda_graph, "BUCKET", 3)  # several graphs' worth of positions
    prior = make_prior(vae, **config)
    condition = None if not config else torch.arange(6) % 5 if config == CLASS else torch.randint(0, 6, (6, 3))
    condition_bl = prior.condition_ids(condition, 6)
    rows = settings.get("start_row", 0)
    known_bn = torch.randint(0, K, (6, 2 * rows * SHAPE[2]))
    moved: list[int] = []
    params = LevelParams(
        temperature=(1.0, 0.5, 1.0),
        top_k=(None, 5, None),
        top_p=(None, None, 0.9),
        cfg_scale=(settings["cfg_scale"],) * 3 if "cfg_scale" in settings else (),
        seed=13,
    )
    steps, chosen = CapturedSampler(prior, capture=False), make_sampler(prior, Engine())
    assert isinstance(chosen, PackedPrior)
    # The second call finds the memory of the first.
    steps.sample(condition_bl.flip(0), params, first_image=7)
    plain, packed = (
        sampler.sample(condition_bl, params, first_image=40, known=known_bn, advance=moved.append).codes
        for sampler in (steps, chosen)
    )
    assert torch.equal(plain, packed) and torch.equal(plain[:, :rows].flatten(1), known_bn)
    assert moved == [6] * 2 * (4 - 2 * rows) and steps.steps(known_bn.shape[1]) == 4 - 2 * rows


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_draw_the_same(precision: str) -> None:
    vae = make_vae().cuda()
    prior = make_prior(vae, **CLASS).cuda()
    settings = {"seed": 3, "cfg_scale": 0.5, "precision": precision, "top_p": 0.9}
    replayed = generate(prior, vae, LABELS, **settings)
    launched = generate(prior, vae, LABELS, **{**settings, "precision": Engine(precision, use_graphs=False)})
    assert torch.equal(replayed.codes, launched.codes)
    with pytest.raises(ValueError, match='precision: expected "fp32" or "bf16" on a GPU'):
        generate(prior, vae, LABELS, precision="int8")


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_shorter_precision_draws_from_nearby_logits(prior: RQTransformer, vae: RQVAE, precision: str) -> None:
    """The same uniforms: most first codes agree, and not every code does (it is another precision)."""
    labels = torch.arange(200) % 5
    exact = generate(prior, vae, labels, seed=14).codes
    short = generate(prior, vae, labels, seed=14, precision=precision).codes
    agree = (exact[:, 0, 0, 0] == short[:, 0, 0, 0]).double().mean()
    assert agree > 0.9 and not torch.equal(exact, short)


def test_changed_weights_are_seen(vae: RQVAE) -> None:
    """A write through .data leaves no trace in version counters."""
    prior = make_prior(vae, **CLASS)
    first = generate(prior, vae, LABELS, seed=2).codes

    def drawn_afresh() -> Tensor:
        return generate(copy.deepcopy(prior), vae, LABELS, seed=2).codes

    def step() -> None:
        prior.classifier.weight.grad = torch.randn_like(prior.classifier.weight)
        torch.optim.SGD([prior.classifier.weight], lr=0.5).step()

    for change in (
        step,
        lambda: prior.load_state_dict(make_prior(vae, **CLASS).state_dict()),
        lambda: prior.spatial_positions.data.neg_(),
        lambda: prior.classifier.norm.bias.data.copy_(prior.classifier.norm.bias.flip(0)),
    ):
        change()
        second = generate(prior, vae, LABELS, seed=2).codes
        assert not torch.equal(second, first) and torch.equal(second, drawn_afresh())
        first = second


def test_weights_are_packed_once(vae: RQVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = make_prior(vae)
    made = []
    pack = rqkernels.PackedDepthDecoder
    monkeypatch.setattr(rqkernels, "PackedDepthDecoder", lambda *a, **k: made.append(1) or pack(*a, **k))
    for precision in ("fp32", "fp32", "int8", "int8"):
        generate(prior, vae, num=2, precision=precision)
    assert len(made) == 2
    alive = weakref.ref(prior)
    del prior
    gc.collect()
    assert alive() is None  # what is kept does not keep the model


@pytest.mark.parametrize("guidance", [None, 2.0])
def test_every_position_is_computed_once(
    prior: RQTransformer, vae: RQVAE, guidance: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step sees the one new position of all images, behind those whose keys and values are kept; the codes of the
    position come from one call."""
    steps, calls = [], []
    step, decode = rqkernels.transformer_step, rqkernels.depth_decode

    def watched_step(u_bnw: Tensor, packed: Any, keys: Tensor, values: Tensor, length: int) -> Tensor:
        steps.append((*u_bnw.shape[:2], length))
        return step(u_bnw, packed, keys, values, length)

    monkeypatch.setattr(rqkernels, "transformer_step", watched_step)
    monkeypatch.setattr(rqkernels, "depth_decode", lambda h, *a, **k: calls.append(len(h)) or decode(h, *a, **k))
    generate(prior, vae, LABELS[:3], cfg_scale=guidance)
    rows = 6 if guidance else 3
    assert steps == [(rows, 1, position) for position in range(prior.positions)]
    assert calls == [rows] * prior.positions


# --- continuing


@pytest.mark.parametrize("batch_size", [None, 3])
def test_continuing_from_given_rows(prior: RQTransformer, vae: RQVAE, batch_size: int | None) -> None:
    given = torch.randint(0, K, (20, *SHAPE))
    settings = {"seed": 6, "cfg_scale": 0.5, "batch_size": batch_size}
    drawn = generate(prior, vae, LABELS, known=KnownRows(given, 1), **settings)
    assert torch.equal(drawn.codes[:, :1], given[:, :1])
    expected = draw_plainly(prior, LABELS, 20, seed=6, guidance=0.5, start=given, start_row=1)
    assert torch.equal(drawn.codes, expected)


def test_what_is_below_the_given_rows_does_not_matter(unconditional: RQTransformer, vae: RQVAE) -> None:
    given = torch.randint(0, K, (4, *SHAPE))
    hidden = given.clone()
    hidden[:, 1:] = -1
    first = generate(unconditional, vae, known=KnownRows(given, 1), seed=8)
    second = generate(unconditional, vae, num=4, known=KnownRows(hidden, 1), seed=8)
    assert torch.equal(first.codes, second.codes)
    scratch = generate(unconditional, vae, known=KnownRows(hidden, 0), seed=8)
    assert torch.equal(scratch.codes, generate(unconditional, vae, num=4, seed=8).codes)


def test_a_drawn_map_continues_as_it_was_drawn(prior: RQTransformer, vae: RQVAE) -> None:
    drawn = generate(prior, vae, LABELS, seed=9)
    again = generate(prior, vae, LABELS, seed=9, known=KnownRows(drawn.codes, 1))
    assert torch.equal(again.codes, drawn.codes)


# --- how it is run


def test_models_are_left_in_their_modes(vae: RQVAE) -> None:
    prior = make_prior(vae, **CLASS)
    expected = generate(prior, vae, LABELS, seed=1).codes
    prior.train()
    prior.depth_transformer.eval()
    vae.train()
    state = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    try:
        assert torch.equal(generate(prior, vae, LABELS, seed=1).codes, expected)
        with pytest.raises(ValueError, match="num"):
            generate(prior, vae)
        assert prior.training and prior.spatial_transformer.training and vae.training
        assert not prior.depth_transformer.training and not prior.depth_transformer.blocks[0].training
        assert all(torch.equal(tensor, state[name]) for name, tensor in vae.state_dict().items())
    finally:
        vae.eval()


def test_modes_come_back_after_an_error(vae: RQVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    prior = make_prior(vae, **CLASS).train()
    monkeypatch.setattr(vae, "decode", lambda codes: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        generate(prior, vae, [1])
    assert prior.training and prior.depth_transformer.training


def test_progress_bar(prior: RQTransformer, vae: RQVAE, capsys: pytest.CaptureFixture[str]) -> None:
    generate(prior, vae, LABELS, batch_size=7)
    assert capsys.readouterr() == ("", "")
    generate(prior, vae, LABELS, batch_size=7, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "sampling 20 images" in shown.err and "100%" in shown.err


def test_half_precision(vae: RQVAE) -> None:
    prior = make_prior(vae, **CLASS).bfloat16()
    drawn = generate(prior, vae, LABELS, cfg_scale=1.0)
    assert torch.isfinite(drawn.images).all()


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num": 20}, ValueError, "num: expected None with a condition"),
        ({"condition": None}, ValueError, "num: expected the number of images"),
        ({"condition": None, "num": 0}, ValueError, "num: expected an integer >= 1, got 0"),
        ({"condition": None, "num": 2.0}, TypeError, "num: expected an integer, got 2.0"),
        ({"condition": None, "num": 2**70}, ValueError, "num: expected at most 2147483647 images, got 118"),
        ({"condition": {3}}, TypeError, r"condition: expected .* or class names, got \{3\}$"),
        ({"condition": [None]}, TypeError, r"condition: expected .* or class names, got \[None\]$"),
        ({"condition": torch.zeros(2).long().to("meta")}, ValueError, "condition: expected a tensor with values"),
        ({"condition": torch.tensor([0, 5])}, IndexError, r"condition: expected values in \[0, 5\), got 5"),
        ({"condition": [-1]}, IndexError, r"condition: expected values in \[0, 5\), got -1"),
        ({"condition": [0.5]}, TypeError, "condition: expected int64, got torch.float32"),
        ({"condition": "cat"}, TypeError, "condition: expected a tensor or a list of integers"),
        ({"condition": 3}, ValueError, r"condition: expected at least one row, got shape \(\)"),
        ({"condition": []}, ValueError, "condition: expected at least one row"),
        ({"condition": [[1, 2]]}, ValueError, r"condition: expected shape \(1,\) or \(1, 1\), got \(1, 2\)"),
        ({"temperature": -1.0}, ValueError, "temperature: expected a finite number >= 0, got -1.0"),
        ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number"),
        ({"temperature": "hot"}, TypeError, "temperature: expected a number, got 'hot'"),
        ({"temperature": None}, TypeError, "temperature: expected a number, got None"),
        ({"temperature": [1.0, 1.0]}, ValueError, r"temperature: expected one value, or 3 .* got 2"),
        ({"temperature": [1.0, 1.0, -2.0]}, ValueError, r"temperature\[2\]: expected a finite number"),
        ({"top_k": 0}, ValueError, "top_k: expected an integer >= 1, got 0"),
        ({"top_k": 2.5}, TypeError, "top_k: expected an integer, got 2.5"),
        ({"top_k": True}, TypeError, "top_k: expected an integer, got True"),
        ({"top_k": [5, 5, 5, 5]}, ValueError, r"top_k: expected one value, or 3 .* got 4"),
        ({"top_k": [5, 0, 5]}, ValueError, r"top_k\[1\]: expected an integer >= 1, got 0"),
        ({"top_p": 0.0}, ValueError, r"top_p: expected a number in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, ValueError, r"top_p: expected a number in \(0, 1\], got 1.1"),
        ({"top_p": "all"}, TypeError, "top_p: expected a number or None, got 'all'"),
        ({"top_p": [0.5]}, ValueError, r"top_p: expected one value, or 3 .* got 1"),
        ({"cfg_scale": -0.5}, ValueError, "cfg_scale: expected a finite number >= 0, got -0.5"),
        ({"cfg_scale": float("inf")}, ValueError, "cfg_scale: expected a finite number >= 0"),
        ({"cfg_scale": "strong"}, TypeError, "cfg_scale: expected a number or None, got 'strong'"),
        ({"condition": None, "num": 2, "cfg_scale": 1.0}, ValueError, "cfg_scale: guidance needs a condition"),
        ({"seed": -1}, ValueError, "seed: expected an integer in"),
        ({"seed": 2**64}, ValueError, "seed: expected an integer in"),
        ({"seed": 1.0}, TypeError, "seed: expected an integer, got 1.0"),
        ({"offset": -1}, ValueError, "offset: expected an integer in"),
        ({"offset": None}, TypeError, "offset: expected an integer, got None"),
        ({"precision": "fp16"}, ValueError, "precision: expected one of fp32, bf16, int8, got 'fp16'"),
        ({"precision": None}, ValueError, "precision: expected one of fp32, bf16, int8, got None"),
        ({"use_graphs": False}, TypeError, r"use_graphs: unknown; give precision=Engine\(precision, use_graphs\)"),
        ({"temprature": 1.0}, TypeError, "temprature: unknown; did you mean 'temperature'"),
        ({"batchsize": 1}, TypeError, "batchsize: unknown; did you mean 'batch_size'"),
        ({"guidance_scale": 2.0}, TypeError, "guidance_scale: unknown; cfg_scale is guidance_scale - 1"),
        ({"params": {"seed": 1}}, TypeError, "params: expected a SamplingParams, got dict"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
        ({"batch_size": 1.5}, TypeError, "batch_size: expected an integer, got 1.5"),
        ({"start_row": 1}, TypeError, r"start_row: unknown; give known=KnownRows\(codes, rows\)"),
        ({"known": torch.zeros(2, *SHAPE).long()}, TypeError, "known: expected a KnownRows, got Tensor"),
        ({"known": KnownRows(ZEROS, -1)}, ValueError, r"known.rows: expected an integer in \[0, 1\], got -1"),
        ({"known": KnownRows(ZEROS, 2)}, ValueError, r"known.rows: expected an integer in \[0, 1\], got 2"),
        ({"known": KnownRows(ZEROS, 0.0)}, TypeError, "known.rows: expected an integer, got 0.0"),
        ({"known": KnownRows([[1]], 1)}, TypeError, "known.codes: expected a tensor, got list"),
        ({"known": KnownRows(ZEROS.float(), 1)}, TypeError, "known.codes: expected int64"),
        (
            {"known": KnownRows(torch.zeros(2, 2, 2, 4).long(), 1)},
            ValueError,
            r"known.codes: expected shape \(num, 2, 2, 3\), got \(2, 2, 2, 4\)",
        ),
        (
            {"known": KnownRows(torch.zeros(3, *SHAPE).long(), 1)},
            ValueError,
            "known.codes: expected the same number of images everywhere, got {'condition': 2, 'known.codes': 3}",
        ),
        (
            {"known": KnownRows(ZEROS + K, 1)},
            IndexError,
            r"known.codes in the known rows: expected values in \[0, 11\), got 11",
        ),
    ],
    ids=str,
)
def test_wrong_arguments(
    prior: RQTransformer, vae: RQVAE, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"condition": torch.tensor([0, 1]), **arguments}
    with pytest.raises(error, match=message):
        generate(prior, vae, **arguments)


def test_a_prior_without_a_null_condition(vae: RQVAE, unconditional: RQTransformer) -> None:
    prior = make_prior(vae, condition="class", condition_vocab_size=5)
    generate(prior, vae, [1], cfg_scale=0.0)
    for scale, condition in ((1.0, [1]), (0.1, [0, 4])):
        with pytest.raises(ValueError, match="cfg_scale: guidance needs a prior with a null condition"):
            generate(prior, vae, condition, cfg_scale=scale)
    with pytest.raises(ValueError, match="condition: this prior needs one"):
        generate(prior, vae, num=2)
    with pytest.raises(ValueError, match="condition: this prior is unconditional"):
        generate(unconditional, vae, [1])
    with pytest.raises(ValueError, match="cfg_scale: guidance needs a prior with a null condition"):
        generate(unconditional, vae, num=1, cfg_scale=1.0)


def test_models_that_do_not_belong_together(prior: RQTransformer, vae: RQVAE) -> None:
    with pytest.raises(TypeError, match=r"prior: expected a prior \(RQTransformer, VAR.*\), got RQVAE"):
        generate(vae, vae, [1])
    with pytest.raises(TypeError, match="vae: expected an RQVAE, got NoneType"):
        generate(prior, None, [1])
    with pytest.raises(ValueError, match="vae: expected the codebooks that the prior was made with"):
        generate(prior, make_vae(), [1])
    for change, name in (({"code_shape": (2, 2, 2)}, "code_shape"), ({"codebook_size": K + 1}, "codebook_size")):
        other = tiny.rq_prior(**{"code_shape": SHAPE, "codebook_size": K, "code_dim": C, **change})
        with pytest.raises(ValueError, match=f"vae: expected the prior's {name}, "):
            generate(other, vae, num=1)
    with pytest.raises(ValueError, match="no codebooks yet"):
        generate(RQTransformer(tiny.rq_prior_config(vae)), vae, num=1)
