"""Class names on their way from a folder of pictures to the sheets and codes of a prior that learned them."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rqgen import generate
from rqgen.cli.app import main
from rqgen.data import read_codes, write_codes
from rqgen.data.grid import grid_size
from rqgen.models import load_pretrained
from rqgen.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint


def draw_shapes(folder, names=("circle", "square")):
    """Pictures with transparent paper, and what lies about beside them."""
    generator = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(12):
            picture = Image.new("LA", (40, 40))
            side, left, top = (int(value) for value in generator.integers(10, 20, 3))
            pen = ImageDraw.Draw(picture)
            (pen.ellipse if name == "circle" else pen.rectangle)((left, top, left + side, top + side), fill=(0, 255))
            picture.save(folder / name / f"{number}.png")
    (folder / "empty").mkdir()
    (folder / ".ipynb_checkpoints").mkdir()


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert not left.value.code


@pytest.fixture(scope="module", params=["rq", "var"])
def system(request):
    return request.param


@pytest.fixture(scope="module")
def settings(system, small_tokenizer, small_prior):
    """Overrides for small models of the system: (tokenizer, prior)."""
    if system == "rq":
        return small_tokenizer, small_prior
    tokenizer = [setting for setting in small_tokenizer if "embed_dim" not in setting]
    prior = [setting for setting in small_prior if not setting.startswith(("prior.spatial", "prior.depth"))]
    return [*tokenizer, "model.quantizer.refinements=1"], [*prior, "prior.layers=1", "prior.heads=2"]


@pytest.fixture(scope="module")
def shapes(system, settings, tmp_path_factory):
    """Folder of pictures, tokenizer and prior."""
    folder = tmp_path_factory.mktemp("shapes")
    draw_shapes(folder / "pictures")
    data = ["data.source=folder", f"data.folder={folder / 'pictures'}"]
    train = ["--system", system, *data, "loop.steps=4", "loop.image_every=4"]
    run("train", "tokenizer", *train, *settings[0], "--out", folder / "t")
    run("train", "prior", *train, *settings[1], f"tokenizer={folder / 't' / 'model'}", "--out", folder / "p")
    return folder, folder / "t" / "model", folder / "p" / "model"


def test_models_keep_the_names(shapes):
    _, tokenizer, prior = shapes
    for folder in (tokenizer, prior):
        assert load_pretrained(folder).config.class_names == ("circle", "square")
        assert json.loads((folder / "config.json").read_text())["config"]["class_names"] == ["circle", "square"]


def test_names_in_the_settings_of_a_tokenizer_are_not_replaced(rqgen, system, settings, shapes, tmp_path):
    data = ["data.source=folder", f"data.folder={shapes[0] / 'pictures'}"]
    arguments = ["train", "tokenizer", "--system", system, *data, "loop.steps=1", *settings[0], "--out", tmp_path / "t"]
    code, _, err = rqgen(*arguments, "model.class_names=[square, circle]")
    assert code == 1 and "own are taken (circle, square), got square, circle" in err
    code, _, err = rqgen(*arguments, "model.class_names=[circle, square]")
    assert code == 0, err


def test_the_preview_of_a_training_has_a_row_per_class(shapes):
    _, _, prior = shapes
    events = EventAccumulator(str(prior.parent / "tensorboard")).Reload()
    sheet = events.Images("samples")[-1]
    assert (sheet.height, sheet.width) == grid_size(8, 4, (32, 32), row_labels=("circle", "square"))
    assert (sheet.height, sheet.width) != grid_size(8, 4, (32, 32))


def test_sample_by_name(rqgen, shapes, tmp_path):
    _, tokenizer, prior = shapes
    models = ["--tokenizer", tokenizer, "--prior", prior, "--num", 3]
    seen = {}
    for name, chosen in (
        ("names", ["--class", "square", "--class", "circle"]),
        ("numbers", ["--class", "1", "--class", "0"]),
        ("all", []),
        ("one", ["--class", "square"]),
    ):
        files = ["--out", tmp_path / f"{name}.png", "--codes", tmp_path / f"{name}.safetensors"]
        code, _, err = rqgen("sample", *models, *chosen, *files)
        assert code == 0, err
        seen[name] = read_codes(tmp_path / f"{name}.safetensors")
        assert seen[name].class_names == ("circle", "square")
    assert seen["names"].labels.tolist() == [1, 1, 1, 0, 0, 0] == seen["numbers"].labels.tolist()
    assert seen["all"].labels.tolist() == [0, 0, 0, 1, 1, 1] and seen["one"].labels.tolist() == [1, 1, 1]
    sheets = {name: np.asarray(Image.open(tmp_path / f"{name}.png")) for name in seen}
    assert np.array_equal(sheets["names"], sheets["numbers"])
    height, width = grid_size(6, 3, (32, 32), row_labels=("square", "circle"))
    assert sheets["names"].shape[:2] == (2 * height, 2 * width)
    # The names change places with their rows.
    left = 2 * (width - (3 * 34 + 2))
    first, second = slice(4, 68), slice(72, 136)
    assert left > 60 and sheets["names"][first, :left].min() < 60
    assert np.array_equal(sheets["names"][first, :left], sheets["all"][second, :left])
    assert not np.array_equal(sheets["names"][first, :left], sheets["names"][second, :left])


def test_sample_of_an_unknown_class(rqgen, shapes, tmp_path):
    _, tokenizer, prior = shapes
    for given, words in (
        ("circel", "--class: unknown class 'circel'; did you mean 'circle'?"),
        ("triangle", "--class: unknown class 'triangle'; "),
        ("2", "--class: expected 0..1, got 2"),
        ("empty", "--class: unknown class 'empty'; there are: circle, square"),
    ):
        code, _, err = rqgen(
            "sample", "--tokenizer", tokenizer, "--prior", prior, "--class", given, "--out", tmp_path / "s.png"
        )
        assert code == 1 and words in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_edit_by_name(rqgen, shapes, tmp_path):
    folder, tokenizer, prior = shapes
    Image.open(folder / "pictures" / "circle" / "0.png").crop((4, 4, 36, 36)).save(tmp_path / "image.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 16, 32, 32))
    mask.save(tmp_path / "mask.png")
    arguments = ["--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png"]
    models = ["--tokenizer", tokenizer, "--prior", prior]
    for label in ("square", "1"):
        code, _, err = rqgen("edit", "class", *models, *arguments, "--label", label, "--out", tmp_path / f"{label}.png")
        assert code == 0, err
    assert (tmp_path / "square.png").read_bytes() == (tmp_path / "1.png").read_bytes()
    code, _, err = rqgen("edit", "class", *models, *arguments, "--label", "squar", "--out", tmp_path / "no.png")
    assert code == 1 and "--label: unknown class 'squar'; did you mean 'square'?" in err
    assert not (tmp_path / "no.png").exists()


def test_generate_by_name(shapes):
    _, tokenizer, prior = (load_pretrained(part) if number > 0 else part for number, part in enumerate(shapes))
    by_number = generate(prior, tokenizer, torch.tensor([1, 0, 0]), seed=3).images
    for condition in (
        ["square", "circle", "circle"],
        ("square", 0, "0"),
        np.array(["square", "circle", "circle"]),
        [["square"], ["circle"], ["circle"]],
    ):
        assert torch.equal(generate(prior, tokenizer, condition, seed=3).images, by_number)
    for condition, words in (
        (["squre"], "condition: unknown class 'squre'; did you mean 'square'"),
        (["2"], r"condition: expected 0\.\.1, got 2"),
    ):
        with pytest.raises(ValueError, match=words):
            generate(prior, tokenizer, condition)
    with pytest.raises(
        TypeError, match="condition: expected a tensor or a list of integers or class names, got 'square'"
    ):
        generate(prior, tokenizer, "square")


def test_a_prior_from_codes_on_disk_keeps_the_names_too(rqgen, system, settings, shapes, tmp_path):
    folder, tokenizer, _ = shapes
    images = ["source=folder", f"folder={folder / 'pictures'}"]
    file = tmp_path / "codes.safetensors"
    assert rqgen("encode", "--tokenizer", tokenizer, "--out", file, *images)[0] == 0
    assert read_codes(file).class_names == ("circle", "square")
    hard = ["prior.soft_labels=false", "prior.stochastic_codes=false"] if system == "rq" else []
    arguments = ["--system", system, f"tokenizer={tokenizer}", *settings[1], *hard, "loop.steps=1"]
    code, _, err = rqgen("train", "prior", *arguments, f"codes={file}", "--out", tmp_path / "p")
    assert code == 0, err
    assert load_pretrained(tmp_path / "p" / "model").config.class_names == ("circle", "square")
    # An image without a class is found before the training, not in its middle.
    encoded = read_codes(file)
    encoded.labels[5] = -1
    write_codes(tmp_path / "some.safetensors", encoded)
    code, _, err = rqgen(
        "train", "prior", *arguments, f"codes={tmp_path / 'some.safetensors'}", "--out", tmp_path / "q"
    )
    assert code == 1 and "labels: expected 0 <= label < 2, got -1..1" in err and err.count("\n") == 1
    assert not (tmp_path / "q" / "model").exists()


def test_a_class_more_is_not_slipped_into_a_run(rqgen, system, settings, shapes, tmp_path):
    folder, tokenizer, _ = shapes
    run_folder, pictures = tmp_path / "p", tmp_path / "pictures"
    shutil.copytree(folder / "pictures", pictures)
    arguments = [
        *("train", "prior", "--system", system, "--out", run_folder, f"tokenizer={tokenizer}"),
        *(*settings[1], "data.source=folder", f"data.folder={pictures}"),
        "loop.steps=2",
    ]
    code, _, err = rqgen(*arguments)
    assert code == 0, err
    (pictures / "circle").rename(pictures / "ring")
    code, _, err = rqgen(*arguments, "--resume")
    assert code == 1 and "'class_names' was ['circle', 'square'] there and is ['ring', 'square'] now" in err
    shutil.copytree(pictures / "ring", pictures / "circle")
    code, _, err = rqgen(*arguments, "--resume")
    assert code == 1 and "now" in err and "'circle', 'ring', 'square'" in err and err.count("\n") == 1
    shutil.rmtree(pictures / "ring")
    code, _, err = rqgen(*arguments, "--resume")
    assert code == 0, err


@pytest.mark.parametrize("stage", ["tokenizer", "prior"])
def test_images_that_came_or_went_are_not_slipped_into_a_run(rqgen, system, settings, shapes, stage, tmp_path):
    folder, tokenizer, _ = shapes
    out, pictures = tmp_path / "run", tmp_path / "pictures"
    shutil.copytree(folder / "pictures", pictures)
    more = [f"tokenizer={tokenizer}"] if stage == "prior" else []
    arguments = [
        *("train", stage, "--system", system, "--out", out, *more, *settings[stage == "prior"]),
        *("data.source=folder", f"data.folder={pictures}", "data.held_out_fraction=0", "loop.steps=2"),
    ]
    code, _, err = rqgen(*arguments)
    assert code == 0, err
    shutil.copy(pictures / "circle" / "0.png", pictures / "circle" / "new.png")
    code, _, err = rqgen(*arguments, "--resume")
    expected = "its images have changed: 24 images of 2 classes then, 25 images of 2 classes now"
    assert code == 1 and expected in err and err.count("\n") == 1
    (pictures / "circle" / "0.png").unlink()
    code, _, err = rqgen(*arguments, "--resume")
    assert code == 1 and "24 images of 2 classes then, 24 images of 2 classes now, but others" in err
    (pictures / "circle" / "new.png").rename(pictures / "circle" / "0.png")
    code, _, err = rqgen("train", stage, "--system", system, "--out", out, "--resume", "loop.steps=4")
    assert code == 0, err


def test_a_run_of_an_older_version_keeps_its_split(rqgen, settings, system, shapes, tmp_path):
    folder, _, _ = shapes
    arguments = [
        *("train", "tokenizer", "--system", system, "--out", tmp_path / "run", *settings[0], "data.source=folder"),
        *(f"data.folder={folder / 'pictures'}", "data.folder.split=order", "loop.steps=2"),
    ]
    assert rqgen(*arguments)[0] == 0
    for checkpoint in checkpoints(tmp_path / "run" / "checkpoints"):
        state, info = load_checkpoint(checkpoint)
        del info["description"]["data"]["folder"]["split"], info["description"]["images"]
        save_checkpoint(checkpoint.parent, info["step"], state, info, keep=9)
    code, _, err = rqgen(
        "train", "tokenizer", "--system", system, "--out", tmp_path / "run", "--resume", "loop.steps=4"
    )
    assert code == 0, err
    assert load_pretrained(tmp_path / "run" / "model").data["folder"]["split"] == "order"
