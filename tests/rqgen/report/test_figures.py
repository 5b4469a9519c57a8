"""Figures: written, readable, and about what they were given."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from rqgen.quantizers import CodeLayout
from rqgen.report import (
    plot_coarse_to_fine,
    plot_code_usage,
    plot_edits,
    plot_losses,
    plot_reconstructions,
    plot_samples,
    plot_sampling_speed,
    plot_scaling,
    plot_systems,
    power_of_ten,
)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def assert_drawn(path, *, least_side=100):
    shown = pixels(path)
    assert min(shown.shape[:2]) >= least_side and shown.std() > 1
    return shown


class FakeTokenizer:
    """Tokenizer that decodes depth d to grey d/D: each row of the figure has its own shade."""

    layout = CodeLayout.stacks((1, 1, 4), 8)

    def __init__(self):
        self.depths = []

    def encode(self, images):
        return torch.zeros(len(images), 1, 1, 4, dtype=torch.int64)

    def decode_partial(self, codes, depth):
        self.depths.append(depth)
        return torch.full((len(codes), 1, 8, 8), depth / 4 - 0.5)


def test_coarse_to_fine_decodes_every_depth(tmp_path):
    vae = FakeTokenizer()
    plot_coarse_to_fine(vae, -torch.ones(3, 1, 8, 8), tmp_path / "c.png")
    assert vae.depths == [1, 2, 3, 4]
    shades = {tuple(colour) for colour in assert_drawn(tmp_path / "c.png").reshape(-1, 3)}
    for depth in range(1, 5):
        shade = round((depth / 4 + 0.5) * 127.5)
        assert any(max(abs(value - shade) for value in colour) <= 1 for colour in shades)


def test_reconstructions(tmp_path):
    images = torch.rand(5, 3, 8, 8) * 2 - 1
    plot_reconstructions(images, -images, tmp_path / "r.png", columns=3)
    assert_drawn(tmp_path / "r.png")
    with pytest.raises(ValueError, match="reconstructions: expected shape"):
        plot_reconstructions(images, images[:4], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_code_usage(tmp_path):
    counts = torch.tensor([[5, 0, 1], [0, 0, 0]])
    plot_code_usage(counts, tmp_path / "u.png")
    first = assert_drawn(tmp_path / "u.png")
    plot_code_usage(torch.tensor([[1, 5, 0], [0, 0, 0]]), tmp_path / "same.png")
    plot_code_usage(torch.tensor([[2, 2, 2], [0, 0, 0]]), tmp_path / "other.png")
    assert np.array_equal(first, pixels(tmp_path / "same.png"))
    assert not np.array_equal(first, pixels(tmp_path / "other.png"))
    plot_code_usage(counts, tmp_path / "scales.png", axis="scale")
    assert not np.array_equal(first, pixels(tmp_path / "scales.png"))


def test_losses(tmp_path):
    history = [{"step": s, "learning_rate": 1.0, "loss": 1 / s, "perplexity/depth_1": 9.0} for s in (1, 2, 3)]
    plot_losses({"tokenizer": history, "prior": []}, tmp_path / "l.png")
    drawn = assert_drawn(tmp_path / "l.png")
    plot_losses({"tokenizer": [record | {"loss": 1.0} for record in history], "prior": []}, tmp_path / "flat.png")
    assert not np.array_equal(drawn, pixels(tmp_path / "flat.png"))


def test_samples_are_a_plain_sheet(tmp_path):
    images = torch.stack([torch.full((1, 4, 4), value) for value in (-1.0, 1.0, 0.0, 1.0)])
    plot_samples(images, tmp_path / "s.png", columns=2)
    shown = pixels(tmp_path / "s.png")
    assert shown.shape == (2 * (2 + 2 * 6), 2 * (2 + 2 * 6), 3)
    assert (shown[4:12, 4:12] == 0).all() and (shown[16:24, 4:12] == 128).all()


def test_sampling_speed(tmp_path):
    def case(shape, batch, contender, ms, decoder=5.0):
        return {
            "shape": shape,
            "batch": batch,
            "contender": contender,
            "precision": "fp32",
            "ar_ms_per_image": ms,
            "floor_ms_per_image": 1.0,
            "decoder_ms_per_image": decoder,
        }

    cases = [
        case([8, 8, 4], batch, name, ms)
        for name, times in (("rqgen", (20.0, 4.0)), ("published formulation", (90.0, 30.0)))
        for batch, ms in zip((1, 16), times, strict=True)
    ]
    pictures = []
    for more in ([], [case([16, 16, 1], 1, "rqgen", 60.0, None)], [case([16, 16, 1], 1, "rqgen", 60.0, 30.0)]):
        plot_sampling_speed([*cases, *more], tmp_path / "speed.png")
        pictures.append(assert_drawn(tmp_path / "speed.png"))
    assert all((one != two).any() for one, two in ((pictures[0], pictures[1]), (pictures[1], pictures[2])))


def test_systems(tmp_path):
    def system(name, steps, products):
        work = {"batch": 1, "products": products, "attention": 5e8, "weights": 2e7, "states": 1e6}
        return {"name": name, "steps": steps, "counted_per_image": [work, work | {"batch": 8, "weights": 2.5e6}]}

    def case(name, batch, ms, **way):
        way = {"precision": "fp32", "cfg_scale": 0.0, **way}
        return {"system": name, "batch": batch, "ar_ms_per_image": ms, "floor_ms_per_image": 1.0, **way}

    systems = [system("VAR", [10], 7e10), system("flat", [256], 2e10)]
    cases = [case(name, batch, ms) for batch in (1, 8) for name, ms in (("VAR", 50.0), ("flat", 300.0 / batch))]
    pictures = []
    for other, more in (
        (systems, []),
        (systems, [case("flat", 1, 90.0, precision="int8")]),
        (systems, [case("VAR", 1, 90.0, cfg_scale=1.5)]),
        ([systems[0], system("flat", [256], 3e10)], []),
    ):
        plot_systems(other, [*cases, *more], tmp_path / "systems.png")
        pictures.append(assert_drawn(tmp_path / "systems.png"))
    assert all((pictures[0] != picture).any() for picture in pictures[1:])


def test_scaling(tmp_path):
    sizes = [1e5, 1e6, 1e7]

    def drawn(name, **changes):
        curve = {"title": "test loss", "values": [3.0, 2.5, 2.2], "alpha": -0.07, "log_beta": -27.2, "correlation": -1}
        plot_scaling(sizes, [{**curve, **changes}, {**curve, "title": "token error rate"}], tmp_path / name)
        return assert_drawn(tmp_path / name)

    first = drawn("one.png")
    for change in ({"values": [3.0, 2.6, 2.2]}, {"alpha": -0.06}, {"log_beta": -28.0}, {"correlation": -0.98}):
        other = drawn("other.png", **change)
        assert (first != other).any()
    with pytest.raises(ValueError, match="test loss: expected a value for each of 3 sizes, got 2"):
        drawn("none.png", values=[3.0, 2.5])
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize(
    ("log_value", "text"),
    [
        (math.log(3.1e-5), "3.10e-05"),
        (math.log(9.999), "1.00e+01"),
        (0.0, "1.00e+00"),
        (-1e4 * math.log(10), "1.00e-10000"),
        (1234.5 * math.log(10), "3.16e+1234"),
    ],
)
def test_powers_of_ten_beyond_a_float(log_value, text):
    assert power_of_ten(log_value) == text


CURVE = {"title": "loss", "values": [3.0, 2.0, 1.0], "alpha": -0.1, "log_beta": 1.0, "correlation": -0.9}
IMAGES, MASK = torch.zeros(4, 1, 8, 8), torch.zeros(8, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("plot", "words"),
    [
        (lambda path: plot_reconstructions(IMAGES[:0], IMAGES[:0], path), r"images: expected \(N, channels, H, W\)"),
        (lambda path: plot_reconstructions(IMAGES[0], IMAGES[0], path), r"images: expected .*, got \(1, 8, 8\)"),
        (
            lambda path: plot_reconstructions(IMAGES, IMAGES, path, columns=0),
            "columns: expected an integer >= 1",
        ),
        (lambda path: plot_edits([], path), "edits: expected at least one, got none"),
        (lambda path: plot_edits([("a", IMAGES, MASK.float(), IMAGES)], path), r"edits\[0\]: mask: expected bool \(8"),
        (lambda path: plot_edits([("a", IMAGES, MASK[:, 1:], IMAGES)], path), r"edits\[0\]: mask: .* \(8, 7\)"),
        (lambda path: plot_edits([("a", IMAGES, MASK, IMAGES[:2])], path), r"edits\[0\]: results: expected shape"),
        (lambda path: plot_code_usage(torch.zeros(4), path), r"counts: expected numbers >= 0, \(levels, codes\)"),
        (lambda path: plot_code_usage(-torch.ones(2, 4), path), "counts: expected numbers >= 0"),
        (lambda path: plot_losses({}, path), "histories: expected at least one run, got none"),
        (
            lambda path: plot_losses({"prior": [{"loss": 1.0}]}, path),
            "histories: prior: expected a step in each",
        ),
        (lambda path: plot_sampling_speed([], path), "cases: expected at least one, got none"),
        (lambda path: plot_systems([], [], path), "systems: expected at least one, got none"),
        (lambda path: plot_scaling([1, 2, 3], [], path), "curves: expected at least one, got none"),
        (lambda path: plot_scaling([0, 2, 3], [CURVE], path), "sizes: expected finite numbers > 0"),
        (lambda path: plot_scaling([1, 2, 3], [{**CURVE, "values": [1, 2, -3]}], path), "loss: expected finite"),
        (lambda path: plot_scaling([1, 2, 3], [{**CURVE, "values": [1, 2, math.nan]}], path), "loss: expected finite"),
    ],
)
def test_what_cannot_be_plotted_is_told(tmp_path, plot, words):
    with pytest.raises(ValueError, match=words):
        plot(tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_terms_that_some_records_lack_are_plotted(tmp_path):
    """A term that began or ended in the middle of a run was a KeyError, or was left out."""
    records = [{"step": 1, "loss": 2.0, "first": 1.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.5, "last": 3.0}]
    plot_losses({"tokenizer": records}, str(tmp_path / "losses.png"))
    assert_drawn(tmp_path / "losses.png")


@pytest.mark.filterwarnings("error")
def test_more_curves_than_colours_and_equal_values(tmp_path):
    """The ninth curve was left out."""
    plot_scaling([1, 2, 3], [CURVE] * 9, tmp_path / "nine.png")
    plot_scaling([1, 2, 3], [CURVE] * 10, tmp_path / "ten.png")
    nine, ten = pixels(tmp_path / "nine.png"), pixels(tmp_path / "ten.png")
    assert nine.shape == ten.shape and nine[-200:, : nine.shape[1] // 2].std() > 10
    level = {**CURVE, "values": [2.0, 2.0, 2.0], "alpha": 0.0}
    plot_scaling([1, 2, 3], [level], tmp_path / "level.png")
    assert_drawn(tmp_path / "level.png")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_power_of_ten(value):
    with pytest.raises(ValueError, match="log_value: expected a finite number"):
        power_of_ten(value)
