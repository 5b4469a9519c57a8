#!/usr/bin/env bash
# accelerate 1.15.0 with torch 2.13.0: Accelerator(mixed_precision="fp16", cpu=True) computes in float32.
#
# Guess: float16 by autocast, which torch has on a CPU, or an error. bf16 on the same CPU does what it says.
# Seen: no autocast, no scaler, no warning; the accelerator still says that its precision is fp16.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6 accelerate==1.15.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import accelerate
import torch

with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    accelerator = accelerate.Accelerator(mixed_precision="fp16", cpu=True)
    model = accelerator.prepare(torch.nn.Linear(4, 4))
    seen = []
    hook = lambda module, inputs, output: seen.append((output.dtype, torch.is_autocast_enabled("cpu")))
    model.register_forward_hook(hook)
    model(torch.ones(1, 4))
    with accelerator.autocast():
        model(torch.ones(1, 4))
with torch.autocast("cpu", torch.float16):
    torchs = torch.nn.Linear(4, 4)(torch.ones(1, 4)).dtype
print(f"accelerate {accelerate.__version__}: precision {accelerator.mixed_precision}, scaler {accelerator.scaler}, {seen}")
print(f"torch {torch.__version__} by itself: {torchs}; warnings about fp16: {[str(w.message) for w in said if 'fp16' in str(w.message)]}")
assert accelerator.mixed_precision == "fp16" and accelerator.scaler is None, "the behaviour changed"
assert seen == [(torch.float32, False)] * 2 and torchs == torch.float16, "the behaviour changed"
assert not any("fp16" in str(w.message) for w in said), "the behaviour changed"
PYTHON
