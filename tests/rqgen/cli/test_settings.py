"""Settings of the commands: recipes and bases, images that decide the model's shape, `rqgen config`, hostile values."""

import json
import logging
import re
import textwrap
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from rqgen.cli.app import main
from rqgen.cli.demo import load_demo
from rqgen.cli.explain import COMMANDS, explain
from rqgen.cli.field_help import field_help
from rqgen.cli.scaling import ScalingConfig
from rqgen.cli.settings import RECIPES, find_config
from rqgen.config import load, nested_dataclasses, to_dict
from rqgen.data import DataConfig, open_dataset, read_codes
from rqgen.evaluation import EvaluationConfig
from rqgen.models import RQVAE, VAR, MultiScaleVQVAE, RQTransformer, load_pretrained
from rqgen.quantizers.multiscale import SCALES_256, SCALES_512, SCALES_1024, scales_up_to
from rqgen.systems import TITLES
from rqgen.systems.rq import RQDemo, RQPriorRun, RQTokenizerRun
from rqgen.systems.var import VARDemo, VARPriorRun, VARTokenizerRun
from rqgen.training import check_memory, memory

SMALL = ["model.base_channels=8", "loop.batch_size=4", "loop.steps=1", "loop.checkpoint_every=0"]
SMALL_PRIOR = ["prior.embed_dim=16", "loop.batch_size=4", "loop.steps=1", "loop.checkpoint_every=0"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of colour pictures, 72x80 pixels, in two classes whose names YAML 1.1 takes for something else."""
    folder = tmp_path_factory.mktemp("images") / "2024"
    generator = np.random.default_rng(0)
    for name in ("010", "no"):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            pixels = generator.integers(0, 256, (80, 72, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def succeed(*arguments):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert not left.value.code


@pytest.fixture(scope="module")
def mine(photos, tmp_path_factory):
    """A run of the README's line, with another split than the default."""
    out = tmp_path_factory.mktemp("mine") / "run"
    data = ["data.source=folder", f"data.folder={photos}", "data.held_out_fraction=0.25", "data.split_seed=3"]
    succeed("train", "tokenizer", *data, "data.horizontal_flip=true", "data.classes=[no, 010]", *SMALL, "--out", out)
    return out


def test_a_folder_is_enough_to_read_a_folder(tmp_path):
    photos = load(RQTokenizerRun, find_config("photos_tokenizer"), [f"data.folder={tmp_path}"], recipes=RECIPES)
    assert photos.data.place == ("folder", tmp_path.resolve()) and photos.data.resolution == 64
    saved = to_dict(load(RQTokenizerRun, None, [], recipes=RECIPES))
    resumed = load(RQTokenizerRun, None, [f"data.folder={tmp_path}"], defaults=saved)
    assert resumed.data.source == "folder"


@pytest.mark.parametrize(
    ("overrides", "culprit"),
    [
        (["model.base_channels=30", "model.dropout=0.1"], "model.base_channels=30"),
        (["data.source=folder", "data.split_seed=3"], "data.source=folder"),
        (["model.channel_multipliers=[1,1,1,1,1,1,1,1]", "model.dropout=0.1"], "model.channel_multipliers=["),
    ],
)
def test_the_override_at_fault_is_named(overrides, culprit):
    with pytest.raises(ValueError) as caught:
        load(RQTokenizerRun, None, overrides, recipes=RECIPES)
    assert str(caught.value).startswith(f"override '{culprit}")


# --- Hostile values


@pytest.mark.parametrize(
    ("command", "override", "words"),
    [
        ("tokenizer", "data.resolution=1:04", "'data.resolution': expected an integer, got '1:04'"),
        ("tokenizer", "loop=x", "'loop': expected settings (LoopConfig), got 'x'"),
        ("tokenizer", "loop.steps=???", "'loop.steps': expected an integer, got '???'"),
        ("tokenizer", "loop.steps=100000000", "loop.steps: expected at most 99999999, got 100000000"),
        ("tokenizer", "loop.workers=1000000", "loop.workers: expected at most 256, got 1000000"),
        ("tokenizer", "loop.workers=-1", "loop.workers: expected at least 0, got -1"),
        ("tokenizer", "loop.seed=4294967296", "loop.seed: expected a seed within 0..4294967295"),
        ("tokenizer", "loop.seed=-1", "loop.seed: expected a seed within 0..4294967295"),
        ("tokenizer", "data.split_seed=-1", "data.split_seed: expected a seed within 0..4294967295"),
        ("tokenizer", "data.split_seed=4294967296", "data.split_seed: expected a seed within 0..4294967295"),
        ("tokenizer", "data.held_out_fraction=0.9999", "held_out_fraction: 0.9999 leaves no images to train on"),
        ("tokenizer", "data.held_out_fraction=nan", "'data.held_out_fraction': expected a finite number, got 'nan'"),
        ("tokenizer", "data.resolution=1000000", "data.resolution: expected at most 512, got 1000000"),
        (
            "tokenizer",
            "data.photos.crops_per_epoch=99999999999",
            "data.photos.crops_per_epoch: expected at most 10000000",
        ),
        ("tokenizer", "loop.optimizer.weight_decay=.nan", "'loop.optimizer.weight_decay': expected a finite number"),
        ("tokenizer", "loop.batch_size=4294967296", "loop.batch_size: expected at most 16777216"),
        ("tokenizer", "model.base_channels=2147483648", "model.base_channels: expected at most 65536"),
        ("tokenizer", "model.num_res_blocks=2147483648", "model.num_res_blocks: expected at most 256"),
        ("tokenizer", "model.channel_multipliers=[1,2147483648]", "model.channel_multipliers: expected at most 16"),
        ("tokenizer", f"model.channel_multipliers={[1] * 40}", "data.resolution: expected a multiple of 4294967296"),
        ("tokenizer", "model.quantizer.codebook_size=99999999999", "model.quantizer.codebook_size: expected at most"),
        ("tokenizer", "model.quantizer.depth=100000", "model.quantizer.depth: expected at most 1024, got 100000"),
        ("tokenizer", "model.embed_dim=2147483648", "model.embed_dim: expected at most 65536"),
        ("prior", "prior.spatial.layers=2147483648", "prior.spatial.layers: expected at most 1024, got 2147483648"),
        ("prior", "prior.embed_dim=2147483648", "prior.embed_dim: expected at most 131072, got 2147483648"),
        ("prior", "prior.tau=inf", "'prior.tau': expected a finite number or null, got 'inf'"),
        ("prior", "prior.preset=2B", "prior: name: expected one of 90M"),
        ("prior", "prior.condition=classes", "'prior.condition': expected one of none, class, got 'classes'"),
        ("var tokenizer", "model.quantizer.scales=[1,9999]", "scales: expected token maps of at most 4096 a side"),
        ("var tokenizer", f"model.quantizer.scales={[1] * 300}", "scales: expected at most 256, got 300"),
        ("var tokenizer", "model.quantizer.refinements=999999999", "refinements: expected at most 256"),
        ("var tokenizer", "model.latent_kernel=1001", "latent_kernel: expected an odd number below 256, got 1001"),
        ("var prior", "prior.layers=2147483648", "prior.layers: expected at most 1024, got 2147483648"),
        ("var prior", "prior.drop_path=1", "prior.drop_path: expected 0 <= drop_path < 1, got 1.0"),
        ("demo", "sampling.seed=4294967296", "sampling.seed: expected a seed within 0..4294967295"),
        ("demo", "sampling.count=100000000000", "sampling.count: expected at most 1000000"),
    ],
)
def test_one_clear_line_for_what_no_run_can_have(rqgen, mine, tmp_path, command, override, words):
    *system, stage = command.split()
    arguments = ["demo"] if stage == "demo" else ["train", stage, *(["--system", "var"] if system else [])]
    if command == "prior":
        arguments.append(f"tokenizer={mine / 'model'}")
    code, out, err = rqgen(*arguments, override, "--out", tmp_path / "run")
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert words in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("loop: x\n", "mine.yaml: wrong value at 'loop': expected settings (LoopConfig), got 'x' (line 1)"),
        ("data:\n  resolution: 1:04\n", "mine.yaml: wrong value at 'data.resolution': expected an integer"),
        (
            "data:\n  resolution: 1\n  resolution: 2\n",
            "mine.yaml: key 'resolution' stands twice in one mapping (line 3)",
        ),
        ("loop:\n  mixed_precision: yes\n", "expected one of no, fp16, bf16, got 'yes' (line 2)"),
    ],
)
def test_one_clear_line_for_a_file(rqgen, tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    code, out, err = rqgen("train", "tokenizer", "--config", path, "--out", tmp_path / "run")
    assert code == 1 and words in err and err.count("\n") == 1 and not out


def test_a_model_beyond_memory_is_refused_before_any_of_it_is_made(rqgen, mine, tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "memory_limit", lambda: 2**20)
    code, _, err = rqgen("train", "tokenizer", "--out", tmp_path / "a")
    assert code == 1 and re.search(r"error: model: training [\d,]+ parameters takes at least 0\.0 GiB", err)
    code, _, err = rqgen("train", "prior", f"tokenizer={mine / 'model'}", "--out", tmp_path / "b")
    assert code == 1 and "error: prior: training " in err and "this machine has 0.0 GiB" in err
    # Four numbers for each of 100 parameters, and no memory for any.
    monkeypatch.setattr(memory, "memory_limit", lambda: 1600)
    check_memory("model", lambda: torch.nn.Linear(9, 10))
    with pytest.raises(ValueError, match="model: training 110 parameters"):
        check_memory("model", lambda: torch.nn.Linear(10, 10))
    monkeypatch.undo()
    assert 2**28 < memory.memory_limit() < 2**60
    with pytest.raises(ValueError, match=r"model: training [\d,]+ parameters .* and this machine has"):
        check_memory("model", lambda: torch.nn.Linear(2**30, 2**30))


def test_nothing_held_out_trains(rqgen, tmp_path):
    """A share so small that no image is held out."""
    code, _, err = rqgen("train", "tokenizer", "data.held_out_fraction=1e-9", *SMALL, "--out", tmp_path / "run")
    assert code == 0, err
    assert len(open_dataset(DataConfig(held_out_fraction=1e-9), "held_out")) == 0


# --- Recipes and bases

KINDS = (RQTokenizerRun, RQPriorRun, VARTokenizerRun, VARPriorRun, RQDemo, VARDemo, ScalingConfig)


@pytest.mark.parametrize("cls", KINDS)
def test_a_file_with_one_key_equals_that_key_as_an_override(cls, tmp_path):
    path = tmp_path / "mine.yaml"
    names = ("tokenizer", "loop") if "loop" not in nested_dataclasses(cls) else ("loop",)
    content = {"steps": 7}
    for name in reversed(names):
        content = {name: content}
    path.write_text(yaml.safe_dump(content))
    override = f"{'.'.join(names)}.steps=7"
    assert load(cls, path, recipes=RECIPES) == load(cls, None, [override], recipes=RECIPES) != load(cls, None)


def test_every_recipe_says_what_it_starts_from():
    for path in RECIPES.glob("*.yaml"):
        assert "base" in yaml.safe_load(path.read_text())
    assert {cls.recipe for cls in KINDS} | {"photos_tokenizer"} == {path.stem for path in RECIPES.glob("*.yaml")}
    photos = load(RQTokenizerRun, RECIPES / "photos_tokenizer.yaml", recipes=RECIPES)
    assert photos.model.attention_resolutions == [8] and photos.model.code_shape == [8, 8, 4]
    assert photos.data.channels == photos.model.image_channels == 3 and photos.model.resolution == 64


def test_the_documented_file_is_read(tmp_path):
    text = (Path(__file__).resolve().parents[3] / "docs/settings.md").read_text()
    block = re.search(r"^    base: .*?(?=\n\n)", text, re.MULTILINE | re.DOTALL)[0]
    path = tmp_path / "mine.yaml"
    path.write_text(textwrap.dedent(block))
    run = load(RQTokenizerRun, path, recipes=RECIPES)
    assert run.data.folder.path == Path("photos")
    assert run.model.base_channels == 32 and run.model.code_shape == [16, 16, 4]


def test_a_base_from_the_command_line(rqgen, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: photos_tokenizer\ndata: {photos: {crops_per_epoch: 16}}\n")
    code, out, err = rqgen("config", "--config", path)
    assert code == 0, err
    content = yaml.safe_load(out)
    assert content["model"]["base_channels"] == 32 and content["data"]["photos"]["crops_per_epoch"] == 16
    code, _, err = rqgen("train", "tokenizer", "base=photos_tokenizer", "--out", tmp_path / "run")
    assert code == 1 and "unknown key 'base'; a file names what it starts from" in err


def test_what_a_run_writes_reproduces_it(rqgen, mine, tmp_path):
    written = (mine / "config.yaml").read_text()
    assert written.startswith("base: null\n")
    # The digits' recipe has other settings: none of them may come back.
    code, _, err = rqgen("train", "tokenizer", "--config", mine / "config.yaml", "--out", tmp_path / "again")
    assert code == 0, err
    assert (tmp_path / "again" / "config.yaml").read_text() == written
    run = load(RQTokenizerRun, mine / "config.yaml")
    assert run.data.classes == ["no", "010"] and run.loop.mixed_precision == "no"
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / "model" / name).read_bytes() == (mine / "model" / name).read_bytes()


def test_seeds_of_a_demo_come_from_the_file_unless_one_is_given(tmp_path):
    path = tmp_path / "demo.yaml"
    path.write_text("sampling: {seed: 5}\ntokenizer: {loop: {seed: 6}}\n")
    config = load_demo(None, config=path)
    assert (config.tokenizer.loop.seed, config.prior.loop.seed, config.sampling.seed) == (6, 0, 5)
    config = load_demo(7, config=path)
    assert (config.tokenizer.loop.seed, config.prior.loop.seed, config.sampling.seed) == (7, 7, 7)
    assert config.sampling.count == 500 and config.tokenizer.model.base_channels == 16


# --- Images decide the model's shape


def test_the_line_for_folders_trains_in_colour(mine, photos):
    vae = RQVAE.from_pretrained(mine / "model")
    assert vae.config.image_channels == 3 and vae.config.image_shape == (32, 32) and vae.code_shape == (4, 4, 4)
    assert vae.data["folder"]["path"] == str(photos) and vae.data["classes"] == ["no", "010"]


@pytest.mark.parametrize("cls", [RQTokenizerRun, VARTokenizerRun])
@pytest.mark.parametrize("side", [8, 32, 64, 96, 128, 256])
def test_size_and_channels_are_set_in_one_place(cls, side):
    for channels, more in ((3, []), (1, ["data.channels=1"])):
        run = load(cls, None, ["data.folder=x", f"data.resolution={side}", *more], recipes=RECIPES)
        assert run.data.source == "folder" and run.model.image_channels == run.data.channels == channels
        assert run.model.image_shape == (side, side)
        if cls is RQTokenizerRun:
            assert run.model.code_shape == [side // 8, side // 8, 4] and run.model.resolution == side
        else:
            assert run.model.quantizer.scales == [[one, one] for one in scales_up_to(side // 8)]


def test_defaults_of_digits_stay_grey_and_the_models_own_defaults_are_the_published_ones():
    run = load(RQTokenizerRun, None, recipes=RECIPES)
    assert run.data == DataConfig() and run.data.channels == run.model.image_channels == 1
    from rqgen.models import RQVAEConfig

    assert RQVAEConfig().code_shape == [8, 8, 4] and RQVAEConfig().attention_resolutions == [8]
    wide = RQVAEConfig(image_size=[128, 256], channel_multipliers=[1, 1, 2])
    assert wide.code_shape == [32, 64, 4] and wide.attention_resolutions == [64]


def test_token_maps_follow_the_published_lists():
    assert scales_up_to(16) == list(SCALES_256) and scales_up_to(32) == list(SCALES_512)
    assert scales_up_to(64) == list(SCALES_1024) and scales_up_to(1) == [1] and scales_up_to(4) == [1, 2, 3, 4]
    assert scales_up_to(8) == [1, 2, 3, 4, 5, 6, 8] and scales_up_to(20) == [1, 2, 3, 4, 6, 9, 13, 18, 20]
    with pytest.raises(ValueError, match="no published list reaches a feature map of 65x65"):
        scales_up_to(65)


@pytest.mark.parametrize(
    ("system", "overrides", "words"),
    [
        ("rq", ["data.resolution=36"], "data.resolution: expected a multiple of 8, as the model has 4 levels"),
        ("rq", ["data.resolution=36"], "such as 32 or 40; got 36"),
        ("rq", ["data.resolution=4"], "such as 8 or 16; got 4"),
        ("var", ["data.resolution=36"], "data.resolution: expected a multiple of 8, as the model has 4 levels"),
        ("var", ["data.folder=x", "data.resolution=1024"], "data.resolution: 1024 needs model.quantizer.scales"),
        (
            "rq",
            ["data.resolution=64", "model.resolution=32"],
            "data.resolution: 64, but the tokenizer is for images of 32x32",
        ),
        ("rq", ["model.image_channels=3"], "data.channels: 1, but the tokenizer is for images of 3 channels"),
        ("rq", ["model.image_size=[32,64]"], "data.resolution: 32, but the tokenizer is for images of 32x64"),
        ("var", ["model.quantizer.scales=[1,2]"], "data.resolution: 32, but the tokenizer is for images of 16x16"),
        ("rq", ["model.code_shape=[4,4,2]"], "model.quantizer.depth: expected the depth of code_shape, 2, got 4"),
        ("rq", ["data.source=digits", "data.folder=x"], "data.folder: expected a path for source 'folder' and none"),
    ],
)
def test_contradictions_are_refused_with_both_values(rqgen, tmp_path, system, overrides, words):
    code, _, err = rqgen("train", "tokenizer", "--system", system, *overrides, "--out", tmp_path / "run")
    assert code == 1 and words in err and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_split_of_a_demo_and_a_family_is_set_once():
    for cls in (RQDemo, VARDemo, ScalingConfig):
        run = load(cls, None, ["tokenizer.data.resolution=16", "tokenizer.data.split_seed=4"], recipes=RECIPES)
        assert run.prior.data == run.tokenizer.data and run.tokenizer.model.image_shape == (16, 16)
    with pytest.raises(ValueError, match=r"prior\.data\.split_seed: 9, but tokenizer\.data\.split_seed is 0"):
        load(RQDemo, None, ["prior.data.split_seed=9"], recipes=RECIPES)


# --- A prior and `encode` read the tokenizer's images


def test_a_prior_trains_on_the_images_of_its_tokenizer(rqgen, mine, tmp_path, caplog):
    tokenizer = f"tokenizer={mine / 'model'}"
    with caplog.at_level(logging.WARNING):
        code, _, err = rqgen("train", "prior", tokenizer, *SMALL_PRIOR, "--out", tmp_path / "prior")
    assert code == 0, err
    assert "hold" not in caplog.text
    run, theirs = load(RQPriorRun, tmp_path / "prior" / "config.yaml"), load(RQTokenizerRun, mine / "config.yaml").data
    # All but the flips: latents are encoded once.
    assert to_dict(run.data) == to_dict(theirs) | {"horizontal_flip": False} and theirs.horizontal_flip
    ours = open_dataset(run.data, "held_out")
    assert ours.files == open_dataset(theirs, "held_out").files and len(ours) == 5
    prior = RQTransformer.from_pretrained(tmp_path / "prior" / "model")
    assert prior.config.condition_vocab_size == 2 and prior.data == to_dict(run.data)


def test_another_split_is_said_and_other_images_are_others(rqgen, mine, tmp_path, caplog):
    arguments = ["train", "prior", f"tokenizer={mine / 'model'}", *SMALL_PRIOR]
    with caplog.at_level(logging.WARNING):
        code, _, err = rqgen(*arguments, "data.split_seed=4", "--out", tmp_path / "a")
    assert code == 0, err
    assert "data.split_seed: 4, but the tokenizer's was 3: what one stage holds out, the other may train" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        code, _, err = rqgen(*arguments, "data.source=digits", "--out", tmp_path / "b")
    assert code == 0, err
    data = load(RQPriorRun, tmp_path / "b" / "config.yaml").data
    assert data == DataConfig(channels=3) and "hold" not in caplog.text
    code, _, err = rqgen(*arguments, "data.resolution=64", "--out", tmp_path / "c")
    assert code == 1 and "data.resolution: 64, but the tokenizer is for images of 32x32" in err
    code, _, err = rqgen(*arguments, "data.channels=1", "--out", tmp_path / "c")
    assert code == 1 and "data.channels: 1, but the tokenizer is for images of 3 channels" in err
    code, _, err = rqgen(*arguments, "data.folder=null", "--out", tmp_path / "c")
    assert code == 1 and "data.folder: expected a path for source 'folder' and none otherwise, got None" in err


def test_a_prior_of_the_other_system_follows_too(rqgen, photos, tmp_path):
    data = [f"data.folder={photos}", "data.resolution=64", "data.classes=[010]"]
    arguments = ["train", "tokenizer", "--system", "var", *data, *SMALL, "--out", tmp_path / "vae"]
    code, _, err = rqgen(*arguments)
    assert code == 0, err
    vae = MultiScaleVQVAE.from_pretrained(tmp_path / "vae" / "model")
    assert vae.config.image_channels == 3 and vae.scales == [[side, side] for side in (1, 2, 3, 4, 5, 6, 8)]
    tokenizer = f"tokenizer={tmp_path / 'vae' / 'model'}"
    code, _, err = rqgen("train", "prior", "--system", "var", tokenizer, *SMALL_PRIOR, "--out", tmp_path / "prior")
    assert code == 0, err
    prior = VAR.from_pretrained(tmp_path / "prior" / "model")
    assert prior.config.num_classes == 1 and prior.data["classes"] == ["010"] and prior.scales == vae.scales


def test_encode_takes_the_tokenizers_images_and_says_so(rqgen, mine, photos, tmp_path, caplog):
    arguments = ["encode", "--tokenizer", mine / "model", "--out", tmp_path / "codes"]
    with caplog.at_level(logging.INFO):
        code, _, err = rqgen(*arguments, "--split", "held_out")
    assert code == 0, err
    assert (
        f"no images were named: encoding those of the tokenizer's training, source=folder folder={photos}"
        in caplog.text
    )
    encoded = read_codes(tmp_path / "codes")
    assert encoded.class_names == ("no", "010") and len(encoded.labels) == 5
    caplog.clear()
    with caplog.at_level(logging.INFO):
        code, _, err = rqgen(*arguments, f"folder={photos}/", "--split", "held_out")
    assert code == 0, err
    assert "no images were named" not in caplog.text
    # The same folder: the same split.
    assert torch.equal(read_codes(tmp_path / "codes").labels, encoded.labels)
    code, out, err = rqgen(*arguments, "source=digits", "classes=[7]", "--split", "all")
    assert code == 0 and "179 images" in out, err
    path = tmp_path / "images.yaml"
    path.write_text("source: digits\nclasses: [7]\n")
    code, out, err = rqgen(*arguments, "--config", path)
    assert code == 0 and "179 images" in out, err


def test_a_tokenizer_that_does_not_know_its_images_says_so(rqgen, mine, photos, tmp_path):
    vae = RQVAE.from_pretrained(mine / "model")
    vae.data = None
    vae.save_pretrained(tmp_path / "vae")
    assert "data" not in json.loads((tmp_path / "vae" / "config.json").read_text())
    tokenizer = f"tokenizer={tmp_path / 'vae'}"
    for arguments, prefix in (
        (["train", "prior", tokenizer, *SMALL_PRIOR, "--out", tmp_path / "prior"], "data."),
        (["encode", "--tokenizer", tmp_path / "vae", "--out", tmp_path / "codes"], ""),
    ):
        code, _, err = rqgen(*arguments)
        assert code == 1 and f"{prefix}source: the tokenizer in" in err and f"give {prefix}folder=PATH" in err
        code, _, err = rqgen(*arguments, f"{prefix}folder={photos}")
        assert code == 0, err
    assert load(RQPriorRun, tmp_path / "prior" / "config.yaml").data == DataConfig(source="folder", folder=photos)


def test_settings_of_images_that_a_damaged_file_holds_are_refused(rqgen, mine, tmp_path):
    config_json = tmp_path / "vae" / "config.json"
    RQVAE.from_pretrained(mine / "model").save_pretrained(tmp_path / "vae")
    weights = load_file(tmp_path / "vae" / "model.safetensors")
    save_file(weights, tmp_path / "vae" / "model.safetensors")  # without the checksum, as older versions
    for data, words in (
        ({"source": "cats"}, "config.json: data: wrong value at 'source': expected one of "),
        ({"sauce": "folder"}, "config.json: data: unknown key 'sauce'; did you mean 'source'"),
        ([1], "config.json: data: expected a JSON object, got list"),
    ):
        config_json.write_text(json.dumps({**json.loads(config_json.read_text()), "data": data}))
        code, _, err = rqgen("encode", "--tokenizer", tmp_path / "vae", "--out", tmp_path / "codes")
        assert code == 1 and words in err and err.count("\n") == 1


def test_a_family_on_a_trained_tokenizer_follows_its_images(tmp_path):
    config = load(VARTokenizerRun, None, ["data.resolution=16", "data.classes=[3,4]"], recipes=RECIPES)
    vae = MultiScaleVQVAE(config.model)
    vae.data = to_dict(config.data)
    vae.save_pretrained(tmp_path / "vae")
    from rqgen.cli.scaling import load_scaling

    family = load_scaling(None, (), tmp_path / "vae")
    assert family.prior.data.resolution == 16 and family.prior.data.classes == ["3", "4"]


def test_models_keep_what_they_learnt_from(mine, tmp_path):
    vae = load_pretrained(mine / "model")
    vae.save_pretrained(tmp_path / "again")
    assert load_pretrained(tmp_path / "again").data == vae.data is not None


# --- rqgen config


@pytest.mark.parametrize("system", ["rq", "var"])
@pytest.mark.parametrize("command", COMMANDS.values())
def test_config_prints_a_file_that_the_command_reads(rqgen, tmp_path, command, system):
    code, out, err = rqgen("config", *command.split(), "--system", system)
    assert code == 0, err
    path = tmp_path / "settings.yaml"
    path.write_text(out)
    content = yaml.safe_load(out)
    assert content["base"] is None
    cls = {
        "train tokenizer": {"rq": RQTokenizerRun, "var": VARTokenizerRun},
        "train prior": {"rq": RQPriorRun, "var": VARPriorRun},
        "encode": {"rq": DataConfig, "var": DataConfig},
        "evaluate": {"rq": EvaluationConfig, "var": EvaluationConfig},
        "demo": {"rq": RQDemo, "var": VARDemo},
        "scaling": {"rq": ScalingConfig, "var": ScalingConfig},
    }[command][system]
    default = load(cls, None, recipes=RECIPES)
    assert load(cls, path, recipes=RECIPES) == default
    for key, value in leaves(to_dict(default)):
        assert re.search(rf"^ *(# )?{key.rsplit('.', 1)[-1]}:", out, re.MULTILINE)
        if command == "encode" or (command in ("train prior", "evaluate") and key.startswith("data.")):
            continue  # the model decides
        found = content
        for name in key.split("."):
            found = found[name]
        assert found == value or float(found) == value
    assert yaml.safe_load(explain(command.split(), system=system, config=str(path))) == content


def leaves(tree, prefix=""):
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_config_shows_values_defaults_and_help(rqgen):
    code, out, err = rqgen("config", "data.folder=photos", "data.resolution=64", "loop.steps=7")
    assert code == 0, err
    content = yaml.safe_load(out)
    assert content["loop"]["steps"] == 7 and content["model"]["resolution"] == 64
    assert content["model"]["image_channels"] == content["data"]["channels"] == 3
    assert content["model"]["code_shape"] == [8, 8, 4] and content["data"]["source"] == "folder"
    assert "the new number. [320]\n  steps: 7\n" in out
    assert "  # Channels of an image. [1; follows]\n  image_channels: 3\n" in out
    assert "# 1 (grey) or 3 (colour). null: the source's, 1 for digits" in out


def test_a_printed_key_that_follows_may_be_left_out(rqgen, tmp_path):
    _, out, _ = rqgen("config")
    path, lines = tmp_path / "mine.yaml", out.splitlines()
    marked = [i for i, line in enumerate(lines) if "follows]" in line]
    path.write_text("\n".join(line for i, line in enumerate(lines) if i - 1 not in marked))
    overrides = ["data.source=folder", "data.folder=x", "data.resolution=64"]
    run = load(RQTokenizerRun, path, overrides, recipes=RECIPES)
    assert run == load(RQTokenizerRun, None, overrides, recipes=RECIPES) and run.model.code_shape == [8, 8, 4]


def test_config_of_a_prior_shows_the_images_of_its_tokenizer(rqgen, mine, photos):
    code, out, err = rqgen("config", "train", "prior", f"tokenizer={mine / 'model'}", "data.folder.fit=enlarge")
    assert code == 0, err
    content = yaml.safe_load(out)
    assert content["data"]["folder"]["path"] == str(photos) and content["data"]["split_seed"] == 3
    _, out, _ = rqgen("config", "prior", "tokenizer=nowhere", "data.folder.fit=enlarge")
    assert yaml.safe_load(out)["data"] == {"folder": {"fit": "enlarge"}} and "  # split_seed: 0\n" in out


@pytest.mark.parametrize("cls", [*KINDS, DataConfig, EvaluationConfig])
def test_every_setting_has_help(cls):
    def missing(one, prefix):
        help_of = field_help(one)
        for setting in fields(one):
            if not help_of.get(setting.name):
                yield prefix + setting.name
        for name, inner in nested_dataclasses(one).items():
            yield from missing(inner, f"{prefix}{name}.")

    assert not list(missing(cls, ""))


def test_config_mistakes(rqgen):
    for arguments, words in (
        (
            ["sample"],
            "config: expected one of train tokenizer, train prior, encode, evaluate, demo, scaling, then KEY=VALUE",
        ),
        (["loop.steps=3", "demo"], "config: expected one of"),
        (["train", "encode"], "config: expected one of"),
        (["loop.step=3"], "unknown key 'loop.step'; did you mean 'loop.steps'"),
        (["--config", "nowhere.yaml"], "config file not found: nowhere.yaml"),
        (["--system", "gan"], f"--system: expected one of {', '.join(TITLES)}, got 'gan'"),
    ):
        code, out, err = rqgen("config", *arguments)
        assert code == 1 and words in err and err.count("\n") == 1 and not out
