"""`rqgen convert`."""

import lzma
from pathlib import Path

import pytest
import torch

from rqgen.models.rqtransformer import RQTransformer
from rqgen.models.rqvae import RQVAE

PUBLISHED = Path(__file__).parents[2] / "data" / "kakaobrain"


@pytest.fixture
def published(tmp_path):
    """A published checkpoint as it would lie on disk."""

    def unpack(name):
        folder = tmp_path / name
        folder.mkdir()
        for file in (PUBLISHED / name).iterdir():
            data = file.read_bytes()
            (folder / file.name.removesuffix(".xz")).write_bytes(
                lzma.decompress(data) if file.suffix == ".xz" else data
            )
        return folder / "model.pt"

    return unpack


def test_convert_writes_models_that_load(rqgen, published, tmp_path):
    source = published("rqvae-shared-8x8x4")
    code, out, err = rqgen("convert", "kakaobrain", source, tmp_path / "vae")
    assert code == 0, err
    assert out.startswith("rqvae: ")
    vae = RQVAE.from_pretrained(tmp_path / "vae")
    prior = published("rqtransformer-class")
    for number, tokenizer in enumerate((source, source.parent, tmp_path / "vae")):
        out = tmp_path / f"prior{number}"
        code, _, err = rqgen("convert", "kakaobrain", prior, out, "--tokenizer", tokenizer)
        assert code == 0, err
        assert torch.equal(RQTransformer.from_pretrained(out).codebooks, vae.codebooks)


def test_a_missing_file_is_named_by_its_argument(rqgen, published, tmp_path):
    prior = published("rqtransformer-class")
    (tmp_path / "empty").mkdir()
    for arguments, words in (
        ([tmp_path / "model.pt"], f"error: SRC: no file {tmp_path / 'model.pt'}\n"),
        ([tmp_path / "empty"], f"error: SRC: no file {tmp_path / 'empty' / 'model.pt'}\n"),
        ([prior, "--tokenizer", tmp_path / "no.pt"], f"error: --tokenizer: no file {tmp_path / 'no.pt'}\n"),
        (
            [prior, "--tokenizer", tmp_path / "empty"],
            f"error: --tokenizer: no file {tmp_path / 'empty' / 'model.pt'}\n",
        ),
    ):
        source, *options = arguments
        code, _, err = rqgen("convert", "kakaobrain", source, tmp_path / "out", *options)
        assert code == 1 and err == words
    assert not (tmp_path / "out").exists()


def test_convert_mistakes(rqgen, tmp_path):
    (tmp_path / "model.pt").write_text("<!doctype html><html>Sign in to download</html>")
    code, _, err = rqgen("convert", "kakaobrain", tmp_path / "model.pt", tmp_path / "out")
    page = f"{tmp_path / 'model.pt'}: not a readable torch checkpoint: it is an HTML page"
    assert code == 1 and err == f"error: {page}\n"
    assert not (tmp_path / "out").exists()
