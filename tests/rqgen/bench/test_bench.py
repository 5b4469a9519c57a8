"""`rqgen bench`, with priors that sample in an instant."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from rich.console import Console

from rqgen.bench import machine, sampling, systems
from rqgen.bench.published import PublishedSampling
from rqgen.bench.sampling import SamplingBench
from rqgen.bench.systems import SystemsBench
from rqgen.inference import Engine, SamplingParams, cast_prior, make_sampler
from rqgen.inference.cuda_graph import CapturedSampler
from rqgen.models.transformer import TransformerConfig
from rqgen.sampling import Cost, sampling_cost
from rqkernels import _measure

SMALL = ["--width", 16, "--heads", 2, "--spatial-layers", 2, "--depth-layers", 1, "--codebook-size", 32]


def quick_peaks(monkeypatch):
    monkeypatch.setattr(_measure, "COPIED_BYTES", {"cpu": 1 << 12})
    monkeypatch.setattr(_measure, "PRODUCT_SIDE", {"cpu": 64})


def small_prior(shape, **settings):
    spatial = TransformerConfig(layers=2, heads=2)
    prior = tiny.rq_prior(code_shape=shape, codebook_size=11, spatial=spatial, **settings)
    return tiny.resample_weights(prior, std=0.3)


def test_everything_is_measured_and_drawn(rqgen, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling, "IMAGE_SIDE", 16)
    quick_peaks(monkeypatch)
    shapes = ["--shape", "2x2x2", "--shape", "4x4x1"]
    more = ["--batch", 1, "--batch", 3, "--precision", "fp32", "--precision", "int8", "--published", "--flat"]
    quick = ["--decoder-channels", 1, "--seconds", 0, "--device", "cpu", "--threads", 1]
    code, out, err = rqgen("bench", "sampling", *SMALL, *shapes, *more, *quick, "--out", tmp_path)
    assert code == 0, err
    assert "AR" in out and "% of the floor" in out
    result = json.loads((tmp_path / "sampling.json").read_text())
    assert result["environment"]["versions"]["torch"] and result["environment"]["threads"] == 1
    assert result["settings"]["codebook_size"] == 32 and result["peaks"]["copy_bytes_per_s"] > 0
    cases = result["cases"]
    contenders = [("rqgen", "fp32"), ("rqgen", "int8"), ("published formulation", "fp32")]
    assert [(case["contender"], case["precision"]) for case in cases] == contenders * 4
    assert [case["layers"] for case in cases[::6]] == [[2, 1], [3, 0]]  # the same budget of layers
    for case in cases:
        assert case["greedy_agreement"] == 1 or (case["precision"] == "int8" and case["greedy_agreement"] > 0.5)
        assert case["images_per_s"] == pytest.approx(1e3 / (case["ar_ms_per_image"] + case["decoder_ms_per_image"]))
        assert case["percent_of_floor"] == pytest.approx(100 * case["floor_ms_per_image"] / case["ar_ms_per_image"])
    stacked, one = result["cost_law"]
    assert stacked["flat_over_stacked_attention"] > 1 and stacked["measured"]["flat_ar_ms_per_image"] > 0
    assert one["flat_over_stacked"] == 1 and "measured" not in one  # it is its own flat model
    assert np.asarray(Image.open(tmp_path / "sampling.png")).std() > 1


def bench_of(**settings):
    unset = {**dict.fromkeys(SamplingBench.__dataclass_fields__), "use_graphs": True}
    return SamplingBench(**{**unset, **settings})


def test_the_published_formulation_has_our_precisions():
    prior = small_prior((2, 2, 2))

    def of(precisions):
        contenders = sampling._contenders(bench_of(precisions=precisions, published=True, use_graphs=True), prior)
        return [(contender.name, contender.precision) for contender in contenders][len(precisions) :]

    assert of(["bf16", "fp32"]) == [("published formulation", "bf16"), ("published formulation", "fp32")]
    assert of(["int8"]) == [("published formulation", "fp32")]
    codes = sampling._published(prior, "bf16").sample(prior.condition_ids(None, 3), 5, 0.9)
    assert codes.shape == (3, 4, 2) and codes.min() >= 0 and codes.max() < 11


def test_contenders_as_a_gpu_has_them(monkeypatch):
    """There ours computes with modules too, and both from weights of that precision."""

    def modules(prior, engine):
        return CapturedSampler(cast_prior(prior, engine.precision), capture=False)

    monkeypatch.setattr(sampling, "make_sampler", modules)
    prior = small_prior((2, 2, 2), condition="class", condition_vocab_size=5)
    bench = bench_of(precisions=["bf16", "fp32"], published=True, seconds=0.0)
    contenders = sampling._contenders(bench, prior)
    short, whole = (contender.weight_bytes for contender in contenders[:2])
    assert whole == 2 * short > 0
    assert [sampling._check_greedy(contender, prior) for contender in contenders[1::2]] == [1, 1]
    assert all(sampling._check_greedy(contender, prior) > 0.5 for contender in contenders[::2])
    peaks = machine.Rates(1e9, {"bf16": 1e9, "fp32": 1e9})
    cases, missing = sampling._measure(bench, prior, 3, None, peaks)
    assert not missing and [case["weight_bytes"] for case in cases] == [short, whole, None, None]  # on the CPU, that is


def test_codes_that_do_not_follow_from_the_weights_are_never_timed(monkeypatch):
    prior = small_prior((2, 2, 2), condition="class", condition_vocab_size=5)
    exact, rounded = (sampling._published(prior, precision) for precision in ("fp32", "bf16"))
    assert sampling._check_greedy(exact, prior) == 1 and sampling._check_greedy(rounded, prior) > 0.5
    monkeypatch.setattr(PublishedSampling, "_context", lambda self, seen, condition: torch.ones(len(seen), 1, 16))
    with pytest.raises(RuntimeError, match="greedy codes of 'published formulation' in fp32 are not those of its weig"):
        sampling._check_greedy(exact, prior)


def test_what_does_not_fit_into_the_memory_is_named(rqgen, tmp_path, monkeypatch):
    def sample(self, condition_bl, **settings):
        if len(condition_bl) > 1:
            raise torch.OutOfMemoryError
        return original(self, condition_bl, **settings)

    original = PublishedSampling.sample
    monkeypatch.setattr(PublishedSampling, "sample", sample)
    monkeypatch.setattr(sampling, "peak_bytes", lambda call, device: call().nbytes)
    quick_peaks(monkeypatch)
    options = ["--shape", "2x2x2", "--batch", 1, "--batch", 2, "--published", "--decoder-channels", 0, "--seconds", 0]
    code, out, err = rqgen("bench", "sampling", *SMALL, *options, "--device", "cpu", "--out", tmp_path)
    assert code == 0, err
    assert "batch   2  published formulation fp32: out of memory" in out
    result = json.loads((tmp_path / "sampling.json").read_text())
    missing = {"shape": [2, 2, 2], "batch": 2, "contender": "published formulation", "precision": "fp32"}
    assert result["out_of_memory"] == [missing]
    assert [(case["batch"], case["contender"]) for case in result["cases"]] == [
        (1, "rqgen"),
        (1, "published formulation"),
        (2, "rqgen"),
    ]


@pytest.mark.parametrize(("batch", "floor_ms"), [(1, 84.0), (100, 1.02), (200, 0.60), (500, 0.42)])
def test_the_floor_of_the_largest_preset_on_an_h100(batch, floor_ms):
    """A card that copies 3.0 TB/s and multiplies 790 TFLOP/s."""
    config = bench_of(precisions=[], preset="1.4B", codebook_size=16384).prior_config((8, 8, 4))
    peaks = machine.Rates(3.0e12, {"bf16": 790e12})
    seconds = machine.floor_seconds(peaks, sampling_cost(config, batch), "bf16")
    assert 1e3 * seconds / batch == pytest.approx(floor_ms, rel=0.02)


def test_three_systems_side_by_side(rqgen, tmp_path, monkeypatch):
    quick_peaks(monkeypatch)
    monkeypatch.setattr(systems, "CODES", {16: systems.Codes((1, 2, 4), (2, 2, 3), (4, 4, 1))})
    for name in ("RQ_DECODER_CHANNELS", "SCALES_DECODER_CHANNELS"):
        monkeypatch.setattr(systems, name, 1)
    sizes = ["--image-side", 16, *SMALL, "--var-codebook-size", 16]
    more = ["--batch", 1, "--batch", 2, "--precision", "fp32", "--precision", "int8", "--cfg-scale", 2, "--decoder"]
    quick = ["--seconds", 0, "--device", "cpu", "--threads", 1]
    code, out, err = rqgen("bench", "systems", *sizes, *more, *quick, "--out", tmp_path)
    assert code == 0, err
    assert "flat  batch   2  fp32 cfg_scale 2" in out
    result = json.loads((tmp_path / "systems.json").read_text())
    # The same number of layers; scales, positions and codes of each, or codes alone.
    assert [(system["name"], system["layers"], system["steps"]) for system in result["systems"]] == [
        ("VAR", [3], [3]),
        ("RQ-Transformer", [2, 1], [4, 12]),
        ("flat", [3], [16]),
    ]
    drawn = [(case["system"], case["precision"], case["cfg_scale"], case["batch"]) for case in result["cases"]]
    every = [("VAR", "fp32", 0), ("VAR", "fp32", 2)]
    every += [(name, *way) for name in ("RQ-Transformer", "flat") for way in (("fp32", 0), ("fp32", 2), ("int8", 0))]
    assert drawn == [(*way, batch) for batch in (1, 2) for way in every]
    for case in result["cases"]:
        assert case["images_per_s"] == pytest.approx(1e3 / (case["ar_ms_per_image"] + case["decoder_ms_per_image"]))
        assert case["percent_of_floor"] == pytest.approx(100 * case["floor_ms_per_image"] / case["ar_ms_per_image"])
    floors = [case["floor_ms_per_image"] for case in result["cases"]]
    assert floors[0] < floors[1] < 2.1 * floors[0]  # weights are read once for both rows of a guided image
    for system in result["systems"]:
        one, two = system["counted_per_image"]
        assert one["products"] == two["products"] and one["weights"] == 2 * two["weights"]
    assert np.asarray(Image.open(tmp_path / "systems.png")).std() > 1
    for arguments, words in (
        (["--image-side", 100], "--image-side: expected one of 16, got 100"),
        (["--image-side", 16, "--precision", "fp64"], "--precision: expected one of fp32, bf16, int8, got 'fp64'"),
        (["--image-side", 16, "--cfg-scale", 0], "--cfg-scale: expected a number > 0, got 0.0"),
    ):
        code, _, err = rqgen("bench", "systems", *SMALL, *arguments, *quick, "--out", tmp_path)
        assert code == 1 and words in err and err.count("\n") == 1


def test_the_floor_is_that_of_parts_one_after_another():
    peaks = machine.Rates(100.0, {"fp32": 10.0, "int8": 40.0})
    moving, computing = Cost(50, 25, 10, 10), Cost(1, 1, 300, 100)
    assert machine.floor_seconds(peaks, [moving], "fp32") == 4 * 75 / 100
    assert machine.floor_seconds(peaks, [moving, computing], "fp32") == 3 + 400 / 10
    assert machine.floor_seconds(peaks, [moving, computing], "int8") == (50 + 4 * 25) / 100 + 400 / 40


def test_mistakes(rqgen, tmp_path):
    for arguments, words in (
        (["--shape", "8x8"], "--shape: expected three numbers like 8x8x4, got '8x8'"),
        (["--precision", "fp64"], "--precision: expected one of fp32, bf16, int8, got 'fp64'"),
        (["--preset", "2B"], "name: expected one of"),
    ):
        code, _, err = rqgen("bench", "sampling", *SMALL, *arguments, "--device", "cpu", "--out", tmp_path)
        assert code == 1 and words in err and err.count("\n") == 1


@pytest.mark.parametrize("shape", [(2, 3, 3), (2, 2, 1)])
def test_the_published_formulation_draws_the_same_likeliest_codes(shape):
    condition = {"condition": "class", "condition_vocab_size": 5} if shape[2] > 1 else {}
    prior = small_prior(shape, **condition)
    condition_bl = prior.condition_ids(torch.arange(5) if condition else None, 5)
    params = SamplingParams(top_k=1).resolve(prior, None)
    ours = make_sampler(prior, Engine()).sample(condition_bl, params).codes
    assert torch.equal(PublishedSampling(prior).sample(condition_bl, top_k=1), ours.flatten(1, 2))


def test_the_published_formulation_draws_from_what_is_kept():
    prior = small_prior((2, 2, 2))
    condition_bl = prior.condition_ids(None, 400)
    first = PublishedSampling(prior).sample(condition_bl, top_k=3, top_p=0.9)[:, 0, 0]
    logits = prior(torch.zeros(1, 2, 2, 2, dtype=torch.int64)).logits[0, 0, 0, 0]
    best, order = logits.topk(3)
    kept = (best.softmax(0).cumsum(0) - best.softmax(0)) < 0.9
    assert set(first.tolist()) == set(order[kept].tolist())
    with pytest.raises(ValueError, match="prior: the published formulation"):
        PublishedSampling(small_prior((2, 2, 2), depth_context="previous"))


@pytest.mark.parametrize(("preset", "layers"), [("90M", (24, 4)), ("1.4B", (42, 6))])
def test_presets_keep_their_layers_at_every_shape(preset, layers):
    bench = bench_of(precisions=[], preset=preset, codebook_size=64)
    for shape, expected in (((8, 8, 4), layers), ((16, 16, 1), (sum(layers), 0))):
        config = bench.prior_config(shape)
        assert (config.spatial.layers, config.depth.layers) == expected and config.code_shape == shape


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"batch_sizes": []}, ValueError, "--batch: expected at least one, got none"),
        ({"batch_sizes": [0]}, ValueError, "--batch: expected an integer >= 1, got 0"),
        ({"batch_sizes": ["1"]}, TypeError, "--batch: expected an integer, got '1'"),
        ({"batch_sizes": [1, 2, 1]}, ValueError, "--batch: expected each once, got 1 twice"),
        ({"precisions": []}, ValueError, "--precision: expected at least one, got none"),
        ({"precisions": ["fp32", "fp32"]}, ValueError, "--precision: expected each once, got 'fp32' twice"),
        ({"seconds": -1.0}, ValueError, "--seconds: expected a finite number >= 0, got -1.0"),
        ({"shapes": []}, ValueError, "--shape: expected at least one, got none"),
        ({"shapes": [(2, 2)]}, ValueError, r"--shape: expected \(h, w, D\), got \(2, 2\)"),
        ({"shapes": [(2, 2, 0)]}, ValueError, "--shape: expected an integer >= 1, got 0"),
    ],
)
def test_runs_that_cannot_be_measured_are_told_before_the_first(tmp_path, settings, error, words):
    common = {"width": 16, "heads": 2, "spatial_layers": 1, "depth_layers": 1, "codebook_size": 8, "batch_sizes": [1]}
    common |= {"precisions": ["fp32"], "use_graphs": False, "seconds": 0.0}
    sampled = {"shapes": [(2, 2, 2)], "preset": None, "top_k": None, "top_p": None, "decoder_channels": 0}
    bench = SamplingBench(published=False, flat=False, **sampled, **common)
    where = {"out": tmp_path / "bench", "device": torch.device("cpu"), "console": Console(quiet=True)}
    with pytest.raises(error, match=words):
        sampling.run_sampling_bench(replace(bench, **settings), **where)
    if "shapes" not in settings:
        bench = SystemsBench(image_side=256, var_codebook_size=8, cfg_scale=None, decoder=False, **common)
        with pytest.raises(error, match=words):
            systems.run_systems_bench(replace(bench, **settings), **where)
    assert list(tmp_path.iterdir()) == []
