"""`rqgen encode`: images to codes on disk."""

from __future__ import annotations

from typing import get_args

from rich.console import Console

from rqgen.config import one_of, to_dict
from rqgen.data import EncodedImages, Split, open_dataset, write_codes
from rqgen.data.codes import check_codes_name, is_codes_file
from rqgen.training import encode_dataset

from .models import Loaded, check_images_fit, load_tokenizer
from .outputs import output_file
from .requests import EncodeRequest
from .settings import find_config, load_encoding


def encode_images(request: EncodeRequest) -> EncodedImages:
    """Encode every image of a split and write the codes. The settings are those of a `DataConfig`, see
    `load_encoding`."""
    split = _split(request.split)
    check_codes_name(request.out, "--out")
    config = find_config(request.config)
    with output_file(request.out, "--out", is_codes_file):
        vae = load_tokenizer(request.tokenizer)
        data = load_encoding(Loaded(vae, request.tokenizer), config, request.overrides)
        check_images_fit(data, vae.config, prefix="")
        images, console = open_dataset(data, split), Console(stderr=True)
        codes, labels = encode_dataset(vae, images, batch_size=request.batch_size, codes=True, console=console)
        info = {"tokenizer": str(request.tokenizer), "split": split, "data": to_dict(data)}
        encoded = EncodedImages(
            codes=codes,
            labels=labels,
            codebook_size=vae.codebook_size,
            codebook_id=vae.fingerprint(),
            class_names=images.class_names,
            info=info,
        )
        write_codes(request.out, encoded)
        return encoded


def _split(name: str) -> Split:
    splits: dict[str, Split] = {split: split for split in get_args(Split)}
    if name not in splits:
        raise ValueError(f"split: {one_of(splits, name)}")
    return splits[name]
