"""Codes on disk."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from rqgen.data import EncodedImages, read_codes, write_codes
from rqgen.data.codes import codebook_fingerprint


@pytest.fixture
def encoded():
    codes = torch.randint(0, 9, (5, 2, 3, 4), generator=torch.Generator().manual_seed(0))
    return EncodedImages(codes, torch.tensor([0, 1, 2, -1, 1]), 9, "abc", ("x", "y", "z"), {"split": "train"})


def test_round_trip(encoded, tmp_path):
    path = tmp_path / "deep" / "codes.safetensors"
    write_codes(path, encoded)
    back = read_codes(path)
    assert torch.equal(back.codes_nhwd, encoded.codes_nhwd) and back.codes_nhwd.dtype == torch.int64
    assert torch.equal(back.labels, encoded.labels)
    assert (back.codebook_size, back.codebook_id) == (9, "abc")
    assert back.class_names == ("x", "y", "z") and back.info == {"split": "train"}
    assert [entry.name for entry in path.parent.iterdir()] == ["codes.safetensors"]
    assert load_file(path)["codes"].dtype == torch.int32


def test_bad_files(encoded, tmp_path):
    with pytest.raises(FileNotFoundError, match="codes file not found"):
        read_codes(tmp_path / "nowhere")
    broken = tmp_path / "broken"
    broken.write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        read_codes(broken)
    save_file({"codes": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="not a file of codes"):
        read_codes(tmp_path / "other")
    save_file({"codes": torch.zeros(1)}, tmp_path / "newer", {"format": "rqgen-codes", "format_version": "9"})
    with pytest.raises(ValueError, match="expected format_version 1, got 9"):
        read_codes(tmp_path / "newer")


def test_bad_codes():
    labels = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"codes: expected 0 <= code < 3, got 0\.\.3"):
        EncodedImages(torch.tensor([[[[0, 3]]]]), labels, 3, "", (), {})
    with pytest.raises(ValueError, match="codes: expected integers"):
        EncodedImages(torch.zeros(1, 1, 1, 1), labels, 3, "", (), {})
    with pytest.raises(ValueError, match="labels"):
        EncodedImages(torch.zeros(2, 1, 1, 1, dtype=torch.int64), labels, 3, "", (), {})


def test_fingerprint_follows_values_and_shape():
    codebook = torch.arange(6.0).reshape(2, 3)
    assert codebook_fingerprint(codebook) == codebook_fingerprint(codebook.double())
    assert codebook_fingerprint(codebook) != codebook_fingerprint(codebook.reshape(3, 2))
    assert codebook_fingerprint(codebook) != codebook_fingerprint(codebook + 1)
