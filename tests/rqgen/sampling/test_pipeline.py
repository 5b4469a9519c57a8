"""A pipeline: one folder, classes by name or number, PIL images."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from rqgen import Pipeline, SamplingParams, generate
from rqgen.models import load_pretrained

# Written by the first version: tokenizer/ and prior/ of two classes without names, and no pipeline.json.
SAVED = Path(__file__).parents[2] / "data" / "models_v1"


@pytest.fixture(params=["rq", "var"])
def folder(request):
    return SAVED / request.param


@pytest.fixture
def pipe(folder):
    return Pipeline(*(load_pretrained(folder / part) for part in ("tokenizer", "prior")), class_names=["cat", "dog"])


def flat(codes):
    return codes.flatten(1) if isinstance(codes, torch.Tensor) else torch.cat([m.flatten(1) for m in codes], dim=1)


def test_a_folder_with_the_two_models_alone_is_a_pipeline(folder):
    pipe = Pipeline.from_pretrained(folder)
    assert pipe.class_names == ("0", "1") and pipe.device == torch.device("cpu")
    out = pipe([1, 0], seed=3)
    assert torch.equal(out.tensors, generate(pipe.prior, pipe.tokenizer, [1, 0], seed=3).images)


def test_saved_and_read_again(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    assert sorted(path.name for path in (tmp_path / "pipe").iterdir()) == ["pipeline.json", "prior", "tokenizer"]
    again = Pipeline.from_pretrained(tmp_path / "pipe")
    assert again.class_names == ("cat", "dog")
    assert torch.equal(again("dog", seed=1).tensors, pipe("dog", seed=1).tensors)
    again.save_pretrained(tmp_path / "pipe")  # replaced
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe"]
    assert Pipeline.from_pretrained(tmp_path / "pipe").class_names == ("cat", "dog")


def named(folder, names):
    prior = load_pretrained(folder / "prior")
    prior.config.class_names = names
    return prior


def test_names_of_the_prior_are_not_replaced(folder, tmp_path):
    tokenizer, prior = load_pretrained(folder / "tokenizer"), named(folder, ("cat", "dog"))
    for names in (None, [], ["cat", "dog"], ["0", "1"]):
        assert Pipeline(tokenizer, prior, class_names=names).class_names == ("cat", "dog")
    words = r"class_names: expected none, as the prior has names of its own \(cat, dog\), got dog, cat"
    with pytest.raises(ValueError, match=f"^{words}$"):
        Pipeline(tokenizer, prior, class_names=["dog", "cat"])
    # A prior that was put into the folder of another one.
    Pipeline(tokenizer, prior).save_pretrained(tmp_path / "pipe")
    named(folder, ("dog", "cat")).save_pretrained(tmp_path / "pipe" / "prior")
    with pytest.raises(ValueError, match=r"pipe: class_names: expected none, .* \(dog, cat\), got cat, dog$"):
        Pipeline.from_pretrained(tmp_path / "pipe")


def test_names_that_the_prior_is_given_later_are_saved(folder, tmp_path):
    pipe = Pipeline.from_pretrained(folder)
    pipe.save_pretrained(tmp_path / "unnamed")
    assert json.loads((tmp_path / "unnamed" / "pipeline.json").read_text())["class_names"] == []
    pipe.prior.config.class_names = ("cat", "dog")
    assert pipe.class_names == ("cat", "dog")
    pipe.save_pretrained(tmp_path / "named")
    again = Pipeline.from_pretrained(tmp_path / "named")
    assert again.class_names == again.prior.class_names == ("cat", "dog")


@pytest.mark.parametrize("condition", ["dog", "1", 1, np.int64(1), np.array(1), torch.tensor(1)], ids=repr)
def test_one_class_by_name_or_number(pipe, condition):
    expected = pipe([1, 1, 1], seed=5)
    out = pipe(condition, 3, seed=5)
    assert torch.equal(out.tensors, expected.tensors) and torch.equal(flat(out.codes), flat(expected.codes))
    assert torch.equal(pipe(condition, seed=5).tensors, expected.tensors[:1])


@pytest.mark.parametrize(
    "condition", [["dog", "cat"], ["dog", 0], (1, 0), np.array([1, 0]), torch.tensor([1, 0]), np.array(["dog", "cat"])]
)
def test_several_classes(pipe, condition):
    out = pipe(condition, params=SamplingParams(seed=4), cfg_scale=1.0)
    assert torch.equal(out.tensors, generate(pipe.prior, pipe.tokenizer, [1, 0], seed=4, cfg_scale=1.0).images)


def test_images_are_those_of_pil(pipe):
    out = pipe(num=2, seed=2)
    for image, tensor in zip(out.images, out.tensors, strict=True):
        assert image.mode == "L" and image.size == (8, 8)
        assert np.array_equal(np.asarray(image), ((tensor[0] + 1) * 127.5).round().byte().numpy())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("dgo",), ValueError, "condition: unknown class 'dgo'; did you mean 'dog'"),
        ((2,), ValueError, r"condition: expected an integer in \[0, 1\], got 2"),
        ((["dog", "bird"],), ValueError, "condition: unknown class 'bird'; there are: cat, dog"),
        (([0, 2],), IndexError, r"condition: expected values in \[0, 2\), got 2"),
        (("dog", 0), ValueError, "num: expected an integer >= 1, got 0"),
        ((["dog", "cat"], 2), ValueError, "num: expected None with a condition"),
        ((1.5,), (TypeError, ValueError), "condition"),
        ((), ValueError, "num: expected the number of images"),
    ],
    ids=str,
)
def test_mistakes(pipe, arguments, error, message):
    with pytest.raises(error, match=message):
        pipe(*arguments)
    with pytest.raises(TypeError, match="guidance_scale: unknown; cfg_scale is guidance_scale - 1"):
        pipe("dog", guidance_scale=2.0)


def test_models_that_do_not_belong_together(pipe, folder):
    other = SAVED / {"rq": "var", "var": "rq"}[folder.name]
    with pytest.raises(TypeError, match="vae: expected an"):
        Pipeline(load_pretrained(other / "tokenizer"), pipe.prior)
    with pytest.raises(TypeError, match=r"prior: expected a prior \(RQTransformer, VAR.*\), got"):
        Pipeline(pipe.tokenizer, pipe.tokenizer)
    with pytest.raises(ValueError, match="class_names: expected one for each of 2 classes"):
        Pipeline(pipe.tokenizer, pipe.prior, class_names=["cat"])


def test_damaged_folders_are_named(pipe, folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="folder: no folder"):
        Pipeline.from_pretrained(tmp_path / "nowhere")
    path = tmp_path / "pipe"
    pipe.save_pretrained(path)
    for text, words in (
        ("{", "pipeline.json"),
        ('{"format_version": 2}', "pipeline.json: expected format_version 1, got 2"),
        (
            '{"format_version": 1, "class_names": "cat"}',
            "class_names: expected a list of names, got 'cat'",
        ),
        ('{"format_version": 1, "class_names": ["cat"]}', "class_names: expected one for each of 2 classes"),
        (
            '{"format_version": 1, "class_names": ["cat", "cat"]}',
            "pipeline.json: class_names: expected names that differ",
        ),
    ):
        (path / "pipeline.json").write_text(text)
        with pytest.raises(ValueError, match=words):
            Pipeline.from_pretrained(path)
    (path / "pipeline.json").write_text(json.dumps({"format_version": 1, "class_names": []}))
    assert Pipeline.from_pretrained(path).class_names == ("0", "1")
    shutil.rmtree(path / "prior")
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer/ and prior/ in .*, but prior/ is missing"):
        Pipeline.from_pretrained(path)
    shutil.copytree(path / "tokenizer", path / "prior")
    with pytest.raises(ValueError, match=r"pipe/prior: expected a prior, got a (rqvae|multiscale_vqvae)"):
        Pipeline.from_pretrained(path)


def test_other_files_are_not_replaced(pipe, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds files that are not a pipeline's, not replaced: \['notes.txt'\]"):
        pipe.save_pretrained(tmp_path)
    with pytest.raises(FileExistsError, match="is not a folder"):
        pipe.save_pretrained(tmp_path / "notes.txt")
    assert (tmp_path / "notes.txt").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_pipeline_that_cannot_be_written_leaves_the_old_one(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "pipe")
    before = pipe("dog", seed=1).tensors
    with torch.no_grad():
        next(pipe.prior.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="is not finite, not saved"):
        pipe.save_pretrained(tmp_path / "pipe")
    assert torch.equal(Pipeline.from_pretrained(tmp_path / "pipe")("dog", seed=1).tensors, before)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_prior_without_classes():
    vae = load_pretrained(SAVED / "rq" / "tokenizer")
    pipe = Pipeline(vae, tiny.rq_prior(vae, embed_dim=8))
    assert pipe.class_names == () and len(pipe(num=2).images) == 2
    for condition in (1, "cat"):
        with pytest.raises(ValueError, match="condition: expected none, as this prior knows no classes"):
            pipe(condition)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["rq", "var"])
def test_a_pipeline_in_half_precision_is_read_again(kind, dtype, tmp_path):
    """The prior's copy of the codebook was rounded, the tokenizer's not: they were taken for different ones."""
    vae = tiny.rqvae() if kind == "rq" else tiny.multiscale_vqvae()
    prior = tiny.rq_prior(vae, num_classes=3) if kind == "rq" else tiny.var(vae)
    Pipeline(vae.to(dtype), prior.to(dtype)).save_pretrained(tmp_path / "pipe")
    again = Pipeline.from_pretrained(tmp_path / "pipe")
    assert again(1).tensors.isfinite().all()
    Pipeline(vae, prior.float())
    other = tiny.rqvae() if kind == "rq" else tiny.multiscale_vqvae()
    with pytest.raises(ValueError, match="vae: expected the codebooks that the prior was made with"):
        Pipeline(other, prior)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_that_pil_would_show_as_others(channels):
    """Two and four channels came back as grey or colour with alpha."""
    vae = tiny.rqvae(image_channels=channels)
    pipe = Pipeline(vae, tiny.rq_prior(vae))
    with pytest.raises(ValueError, match=f"tokenizer: expected images of 1 or 3 channels, .* got {channels}"):
        pipe(num=1)


@pytest.mark.parametrize(
    ("device", "error", "message"),
    [
        ("gpu", ValueError, "device: expected a device, such as cpu, cuda or cuda:1, got 'gpu'"),
        ("cuda:99", ValueError, r"device: torch sees \w+ CUDA devices?, got 'cuda:99'"),
        (0, TypeError, "device: expected a device or its name, such as cpu or cuda, got 0"),
    ],
)
def test_devices_that_are_not_there(pipe, folder, device, error, message):
    for call in (pipe.to, lambda device: Pipeline.from_pretrained(folder, device)):
        with pytest.raises(error, match=message):
            call(device)


def test_it_moves_as_a_whole(pipe, tmp_path):
    assert pipe.to("cpu") is pipe
    assert pipe.to("meta").device.type == pipe.tokenizer.device.type == "meta"
    with pytest.raises(ValueError, match="prior: it is on the meta device and has no values"):
        pipe("dog")
    with pytest.raises(ValueError, match="is on the meta device and has no values, not saved"):
        pipe.save_pretrained(tmp_path / "pipe")
