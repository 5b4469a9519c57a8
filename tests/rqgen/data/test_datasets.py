"""Digits, photographs and folders of images."""

import itertools
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rqgen.checks import DIGIT_NAMES
from rqgen.config import from_dict, to_dict
from rqgen.data import DataConfig, open_dataset
from rqgen.data.datasets import stratified_split
from rqgen.data.settings import saved_settings
from rqgen.data.sources import SOURCES
from rqgen.data.sources.folder import FolderOptions
from rqgen.data.sources.photos import PhotosOptions


def write_image(path, width=40, height=36, value=128, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    colour = value if mode == "L" else (value, 0, 255 - value)
    Image.new(mode, (width, height), colour).save(path)


@pytest.fixture
def folder(tmp_path):
    for name, value in (("cats", 0), ("dogs", 255)):
        for number in range(6):
            write_image(tmp_path / name / f"{number}.png", value=value)
    return tmp_path


def folder_config(folder, fit="crop", on_broken="fail", **settings):
    options = FolderOptions(folder, fit=fit, on_broken=on_broken)
    return DataConfig(source="folder", folder=options, resolution=32, channels=3, **settings)


def test_digits_are_split_once_stratified_and_shuffled():
    train, held_out = (open_dataset(DataConfig(), split) for split in ("train", "held_out"))
    assert len(train) + len(held_out) == 1797 and 290 <= len(held_out) <= 310
    assert train.class_names == DIGIT_NAMES
    counts = torch.bincount(held_out.labels)
    assert counts.min() >= 28 and counts.max() <= 32
    image, label = train.item(0, 0)
    assert image.shape == (1, 32, 32) and image.dtype == torch.float32 and 0 <= label < 10
    assert image.min() >= -1 and image.max() <= 1 and image.max() > 0.5

    both = torch.cat([train.images, held_out.images]).flatten(1)
    everything = open_dataset(DataConfig(), "all")
    assert len(everything) == 1797
    # No digit is in both parts: as multisets, the parts together are the whole.
    assert torch.equal(both.double().sum(1).sort()[0], everything.images.flatten(1).double().sum(1).sort()[0])
    again = open_dataset(DataConfig(), "held_out")
    other = open_dataset(DataConfig(split_seed=1), "held_out")
    assert torch.equal(held_out.images, again.images)
    assert not torch.equal(held_out.images, other.images)
    # Shuffled: the held-out ones are not a run of neighbours in the file.
    indices = stratified_split([0] * 100, 0.2, 0, "held_out")
    assert len(indices) == 20 and max(indices) - min(indices) > 40


def test_enlarged_digits_average_back_to_the_original_pixels():
    from sklearn.datasets import load_digits

    everything = open_dataset(DataConfig(), "all")
    small = torch.nn.functional.avg_pool2d(everything.images, 4).squeeze(1)
    original = torch.from_numpy(load_digits().images).float() / 8 - 1
    assert (small - original).abs().mean() < 0.1
    assert torch.equal(everything.labels, torch.from_numpy(load_digits().target))


def test_colour_digits_and_chosen_classes():
    dataset = open_dataset(DataConfig(channels=3, classes=["7", "2"], resolution=16), "train")
    image, _ = dataset.item(3, 0)
    assert image.shape == (3, 16, 16) and torch.equal(image[0], image[2])
    assert dataset.class_names == ("seven", "two") and set(dataset.labels.tolist()) == {0, 1}
    sevens = open_dataset(DataConfig(channels=3, classes=["7"], resolution=16), "train")
    assert torch.equal(dataset.images[dataset.labels == 0], sevens.images)
    by_name = open_dataset(DataConfig(channels=3, classes=["seven", "2"], resolution=16), "train")
    assert by_name.class_names == ("seven", "two") and torch.equal(by_name.images, dataset.images)


def test_split_parts_cover_everything():
    labels = [0] * 9 + [1] * 3 + [2]
    train, held_out = (stratified_split(labels, 1 / 3, 5, split) for split in ("train", "held_out"))
    assert sorted(train + held_out) == stratified_split(labels, 1 / 3, 5, "all") == list(range(13))
    assert sorted(labels[i] for i in held_out) == [0, 0, 0, 1]
    assert stratified_split(labels, 0.0, 5, "held_out") == []


def test_photo_crops_are_random_but_repeatable():
    config = DataConfig(source="photos", channels=3, resolution=48, photos=PhotosOptions(crops_per_epoch=6))
    train = open_dataset(config, "train")
    assert train.varies and len(train) == 6 and train.class_names == ("china", "flower")
    first, label = train.item(2, epoch=0)
    assert first.shape == (3, 48, 48) and label == 0 and first.abs().max() <= 1
    assert torch.equal(first, open_dataset(config, "train").item(2, epoch=0)[0])
    assert not torch.equal(first, train.item(2, epoch=1)[0])
    assert not torch.equal(first, train.item(4, epoch=0)[0])
    with pytest.raises(IndexError, match="index"):
        train.item(6, 0)
    with pytest.raises(ValueError, match="resolution: the held_out part of photograph 'china'"):
        open_dataset(DataConfig(source="photos", resolution=200), "held_out")


def test_folder_classes_sizes_and_ranges(folder):
    dataset = open_dataset(folder_config(folder), "all")
    assert dataset.class_names == ("cats", "dogs") and len(dataset) == 12
    image, label = dataset.item(0, 0)
    assert image.shape == (3, 32, 32) and label == 0
    assert torch.equal(image[:, 0, 0], torch.tensor([-1.0, -1.0, 1.0]))
    assert dataset.item(11, 0)[1] == 1
    train, held_out = (open_dataset(folder_config(folder), split) for split in ("train", "held_out"))
    assert sorted([*train.files, *held_out.files]) == dataset.files and held_out.files
    only = open_dataset(folder_config(folder, classes=["dogs"]), "all")
    assert len(only) == 6 and only.item(0, 0)[1] == 0


def test_folder_without_classes(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "notes.txt").write_text("not an image")
    dataset = open_dataset(folder_config(tmp_path), "all")
    assert len(dataset) == 1 and dataset.class_names == () and dataset.item(0, 0)[1] == -1
    with pytest.raises(ValueError, match=r"classes: .* no class folders"):
        open_dataset(folder_config(tmp_path, classes=["a"]), "all")


def test_what_is_no_picture_is_skipped_and_counted_in_one_line(folder, caplog):
    inside = folder / "cats" / "deeper"
    for name in (
        ".hidden.png",
        "._0.png",
        ".ipynb_checkpoints/0-checkpoint.png",
        "deeper/.cache/0.png",
        "deeper/1.png",
    ):
        write_image(folder / "cats" / name)
    write_image(folder / ".ipynb_checkpoints" / "0.png")
    write_image(folder / ".loose.png")
    write_image(folder / "birds.png" / "0.png")  # a folder named like an image
    write_image(inside / "2.PNG")
    (folder / "empty" / "emptier").mkdir(parents=True)
    (folder / "__MACOSX" / "cats").mkdir(parents=True)
    (folder / "__MACOSX" / "cats" / "._0.png").write_bytes(b"\0\5\x16\7")
    write_image(folder / "@eaDir" / "thumbnail.jpg")
    (folder / "Thumbs.db").write_bytes(b"")
    (inside / "notes.txt").write_text("not an image")
    (folder / "dogs" / "gone.png").symlink_to(folder / "nowhere.png")
    (folder / "gone").symlink_to(folder / "nowhere")
    (folder / "dogs" / "self.png").symlink_to(folder / "dogs" / "self.png")
    (folder / "dogs" / "up").symlink_to(folder)
    (inside / "around").symlink_to(folder / "cats")
    os.mkfifo(folder / "dogs" / "pipe.png")
    with caplog.at_level(logging.INFO):
        for split in ("train", "held_out", "all"):
            dataset = open_dataset(folder_config(folder), split)
    assert dataset.class_names == ("cats", "dogs")
    names = [path.relative_to(folder).as_posix() for path, _ in dataset.files]
    expected = [f"{kind}/{n}.png" for kind in ("cats", "dogs") for n in range(6)]
    assert sorted(names) == sorted([*expected, "cats/deeper/1.png", "cats/deeper/2.PNG"])
    assert caplog.messages == [
        f"{folder}: skipped hidden files and folders: 6 (.ipynb_checkpoints), "
        "folders of other programs: 2 (@eaDir), other files: 3 (Thumbs.db), "
        "folders named like an image: 1 (birds.png), "
        "links that lead nowhere: 3 (gone), links to folders already read: 2 (cats/deeper/around), "
        "folders without images: 1 (empty)"
    ]


def test_a_class_may_be_a_link_and_a_folder_of_nothing_names_what_it_skipped(folder, tmp_path_factory):
    top = tmp_path_factory.mktemp("links")
    (top / "pets").symlink_to(folder / "cats")
    dataset = open_dataset(folder_config(top), "all")
    assert dataset.class_names == ("pets",) and len(dataset) == 6
    (top / "pets").unlink()
    write_image(top / ".hidden" / "0.png")
    (top / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"no image files found .*; skipped hidden .*: 1 \(\.hidden\), folders without"
    ):
        open_dataset(folder_config(top), "all")


def test_folders_that_cannot_be_read_are_skipped(folder, caplog, monkeypatch):
    iterdir = Path.iterdir

    def refuse_dogs(path):
        if path.name == "dogs":
            raise PermissionError(13, "Permission denied", str(path))
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse_dogs)
    with caplog.at_level(logging.INFO):
        assert open_dataset(folder_config(folder), "all").class_names == ("cats",)
    assert caplog.messages == [f"{folder}: skipped folders that cannot be read: 1 (dogs)"]


def test_an_empty_class_cannot_be_chosen(folder):
    (folder / "birds").mkdir()
    with pytest.raises(ValueError, match=r"classes: unknown class 'birds' in .*; there are: cats, dogs"):
        open_dataset(folder_config(folder, classes=["birds", "cats"]), "all")


@pytest.mark.parametrize("suffix", ["pgm", "ppm", "pbm", "webp", "jfif", "tga", "jp2", "TIFF"])
def test_kinds_of_files_in_a_folder(tmp_path, suffix):
    kind = {"jfif": "JPEG", "jp2": "JPEG2000", "pgm": "PPM", "pbm": "PPM"}.get(suffix, suffix.upper())
    Image.new("1" if suffix == "pbm" else "L", (32, 32)).save(tmp_path / f"a.{suffix}", format=kind)
    assert len(open_dataset(folder_config(tmp_path), "all")) == 1


def test_centre_crop_keeps_the_centre(tmp_path):
    pixels = np.zeros((32, 96, 3), dtype=np.uint8)
    pixels[:, 32:64] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image, _ = open_dataset(folder_config(tmp_path), "all").item(0, 0)
    assert torch.equal(image, torch.ones(3, 32, 32))


def test_flips_touch_training_images_only(tmp_path):
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:, :16] = 255
    Image.fromarray(pixels).save(tmp_path / "half.png")
    config = folder_config(tmp_path, horizontal_flip=True, held_out_fraction=0)
    train = open_dataset(config, "train")
    left = [bool(train.item(0, epoch)[0][0, 0, 0] > 0) for epoch in range(32)]
    assert 4 < sum(left) < 28
    assert left == [bool(train.item(0, epoch)[0][0, 0, 0] > 0) for epoch in range(32)]
    whole = open_dataset(config, "all")
    assert train.varies and not whole.varies
    assert all(whole.item(0, epoch)[0][0, 0, 0] > 0 for epoch in range(32))


def test_shifts_move_training_images_and_repeat_their_border(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    config = DataConfig(
        source="folder", folder=tmp_path, resolution=16, channels=3, shift=2, held_out_fraction=0, horizontal_flip=True
    )
    train, whole = open_dataset(config, "train"), open_dataset(config, "all")
    plain = whole.item(0, 0)[0]
    assert train.varies and not whole.varies and torch.equal(plain, whole.item(0, 5)[0])
    # The border repeated, then a window that sees the picture further down and to the right.
    padded = {m: np.pad(plain.flip(-1) if m else plain, ((0, 0), (2, 2), (2, 2)), mode="edge") for m in (False, True)}
    windows = {
        padded[m][:, 2 - down : 18 - down, 2 - right : 18 - right].tobytes(): (m, down, right)
        for m, down, right in itertools.product((False, True), range(-2, 3), range(-2, 3))
    }
    seen = {windows[train.item(0, epoch)[0].numpy().tobytes()] for epoch in range(600)}
    assert len(seen) == 2 * 5 * 5
    assert torch.equal(train.item(0, 7)[0], open_dataset(config, "train").item(0, 7)[0])


def test_a_shift_stays_within_the_image():
    for shift in (-1, 32):
        with pytest.raises(ValueError, match=rf"shift: expected 0 <= shift < resolution \(32\), got {shift}"):
            DataConfig(shift=shift)
    assert (
        open_dataset(DataConfig(shift=1), "train").varies and not open_dataset(DataConfig(shift=1), "held_out").varies
    )


def test_broken_images_fail_by_name_or_are_skipped_by_name(folder, caplog):
    broken = folder / "cats" / "broken.png"
    broken.write_bytes(b"no image")
    truncated = folder / "dogs" / "truncated.png"
    whole = (folder / "dogs" / "0.png").read_bytes()
    truncated.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"broken\.png: broken image file .*on_broken=skip"):
        open_dataset(folder_config(folder), "all")
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(folder_config(folder, on_broken="skip"), "all")
    assert len(dataset) == 12
    assert "broken.png" in caplog.text and "truncated.png" in caplog.text
    for path in folder.rglob("?.png"):
        path.unlink()
    with pytest.raises(ValueError, match="none of its image files can be read"):
        open_dataset(folder_config(folder, on_broken="skip"), "all")


def test_wrong_sizes(tmp_path):
    write_image(tmp_path / "small.png", 20, 40)
    with pytest.raises(ValueError, match=r"small\.png: image is 20x40 pixels, smaller than 32x32"):
        open_dataset(folder_config(tmp_path), "all")
    with pytest.raises(ValueError, match=r"small\.png: image is 20x40 pixels, expected exactly 32x32"):
        open_dataset(folder_config(tmp_path, fit="exact"), "all")
    image, _ = open_dataset(folder_config(tmp_path, fit="enlarge"), "all").item(0, 0)
    assert image.shape == (3, 32, 32)


def test_images_of_other_sizes_are_left_out_by_name(folder, caplog):
    write_image(folder / "cats" / "small.png", 20, 40)
    write_image(folder / "dogs" / "square.png", 32, 32)
    with pytest.raises(
        ValueError, match=r"small\.png: image is .* smaller than 32x32.*; data\.folder\.on_broken=skip leaves"
    ):
        open_dataset(folder_config(folder), "all")
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(folder_config(folder, on_broken="skip"), "all")
    assert len(dataset) == 13 and "small.png: image is 20x40 pixels" in caplog.text
    assert len(open_dataset(folder_config(folder, on_broken="skip", fit="exact"), "all")) == 1


# --- Folders that grow


def names_of(dataset):
    return {str(path) for path, _ in dataset.files}


def parts(folder, split="name", **settings):
    options = FolderOptions(folder, split=split)
    config = DataConfig(source="folder", folder=options, resolution=32, held_out_fraction=0.25, **settings)
    return tuple(names_of(open_dataset(config, part)) for part in ("train", "held_out"))


def test_images_stay_in_their_part_when_others_come_or_go(tmp_path):
    for number in range(40):
        write_image(tmp_path / "cats" / f"{number}.png")
    before = parts(tmp_path)
    assert before[0] and 3 <= len(before[1]) <= 20 and not before[0] & before[1]
    for number in range(40):
        write_image(tmp_path / "cats" / f"0{number}.png")
        write_image(tmp_path / "ants" / f"{number}.png")
    after = parts(tmp_path)
    assert before[0] < after[0] and before[1] < after[1] and len(set.union(*after)) == 120
    for path in sorted(before[0])[:10]:
        Path(path).unlink()
    assert parts(tmp_path)[1] == after[1]
    # The seed matters, the place of the folder does not, and there is no other pattern.
    assert parts(tmp_path, split_seed=1)[1] != after[1]
    tmp_path.rename(moved := tmp_path.with_name("moved"))
    assert {Path(path).relative_to(moved) for path in parts(moved)[1]} == {
        Path(path).relative_to(tmp_path) for path in after[1]
    }


def test_older_versions_split_by_the_order_of_files(tmp_path):
    for number in range(8):
        write_image(tmp_path / "cats" / f"{number}.png")
    keep = stratified_split([0] * 8, 0.25, 0, "held_out")
    assert parts(tmp_path, split="order")[1] == {str(tmp_path / "cats" / f"{index}.png") for index in keep}
    for saved in (
        {"source": "folder", "folder": str(tmp_path), "fit": "enlarge"},
        {"source": "folder", "folder": {"path": str(tmp_path), "fit": "enlarge"}},
    ):
        config = from_dict(DataConfig, saved_settings(saved), where="here")
        assert config.folder == FolderOptions(tmp_path, fit="enlarge", split="order")
    for new in ({"source": "digits"}, to_dict(DataConfig(source="folder", folder=tmp_path))):
        assert saved_settings(new) == new


def test_a_fingerprint_follows_the_names(tmp_path):
    for number in range(8):
        write_image(tmp_path / "cats" / f"{number}.png")
    config = DataConfig(source="folder", folder=tmp_path, resolution=32, held_out_fraction=0)
    first = open_dataset(config, "train").fingerprint()
    assert first == open_dataset(config, "train").fingerprint()
    assert (first["images"], first["classes"]) == (8, 1)
    (tmp_path / "cats" / "7.png").rename(tmp_path / "cats" / "8.png")
    assert open_dataset(config, "train").fingerprint()["names"] != first["names"]
    assert open_dataset(DataConfig(), "train").fingerprint() == {"images": 1498, "classes": 10}


def test_a_class_without_an_image_to_train_on_is_named(tmp_path, caplog):
    for number in range(12):
        write_image(tmp_path / f"class{number:02}" / "0.png")
    with caplog.at_level(logging.WARNING):
        _, held_out = parts(tmp_path)
    assert len(held_out) > 0 and f"{tmp_path}: classes without an image to train on: {len(held_out)} (" in caplog.text


def test_missing_empty_and_mixed_folders(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"folder\.path: no folder"):
        open_dataset(folder_config(tmp_path / "nowhere"), "all")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no image files found"):
        open_dataset(folder_config(empty), "all")
    write_image(folder / "loose.png")
    with pytest.raises(ValueError, match=r"both class folders and loose images \(loose\.png"):
        open_dataset(folder_config(folder), "all")


def test_unknown_classes_suggest_the_nearest(folder):
    with pytest.raises(ValueError, match=r"unknown class 'cat' in .*did you mean 'cats'"):
        open_dataset(folder_config(folder, classes=["cat"]), "all")
    with pytest.raises(ValueError, match="unknown class '12' in digits"):
        open_dataset(DataConfig(classes=["12"]), "all")
    with pytest.raises(ValueError, match="list of different class names"):
        open_dataset(DataConfig(classes=["1", "1"]), "all")
    with pytest.raises(ValueError, match="list of different class names"):
        open_dataset(DataConfig(classes=["1", "one"]), "all")
    with pytest.raises(ValueError, match="unknown class 'sevn' in digits; did you mean 'seven'"):
        open_dataset(DataConfig(classes=["sevn"]), "all")


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"resolution": 0}, "resolution"),
        ({"channels": 2}, "channels"),
        ({"held_out_fraction": 1.0}, "held_out_fraction"),
        ({"photos": {"crops_per_epoch": 0}}, "crops_per_epoch"),
        ({"source": "folder"}, "folder"),
        ({"folder": "x"}, "folder"),
    ],
)
def test_bad_data_settings(settings, word):
    with pytest.raises(ValueError, match=word):
        DataConfig(**settings)


# --- Settings made in Python


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"resolution": "32"}, TypeError, "resolution: expected an integer, got '32'"),
        ({"resolution": 32.0}, TypeError, "resolution: expected an integer, got 32.0"),
        ({"horizontal_flip": "no"}, TypeError, "horizontal_flip: expected true or false, got 'no'"),
        ({"source": "cifar"}, ValueError, "source: expected one of digits, folder, photos, got 'cifar'"),
        ({"classes": ["a", 1]}, TypeError, "classes[1]: expected text, got 1"),
        ({"channels": 2}, ValueError, "channels: expected one of 1, 3, got 2"),
        ({"held_out_fraction": "0.5"}, TypeError, "held_out_fraction: expected a finite number, got '0.5'"),
    ],
)
def test_settings_are_checked_by_their_types(values, error, words):
    with pytest.raises(error) as caught:
        DataConfig(**values)
    assert str(caught.value) == words
    config = DataConfig()
    for name, value in values.items():
        setattr(config, name, value)
    with pytest.raises(error) as caught:
        open_dataset(config, "train")
    assert str(caught.value) == f"data.{words}"


def test_options_of_a_source_are_checked_by_their_types(tmp_path):
    with pytest.raises(ValueError, match=r"^fit: expected one of crop, enlarge, exact, got 'crp'"):
        FolderOptions(path=tmp_path, fit="crp")
    config = DataConfig(source="folder", folder=FolderOptions(path=str(tmp_path)))
    assert config.folder.path == tmp_path
    config.folder.fit = "crp"
    with pytest.raises(ValueError, match=r"^data\.folder\.fit: expected one of crop, enlarge, exact, got 'crp'"):
        open_dataset(config, "train")


@pytest.mark.parametrize("source", ["digits", "photos"])
def test_an_unknown_split_is_refused(source):
    for opener in (open_dataset, lambda config, split: SOURCES.find(source, "").open(config, config.photos, split)):
        with pytest.raises(ValueError, match="split: expected one of train, held_out, all, got 'test'"):
            opener(DataConfig(source=source), "test")
