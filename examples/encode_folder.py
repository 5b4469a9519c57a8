"""Encode a folder of images with a trained tokenizer and look at the codes.

make demo
python examples/encode_folder.py runs/demo/tokenizer photos/ --out coarse_to_fine.png
"""

import argparse
from pathlib import Path

import torch

import rqgen
from rqgen.data import image_grid, read_image, save_image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Encode a folder of images and look at the codes.")
    parser.add_argument("tokenizer", type=Path, help="folder of a trained RQ-VAE")
    parser.add_argument("folder", type=Path, help="folder of images")
    parser.add_argument("--out", type=Path, default=Path("coarse_to_fine.png"), help="image to write")
    args = parser.parse_args(arguments)

    vae = rqgen.RQVAE.from_pretrained(args.tokenizer)
    paths = sorted(path for path in args.folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"folder: expected images, found none in {args.folder}")
    size = vae.image_shape
    pictures = [read_image(path, channels=vae.image_channels)[None] for path in paths]
    images = torch.cat([torch.nn.functional.interpolate(p, size, mode="bilinear", antialias=True) for p in pictures])

    codes = vae.encode(images)  # (N, h, w, D)
    for path, code in zip(paths, codes, strict=True):
        print(f"{path.name}: codes of the top left position {code[0, 0].tolist()}")
    for depth in range(codes.shape[-1]):
        used = len(codes[..., depth].unique())
        error = (vae.decode_partial(codes, depth + 1) - images).square().mean()
        print(f"depth {depth + 1}: {used} codes used, mean squared error {error:.4f} with the codes up to here")
    rows = [images, *(vae.decode_partial(codes, depth + 1) for depth in range(codes.shape[-1]))]
    save_image(image_grid(torch.cat([row[:10] for row in rows]), columns=min(10, len(images))), args.out)


if __name__ == "__main__":
    main()
