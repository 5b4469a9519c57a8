"""Soft labels from distances, and the cross-entropies that never materialise them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._arguments import FLOAT_DTYPES, check_flag, check_positive
from .._library import call, check_tensor
from ..reference.soft_label import (
    check_inplace,
    check_labels,
    check_linear,
    check_linear_dtypes,
    check_logits,
    check_loss,
    check_losses_out,
    check_mask,
)

_SOFTMAX, _LOSS, _FUSED = (
    "distance_softmax",
    "soft_label_cross_entropy",
    "fused_linear_soft_label_cross_entropy",
)
# Bytes of logits that the fused linear holds at a time.
_LOGITS_BUDGET = 32 << 20
# A float16 gradient waits for backward times this: most of its entries are far below 1/K, where float16 has no digits.
_FLOAT16_SCALE = 4096.0


def _check_call(op: str, x: object, codebook: object, tau: object) -> float:
    check_tensor(op, "x", x, FLOAT_DTYPES)
    check_tensor(op, "codebook", codebook, FLOAT_DTYPES)
    return check_positive(op, "tau", tau)


def _weight(op: str, x: Tensor, mask: Tensor | None, reduction: str) -> Tensor | None:
    """What the sum of all losses is multiplied by: None for 1. One over no rows is infinite, and their mean NaN."""
    if reduction != "mean":
        return None
    rows = torch.full((), x.shape[:-1].numel(), device=x.device) if mask is None else call(op, mask.sum)
    return rows.float().reciprocal()


def _reduced(losses: Tensor, weight: Tensor | None) -> Tensor:
    total = losses.sum(dtype=torch.float64)
    return (total if weight is None else total * weight).float()


def _gradient_scale(dtype: torch.dtype) -> float:
    return _FLOAT16_SCALE if dtype == torch.float16 else 1.0


def _is_one(factor: Tensor) -> bool:
    """Whether a factor can be left out: known for numbers in reach alone, not in a graph or on a device."""
    return (
        type(factor) is Tensor
        and factor.dim() == 0
        and factor.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and factor.item() == 1
    )


def distance_softmax(x: Tensor, codebook: Tensor, tau: float) -> Tensor:
    """`Q_tau(k | x) = softmax_k(-|x - e(k)|^2 / tau)`, materialised (Lee et al. 2022, equation 15).

    Naively `torch.softmax(-torch.cdist(x, codebook).square() / tau, -1)`, which loses the digits of small distances;
    here products run in float32 on vectors centred among the codes (on CUDA on tensor cores, each vector in two parts
    of float16, and where those do not reach as squared differences), and where their rounding could be seen in Q, the
    codes that have the most of it get their distances in float64. So with tau -> 0 Q
    tends to the certified code of `residual_search` (shared equally by equal codes). A small Q has the relative error
    of its float32 score, about 1e-7 |x||e| / tau plus 1e-7 times its exponent; below about 1e-38 it is zero.

    Not differentiable: inputs are taken detached. For a loss, `soft_label_cross_entropy` needs no such tensor.

    Args:
        x: (..., C), float32, float16 or bfloat16; taken as float32.
        codebook: (K, C), float32, float16 or bfloat16; or (D, K, C), one per depth of x (..., D, C).
        tau: temperature > 0, in squared units of x.

    Returns:
        (..., K) float32, rows summing to one. NaN for a row of x that is not finite, and on CUDA, where an error would
        have to wait for the device, for every row of a codebook that is not.

    Raises:
        TypeError: a wrong dtype (float64 among them).
        ValueError: shapes that do not fit, an empty codebook or on a CPU one that is not finite, tau not > 0.
    """
    tau = _check_call(_SOFTMAX, x, codebook, tau)
    return call(_SOFTMAX, torch.ops.rqkernels.distance_softmax, x.detach(), codebook.detach(), tau)


@torch.library.register_fake("rqkernels::distance_softmax")
def _fake_softmax(x: Tensor, codebook: Tensor, tau: float) -> Tensor:
    check_labels(_SOFTMAX, x, codebook)
    return x.new_empty((*x.shape[:-1], codebook.shape[-2]), dtype=torch.float32)


def soft_label_cross_entropy(
    logits: Tensor,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    losses_out: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of logits against soft labels that are never materialised (Lee et al. 2022, section 3.2.3).

        loss = logsumexp(logits) - sum_k Q_tau(k|x) logits_k        d loss / d logits = softmax(logits) - Q_tau

    Naively `cross_entropy(logits.flatten(0, -2), distance_softmax(x, codebook, tau).flatten(0, -2))`: distances,
    labels, log-softmax and gradient, each of the size of the logits. Here Q is formed for some rows at a time (see
    `distance_softmax`, also for what happens as tau -> 0), loss and gradient come from one reading of the logits (on
    CUDA one each, with Q formed again), and nothing of their size is made but the gradient that is returned: in the
    forward call, in the dtype of the logits, where a gradient will be asked for. On a CPU a call also holds the
    labels of at most 32 rows, for each thread where there are many rows, else for all together (with K C >= 2^19 a
    twentieth of the logits from about 700 rows on), and a copy of the codebook where it lies off the origin. Sums
    within a row are float32 and beyond 1024 terms float64, over rows float64. A row's loss and gradient do not depend
    on threads or on the other rows.

    Differentiable once, in logits alone. Autocast does not touch it: logits are used in the dtype in which they come.

    Args:
        logits: (..., K), or (..., D, K) where x is (..., D, C); float32, float16 or bfloat16. Strides that no (n, m, K)
            tensor with contiguous K can have cost a copy.
        x: (..., C) or (..., D, C): the residual that each label is for; float32, float16 or bfloat16.
        codebook: (K, C), or (D, K, C): one per depth; any of these dtypes.
        tau: temperature > 0, in squared units of x.
        mask: bool, the shape of logits without K. False rows are not read (they may hold NaN), count nowhere and get a
            gradient of zero.
        reduction: "mean" (over counted rows; NaN where there are none), "sum" or "none" (masked rows 0).
        inplace: where a gradient will be asked for, write it over the logits, which nobody may need afterwards, and
            allocate nothing of their size. Autograd raises where another function has kept these logits for its own
            backward. backward then runs once. Without a gradient to come, logits stay as they are.
        losses_out: float32, the shape of logits without K: is filled with the rows' losses, to be logged beside a
            "mean" whose gradient is written once. No gradient goes through it: that is what reduction="none" is for.

    Returns:
        float32 scalar, or the rows' losses. For a row with
        - a logit of -inf: +inf where its label is above zero, else as if that code were not there;
        - logits of NaN, +inf or nothing but -inf, or x (on CUDA: or the codebook) not finite: NaN, so is the gradient.

    Raises:
        TypeError: a wrong dtype (float64 among them), tau not a number.
        ValueError: shapes that do not fit, an empty codebook or on a CPU one that is not finite, tau not > 0, an
            unknown reduction. With inplace: logits that are a leaf with requires_grad, that share memory with one
            another or have the strides named above, and torch.compile.
        RuntimeError: a second derivative; with inplace, a second backward.
    """
    op = _LOSS
    check_tensor(op, "logits", logits, FLOAT_DTYPES)
    tau = _check_call(op, x, codebook, tau)
    check_loss(op, mask, reduction)
    check_losses_out(op, losses_out, x, logits=logits, codebook=codebook, mask=mask)
    inplace = check_flag(op, "inplace", inplace)
    if mask is not None:  # whose rows are counted before the operator could check anything
        check_labels(op, x, codebook)
        check_logits(op, logits, x, codebook, mask)
    x, codebook = x.detach(), codebook.detach()
    weight, reduce = _weight(op, x, mask, reduction), reduction != "none"
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    if inplace and with_gradient:
        if torch.compiler.is_compiling():
            raise ValueError(f"{op}: inplace cannot be traced by torch.compile, which decides itself what to overwrite")
        check_inplace(op, logits)
    if with_gradient and (inplace or losses_out is not None):
        loss, losses = _GradientInForward.apply(logits, x, codebook, tau, mask, weight, reduce, inplace)
    else:
        # What wants the losses of rows has no gradient to come here, and the reduction is left to do.
        rows_first = reduce and losses_out is not None
        scale = _gradient_scale(logits.dtype)
        losses = call(
            op,
            torch.ops.rqkernels.soft_label_cross_entropy,
            *(logits, x, codebook, tau, mask, weight, reduce and not rows_first, scale, with_gradient),
        )[0]
        loss = _reduced(losses, weight) if rows_first else losses
    if losses_out is not None:
        losses_out.copy_(losses.detach())
    return loss


@torch.library.register_fake("rqkernels::soft_label_cross_entropy")
def _fake_cross_entropy(
    logits: Tensor,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    mask: Tensor | None,
    weight: Tensor | None,
    reduce: bool,
    gradient_scale: float,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    _check_fake_loss(logits, x, codebook, mask)
    loss = logits.new_empty(() if reduce else logits.shape[:-1], dtype=torch.float32)
    return loss, logits.new_empty(logits.shape if with_gradient else (0,))


@torch.library.register_fake("rqkernels::soft_label_cross_entropy_")
def _fake_cross_entropy_(
    logits: Tensor,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    mask: Tensor | None,
    weight: Tensor | None,
    reduce: bool,
    gradient_scale: float,
) -> Tensor:
    _check_fake_loss(logits, x, codebook, mask)
    return logits.new_empty(() if reduce else logits.shape[:-1], dtype=torch.float32)


def _check_fake_loss(logits: Tensor, x: Tensor, codebook: Tensor, mask: Tensor | None) -> None:
    check_labels(_LOSS, x, codebook)
    check_logits(_LOSS, logits, x, codebook, mask)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gradient_scale, with_gradient = inputs[-2:]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # or zeros, as many as logits, would come for it
    ctx.save_for_backward(output[1])
    ctx.gradient_scale, ctx.with_gradient = gradient_scale, with_gradient


def _factor(grad: Tensor, gradient: Tensor, gradient_scale: float) -> Tensor:
    """What the gradient that waited is multiplied by. A scalar stays float32; one for each row takes its dtype."""
    factor = grad / gradient_scale
    return factor if factor.dim() == 0 else factor.unsqueeze(-1).to(gradient.dtype)


def _times(gradient: Tensor, grad: Tensor, gradient_scale: float) -> Tensor:
    factor = _factor(grad, gradient, gradient_scale)
    return gradient if _is_one(factor) else gradient * factor


@once_differentiable
def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    if not ctx.with_gradient:
        raise RuntimeError("soft_label_cross_entropy: backward of a call that was made with with_gradient=False")
    (gradient,) = ctx.saved_tensors
    return _times(gradient, grad, ctx.gradient_scale), *(None,) * 8


torch.library.register_autograd("rqkernels::soft_label_cross_entropy", _backward, setup_context=_setup_context)


class _GradientInForward(torch.autograd.Function):
    """What the operator's own gradient does not offer: the gradient in the memory of the logits, and the losses of rows
    beside their mean or sum."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        x: Tensor,
        codebook: Tensor,
        tau: float,
        mask: Tensor | None,
        weight: Tensor | None,
        reduce: bool,
        inplace: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.inplace, ctx.gradient_scale = inplace, _gradient_scale(logits.dtype)
        arguments = (x, codebook, tau, mask, weight, False, ctx.gradient_scale)
        if inplace:
            ctx.gradient = logits.detach()
            losses = call(_LOSS, torch.ops.rqkernels.soft_label_cross_entropy_, ctx.gradient, *arguments)
            # So that a function that kept the logits for its own backward finds them changed.
            torch.autograd.graph.increment_version(logits)
        else:
            losses, gradient = call(_LOSS, torch.ops.rqkernels.soft_label_cross_entropy, logits, *arguments, True)
            ctx.save_for_backward(gradient)
        ctx.set_materialize_grads(False)
        loss, losses = (_reduced(losses, weight), losses) if reduce else (losses, losses.clone())
        ctx.mark_non_differentiable(losses)
        return loss, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        if not ctx.inplace:
            return _times(ctx.saved_tensors[0], grad, ctx.gradient_scale), *(None,) * 7
        if ctx.gradient is None:
            raise RuntimeError("soft_label_cross_entropy: with inplace=True backward runs once")
        gradient, ctx.gradient = ctx.gradient, None
        factor = _factor(grad, gradient, ctx.gradient_scale)
        return gradient if _is_one(factor) else gradient.mul_(factor), *(None,) * 7


def fused_linear_soft_label_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    *,
    mask: Tensor | None = None,
    reduction: str = "mean",
    losses_out: Tensor | None = None,
) -> Tensor:
    """`soft_label_cross_entropy(linear(hidden, weight, bias), x, codebook, tau)`, without the logits of all rows.

    Rows go through the matmul, the loss and the gradient's matmuls in chunks of at most 32 MiB of logits, which their
    gradient overwrites; gradients of hidden, weight and bias wait for backward, the latter two summed in float32. With
    "none" the rows' factors are not known in time: there backward computes the logits once more.

    Under autocast the matmuls run in its dtype; the loss is float32 arithmetic, as in `soft_label_cross_entropy`.
    Differentiable once, in hidden, weight and bias.

    Args:
        hidden: (..., H), or (..., D, H) where x is (..., D, C); float32, float16 or bfloat16.
        weight: (K, H), and bias (K) or None: the classifier, in the dtype of hidden (any of these under autocast).
        x, codebook, tau, mask, reduction, losses_out: as in `soft_label_cross_entropy`.

    Returns:
        float32 scalar, or the rows' losses; see `soft_label_cross_entropy`.

    Raises:
        As `soft_label_cross_entropy`, and for hidden, weight and bias that do not fit.
    """
    op = _FUSED
    check_tensor(op, "hidden", hidden, FLOAT_DTYPES)
    check_tensor(op, "weight", weight, FLOAT_DTYPES)
    if bias is not None:
        check_tensor(op, "bias", bias, FLOAT_DTYPES)
    tau = _check_call(op, x, codebook, tau)
    check_loss(op, mask, reduction)
    check_losses_out(op, losses_out, x, hidden=hidden, weight=weight, bias=bias, codebook=codebook, mask=mask)
    # Here, for below they come in chunks, to an operator of another name.
    check_labels(op, x, codebook)
    check_linear(op, hidden, weight, bias, x, codebook)
    check_mask(op, "hidden", hidden, x, mask)
    dtype = check_linear_dtypes(op, hidden, weight, bias)
    x, codebook = x.detach(), codebook.detach()
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    row_weight, reduce = _weight(op, x, mask, reduction), reduction != "none"
    total, losses, *_ = call(
        op, _fused_linear, hidden, weight, bias, x, codebook, tau, mask, row_weight, reduce, wanted and reduce, dtype
    )
    if losses_out is not None:
        losses_out.copy_(losses.detach())
    return total if reduce else losses


def _in_chunks(operator: Any, *arguments: object) -> Any:
    """What a chunk's loss has to say is said in the name of the fused one."""
    try:
        return operator(*arguments)
    except ValueError as error:
        raise ValueError(str(error).replace(f"{_LOSS}:", f"{_FUSED}:", 1)) from None


@torch.library.custom_op("rqkernels::fused_linear_soft_label_cross_entropy", mutates_args=())
def _fused_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    mask: Tensor | None,
    row_weight: Tensor | None,
    reduce: bool,
    with_gradient: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    # Rows in groups that must stay together: the depths of one position where each has a codebook.
    together = 1 if codebook.dim() == 2 else codebook.shape[0]
    num_codes = weight.shape[0]
    group = () if codebook.dim() == 2 else (together,)
    h = hidden.reshape(-1, *group, hidden.shape[-1])
    x = x.reshape(-1, *group, x.shape[-1])
    mask = None if mask is None else mask.reshape(-1, *group)
    each_row = row_weight is not None and row_weight.dim() > 0
    if each_row:
        row_weight = row_weight.reshape(-1, *group)
    w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    losses = x.new_empty(x.shape[:-1], dtype=torch.float32)
    grads: tuple[Tensor, ...] = (hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0))
    if with_gradient:
        grad_h = torch.empty_like(h)
        grad_w = torch.zeros_like(weight, dtype=torch.float32)
        grad_b = weight.new_zeros(num_codes, dtype=torch.float32)
    scale = _gradient_scale(dtype)
    step = max(1, _LOGITS_BUDGET // (num_codes * dtype.itemsize * together))
    logits_buffer = h.new_empty((min(step, h.shape[0]) * together, num_codes), dtype=dtype)
    with torch.amp.autocast(hidden.device.type, enabled=False):
        # Once without rows too: a codebook that is not finite is refused whatever comes with it.
        for begin in range(0, max(h.shape[0], 1), step):
            rows = slice(begin, begin + step)
            part = h[rows].to(dtype).reshape(-1, h.shape[-1])
            logits = logits_buffer[: part.shape[0]]
            if b is None:
                torch.mm(part, w.t(), out=logits)
            else:
                torch.addmm(b, part, w.t(), out=logits)
            arguments = (
                logits.view(*x[rows].shape[:-1], num_codes),
                x[rows],
                codebook,
                tau,
                None if mask is None else mask[rows],
                row_weight[rows] if each_row else row_weight,
            )
            if not with_gradient:
                no_weight = (*arguments[:-1], None)
                losses[rows] = _in_chunks(torch.ops.rqkernels.soft_label_cross_entropy, *no_weight, False, 1.0, False)[
                    0
                ]
                continue
            losses[rows] = _in_chunks(torch.ops.rqkernels.soft_label_cross_entropy_, *arguments, False, scale)
            if mask is not None:
                # Times a gradient of zero, NaN would still be NaN.
                part = part.masked_fill(~mask[rows].reshape(-1, 1), 0)
            grad_h[rows] = (logits @ w).view(grad_h[rows].shape) / scale
            if dtype == torch.float32:
                grad_w.addmm_(logits.t(), part)
            else:
                grad_w.add_(logits.t() @ part, alpha=1 / scale)
            grad_b.add_(logits.sum(0, dtype=torch.float32), alpha=1 / scale)
    if with_gradient:
        grads = (grad_h.view(hidden.shape), grad_w.to(weight.dtype), grad_b if bias is None else grad_b.to(bias.dtype))
    total = _reduced(losses, row_weight) if reduce else losses.new_empty(0)
    return total, losses.view(hidden.shape[:-1]), *grads


@_fused_linear.register_fake
def _fake_fused_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    mask: Tensor | None,
    row_weight: Tensor | None,
    reduce: bool,
    with_gradient: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    total = hidden.new_empty(() if reduce else (0,), dtype=torch.float32)
    losses = hidden.new_empty(hidden.shape[:-1], dtype=torch.float32)
    if not with_gradient:
        return total, losses, hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    grad_b = weight.new_empty(weight.shape[0], dtype=torch.float32 if bias is None else bias.dtype)
    return total, losses, hidden.new_empty(hidden.shape), weight.new_empty(weight.shape), grad_b


def _setup_fused(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, x, codebook, tau, mask, _, reduce, _, dtype = inputs
    total, losses, *grads = output
    ctx.mark_non_differentiable(losses if reduce else total, *grads)
    ctx.set_materialize_grads(False)
    ctx.reduce, ctx.tau, ctx.dtype = reduce, tau, dtype
    if reduce:
        ctx.save_for_backward(*grads)
    else:
        ctx.save_for_backward(hidden, weight, bias, x, codebook, mask)


@once_differentiable
def _backward_fused(ctx: Any, grad_total: Tensor, grad_losses: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    if ctx.reduce:
        one = _is_one(grad_total)
        grads = ctx.saved_tensors if one else tuple(saved * grad_total for saved in ctx.saved_tensors)
    else:
        hidden, weight, bias, x, codebook, mask = ctx.saved_tensors
        grads = _fused_linear(
            hidden, weight, bias, x, codebook, ctx.tau, mask, grad_losses.contiguous(), False, True, ctx.dtype
        )[2:]
    needed = (g if wanted else None for g, wanted in zip(grads, ctx.needs_input_grad[:3], strict=True))
    return *needed, *(None,) * 8


_fused_linear.register_autograd(_backward_fused, setup_context=_setup_fused)
