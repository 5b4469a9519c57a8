"""Codes on disk."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rqgen.data import EncodedImages, TensorItems, read_codes, write_codes
from rqgen.quantizers import CodeLayout, MultiScaleConfig, MultiScaleQuantizer, code_fingerprint

SCALES = [[1, 1], [1, 2], [2, 3]]
LABELS = torch.tensor([0, 1, 2, -1, 1])


def draw(*shape):
    return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["stacks", "token maps"])
def encoded(request):
    codes = draw(5, 2, 3, 4) if request.param == "stacks" else [draw(5, h, w) for h, w in SCALES]
    return EncodedImages(codes, LABELS, 9, "abc", ("x", "y", "z"), {"split": "train"})


def same(one, two):
    """True if codes are equal, in structure and dtype too."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    return isinstance(two, list) and len(one) == len(two) and all(map(same, one, two))


def test_round_trip(encoded, tmp_path):
    path = tmp_path / "deep" / "codes.safetensors"
    write_codes(path, encoded)
    back = read_codes(path)
    assert same(back.codes, encoded.codes) and back.layout == encoded.layout
    assert torch.equal(back.labels, encoded.labels)
    assert (back.codebook_size, back.codebook_id) == (9, "abc")
    assert back.class_names == ("x", "y", "z") and back.info == {"split": "train"}
    assert [entry.name for entry in path.parent.iterdir()] == ["codes.safetensors"]
    assert load_file(path)["codes"].dtype == torch.int32


def test_on_disk_all_codes_of_an_image_lie_side_by_side(tmp_path):
    stacks, maps = draw(5, 2, 3, 4), [draw(5, h, w) for h, w in SCALES]
    for codes, rows in (
        (stacks, [image.flatten().tolist() for image in stacks]),
        (maps, [[code for tokens in maps for code in tokens[i].flatten().tolist()] for i in range(5)]),
    ):
        write_codes(tmp_path / "codes", EncodedImages(codes, LABELS, 9, "", (), {}))
        assert (
            load_file(tmp_path / "codes")["codes"].tolist() == rows == CodeLayout.of(codes, 9).flatten(codes).tolist()
        )


def test_the_first_version_is_read(tmp_path):
    codes = draw(5, 2, 3, 4)
    metadata = {"codebook_size": "9", "codebook_id": "abc", "class_names": '["x", "y", "z"]', "info": "{}"}
    path = tmp_path / "old"
    tensors = {"codes": codes.int(), "labels": LABELS}
    save_file(tensors, path, {"format": "rqgen-codes", "format_version": "1"} | metadata)
    back = read_codes(path)
    assert same(back.codes, codes) and back.layout.shape == (2, 3, 4) and back.class_names == ("x", "y", "z")


def test_the_second_version_is_read(encoded, tmp_path):
    metadata = {
        **{"format": "rqgen-codes", "format_version": "2", "codebook_size": "9", "codebook_id": "abc"},
        **{"class_names": '["x", "y", "z"]', "info": '{"split": "train"}'},
        "code_shape": json.dumps(encoded.layout.to_json()),
    }
    save_file({"codes": encoded.layout.flatten(encoded.codes).int(), "labels": LABELS}, tmp_path / "old", metadata)
    back = read_codes(tmp_path / "old")
    assert same(back.codes, encoded.codes) and torch.equal(back.labels, LABELS) and back.info == encoded.info
    assert back.class_names == encoded.class_names and back.codebook_size == 9 and back.codebook_id == "abc"


WRITE = """
import sys, torch
from pathlib import Path
from rqgen.data import EncodedImages, write_codes
from rqgen.models import RQTransformer, RQTransformerConfig
from rqgen.models.transformer import TransformerConfig

folder = Path(sys.argv[1])
info = {name: {"split": name} for name in ("tokenizer", "split", "data", "seed", "z", "a")}
names = ("circle", "square", "Käse")
codes = torch.arange(24).reshape(2, 3, 2, 2)
write_codes(folder / "codes.safetensors", EncodedImages(codes, torch.tensor([2, -1]), 24, "abc", names, info))
torch.manual_seed(0)
stack = TransformerConfig(layers=1, heads=1)
config = RQTransformerConfig((1, 1, 2), 4, 2, embed_dim=4, spatial=stack, depth=stack, condition="class",
                             condition_vocab_size=3, class_names=names)
RQTransformer(config, torch.zeros(4, 2)).save_pretrained(folder / "model")
"""


def test_files_are_the_same_bytes_in_every_process(tmp_path):
    written = []
    for seed in range(2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", WRITE, str(folder)], env=os.environ | {"PYTHONHASHSEED": str(seed)}, check=True
        )
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        assert len(files) == 3
        written.append([path.read_bytes() for path in files])
    assert all(one == written[0] for one in written)
    assert read_codes(tmp_path / "0" / "codes.safetensors").class_names == ("circle", "square", "Käse")


def test_bad_files(encoded, tmp_path):
    with pytest.raises(FileNotFoundError, match="codes: no file "):
        read_codes(tmp_path / "nowhere")
    good = tmp_path / "good"
    write_codes(good, encoded)
    content = good.read_bytes()
    for number, data in enumerate((b"\0" * 40, content[:6], content[:60], content[:-4])):
        (tmp_path / f"broken{number}").write_bytes(data)
        with pytest.raises(ValueError, match=rf"broken{number}: not a readable safetensors file"):
            read_codes(tmp_path / f"broken{number}")
    save_file({"codes": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="other: not a file of codes"):
        read_codes(tmp_path / "other")
    save_file({"codes": torch.zeros(1)}, tmp_path / "newer", {"format": "rqgen-codes", "format_version": "9"})
    with pytest.raises(ValueError, match="newer: expected format_version 1 or 2, got 9"):
        read_codes(tmp_path / "newer")


def test_a_file_that_contradicts_itself_is_refused(encoded, tmp_path):
    path = tmp_path / "codes"
    write_codes(path, encoded)
    tensors = load_file(path)
    shape = json.dumps(encoded.layout.to_json())
    metadata = {
        **{"format": "rqgen-codes", "format_version": "2", "codebook_size": "9", "codebook_id": "abc"},
        **{"class_names": "[]", "info": "{}", "code_shape": shape},
    }
    save_file(tensors, path, metadata)
    assert same(read_codes(path).codes, encoded.codes)  # as it should be; now one thing is wrong at a time
    for change, words in (
        ({"codebook_size": "8"}, r"codes: expected 0 <= code < 8, got 0\.\.8"),
        ({"code_shape": "[2, 3, 5]"}, "code_shape"),
        ({"code_shape": "[[1, 1], [2, 2]]"}, "code_shape"),
        ({"code_shape": "[]"}, "code_shape"),
        ({"code_shape": "[[1, 1], 5]"}, "code_shape"),
        ({"code_shape": '{"h": 2}'}, "code_shape"),
        ({"code_shape": "{"}, "code_shape"),
        ({"code_shape": f"[{tensors['codes'].shape[1]}]"}, r"code_shape: \[\d+\] does not fit codes"),
        ({"code_shape": "[2, -1, 4]"}, r"code_shape: \[2, -1, 4\] does not fit codes \("),
        ({"code_shape": f"[2, 3, {10**40}]"}, r"code_shape: .* does not fit codes \(\d+, \d+\)$"),
    ):
        save_file(tensors, path, metadata | change)
        with pytest.raises(ValueError, match=rf"{path.name}: .*{words}"):
            read_codes(path)
    for missing in ("codebook_id", "code_shape", "info"):
        save_file(tensors, path, {name: value for name, value in metadata.items() if name != missing})
        with pytest.raises(ValueError, match=f"its metadata lacks '{missing}'"):
            read_codes(path)
    save_file({"codes": tensors["codes"]}, path, metadata)
    with pytest.raises(ValueError, match="it lacks labels"):
        read_codes(path)


def test_a_description_that_is_none_is_refused(encoded, tmp_path):
    path = tmp_path / "codes"
    write_codes(path, encoded)
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert sorted(metadata) == ["checksum", "rqgen-codes"]
    description = json.loads(metadata["rqgen-codes"])
    assert description["format_version"] == 3
    for change, words in (
        ({"format_version": 4}, "expected format_version 3, got 4"),
        ({"format_version": None}, "expected format_version 3, got None"),
        ({"codebook_size": "9"}, "codebook_size: expected an integer, got '9'"),
        ({"codebook_size": 9.0}, "codebook_size: expected an integer, got 9.0"),
        ({"codebook_size": True}, "codebook_size: expected an integer, got True"),
        ({"codebook_id": 7}, "codebook_id: expected a text, got 7"),
        ({"class_names": "xyz"}, "class_names: expected a list of names, got 'xyz'"),
        ({"class_names": ["x", "y", 3]}, "class_names: expected texts that differ"),
        ({"class_names": ["x", "y", "x"]}, "class_names: expected texts that differ"),
        ({"class_names": ["x", "y"]}, r"labels: expected -1 <= label < 2, got -1\.\.2"),
        ({"info": []}, r"info: expected a mapping, got \[\]"),
        ({"code_shape": [2, 3, 5]}, "code_shape"),
        ({"code_shape": None}, "code_shape"),
    ):
        save_file(tensors, path, {"rqgen-codes": json.dumps(description | change)})
        with pytest.raises(ValueError, match=f"{path.name}: .*{words}"):
            read_codes(path)
    for text, words in (("{", "not valid JSON"), ("[1]", "expected a JSON object"), ("[" * 100_000, "not valid JSON")):
        save_file(tensors, path, {"rqgen-codes": text})
        with pytest.raises(ValueError, match=f"{path.name}: rqgen-codes: {words}"):
            read_codes(path)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_tensors_of_other_kinds_in_a_file(tmp_path, version):
    path = tmp_path / "codes"
    write_codes(path, EncodedImages(draw(5, 2, 3, 4), LABELS, 9, "abc", ("x", "y", "z"), {}))
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = {"rqgen-codes": file.metadata()["rqgen-codes"]}
    if version < 3:
        description = json.loads(metadata["rqgen-codes"])
        metadata = {
            name: entry if isinstance(entry, str) else json.dumps(entry) for name, entry in description.items()
        } | {"format": "rqgen-codes", "format_version": str(version)}
    if version == 1:
        tensors["codes"] = tensors["codes"].unflatten(1, (2, 3, 4))
    for name, dtype in (
        *(("codes", torch.float32), ("codes", torch.float16), ("codes", torch.bool)),
        *(("labels", torch.float32), ("labels", torch.float64), ("labels", torch.bool)),
    ):
        save_file({**tensors, name: tensors[name].to(dtype)}, path, metadata)
        with pytest.raises(ValueError, match=f"codes: {name}: expected integers .*, got {dtype}"):
            read_codes(path)
    for name, dtype in (
        ("codes", torch.uint8),
        ("codes", torch.uint16),
        ("codes", torch.int64),
        ("labels", torch.int8),
    ):
        save_file({**tensors, name: tensors[name].to(dtype)}, path, metadata)
        back = read_codes(path)
        assert same(back.codes, draw(5, 2, 3, 4)) and same(back.labels, LABELS)
    save_file({**tensors, "labels": LABELS - 1}, path, metadata)
    with pytest.raises(ValueError, match=r"labels: expected -1 <= label < 3, got -2\.\.1"):
        read_codes(path)


@pytest.mark.parametrize("name", ["codes.npz", "codes.npy", "codes.pt", "codes.json", "codes.safetensors.txt", "a.png"])
def test_a_name_that_says_another_format_is_refused(encoded, tmp_path, name):
    with pytest.raises(ValueError, match=rf"path: codes are written as safetensors: .*{name}"):
        write_codes(tmp_path / name, encoded)
    assert not list(tmp_path.iterdir())
    write_codes(tmp_path / "CODES.SAFETENSORS", encoded)


def test_bad_codes():
    labels = torch.zeros(1, dtype=torch.int64)
    for codes in (torch.tensor([[[[0, 3]]]]), [torch.tensor([[[0]]]), torch.tensor([[[0, 3]]])]):
        with pytest.raises(ValueError, match=r"codes: expected 0 <= code < 3, got 0\.\.3"):
            EncodedImages(codes, labels, 3, "", (), {})
    with pytest.raises(ValueError, match=r"codes: expected integers \(N, h, w, D\)"):
        EncodedImages(torch.zeros(1, 1, 1, 1), labels, 3, "", (), {})
    with pytest.raises(ValueError, match=r"codes: expected integers \(N, h_k, w_k\) each, got torch.int64 \(1, 4\)"):
        EncodedImages([torch.zeros(1, 4, dtype=torch.int64)], labels, 3, "", (), {})
    with pytest.raises(ValueError, match="at least one token map"):
        EncodedImages([], labels, 3, "", (), {})
    for codes in (
        torch.zeros(2, 1, 1, 1, dtype=torch.int64),
        [torch.zeros(n, 1, 1, dtype=torch.int64) for n in (1, 2)],
    ):
        with pytest.raises(ValueError, match=r"labels: expected shape \(2,\), got \(1,\)"):
            EncodedImages(codes, labels, 3, "", (), {})


def test_codes_and_labels_are_whole_numbers_of_any_width():
    codes, labels = torch.tensor([[[[0, 2]]]]), torch.tensor([1])
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64):
        encoded = EncodedImages(codes.to(dtype), labels.to(dtype), 3, "", ("a", "b"), {})
        assert same(encoded.codes, codes) and same(encoded.labels, labels)
        maps = EncodedImages([codes[..., 1].to(dtype)], labels.to(dtype), 3, "", (), {})
        assert same(maps.codes, [codes[..., 1]]) and same(maps.labels, labels)
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=f"codes: expected integers .*, got {dtype}"):
            EncodedImages(codes.to(dtype), labels, 3, "", (), {})
        with pytest.raises(ValueError, match=rf"labels: expected integers \(N,\), got {dtype}"):
            EncodedImages(codes, labels.to(dtype), 3, "", (), {})
        with pytest.raises(ValueError, match=rf"labels: expected integers \(N,\), got {dtype}"):
            TensorItems(codes, labels.to(dtype))
    for wrong, words in ((2, r"-1 <= label < 2, got 2\.\.2"), (-2, r"-1 <= label < 2, got -2\.\.-2")):
        with pytest.raises(ValueError, match=f"labels: expected {words}"):
            EncodedImages(codes, torch.tensor([wrong]), 3, "", ("a", "b"), {})
    with pytest.raises(ValueError, match=r"labels: expected -1 <= label, got -2\.\.-2"):
        TensorItems(codes, torch.tensor([-2]))
    with pytest.raises(ValueError, match=r"labels: expected integers .*, got list"):
        EncodedImages(codes, [0], 3, "", (), {})
    for names in (("a", "a"), ("a", 3)):
        with pytest.raises(ValueError, match="class_names: expected texts that differ"):
            EncodedImages(codes, labels, 3, "", names, {})


def test_flat_codes_come_back(encoded):
    flat = encoded.layout.flatten(encoded.codes)
    assert flat.shape == (5, 24 if encoded.layout.kind == "stacks" else 9)
    assert same(encoded.layout.unflatten(flat), encoded.codes)


def test_codes_of_another_tokenizer(encoded):
    encoded.check_tokenizer(encoded.layout, "abc")
    with pytest.raises(ValueError, match="written by another tokenizer"):
        encoded.check_tokenizer(encoded.layout, "abd")
    got = "2x3x4 codes" if encoded.layout.kind == "stacks" else "token maps of 1x1, 1x2, 2x3"
    with pytest.raises(ValueError, match=f"codes: expected 2x3x5 codes, as the tokenizer has, got {got}"):
        encoded.check_tokenizer(CodeLayout.stacks([2, 3, 5], 9), "abc")
    with pytest.raises(ValueError, match=f"codes: expected token maps of 1x1, 2x3, as the tokenizer has, got {got}"):
        encoded.check_tokenizer(CodeLayout.maps([[1, 1], [2, 3]], 9), "abc")


def test_fingerprint_follows_values_and_shape():
    codebook = torch.arange(6.0).reshape(2, 3)
    assert code_fingerprint(codebook) == code_fingerprint(codebook.double())
    assert code_fingerprint(codebook) != code_fingerprint(codebook.reshape(3, 2))
    assert code_fingerprint(codebook) != code_fingerprint(codebook + 1)
    # Of one tensor as in the first version of the format.
    assert code_fingerprint(codebook) == "9c85d54b302647ae"


def test_fingerprint_of_token_maps_covers_what_refines_them():
    torch.manual_seed(0)
    quantizer = MultiScaleQuantizer(MultiScaleConfig(codebook_size=4, scales=[1, 2], refinements=2), 3)

    def fingerprint():
        return code_fingerprint(*quantizer.code_tensors())

    seen = [fingerprint()]
    with torch.no_grad():
        for tensor in (quantizer.codebook, quantizer.refinements[1].weight, quantizer.refinements[0].bias):
            tensor.view(-1)[0] += 1
            seen.append(fingerprint())
    quantizer.config.refinement_ratio = 0.25
    seen.append(fingerprint())
    assert len(set(seen)) == 5
    # How codes were found does not change what they stand for.
    quantizer.usage.reset()
    quantizer.initialized.fill_(True)
    quantizer.config.normalize = True
    assert fingerprint() == seen[-1]


def test_foreign_files_are_named(tmp_path):
    path = tmp_path / "codes"
    for content, kind in ((b"", "an empty file"), (b"<!doctype html><html></html>", "an HTML page")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"codes: not a readable safetensors file: it is {kind}"):
            read_codes(path)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("codebook_size", None, TypeError, "codebook_size: expected an integer, got None"),
        ("codebook_size", 9.0, TypeError, "codebook_size: expected an integer, got 9.0"),
        ("codebook_size", True, TypeError, "codebook_size: expected an integer, got True"),
        ("codebook_size", 0, ValueError, r"codebook_size: expected an integer in \[1, "),
        ("codebook_id", 3, TypeError, "codebook_id: expected text, got 3"),
        ("info", None, TypeError, "info: expected a mapping, got None"),
        ("info", {"a": torch.zeros(1)}, TypeError, "info: expected what JSON holds, got "),
        ("info", {"a": float("nan")}, TypeError, "info: expected what JSON holds, got "),
    ],
)
def test_what_could_not_be_read_back_is_not_written(encoded, tmp_path, name, value, error, words):
    settings = {**vars(encoded), name: value}
    with pytest.raises(error, match=f"^{words}"):
        EncodedImages(**settings)
    setattr(encoded, name, value)
    with pytest.raises(error, match=f"^{words}"):
        write_codes(tmp_path / "codes", encoded)
    assert list(tmp_path.iterdir()) == []


def test_paths_may_be_text(encoded, tmp_path):
    path = str(tmp_path / "codes.safetensors")
    write_codes(path, encoded)
    assert read_codes(path).codebook_id == encoded.codebook_id
    with pytest.raises(ValueError, match=r"expected a name that ends in \.safetensors"):
        write_codes(str(tmp_path / "codes.npz"), encoded)
    with pytest.raises(FileNotFoundError, match="codes: no file "):
        read_codes(str(tmp_path / "none"))
