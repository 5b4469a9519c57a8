#!/usr/bin/env bash
# jax 0.10.2 with torch 2.13.0: an int64 tensor taken by DLPack loses its upper half without a word.
#
# Guess: an int64 array that shares memory, or a refusal, since JAX is in 32-bit mode (its default) and DLPack does not convert.
# Seen: an int32 copy whose values wrapped modulo 2**32, with no warning, though a Python int of that size is an error.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 jax==0.10.2 jaxlib==0.10.2
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import jax
import jax.numpy as jnp
import torch

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    ids = jnp.from_dlpack(torch.tensor([2**33 + 5, 7]))
print(f"jax {jax.__version__}, torch {torch.__version__}: [2**33 + 5, 7] became {ids.tolist()} of {ids.dtype}, {len(said)} warnings")
try:
    jnp.asarray(2**33 + 5)
except OverflowError as error:
    print(f"the same as a Python int: OverflowError, {error}")
else:
    raise AssertionError("the behaviour changed")
assert ids.dtype == jnp.int32 and ids.tolist() == [5, 7] and not said, "the behaviour changed"
PYTHON
