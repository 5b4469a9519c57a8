#!/usr/bin/env bash
# safetensors 0.8.0: writing the same tensors with the same metadata again gives another file.
#
# Guess: the same bytes, and the mode of the file that is replaced or what the umask says: 0644.
# Seen: several entries of metadata come in random order within one process, and the file has mode 0600.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.2.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import hashlib
import os
import stat

import numpy as np
import safetensors
from safetensors.numpy import save_file

os.umask(0o022)
digests = set()
open("a.safetensors", "wb").close()
before = stat.S_IMODE(os.stat("a.safetensors").st_mode)
for _ in range(20):
    save_file({"a": np.zeros(2, np.float32)}, "a.safetensors", {name: name for name in "abcdefgh"})
    digests.add(hashlib.sha256(open("a.safetensors", "rb").read()).hexdigest())
after = stat.S_IMODE(os.stat("a.safetensors").st_mode)
print(f"safetensors {safetensors.__version__}: {len(digests)} different files of 20, mode {before:o} became {after:o}")
assert len(digests) > 1 and (before, after) == (0o644, 0o600), "the behaviour changed"
PYTHON
