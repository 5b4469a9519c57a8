#!/usr/bin/env bash
# torch 2.13.0: torch.load does not compare the CRC-32 of the records of a file, which torch.save writes.
#
# Guess: one flipped bit in a weight ends in an error, as in every reader of zip files; Python's own zipfile finds it.
# Seen: the file loads, mapped into memory or not, and weight 7 is 28.0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import zipfile

import torch

torch.save({"weight": torch.arange(1024, dtype=torch.float32)}, "weights.pt")
content = bytearray(open("weights.pt", "rb").read())
place = content.find(torch.tensor([7.0, 8.0]).numpy().tobytes())
content[place + 3] ^= 1
open("damaged.pt", "wb").write(content)
bad = zipfile.ZipFile("damaged.pt").testzip()
loaded = [torch.load("damaged.pt", weights_only=True, mmap=mapped)["weight"][7].item() for mapped in (False, True)]
print(f"torch {torch.__version__}; zipfile finds a bad CRC in {bad}; torch.load gives {loaded} in place of 7.0")
assert bad == "weights/data/0" and loaded == [28.0, 28.0], "the behaviour changed"
PYTHON
