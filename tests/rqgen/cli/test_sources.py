"""A data source of one's own is one class: the command line, files and `rqgen config` know it by its registration."""

import json
import logging
import pkgutil
from dataclasses import dataclass, field, make_dataclass

import pytest
import torch
import yaml

from rqgen.cli.settings import RECIPES
from rqgen.config import load, to_dict
from rqgen.data import DataConfig, ImageDataset, open_dataset, read_codes, sources
from rqgen.data.datasets import Augmentation, choose_classes, stratified_split
from rqgen.data.sources import SOURCES, Source, register
from rqgen.data.sources.folder import FolderOptions
from rqgen.models.rqvae import RQVAE
from rqgen.systems.rq import RQPriorRun, RQTokenizerRun

SMALL_PRIOR = ["prior.embed_dim=16", "prior.spatial.layers=1", "loop.batch_size=4", "loop.steps=1"]


@dataclass
class SquaresOptions:
    """Options of source "squares"."""

    count: int = 24
    """Squares of each class."""


class Squares(Source):
    """Grey squares, small and large."""

    name = "squares"
    options = SquaresOptions
    channels = 1
    resolution = 16

    def open(self, config, options, split):
        return SquareImages(config, options, split)


class SquareImages(ImageDataset):
    def __init__(self, config, options, split):
        self.class_names, chosen = choose_classes(["small", "large"], config.classes, "squares")
        labels = [label for label in chosen.values() for _ in range(options.count)]
        sizes = [position + 1 for position in chosen for _ in range(options.count)]
        keep = stratified_split(labels, config.held_out_fraction, config.split_seed, split)
        self._items = [(sizes[i], labels[i], i) for i in keep]
        self._config, self._augment = config, Augmentation(config, split)
        self.varies = self._augment.on

    def __len__(self):
        return len(self._items)

    def item(self, index, epoch):
        size, label, number = self._items[index]
        side = self._config.resolution
        image = torch.full((self._config.channels, side, side), number / 100 - 1)
        image[:, : side * size // 4, : side * size // 4] = 1
        return self._augment(image, index, epoch), label


@pytest.fixture
def squares():
    register(Squares)
    yield
    SOURCES.remove("squares")


def test_a_new_source_trains_both_stages_by_the_ordinary_command_line(rqgen, squares, tmp_path, small_tokenizer):
    small = [setting for setting in small_tokenizer if "batch_size" not in setting]
    data = ["data.source=squares", "data.squares.count=12", "data.classes=[large, small]", "data.shift=1"]
    arguments = ["train", "tokenizer", "--out", tmp_path / "t", *small, "loop.batch_size=4", "loop.steps=1", *data]
    code, _, err = rqgen(*arguments)
    assert code == 0, err
    run = load(RQTokenizerRun, tmp_path / "t" / "config.yaml")
    assert run.data.squares == SquaresOptions(12) and (run.data.resolution, run.data.channels) == (16, 1)
    vae = RQVAE.from_pretrained(tmp_path / "t" / "model")
    assert vae.config.image_shape == (16, 16) and vae.config.image_channels == 1
    assert vae.data["squares"] == {"count": 12} and vae.config.class_names == ("large", "small")
    code, _, err = rqgen("train", "tokenizer", "--out", tmp_path / "t", "--resume", "loop.steps=2")
    assert code == 0, err
    # The second stage and `encode` read the same images.
    tokenizer = tmp_path / "t" / "model"
    code, _, err = rqgen("train", "prior", f"tokenizer={tokenizer}", *SMALL_PRIOR, "--out", tmp_path / "p")
    assert code == 0, err
    assert load(RQPriorRun, tmp_path / "p" / "config.yaml").data.squares == SquaresOptions(12)
    code, out, err = rqgen("encode", "--tokenizer", tokenizer, "--out", tmp_path / "codes", "--split", "held_out")
    assert code == 0 and "4 images" in out, err
    assert read_codes(tmp_path / "codes").labels.tolist() == [0, 0, 1, 1]
    code, out, err = rqgen("encode", "--tokenizer", tokenizer, "--out", tmp_path / "codes", "squares.count=3")
    assert code == 0 and "6 images" in out, err
    # Whoever has not registered it is told so.
    SOURCES.remove("squares")
    try:
        code, _, err = rqgen("encode", "--tokenizer", tokenizer, "--out", tmp_path / "codes")
        assert code == 1 and "config.json: data: unknown key 'squares'" in err and err.count("\n") == 1
    finally:
        register(Squares)


def test_its_settings_are_printed_with_help_and_checked_as_all_others(rqgen, squares, tmp_path):
    code, out, err = rqgen("config", "data.source=squares", "data.squares.count=7")
    assert code == 0, err
    assert '  # Options of source "squares".\n  squares:\n    # Squares of each class. [24]\n    count: 7\n' in out
    content = yaml.safe_load(out)
    # Sections of other sources are printed, at their defaults.
    assert content["data"]["photos"] == {"crops_per_epoch": 1024} and content["data"]["folder"]["path"] is None
    assert content["data"]["resolution"] == content["model"]["resolution"] == 16
    path = tmp_path / "mine.yaml"
    path.write_text(out)
    assert load(RQTokenizerRun, path, recipes=RECIPES).data == DataConfig(source="squares", squares={"count": 7})
    for override, words in (
        ("data.squares.cuont=3", "unknown key 'data.squares.cuont'; did you mean 'data.squares.count'?"),
        ("data.squares.count=many", "wrong value at 'data.squares.count': expected an integer, got 'many'"),
        ("data.squares=7", "wrong value at 'data.squares': expected settings (SquaresOptions), got '7'"),
        ("data.source=square", f"'data.source': expected one of {', '.join(SOURCES.names())}, got 'square'"),
    ):
        code, _, err = rqgen("train", "tokenizer", "data.source=squares", override, "--out", tmp_path / "run")
        assert code == 1 and words in err and err.count("\n") == 1


def test_options_of_another_source_are_named_in_the_log(rqgen, trained, tmp_path, caplog):
    arguments = ["encode", "--tokenizer", trained[0] / "model", "--out", tmp_path / "codes", "--split", "held_out"]
    with caplog.at_level(logging.WARNING):
        assert rqgen(*arguments, "photos.crops_per_epoch=1024")[0] == 0
        assert "has no effect" not in caplog.text
        assert rqgen(*arguments, "photos.crops_per_epoch=5")[0] == 0
    assert "photos.crops_per_epoch: 5 has no effect: source is 'digits'" in caplog.text


def test_options_without_source_code_are_printed_without_help(rqgen):
    options = make_dataclass("Made", [("count", int, field(default=3))])
    register(type("Made", (Squares,), {"name": "made", "options": options}))
    try:
        for arguments in (["config"], ["list", "sources"]):
            code, out, err = rqgen(*arguments)
            assert code == 0 and "count" in out and "[3]" in out, err
    finally:
        SOURCES.remove("made")


def test_every_module_of_the_folder_is_a_source():
    modules = [module.name for module in pkgutil.iter_modules(sources.__path__)]
    assert modules == SOURCES.names() and {"digits", "folder", "photos"} <= set(modules)


OLD = {
    "source": "digits",
    "folder": None,
    "classes": None,
    "resolution": 32,
    "channels": 1,
    "fit": "crop",
    "background": "white",
    "on_broken": "fail",
    "held_out_fraction": 0.25,
    "split_seed": 3,
    "horizontal_flip": False,
    "shift": 0,
    "crops_per_epoch": 1024,
}


def test_what_older_versions_wrote_of_images_is_read(rqgen, trained, tmp_path):
    """Models and settings from before each source had its section."""
    vae = RQVAE.from_pretrained(trained[0] / "model")
    vae.data = OLD
    vae.save_pretrained(tmp_path / "vae")
    assert json.loads((tmp_path / "vae" / "config.json").read_text())["data"] == OLD
    code, _, err = rqgen("encode", "--tokenizer", tmp_path / "vae", "--out", tmp_path / "codes", "--split", "held_out")
    assert code == 0, err
    expected = DataConfig(held_out_fraction=0.25, split_seed=3)
    assert torch.equal(read_codes(tmp_path / "codes").labels, open_dataset(expected, "held_out").labels)
    path = tmp_path / "config.yaml"
    old = {**OLD, "source": "folder", "folder": "photos", "channels": 3, "fit": "exact", "on_broken": "skip"}
    path.write_text(yaml.safe_dump({"base": None, "data": old}))
    data = load(RQTokenizerRun, path).data
    options = FolderOptions("photos", fit="exact", on_broken="skip")
    assert to_dict(data) == to_dict(
        DataConfig(source="folder", folder=options, held_out_fraction=0.25, split_seed=3, channels=3)
    )
