#!/usr/bin/env bash
# torch 2.13.0: a tensor with the negative bit goes through DLPack with the wrong sign.
#
# The imaginary part of a conjugate is a view that torch negates when it is read (`is_neg()`).
# Guess: exporting it fails as it does for a conjugate, or exports resolved values; `.numpy()` of it is an error.
# Seen: NumPy and torch itself receive the numbers before negation, without an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
import torch

spectrum = torch.fft.rfft(torch.arange(4.0))
view = spectrum.conj().imag
received = np.from_dlpack(view)
again = torch.from_dlpack(view)
print(f"torch {torch.__version__}: {view.tolist()} arrives in NumPy as {received.tolist()}, in torch as {again.tolist()}")
try:
    np.from_dlpack(spectrum.conj())
except BufferError as error:
    print(f"a conjugate: BufferError, {error}")
else:
    raise AssertionError("the behaviour changed")
try:
    view.numpy()
except RuntimeError as error:
    print(f"numpy(): RuntimeError, {error}")
else:
    raise AssertionError("the behaviour changed")
assert view.tolist() == [0.0, -2.0, 0.0], "the behaviour changed"
assert received.tolist() == again.tolist() == [0.0, 2.0, 0.0], "the behaviour changed"
PYTHON
