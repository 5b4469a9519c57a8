#!/usr/bin/env bash
# h5py 3.16.0 and zarr 3.1.6: the same codes written into a uint8 data set of each come back as different numbers.
#
# Guess: both refuse -1 and 300 in unsigned bytes, or both do what NumPy's astype does.
# Seen: h5py takes the nearest number that fits, zarr wraps, and neither says a word. A mark of -1 for "no code" becomes
# code 0 in the one and 255 in the other.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check h5py==3.16.0 zarr==3.1.6 numpy==2.2.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import h5py
import numpy as np
import zarr

codes = np.array([7, -1, 300])
with h5py.File("codes.h5", "w") as file:
    stored = file.create_dataset("codes", (3,), dtype="u1")
    stored[:] = codes
    by_h5py = stored[:].tolist()
array = zarr.create_array(store="codes.zarr", shape=(3,), chunks=(3,), dtype="u1")
array[:] = codes
by_zarr = array[:].tolist()
print(f"{codes.tolist()} by h5py {h5py.__version__}: {by_h5py}, by zarr {zarr.__version__}: {by_zarr}")
assert by_h5py == [7, 0, 255] and by_zarr == [7, 255, 44], "the behaviour changed"
PYTHON
