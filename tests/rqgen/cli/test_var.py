"""The commands with --system var, `rqgen edit` and `rqgen convert var`."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rqgen.checks import DIGIT_NAMES
from rqgen.cli.app import main
from rqgen.data import DataConfig, image_grid, open_dataset, read_codes, save_image
from rqgen.data.grid import grid_size
from rqgen.models import VAR, MultiScaleVQVAE, MultiScaleVQVAEConfig
from rqgen.quantizers import MultiScaleConfig
from rqgen.systems import TITLES

TOKENIZER = [
    "model.base_channels=8",
    "model.channel_multipliers=[1,1,1,1]",
    "model.z_channels=8",
    "model.quantizer.codebook_size=16",
    "model.quantizer.refinements=1",
    "loop.batch_size=16",
    "loop.optimizer.warmup_steps=2",
]
PRIOR = ["prior.embed_dim=16", "prior.layers=1", "prior.heads=2", "loop.batch_size=16", "loop.optimizer.warmup_steps=2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("var")
    tokenizer, prior = folder / "tokenizer", folder / "prior"
    for arguments in (
        ["train", "tokenizer", "--system", "var", "--out", str(tokenizer), *TOKENIZER, "loop.steps=3"],
        [
            *("train", "prior", "--system", "var", "--out", str(prior)),
            *(f"tokenizer={tokenizer / 'model'}", *PRIOR, "loop.steps=3"),
        ],
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert not left.value.code
    return tokenizer / "model", prior / "model"


def test_both_stages_train_and_the_prior_draws(rqgen, trained, tmp_path):
    vae, prior = MultiScaleVQVAE.from_pretrained(trained[0]), VAR.from_pretrained(trained[1])
    assert torch.equal(vae.codebooks, prior.quantizer.codebook) and prior.config.num_classes == 10
    models = ["--tokenizer", trained[0], "--prior", trained[1]]
    code, out, err = rqgen("sample", *models, "--num", 3, "--class", 4, "--cfg-scale", 1.5, "--out", tmp_path / "s.png")
    assert code == 0, err
    height, width = grid_size(3, 3, (32, 32), row_labels=("four",))
    assert "3 images" in out and Image.open(tmp_path / "s.png").size == (2 * width, 2 * height)
    assert height == 34 + 2 and width > 3 * 34 + 2
    code, _, err = rqgen("sample", "--tokenizer", trained[0], "--prior", trained[0])
    assert code == 1 and "holds no prior, but a multiscale_vqvae" in err


def test_encode_writes_token_maps(rqgen, trained, tmp_path):
    file = tmp_path / "codes.safetensors"
    code, out, err = rqgen("encode", "--tokenizer", trained[0], "--out", file, "--split", "held_out")
    assert code == 0, err
    encoded, images = read_codes(file), open_dataset(DataConfig(), "held_out")
    assert f"{len(images)} images as token maps of 1x1, 2x2, 3x3, 4x4" in out
    expected = MultiScaleVQVAE.from_pretrained(trained[0]).encode(images.images[:70])
    assert len(encoded.codes) == 4
    assert all(torch.equal(maps[:70], first) for maps, first in zip(encoded.codes, expected, strict=True))
    assert torch.equal(encoded.labels, images.labels) and encoded.class_names == DIGIT_NAMES


def test_a_prior_learns_from_token_maps_on_disk_as_from_images(rqgen, trained, tmp_path):
    file = tmp_path / "codes.safetensors"
    assert rqgen("encode", "--tokenizer", trained[0], "--out", file, "--split", "train", "--batch-size", 16)[0] == 0
    arguments = ["train", "prior", "--system", "var", f"tokenizer={trained[0]}", *PRIOR, "loop.steps=3"]
    code, _, err = rqgen(*arguments, f"codes={file}", "--out", tmp_path / "prior")
    assert code == 0, err
    one, two = (VAR.from_pretrained(folder).state_dict() for folder in (trained[1], tmp_path / "prior" / "model"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_codes_of_another_tokenizer_are_refused(rqgen, trained, tmp_path):
    file, other = tmp_path / "codes.safetensors", tmp_path / "other"
    vae = MultiScaleVQVAE.from_pretrained(trained[0])
    with torch.no_grad():
        vae.quantizer.refinements[0].bias[0] += 1  # one codebook, but its codes stand for other features
    vae.save_pretrained(other)
    assert rqgen("encode", "--tokenizer", other, "--out", file, "--split", "train")[0] == 0
    arguments = ["train", "prior", "--system", "var", *PRIOR, "--out", tmp_path / "prior", f"codes={file}"]
    code, _, err = rqgen(*arguments, f"tokenizer={trained[0]}")
    assert code == 1 and "written by another tokenizer" in err
    coarse = MultiScaleVQVAEConfig(
        **{**vars(vae.config), "quantizer": MultiScaleConfig(codebook_size=16, scales=[1, 4], refinements=1)}
    )
    MultiScaleVQVAE(coarse).save_pretrained(tmp_path / "coarse")
    code, _, err = rqgen(*arguments, f"tokenizer={tmp_path / 'coarse'}", "--out", tmp_path / "third")
    assert code == 1 and "expected token maps of 1x1, 4x4, as the tokenizer has, got token maps of 1x1, 2x2" in err


def test_sample_writes_the_token_maps_it_drew(rqgen, trained, tmp_path):
    models = ["--tokenizer", trained[0], "--prior", trained[1]]
    files = ["--out", tmp_path / "s.png", "--codes", tmp_path / "c"]
    code, _, err = rqgen("sample", *models, "--num", 2, "--class", 4, "--class", 1, *files)
    assert code == 0, err
    drawn = read_codes(tmp_path / "c")
    assert drawn.labels.tolist() == [4, 4, 1, 1]
    # What the file holds is what the sheet shows.
    vae = MultiScaleVQVAE.from_pretrained(trained[0])
    images = torch.cat([vae.decode([maps[i : i + 1] for maps in drawn.codes]) for i in range(4)])
    save_image(image_grid(images, columns=2, row_labels=("four", "one")), tmp_path / "again.png", scale=2)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), np.asarray(Image.open(tmp_path / "s.png")))


def test_usage_is_logged_by_scale(trained):
    events = EventAccumulator(str(trained[0].parent / "tensorboard")).Reload()
    names = {name for name in events.Tags()["scalars"] if name.startswith(("codes_used", "perplexity"))}
    assert names == {f"{what}/scale_{k}" for what in ("codes_used", "perplexity") for k in range(1, 5)}


def test_training_resumes_bit_for_bit(rqgen, trained, tmp_path):
    arguments = ["train", "prior", "--system", "var", f"tokenizer={trained[0]}", *PRIOR, "prior.dropout=0.1"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert rqgen(*arguments, "--out", whole, "loop.steps=4", "loop.checkpoint_every=2")[0] == 0
    assert rqgen(*arguments, "--out", halves, "loop.steps=4", "loop.checkpoint_every=2")[0] == 0
    newest = sorted((halves / "checkpoints").iterdir())[-1]
    for path in sorted(newest.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    newest.rmdir()
    assert rqgen(*arguments, "--out", halves, "loop.steps=4", "loop.checkpoint_every=2", "--resume")[0] == 0
    one, two = (VAR.from_pretrained(folder / "model").state_dict() for folder in (whole, halves))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_tokenizer_of_the_other_system_is_refused(rqgen, trained, tmp_path):
    code, _, err = rqgen("train", "prior", f"tokenizer={trained[0]}", "--out", tmp_path / "p")
    assert code == 1 and "tokenizer: --system rq expects a rqvae, got a multiscale_vqvae" in err
    assert not (tmp_path / "p").exists()


def test_an_unknown_system_is_refused(rqgen):
    code, _, err = rqgen("train", "tokenizer", "--system", "vqgan")
    assert code == 1 and f"--system: expected one of {', '.join(TITLES)}, got 'vqgan'" in err


@pytest.fixture
def pictures(tmp_path):
    pixels = np.full((32, 32), 40, dtype=np.uint8)
    pixels[8:24, 12:20] = 220
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[16:] = 255
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return ["--image", tmp_path / "image.png", "--mask", tmp_path / "mask.png"]


@pytest.mark.parametrize("kind", ["inpaint", "outpaint", "class"])
def test_edit(rqgen, trained, pictures, tmp_path, kind):
    models = ["--tokenizer", trained[0], "--prior", trained[1]]
    code, out, err = rqgen("edit", kind, *models, *pictures, "--label", 7, "--out", tmp_path / "e.png")
    assert code == 0, err
    assert "before, mask and after" in out
    sheet = np.asarray(Image.open(tmp_path / "e.png"))[::2, ::2]
    before, masked = sheet[2:34, 2:34], sheet[2:34, 36:68]
    hidden, kept = (slice(16), slice(16, 32)) if kind == "outpaint" else (slice(16, 32), slice(16))
    assert before[20, 15] == 220 and (masked[hidden] == 128).all()
    after = sheet[2:34, 70:102]
    assert (after[kept] == before[kept]).all() and (after[hidden] != before[hidden]).any()


def test_edit_takes_images_and_masks_as_a_viewer_shows_them(rqgen, trained, tmp_path):
    """Upright, deep, and with what is transparent in the colour of the background."""
    pixels = np.full((32, 32), 40, dtype=np.uint8)
    pixels[8:24, 12:20] = 220
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(np.rot90(pixels).astype(np.uint16) * 257).save(tmp_path / "image.png", exif=turned)
    # White ink over nothing, the mask; and its opposite, a hole.
    ink = np.zeros((32, 32, 2), dtype=np.uint8)
    ink[16:] = 255
    Image.fromarray(ink, "LA").save(tmp_path / "ink.png")
    hole = np.zeros((32, 32, 4), dtype=np.uint8)
    hole[:16, :, 3] = 255
    Image.fromarray(hole).save(tmp_path / "hole.webp", lossless=True, exact=True)
    models = ["--tokenizer", trained[0], "--prior", trained[1], "--image", tmp_path / "image.png", "--label", "7"]
    for mask, more in (
        ("ink.png", ["--background", "black"]),
        ("hole.webp", []),
        ("hole.webp", ["--background", "#fff"]),
    ):
        out = tmp_path / f"{len(more)}.bmp"
        code, _, err = rqgen("edit", "inpaint", *models, "--mask", tmp_path / mask, "--out", out, *more)
        assert code == 0, err
        with Image.open(out) as image:
            assert image.format == "BMP"
            sheet = np.asarray(image)[::2, ::2]
        assert (sheet[2:34, 2:34] == pixels).all()
        assert (sheet[18:34, 36:68] == 128).all() and (sheet[2:18, 36:68] == pixels[:16]).all()
    code, _, err = rqgen("edit", "inpaint", *models, "--mask", tmp_path / "ink.png", "--out", tmp_path / "x.png")
    assert code == 1 and "an image that is masked as a whole" in err  # white on white


def test_edit_mistakes(rqgen, trained, pictures, tmp_path):
    models = ["--tokenizer", trained[0], "--prior", trained[1]]
    Image.new("L", (16, 32)).save(tmp_path / "small.png")
    Image.new("L", (32, 32)).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("no image")
    for change, words in (
        (["--label", 10], "--label: expected 0..9, got 10"),
        (["--mask", tmp_path / "small.png"], f"--mask: {tmp_path / 'small.png'}: expected 32x32 pixels, got 16x32"),
        (["--mask", tmp_path / "none.png"], f"--mask: no file {tmp_path / 'none.png'}"),
        (["--mask", tmp_path / "black.png"], "leaves nothing to sample"),
        (["--image", tmp_path / "none.png"], f"--image: no file {tmp_path / 'none.png'}"),
        (["--image", tmp_path / "text.png"], "not a readable image"),
        (["--prior", trained[0]], "--prior: "),
        (["--background", "whit"], "background: expected a colour such as 'white'"),
    ):
        code, _, err = rqgen("edit", "inpaint", *models, *pictures, *change, "--out", tmp_path / "e.png")
        assert code == 1 and words in err and err.count("\n") == 1
        assert not (tmp_path / "e.png").exists()
    for arguments, words in (
        (["class"], "--label: edit class needs"),
        (["erase"], "expected one of inpaint, outpaint"),
        (["inpant"], "edit: expected one of inpaint, outpaint, class, got 'inpant'; did you mean 'inpaint'?"),
        (["inpaint", "--out", tmp_path / "e.gif"], "--out: expected a file name that ends in .bmp"),
    ):
        code, _, err = rqgen("edit", *arguments, *models, *pictures)
        assert code == 1 and words in err


def test_convert(rqgen, published_var, tmp_path):
    arguments = ["--vae", published_var / "vae.pth", "--var", published_var / "var.pth"]
    code, out, err = rqgen("convert", "var", tmp_path / "out", *arguments, "--config", published_var / "config.json")
    assert code == 0 and "tokenizer and prior" in out, err
    assert MultiScaleVQVAE.from_pretrained(tmp_path / "out/tokenizer").codebook_size == 64
    assert VAR.from_pretrained(tmp_path / "out/prior").config.layers == 2


def test_demo(rqgen, tmp_path, monkeypatch):
    monkeypatch.setattr("rqgen.cli.demo.INPAINTED", 12)
    out = tmp_path / "demo"
    overrides = [*(f"tokenizer.{s}" for s in TOKENIZER), *(f"prior.{s}" for s in PRIOR)]
    steps = ["tokenizer.loop.steps=8", "prior.loop.steps=4", "sampling.count=100"]
    code, _, err = rqgen("demo", "--system", "var", "--seed", 2, "--out", out, *overrides, *steps)
    assert code == 0, err
    figures = {"reconstructions", "coarse_to_fine", "code_usage", "losses", "samples", "edits"}
    assert {path.name for path in out.iterdir()} == {
        *(f"{name}.png" for name in figures),
        "metrics.json",
        "tokenizer",
        "prior",
        "pipeline.json",
    }
    metrics = json.loads((out / "metrics.json").read_text())
    assert len(metrics["codes_used"]) == 4 and metrics["seed"] == 2
    assert 0 <= metrics["sample_accuracy"] <= 1 and len(metrics["sample_accuracy_per_class"]) == 10
    inpainting = metrics["inpainting"]
    assert inpainting["images"] == 12 and 0 <= inpainting["accuracy"] <= 1
    assert inpainting["kept_mse"] > 0 and inpainting["tokenizer_mse"] > 0
