#!/usr/bin/env bash
# torch 2.13.0 with NumPy 2.2.6: a read-only array taken by torch.from_dlpack can be written, without a warning.
#
# Guess: an error, since NumPy marks the exported memory as read-only, or the warning that torch.from_numpy gives.
# Seen: neither, and writing into the tensor changes the array.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import numpy as np
import torch

array = np.zeros(3, np.float32)
array.flags.writeable = False
with warnings.catch_warnings(record=True) as by_dlpack:
    warnings.simplefilter("always")
    torch.from_dlpack(array).add_(1)
with warnings.catch_warnings(record=True) as by_numpy:
    warnings.simplefilter("always")
    torch.from_numpy(array)
print(f"torch {torch.__version__}, NumPy {np.__version__}: writeable {array.flags.writeable}, now {array.tolist()}")
print(f"warnings: {len(by_dlpack)} of from_dlpack, {len(by_numpy)} of from_numpy")
assert array.tolist() == [1.0] * 3 and not by_dlpack and len(by_numpy) == 1, "the behaviour changed"
PYTHON
