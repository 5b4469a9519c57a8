#!/usr/bin/env bash
# Pillow 13.0.0 with a file of tifffile 2025.5.10: a 16-bit colour TIFF stored plane by plane has scrambled pixels.
#
# Guess: the upper byte of each value, as for the same picture stored pixel by pixel, or a refusal.
# Seen: each plane of 16-bit numbers is read as a plane of bytes: low and high bytes of the left half alternate over the
# whole width. No error, and the mode is RGB either way.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 tifffile==2025.5.10 numpy==2.2.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import PIL
import tifffile
from PIL import Image

planes = (np.arange(60).reshape(3, 4, 5) * 1000).astype(np.uint16)
tifffile.imwrite("planes.tif", planes, photometric="rgb", planarconfig="separate")
tifffile.imwrite("pixels.tif", planes.transpose(1, 2, 0), photometric="rgb", planarconfig="contig")
read = {name: np.asarray(Image.open(f"{name}.tif")) for name in ("planes", "pixels")}
first_row = planes[0, 0]
print(f"Pillow {PIL.__version__}, tifffile {tifffile.__version__}: red of the first row is {first_row.tolist()}")
for name, array in read.items():
    print(f"{name}: {array.dtype} {array[0, :, 0].tolist()}")
assert np.array_equal(read["pixels"], planes.transpose(1, 2, 0) >> 8), "the behaviour changed"
assert np.array_equal(read["planes"][0, :, 0], first_row.view(np.uint8)[:5]), "the behaviour changed"
PYTHON
