#!/usr/bin/env bash
# torch 2.13.0: an operator of torch.library.custom_op with register_autograd has zero tangents in forward mode.
#
# Guess: the derivative 6 of x^2 at 3, or an error that forward mode is not supported, as autograd.Function raises one.
# Seen: torch.func.jvp gives 0, forward_ad gives no tangent; backward is right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 numpy==2.2.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torch import Tensor
from torch.autograd import forward_ad


@torch.library.custom_op("finding::square", mutates_args=())
def square(x: Tensor) -> Tensor:
    return x * x


square.register_autograd(
    lambda ctx, grad: 2 * grad * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)
x = torch.tensor(3.0)
_, tangent = torch.func.jvp(square, (x,), (torch.tensor(1.0),))
with forward_ad.dual_level():
    dual = forward_ad.unpack_dual(square(forward_ad.make_dual(x, torch.tensor(1.0)))).tangent
(gradient,) = torch.autograd.grad(square(x.requires_grad_()), x)
print(f"torch {torch.__version__}: jvp {tangent.item()}, forward_ad {dual}, backward {gradient.item()}")
assert tangent.item() == 0 and dual is None and gradient.item() == 6, "the behaviour changed"
PYTHON
