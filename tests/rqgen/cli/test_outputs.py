"""Places that commands write to: what rqgen did not write stays, and no work is done for a place that cannot be
written."""

from __future__ import annotations

import os
import shutil
import sys

import pytest
import torch
from PIL import Image

from rqgen.cli import runs, sample
from rqgen.data import read_codes, save_image
from rqgen.data.codes import is_codes_file
from rqgen.data.grid import is_saved_image
from rqgen.models import RQVAE


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def models(trained):
    return ["--prior", trained[1] / "model", "--tokenizer", trained[0] / "model"]


@pytest.fixture
def no_training(monkeypatch):
    def work(*arguments, **keywords):
        raise AssertionError("it went to work")

    for name in ("fit_tokenizer", "fit_prior"):
        monkeypatch.setattr(runs, name, work)
        monkeypatch.setattr(f"rqgen.cli.demo.{name}", work)
        monkeypatch.setattr(f"rqgen.cli.scaling.{name}", work)


# --- files -----------------------------------------------------------------------------------------------


def test_codes_replace_codes_alone(rqgen, trained, tmp_path):
    tokenizer = tmp_path / "model"
    shutil.copytree(trained[0] / "model", tokenizer)
    shutil.copy(tokenizer / "model.safetensors", tmp_path / "mine.safetensors")
    (tmp_path / "empty.safetensors").touch()
    encode = ["encode", "--tokenizer", tokenizer, "--split", "held_out", "--out"]
    before = content(tmp_path)
    for out, said in (
        (tokenizer / "model.safetensors", "--out: expected a place outside of the folder of a model"),
        (tokenizer / "codes.safetensors", "--out: expected a place outside of the folder of a model"),
        (tokenizer / "deep" / "codes.safetensors", "--out: expected a place outside of the folder of a model"),
        (tmp_path / "mine.safetensors", "mine.safetensors is a safetensors file that rqgen did not write"),
        (trained[0] / "checkpoints" / "step-00000003" / "x.safetensors", "outside of the folder of a checkpoint"),
    ):
        code, _, err = rqgen(*encode, out)
        assert code == 1 and said in err and err.count("\n") == 1
    assert content(tmp_path) == before
    for _ in range(2):
        code, _, err = rqgen(*encode, tmp_path / "empty.safetensors")
        assert code == 0, err
    assert len(read_codes(tmp_path / "empty.safetensors").labels) > 0


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "bmp"])
def test_sheets_replace_sheets_alone(rqgen, models, tmp_path, suffix):
    mine, sheet = tmp_path / f"mine.{suffix}", tmp_path / f"sheet.{suffix}"
    Image.new("RGB", (8, 8)).save(mine)
    save_image(torch.zeros(3, 8, 8, dtype=torch.uint8), sheet)
    before = content(tmp_path)
    command = ["sample", *models, "--class", 1, "--num", 1, "--out"]
    code, _, err = rqgen(*command, mine)
    assert code == 1 and f"mine.{suffix} is " in err and "that rqgen did not write, not replaced" in err
    assert content(tmp_path) == before
    assert is_saved_image(sheet) and not is_saved_image(mine)
    assert rqgen(*command, sheet)[0] == 0


def test_codes_of_samples_replace_codes_alone(rqgen, models, tmp_path):
    (tmp_path / "mine.safetensors").write_text("mine, not a tensor at all")
    command = ["sample", *models, "--class", 1, "--num", 1, "--out", tmp_path / "s.png", "--codes"]
    code, _, err = rqgen(*command, tmp_path / "mine.safetensors")
    assert code == 1 and "--codes: " in err and "is a text file that rqgen did not write" in err
    assert (tmp_path / "mine.safetensors").read_text() == "mine, not a tensor at all"
    code, out, _ = rqgen(*command, tmp_path / "c.safetensors")
    assert code == 0 and out == f"1 images: {tmp_path / 's.png'}; codes: {tmp_path / 'c.safetensors'}\n"
    assert is_codes_file(tmp_path / "c.safetensors") and not is_codes_file(tmp_path / "s.png")
    assert is_saved_image(tmp_path / "s.png") and not is_saved_image(tmp_path / "c.safetensors")


def test_an_edit_does_not_replace_its_input(rqgen, models, tmp_path):
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    save_image(torch.zeros(3, 32, 32, dtype=torch.uint8), image)
    Image.new("L", (32, 32), 255).save(mask)
    (tmp_path / "link.png").symlink_to(image)
    before = content(tmp_path)
    for out, option in ((image, "--image"), (tmp_path / "link.png", "--image"), (mask, "--mask")):
        code, _, err = rqgen("edit", "inpaint", *models, "--image", image, "--mask", mask, "--out", out)
        assert code == 1 and f"--out: expected another file than that of {option}, got {out}" in err
    assert content(tmp_path) == before


def test_an_evaluation_replaces_an_evaluation_alone(rqgen, trained, tmp_path):
    (tmp_path / "package.json").write_text('{"name": "mine"}')
    command = ["evaluate", trained[0], "--metric", "reconstruction", "images=10", "--out"]
    code, _, err = rqgen(*command, tmp_path / "package.json")
    assert code == 1 and "package.json is a JSON file that rqgen did not write" in err
    assert (tmp_path / "package.json").read_text() == '{"name": "mine"}'
    for _ in range(2):
        code, _, err = rqgen(*command, tmp_path / "evaluation.json")
        assert code == 0, err


@pytest.mark.parametrize("command", [["sample"], ["demo"], ["encode"], ["bench", "sampling"], ["train", "tokenizer"]])
def test_names_are_utf_8(rqgen, tmp_path, no_training, command):
    out = os.fsdecode(os.fsencode(tmp_path) + (b"/caf\xe9.png" if command == ["sample"] else b"/caf\xe9"))
    code, _, err = rqgen(*command, "--out", out)
    assert code == 1 and err.startswith("error: --out: expected a name in UTF-8, got b'") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


# --- folders ---------------------------------------------------------------------------------------------


def test_a_run_does_not_replace_what_is_there(rqgen, tmp_path, trained, small_tokenizer, no_training):
    (tmp_path / "history").mkdir()
    (tmp_path / "history" / "history.csv").write_text("date,event\n1990,mine\n")
    (tmp_path / "config").mkdir()
    # A file of settings that the command would take.
    (tmp_path / "config" / "config.yaml").write_text("# mine\nloop:\n  steps: 3\n")
    shutil.copytree(trained[0] / "model", tmp_path / "model")
    before = content(tmp_path)
    for out, said in (
        ("history", "history.csv is a text file that rqgen did not write"),
        ("config", "config.yaml is not the config of such a run: choose another --out"),
        ("model", "--out: expected a place outside of the folder of a model"),
        ("model/new", "--out: expected a place outside of the folder of a model"),
    ):
        code, _, err = rqgen("train", "tokenizer", "--out", tmp_path / out, *small_tokenizer)
        assert code == 1 and said in err and err.count("\n") == 1
    assert content(tmp_path) == before


def test_a_demo_does_not_replace_what_is_there(rqgen, tmp_path, small_demo, no_training):
    for name in ("samples.png", "metrics.json", "pipeline.json", "losses.png"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text('{"mine": 1, "and": "longer"}')
        code, _, err = rqgen("demo", "--out", folder, *small_demo)
        assert code == 1 and f"{name} is a JSON file that rqgen did not write" in err and err.count("\n") == 1


def test_a_benchmark_does_not_replace_what_is_there(rqgen, tmp_path):
    (tmp_path / "sampling.json").write_text('{"mine": 1, "and": "longer"}')
    code, _, err = rqgen("bench", "sampling", "--device", "cpu", "--out", tmp_path)
    assert code == 1 and "sampling.json is a JSON file that rqgen did not write" in err


@pytest.mark.parametrize(
    ("command", "name", "is_folder"),
    [
        (["train", "tokenizer"], "checkpoints", False),
        (["train", "tokenizer"], "tensorboard", False),
        (["train", "tokenizer"], "model", False),
        (["train", "tokenizer"], "history.csv", True),
        (["train", "tokenizer"], "config.yaml", True),
        (["demo"], "training", False),
        (["demo"], "prior", False),
        (["demo"], "samples.png", True),
        (["bench", "sampling", "--device", "cpu"], "sampling.png", True),
        (["bench", "systems", "--device", "cpu"], "systems.json", True),
    ],
)
def test_places_in_the_folder_are_tried_before_the_work(rqgen, tmp_path, no_training, command, name, is_folder):
    (tmp_path / name).mkdir() if is_folder else (tmp_path / name).write_text("mine, and longer")
    code, _, err = rqgen(*command, "--out", tmp_path)
    assert code == 1 and str(tmp_path / name) in err and err.count("\n") == 1
    assert "is a folder" in err if is_folder else "this is a file" in err or "is not a folder" in err


@pytest.mark.parametrize("name", ["checkpoints", "history.csv"])
def test_write_protected_places_are_tried_before_the_work(rqgen, tmp_path, no_training, monkeypatch, name):
    if name == "checkpoints":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("step,learning_rate,loss\n")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / name and access(path, mode))
    code, _, err = rqgen("train", "tokenizer", "--out", tmp_path)
    assert code == 1 and str(tmp_path / name) in err and err.count("\n") == 1


# --- settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("tokenizer.data.held_out_fraction=0", "tokenizer.data.held_out_fraction: expected a share that holds out at"),
        ("tokenizer.data.held_out_fraction=0.0001", "tokenizer.data.held_out_fraction: expected a share that holds"),
        ("prior.prior.condition=none", "prior.prior.condition: expected class, as samples are evaluated by class"),
        ("prior.prior.embed_dim=15", "prior.prior: embed_dim: expected a multiple of spatial.heads"),
        ("tokenizer.loop.batch_size=100000", "tokenizer.loop.batch_size: expected at most the 1498 images there are"),
        ("prior.loop.batch_size=100000", "prior.loop.batch_size: expected at most the 1498 images there are, got"),
        ("tokenizer.data.classes=[1]", "tokenizer.data.classes: expected two or more classes, got 1"),
        ("prior.prior.condition_dropout=0", "sampling.cfg_scale: guidance needs a prior with a null condition"),
        ("prior.codes=x.safetensors", "prior.codes: expected none, as the demo trains its prior on images, got x.safe"),
    ],
)
def test_a_demo_that_would_fail_does_not_train(rqgen, tmp_path, small_demo, no_training, setting, said):
    code, _, err = rqgen("demo", "--out", tmp_path / "out", *small_demo, setting)
    assert code == 1 and said in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("tokenizer.data.held_out_fraction=0", ": tokenizer.data.held_out_fraction: 0 leaves no images to test on"),
        ("tokenizer.loop.batch_size=100000", "tokenizer.loop.batch_size: expected at most the 1498 images there are"),
        ("prior.loop.batch_size=100000", "prior.loop.batch_size: expected at most the 1498 images there are, got"),
        ("depths=[1,2,4000]", "depth 4000: prior.prior: "),
    ],
)
def test_a_family_that_would_fail_does_not_train(rqgen, tmp_path, no_training, setting, said):
    code, _, err = rqgen("scaling", "--out", tmp_path / "out", setting)
    assert code == 1 and said in err and err.count("\n") == 1 and not list(tmp_path.iterdir())


# --- paths -----------------------------------------------------------------------------------------------


def test_a_run_goes_on_in_another_folder_and_with_a_tokenizer_that_moved(
    rqgen, tmp_path, trained, small_prior, monkeypatch
):
    there = tmp_path / "there"
    shutil.copytree(trained[0] / "model", there / "tokenizer")
    monkeypatch.chdir(there)
    arguments = ["train", "prior", "--out", tmp_path / "prior", "loop.tensorboard=false"]
    code, _, err = rqgen(*arguments, "tokenizer=tokenizer", *small_prior, "loop.steps=2")
    assert code == 0, err
    monkeypatch.chdir(tmp_path)
    resume = ["train", "prior", "--out", tmp_path / "prior", "--resume"]
    code, _, err = rqgen(*resume, "loop.steps=3")
    assert code == 0, err
    (there / "tokenizer").rename(tmp_path / "moved")
    code, _, err = rqgen(*resume, "loop.steps=4")
    assert code == 1 and f"tokenizer: no folder {there / 'tokenizer'}: give tokenizer=FOLDER" in err
    code, _, err = rqgen(*resume, "loop.steps=4", "tokenizer=moved")
    assert code == 0, err
    other = RQVAE.from_pretrained(tmp_path / "moved")
    other.quantizer.codebook += 1
    other.save_pretrained(tmp_path / "other")
    code, _, err = rqgen(*resume, "loop.steps=5", "tokenizer=other")
    assert code == 1 and "'codebook' was" in err and err.count("\n") == 1


def test_images_are_found_from_another_folder(rqgen, tmp_path, small_tokenizer, monkeypatch):
    (tmp_path / "there" / "photos").mkdir(parents=True)
    for index in range(20):
        Image.new("RGB", (32, 32), (index, 0, 0)).save(tmp_path / "there" / "photos" / f"{index}.png")
    monkeypatch.chdir(tmp_path / "there")
    more = ["data.folder=photos", "loop.steps=1", "loop.batch_size=4", "data.held_out_fraction=0"]
    code, _, err = rqgen("train", "tokenizer", "--out", "run", *small_tokenizer, *more)
    assert code == 0, err
    monkeypatch.chdir(tmp_path)
    code, out, err = rqgen("encode", "--tokenizer", "there/run/model", "--out", "codes.safetensors")
    assert code == 0 and out.startswith("20 images"), err


def test_errors_name_what_the_user_wrote(rqgen, tmp_path, trained, models):
    prior, tokenizer = trained[1] / "model", trained[0] / "model"
    for command, said in (
        (["sample", "--prior", "nowhere"], "error: --prior: no folder nowhere"),
        (["sample", "nowhere"], "error: RUN: no folder nowhere"),
        (["sample", *models, "--cfg-scale", "-1"], "error: --cfg-scale: expected a finite number >= 0"),
        (["sample", *models, "--temperature", "-1"], "error: --temperature: "),
        (["encode", "--tokenizer", "nowhere"], "error: --tokenizer: no folder nowhere"),
        (["encode", "--tokenizer", tokenizer, "--config", "nowhere"], "error: --config: no file and no shipped"),
        (["convert", "kakaobrain", "x.pt", trained[0]], None),
        (["train", "prior", "tokenizer=nowhere"], "error: tokenizer: no folder nowhere (relative to "),
        (["evaluate", prior, "--tokenizer", "nowhere"], "error: --tokenizer: no folder nowhere"),
    ):
        out = [] if command[0] == "convert" else ["--out", tmp_path / ("x.png" if command[0] == "sample" else "x")]
        code, _, err = rqgen(*command, *out)
        assert code == 1 and err.startswith(said or "error: DST: ") and err.count("\n") == 1


# --- sizes and devices -----------------------------------------------------------------------------------


def test_more_images_than_memory_holds_are_refused_at_once(rqgen, models, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "generate", None)
    code, _, err = rqgen("sample", *models, "--num", 100_000_000, "--out", tmp_path / "s.png")
    assert code == 1 and "--num: 1,000,000,000 images on one sheet take at least " in err and "--offset" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("number", [100_000, 5_000_000_000])
def test_threads_that_no_machine_has_are_wrong_usage(rqgen, number):
    for command in ("sampling", "systems"):
        code, _, err = rqgen("bench", command, "--threads", number)
        assert code == 2 and "--threads" in err and "less than or equal to 1024" in " ".join(err.split())


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:9999", "cpu:7", ""])
def test_devices_that_are_not_there_are_one_line(rqgen, tmp_path, device):
    for command in ("sampling", "systems"):
        code, _, err = rqgen("bench", command, "--device", device, "--out", tmp_path / "out")
        assert code == 1 and err.startswith("error: --device: expected one of cpu") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_seconds_are_not_negative(rqgen):
    for seconds in (-1, "nan"):
        code, _, err = rqgen("bench", "sampling", "--device", "cpu", "--seconds", seconds)
        assert code in (1, 2) and "seconds" in err


def test_sampling_into_a_log_says_how_far_it_is(rqgen, models, tmp_path, monkeypatch):
    command = ["sample", *models, "--class", 1, "--num", 4, "--batch-size", 2, "--out", tmp_path / "s.png"]
    code, out, err = rqgen(*command)
    assert code == 0 and out == f"4 images: {tmp_path / 's.png'}\n"
    assert err.startswith("sampling 4 images: 100% in ") and err.count("\n") == 1
    monkeypatch.setattr(sys.modules["rqgen.sampling.generate"], "SECONDS_PER_LINE", 0.0)
    code, _, err = rqgen(*command)
    assert code == 0 and "sampling 4 images: 50%, " in err and " s left\n" in err
