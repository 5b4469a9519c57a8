"""Codes on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from rqgen.data import EncodedImages, read_codes, write_codes
from rqgen.data.codes import code_fingerprint, flatten_codes, unflatten_codes
from rqgen.quantizers import MultiScaleConfig, MultiScaleQuantizer

SCALES = [[1, 1], [1, 2], [2, 3]]
LABELS = torch.tensor([0, 1, 2, -1, 1])


def draw(*shape):
    return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=["stacks", "token maps"])
def encoded(request):
    codes = draw(5, 2, 3, 4) if request.param == "stacks" else [draw(5, h, w) for h, w in SCALES]
    return EncodedImages(codes, LABELS, 9, "abc", ("x", "y", "z"), {"split": "train"})


def same(one, two):
    """Whether codes are equal, in what they are made of too."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    return isinstance(two, list) and len(one) == len(two) and all(map(same, one, two))


def test_round_trip(encoded, tmp_path):
    path = tmp_path / "deep" / "codes.safetensors"
    write_codes(path, encoded)
    back = read_codes(path)
    assert same(back.codes, encoded.codes) and back.code_shape == encoded.code_shape
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
        assert load_file(tmp_path / "codes")["codes"].tolist() == rows == flatten_codes(codes).tolist()


def test_the_first_version_is_read(tmp_path):
    codes = draw(5, 2, 3, 4)
    metadata = {"codebook_size": "9", "codebook_id": "abc", "class_names": '["x"]', "info": "{}"}
    path = tmp_path / "old"
    tensors = {"codes": codes.int(), "labels": LABELS}
    save_file(tensors, path, {"format": "rqgen-codes", "format_version": "1"} | metadata)
    back = read_codes(path)
    assert same(back.codes, codes) and back.code_shape == [2, 3, 4] and back.class_names == ("x",)


def test_bad_files(encoded, tmp_path):
    with pytest.raises(FileNotFoundError, match="codes file not found"):
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
    shape = json.dumps(encoded.code_shape)
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
        ({"code_shape": f"[{tensors['codes'].shape[1]}]"}, "codes: expected integers"),
        ({"code_shape": "[2, -1, 4]"}, r"code_shape: \[2, -1, 4\] does not fit codes \("),
        ({"code_shape": f"[2, 3, {10**40}]"}, r"code_shape: .* does not fit codes \(\d+, \d+\)$"),
        ({"code_shape": "[" * 100_000}, "code_shape: expected JSON of list"),
        ({"codebook_size": "many"}, "codebook_size: expected JSON of int, got 'many'"),
        ({"codebook_size": "true"}, "codebook_size: expected JSON of int, got 'true'"),
        ({"class_names": "7"}, "class_names: expected JSON of list, got '7'"),
        ({"info": "[1]"}, "info: expected JSON of dict"),
    ):
        save_file(tensors, path, metadata | change)
        with pytest.raises(ValueError, match=rf"{path.name}: .*{words}"):
            read_codes(path)
    for missing in ("codebook_id", "code_shape", "info"):
        save_file(tensors, path, {name: value for name, value in metadata.items() if name != missing})
        with pytest.raises(ValueError, match=f"its metadata lacks '{missing}'"):
            read_codes(path)
    save_file({"codes": tensors["codes"]}, path, metadata)
    with pytest.raises(ValueError, match="it holds no tensor 'labels'"):
        read_codes(path)
    for name in tensors:
        save_file({**tensors, name: tensors[name] + 0.5}, path, metadata)
        with pytest.raises(ValueError, match=f"{name}: expected int32 or int64, got float32"):
            read_codes(path)


def test_foreign_files_are_named(tmp_path):
    path = tmp_path / "codes"
    for content, kind in ((b"", "an empty file"), (b"<!doctype html><html></html>", "an HTML page")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"codes: not a readable safetensors file: it is {kind}"):
            read_codes(path)


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


def test_flat_codes_come_back(encoded):
    flat = flatten_codes(encoded.codes)
    assert flat.shape == (5, 24 if encoded.stacked else 9)
    assert same(unflatten_codes(flat, encoded.code_shape), encoded.codes)


def test_codes_of_another_tokenizer(encoded):
    encoded.check_tokenizer(encoded.code_shape, "abc")
    with pytest.raises(ValueError, match="written by another tokenizer"):
        encoded.check_tokenizer(encoded.code_shape, "abd")
    got = "2x3x4 codes" if encoded.stacked else "token maps of 1x1, 1x2, 2x3"
    with pytest.raises(ValueError, match=f"codes: expected 2x3x5 codes, as the tokenizer has, got {got}"):
        encoded.check_tokenizer([2, 3, 5], "abc")
    with pytest.raises(ValueError, match=f"codes: expected token maps of 1x1, 2x3, as the tokenizer has, got {got}"):
        encoded.check_tokenizer([[1, 1], [2, 3]], "abc")


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
