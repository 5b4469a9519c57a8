#!/usr/bin/env bash
# Pillow 13.0.0: an uncompressed TIFF with orientation 6 has scrambled pixels where it is opened by its path.
#
# Guess: Image.open(path) and Image.open(file object) give the same pixels.
# Seen: by its path the file is mapped into memory with the size that the image has after rotation, and not rotated:
# rows of 6 pixels are cut into rows of 4. By a file object it is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0 numpy==2.2.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import io

import numpy as np
import PIL
from PIL import Image

stored = np.arange(24, dtype=np.uint8).reshape(4, 6)
exif = Image.Exif()
exif[0x0112] = 6  # a viewer turns it by 90 degrees, clockwise
Image.fromarray(stored).save("turned.tif", exif=exif)
upright = np.rot90(stored, -1)
by_path = Image.open("turned.tif")
by_path.load()
by_object = Image.open(io.BytesIO(open("turned.tif", "rb").read()))
by_object.load()
print(f"Pillow {PIL.__version__}: by path\n{np.asarray(by_path)}\nby file object\n{np.asarray(by_object)}")
assert np.array_equal(np.asarray(by_object), upright), "the behaviour changed"
assert not np.array_equal(np.asarray(by_path), upright), "the behaviour changed"
PYTHON
