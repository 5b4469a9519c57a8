#!/usr/bin/env bash
# torch 2.13.0, CPU: the output of a dynamically quantized Linear for a row depends on the other rows.
#
# Guess: activations are scaled row by row, as weights are channel by channel: a row's output is its own.
# Seen: one scale serves the whole batch. Beside a row 50 times as large the error of a row grows about 60-fold.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import torch

warnings.simplefilter("ignore")
torch.manual_seed(0)
plain = torch.nn.Sequential(torch.nn.Linear(64, 64))
quantized = torch.ao.quantization.quantize_dynamic(plain, {torch.nn.Linear}, dtype=torch.qint8)
rows = torch.randn(2, 64)
rows[1] *= 50
with torch.no_grad():
    exact = plain(rows[:1])
    alone, beside = quantized(rows[:1]), quantized(rows)[:1]
errors = [(output - exact).abs().max().item() for output in (alone, beside)]
print(f"torch {torch.__version__}: largest output {exact.abs().max():.2f}; error alone {errors[0]:.4f}, beside {errors[1]:.4f}")
assert errors[0] < 0.03 and errors[1] > 20 * errors[0], "the behaviour changed"
PYTHON
