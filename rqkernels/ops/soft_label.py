"""Soft labels from distances, and cross-entropies that never materialise them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from .._arguments import FLOAT_DTYPES, check_flag, check_positive
from .._derivatives import LIBRARY, is_transformed, refuse_second_derivative, register_derivative
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
# Bytes of logits that the fused linear loss holds at a time.
_LOGITS_BUDGET = 32 << 20
# softmax(logits) - Q is in [-1, 1]: scaled by this it does not overflow float16 and keeps all digits down to 2^-29.
_FLOAT16_SCALE = 2.0**15


def _check_call(op: str, x: object, codebook: object, tau: object) -> float:
    check_tensor(op, "x", x, FLOAT_DTYPES)
    check_tensor(op, "codebook", codebook, FLOAT_DTYPES)
    return check_positive(op, "tau", tau)


def _weight(op: str, x: Tensor, mask: Tensor | None, reduction: str) -> Tensor | None:
    """Return the factor of the sum of all losses, None for 1. Without rows it is infinite, and the mean NaN."""
    if reduction != "mean":
        return None
    rows = torch.full((), x.shape[:-1].numel(), device=x.device) if mask is None else call(op, mask.sum)
    return rows.float().reciprocal()


def _reduced(losses: Tensor, weight: Tensor | None) -> Tensor:
    total = losses.sum(dtype=torch.float64)
    return (total if weight is None else total * weight).float()


def _fill(op: str, losses_out: Tensor, losses: Tensor) -> None:
    try:
        losses_out.copy_(losses.detach())
    except RuntimeError as error:
        if not is_transformed([]):
            raise
        raise ValueError(f"{op}: losses_out must be made within the function that torch.func transforms") from error


def _forms_gradient_early(dtype: torch.dtype, reduce: bool) -> bool:
    """True if the forward call may compute the gradient of logits, for backward to multiply by the incoming gradient.

    That factor can have any size, which float16 cannot represent; and with one factor per row all of a bfloat16
    gradient would be rounded twice. In these cases backward computes the gradient, once the factors are known.
    """
    return dtype == torch.float32 or (dtype == torch.bfloat16 and reduce)


def _is_one(factor: Tensor) -> bool:
    """True if a factor is known to be 1. False for one in a graph, on a device, or that may be differentiated."""
    if type(factor) is not Tensor or factor.dim() > 0 or factor.device.type != "cpu":
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    try:
        return factor.item() == 1
    except RuntimeError:  # a batch of factors (is_grads_batched)
        return False


def distance_softmax(x: Tensor, codebook: Tensor, tau: float) -> Tensor:
    """Soft labels `Q_tau(k | x) = softmax_k(-|x - e(k)|^2 / tau)`, materialised (Lee et al. 2022, equation 15).

    Naively `torch.softmax(-torch.cdist(x, codebook).square() / tau, -1)`, which loses the digits of small distances.
    Here products run in float32 on vectors relative to the codebook center (on CUDA on tensor cores, each vector split
    into two float16 parts, or as squared differences if their range is too small). If rounding could be visible in Q,
    the codes with the largest mass get float64 distances. So for tau -> 0 Q tends to the certified code of
    `residual_search` (shared equally by equal codes). A small Q has the relative error of its float32 score, about
    1e-7 |x||e| / tau plus 1e-7 times its exponent; below about 1e-38 it is zero.

    Not differentiable: inputs are detached. The loss, `soft_label_cross_entropy`, needs no such tensor.

    Args:
        x: (..., C), float32, float16 or bfloat16; taken as float32.
        codebook: (K, C), float32, float16 or bfloat16; or (D, K, C), one per depth of x (..., D, C).
        tau: temperature > 0, in squared units of x.

    Returns:
        (..., K) float32, rows summing to one. NaN for a row of x that is not finite. On CUDA, where an error would
        require a host sync, also NaN for all rows if the codebook is not finite.

    Raises:
        TypeError: a wrong dtype (float64 among them).
        ValueError: shapes that do not match, an empty codebook or on a CPU one that is not finite, tau not > 0.
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
    labels, log-softmax and gradient, each of the size of the logits. Here Q is formed for a few rows at a time (see
    `distance_softmax`, also for tau -> 0), and loss and gradient come from one pass over the logits (on CUDA one each,
    with Q recomputed). The only allocation of their size is the returned gradient, in their dtype, if one will be
    needed: in the forward call, or in backward (see below). On a CPU a call also holds the labels of at most 32 rows,
    per thread if there are many rows, else for all threads together (with K C >= 2^19 a twentieth of the logits from
    about 700 rows on), and a copy of the codebook if its center is not the origin. Sums within a row are float32,
    beyond 1024 terms float64; sums over rows are float64. A row's loss and gradient depend neither on threads nor on
    the other rows.

    Differentiable in logits only: x, codebook and mask are detached, tau is a number. The gradient is
    `factor * (softmax(logits) - Q)` in float32, rounded once to the dtype of logits. `factor` is everything that the
    loss is multiplied by, the reduction included; if it is infinite or zero, so is the gradient. For this, backward
    reads float16 logits again, with reduction="none" also bfloat16 logits, at about the cost of another forward call:
    until then logits, x and codebook must not be changed. For bfloat16 logits with "mean" or "sum" the forward call
    computes the gradient, which is rounded a second time if a factor other than one arrives later.

    There is no second derivative. In forward mode and under `torch.func`, which have all derivatives, the loss is
    computed by `rqkernels.reference.soft_label_cross_entropy`, with labels materialised in float64. Autocast does not
    affect it: logits are used in their own dtype.

    Args:
        logits: (..., K), or (..., D, K) if x is (..., D, C); float32, float16 or bfloat16. Strides that no (n, m, K)
            tensor with contiguous K can have cost a copy.
        x: (..., C) or (..., D, C): the residual of each label; float32, float16 or bfloat16.
        codebook: (K, C), or (D, K, C): one per depth; any of these dtypes.
        tau: temperature > 0, in squared units of x.
        mask: bool, the shape of logits without K. False rows are not read (they may hold NaN), are not counted and have
            a gradient of zero.
        reduction: "mean" (over counted rows; NaN without any), "sum" or "none" (masked rows are 0).
        inplace: if a gradient will be needed, write it over the logits, which must not be used afterwards, and allocate
            nothing of their size: in the forward call, or in backward if that computes it. Autograd raises if another
            function has saved these logits for its own backward. backward then runs once. If no gradient will be
            needed, logits are unchanged.
        losses_out: float32, the shape of logits without K: filled with the rows' losses, for logging next to a "mean".
            No gradient flows through it: use reduction="none" for that.

    Returns:
        float32 scalar, or the rows' losses. For a row with
        - a logit of -inf: +inf if its label is above zero, else as if that code did not exist;
        - logits of NaN, +inf or only -inf, or x (on CUDA: or the codebook) not finite: NaN, and so is the gradient.

    Raises:
        TypeError: a wrong dtype (float64 among them), tau not a number.
        ValueError: shapes that do not match, an empty codebook or on a CPU one that is not finite, tau not > 0, an
            unknown reduction. With inplace: logits that are a leaf with requires_grad, overlap in memory or have the
            strides named above; torch.compile, forward mode and `torch.func`. losses_out created outside the function
            that `torch.func` transforms.
        RuntimeError: a second derivative; with inplace, a second backward.
    """
    op = _LOSS
    check_tensor(op, "logits", logits, FLOAT_DTYPES)
    tau = _check_call(op, x, codebook, tau)
    check_loss(op, mask, reduction)
    check_losses_out(op, losses_out, x, logits=logits, codebook=codebook, mask=mask)
    inplace = check_flag(op, "inplace", inplace)
    if mask is not None:  # its rows are counted below, before the operator checks anything
        check_labels(op, x, codebook)
        check_logits(op, logits, x, codebook, mask)
    x, codebook = x.detach(), codebook.detach()
    weight, reduce = _weight(op, x, mask, reduction), reduction != "none"
    with_gradient = logits.requires_grad and torch.is_grad_enabled()
    if inplace and with_gradient:
        if torch.compiler.is_compiling():
            raise ValueError(f"{op}: inplace cannot be traced by torch.compile, which decides itself what to overwrite")
        if is_transformed([logits]):
            raise ValueError(f"{op}: inplace cannot be used under torch.func or in forward mode, which keep the logits")
        check_inplace(op, logits)
        names = ("logits", "x", "codebook", "tau", "mask", "weight", "reduce")
        total, losses = call(op, _InPlace.apply, *(logits, x, codebook, tau, mask, weight, reduce), names=names)
    else:
        early = with_gradient and _forms_gradient_early(logits.dtype, reduce)
        total, losses, _ = call(
            op,
            torch.ops.rqkernels.soft_label_cross_entropy,
            *(logits, x, codebook, tau, mask, weight, reduce, early),
        )
    if losses_out is not None:
        _fill(op, losses_out, losses)
    return total if reduce else losses


@torch.library.register_fake("rqkernels::soft_label_cross_entropy")
def _fake_cross_entropy(
    logits: Tensor,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    mask: Tensor | None,
    weight: Tensor | None,
    reduce: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_fake_loss(logits, x, codebook, mask)
    return (
        logits.new_empty(() if reduce else (0,), dtype=torch.float32),
        logits.new_empty(logits.shape[:-1], dtype=torch.float32),
        logits.new_empty(logits.shape if with_gradient else (0,)),
    )


@torch.library.register_fake("rqkernels::soft_label_cross_entropy_")
def _fake_cross_entropy_(
    logits: Tensor,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    mask: Tensor | None,
    weight: Tensor | None,
    with_gradient: bool,
) -> Tensor:
    _check_fake_loss(logits, x, codebook, mask)
    return logits.new_empty(logits.shape[:-1], dtype=torch.float32)


def _check_fake_loss(logits: Tensor, x: Tensor, codebook: Tensor, mask: Tensor | None) -> None:
    check_labels(_LOSS, x, codebook)
    check_logits(_LOSS, logits, x, codebook, mask)


def _plain(
    logits: Tensor,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    mask: Tensor | None,
    weight: Tensor | None,
    reduce: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    losses = reference.soft_label_cross_entropy(logits, x, codebook, tau, mask=mask, reduction="none")
    return _reduced(losses, weight) if reduce else losses.new_empty(0), losses, logits.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, x, codebook, ctx.tau, mask, weight, ctx.reduce, ctx.early = inputs
    total, losses, gradient = output
    ctx.mark_non_differentiable(losses if ctx.reduce else total, gradient)
    ctx.set_materialize_grads(False)  # else autograd would allocate zeros of the size of logits
    ctx.save_for_backward(
        total if ctx.reduce else losses, *([gradient] if ctx.early else [logits, x, codebook, mask, weight])
    )


def _backward(ctx: Any, grad_total: Tensor | None, grad_losses: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grad = grad_total if ctx.reduce else grad_losses
    if grad is None:
        return (None,) * 8
    result, *saved = ctx.saved_tensors
    if ctx.early:
        return _times(refuse_second_derivative(_LOSS, saved[0], result), grad), *(None,) * 7
    logits, x, codebook, mask, weight = saved
    with torch.no_grad():
        gradient = call(
            _LOSS,
            torch.ops.rqkernels.soft_label_cross_entropy,
            *(logits, x, codebook, ctx.tau, mask, _factor(grad, weight), False, True),
        )[2]
    return refuse_second_derivative(_LOSS, gradient, result, grad), *(None,) * 7


register_derivative(_LOSS, _plain, _setup_context, _backward)


def _factor(grad: Tensor, weight: Tensor | None) -> Tensor:
    """Return the factor of softmax(logits) - Q: one number, or one per row."""
    return grad if weight is None else grad * weight


def _times(gradient: Tensor, factor: Tensor, inplace: bool = False) -> Tensor:
    """Multiply the gradient by one number, or by one per row for float32; in float32, rounded once to its dtype."""
    if _is_one(factor):
        return gradient
    is_half = gradient.dtype != torch.float32
    if factor.dim() > 0 or (is_half and gradient.is_cuda):
        # A GPU would round a 0-dim tensor to the gradient's dtype first.
        factor = factor.unsqueeze(-1)
    if inplace:
        return gradient.mul_(factor)
    # A factor with dimensions promotes the product of half types to float32, unless it is written in place.
    return gradient.clone().mul_(factor) if is_half and factor.dim() > 0 else gradient * factor


class _InPlace(torch.autograd.Function):
    """Loss whose gradient takes the memory of the logits: (reduced loss, or empty; losses of rows)."""

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
    ) -> tuple[Tensor, Tensor]:
        ctx.tau, ctx.reduce, ctx.is_done = tau, reduce, False
        ctx.early = _forms_gradient_early(logits.dtype, reduce)
        gradient = logits.detach()
        arguments = (gradient, x, codebook, tau, mask, weight, ctx.early)
        losses = call(_LOSS, torch.ops.rqkernels.soft_label_cross_entropy_, *arguments)
        total = _reduced(losses, weight) if reduce else losses.new_empty(0)
        ctx.mark_non_differentiable(losses if reduce else total)
        ctx.set_materialize_grads(False)
        result = total if reduce else losses
        if ctx.early:
            # A function that saved the logits for its own backward then finds them changed.
            torch.autograd.graph.increment_version(logits)
            ctx.gradient = gradient
            ctx.save_for_backward(result)
        else:
            ctx.save_for_backward(result, logits, x, codebook, mask, weight)
        return total, losses

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor | None, grad_losses: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grad_total if ctx.reduce else grad_losses
        if grad is None:
            return (None,) * 7
        if ctx.is_done:
            raise RuntimeError("soft_label_cross_entropy: with inplace=True backward runs once")
        ctx.is_done = True
        result, *saved = ctx.saved_tensors
        if ctx.early:
            gradient, ctx.gradient = ctx.gradient, None
            with torch.no_grad():
                gradient = _times(gradient, grad, inplace=True)
        else:
            logits, x, codebook, mask, weight = saved
            gradient = logits.detach()
            with torch.no_grad():
                arguments = (gradient, x, codebook, ctx.tau, mask, _factor(grad, weight), True)
                call(_LOSS, torch.ops.rqkernels.soft_label_cross_entropy_, *arguments)
            torch.autograd.graph.increment_version(logits)
        return refuse_second_derivative(_LOSS, gradient, result, grad), *(None,) * 6


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
    """`soft_label_cross_entropy(linear(hidden, weight, bias), x, codebook, tau)` without the logits of all rows.

    Rows go through the matmul, the loss and the matmuls of the gradient in chunks of at most 32 MiB of logits, which
    their gradient overwrites. Gradients of hidden, weight and bias are kept in float32 until backward and rounded once,
    after multiplication by all factors of the loss. With "none" the factors of the rows are not known in the forward
    call: backward recomputes the logits. Gradients of float16 logits are rounded after a scaling that keeps their
    digits, and their products are float32; so are those of bfloat16 on CUDA.

    Under autocast the matmuls run in its dtype; the loss is float32 arithmetic, as in `soft_label_cross_entropy`.
    Differentiable in hidden, weight and bias, as `soft_label_cross_entropy` is in logits.

    Args:
        hidden: (..., H), or (..., D, H) if x is (..., D, C); float32, float16 or bfloat16.
        weight: (K, H), and bias (K) or None: the classifier, in the dtype of hidden (any of these under autocast).
        x, codebook, tau, mask, reduction, losses_out: as in `soft_label_cross_entropy`.

    Returns:
        float32 scalar, or the rows' losses; see `soft_label_cross_entropy`.

    Raises:
        The errors of `soft_label_cross_entropy`, and for hidden, weight and bias that do not match.
    """
    op = _FUSED
    check_tensor(op, "hidden", hidden, FLOAT_DTYPES)
    check_tensor(op, "weight", weight, FLOAT_DTYPES)
    if bias is not None:
        check_tensor(op, "bias", bias, FLOAT_DTYPES)
    tau = _check_call(op, x, codebook, tau)
    check_loss(op, mask, reduction)
    check_losses_out(op, losses_out, x, hidden=hidden, weight=weight, bias=bias, codebook=codebook, mask=mask)
    # Checked here: below, rows go in chunks to an operator of another name.
    check_labels(op, x, codebook)
    check_linear(op, hidden, weight, bias, x, codebook)
    check_mask(op, "hidden", hidden, x, mask)
    dtype = check_linear_dtypes(op, hidden, weight, bias)
    x, codebook = x.detach(), codebook.detach()
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    row_weight, reduce = _weight(op, x, mask, reduction), reduction != "none"
    total, losses, *_ = call(
        op,
        torch.ops.rqkernels.fused_linear_soft_label_cross_entropy,
        *(hidden, weight, bias, x, codebook, tau, mask, row_weight, reduce, wanted and reduce, dtype),
    )
    if losses_out is not None:
        _fill(op, losses_out, losses)
    return total if reduce else losses


LIBRARY.define(
    "fused_linear_soft_label_cross_entropy(Tensor hidden, Tensor weight, Tensor? bias, Tensor x, Tensor codebook,"
    " float tau, Tensor? mask, Tensor? factor, bool reduce, bool with_gradient, ScalarType dtype)"
    " -> (Tensor total, Tensor losses, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)


def _in_chunks(*arguments: object) -> Tensor:
    """Compute the loss of a chunk; errors are raised in the name of the fused loss."""
    try:
        return torch.ops.rqkernels.soft_label_cross_entropy_(*arguments)
    except ValueError as error:
        raise ValueError(str(error).replace(f"{_LOSS}:", f"{_FUSED}:", 1)) from None


def _fused_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    mask: Tensor | None,
    factor: Tensor | None,
    reduce: bool,
    with_gradient: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    # Rows are chunked in groups: the depths of one position, if each has its codebook.
    together = 1 if codebook.dim() == 2 else codebook.shape[0]
    num_codes = weight.shape[0]
    group = () if codebook.dim() == 2 else (together,)
    h = hidden.reshape(-1, *group, hidden.shape[-1])
    x = x.reshape(-1, *group, x.shape[-1])
    mask = None if mask is None else mask.reshape(-1, *group)
    w, b = _for_products(weight.to(dtype)), None if bias is None else bias.to(dtype)
    losses = x.new_empty(x.shape[:-1], dtype=torch.float32)
    total_factor = factor
    rest = None
    if with_gradient and dtype == torch.float16:
        # The powers of two of the factors are applied to the products, in float32.
        fraction, exponent = torch.frexp(losses.new_ones(()) if factor is None else factor)
        factor, rest = fraction * _FLOAT16_SCALE, torch.exp2((exponent - 15).float())
    row_factor = None if factor is None or factor.dim() == 0 else factor.reshape(-1, *group)
    # Products of float16 may leave its range: CUDA can return them in float32, but not multiplied by a row's factor.
    in_float = rest is not None and (row_factor is not None or not hidden.is_cuda)
    w_of_products = w.float() if in_float else w
    if with_gradient:
        grad_h = hidden.new_zeros(losses.numel(), hidden.shape[-1], dtype=torch.float32)
        grad_w = torch.zeros_like(weight, dtype=torch.float32)
        grad_b = weight.new_zeros(num_codes, dtype=torch.float32)
    step = max(1, _LOGITS_BUDGET // (num_codes * (dtype.itemsize + 4 * in_float) * together))
    logits_buffer = h.new_empty((min(step, h.shape[0]) * together, num_codes), dtype=dtype)
    with torch.amp.autocast(hidden.device.type, enabled=False):
        # Runs once even without rows: a codebook that is not finite is always refused.
        for begin in range(0, max(h.shape[0], 1), step):
            rows = slice(begin, begin + step)
            part = _for_products(h[rows].to(dtype).reshape(-1, h.shape[-1]))
            logits = logits_buffer[: part.shape[0]]
            if b is None:
                torch.mm(part, w.t(), out=logits)
            else:
                torch.addmm(b, part, w.t(), out=logits)
            losses[rows] = _in_chunks(
                logits.view(*x[rows].shape[:-1], num_codes),
                x[rows],
                codebook,
                tau,
                None if mask is None else mask[rows],
                factor if row_factor is None else row_factor[rows],
                with_gradient,
            )
            if not with_gradient:
                continue
            if mask is not None:
                # NaN times a gradient of zero would be NaN.
                part = part.masked_fill(~mask[rows].reshape(-1, 1), 0)
            flat = slice(begin * together, begin * together + part.shape[0])
            if in_float:
                logits, part = logits.float(), part.float()
                if rest is not None and row_factor is not None:
                    logits *= rest.reshape(-1)[flat, None]
            _add_product(grad_h[flat], logits, w_of_products)
            _add_product(grad_w, logits.t(), part)
            grad_b += logits.sum(0, dtype=torch.float32)
    total = _reduced(losses, total_factor) if reduce else losses.new_empty(0)
    if not with_gradient:
        return total, losses.view(hidden.shape[:-1]), *(losses.new_empty(0) for _ in range(3))
    if rest is not None and row_factor is None:
        for grad in (grad_h, grad_w, grad_b):
            grad *= rest
    return total, losses.view(hidden.shape[:-1]), grad_h.view(hidden.shape), grad_w, grad_b


def _for_products(matrix: Tensor) -> Tensor:
    """Return the matrix, contiguous if neither its rows nor its columns are.

    torch would copy such an operand for every product, and transposed operands in another layout than a contiguous one:
    the sums would be in another order.
    """
    return matrix if 1 in matrix.stride() else matrix.contiguous()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to total in float32; on a CPU a bfloat16 product is rounded to bfloat16 first."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=torch.float32)
    else:
        total += a @ b


def _fake_fused_linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    mask: Tensor | None,
    factor: Tensor | None,
    reduce: bool,
    with_gradient: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    def new(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=torch.float32)

    grads = [hidden.shape, weight.shape, weight.shape[:1]] if with_gradient else [(0,)] * 3
    return new() if reduce else new(0), new(*hidden.shape[:-1]), *(new(*shape) for shape in grads)


LIBRARY.impl("fused_linear_soft_label_cross_entropy", _fused_linear, "CompositeExplicitAutograd")
torch.library.register_fake("rqkernels::fused_linear_soft_label_cross_entropy", _fake_fused_linear)


def _plain_fused(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    codebook: Tensor,
    tau: float,
    mask: Tensor | None,
    factor: Tensor | None,
    reduce: bool,
    with_gradient: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, ...]:
    with torch.amp.autocast(hidden.device.type, enabled=False):
        logits = torch.nn.functional.linear(
            hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        )
    total, losses, _ = _plain(logits, x, codebook, tau, mask, factor, reduce, False)
    return total, losses, *(losses.new_empty(0) for _ in range(3))


def _setup_fused(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, x, codebook, ctx.tau, mask, factor, ctx.reduce, ctx.early, ctx.dtype = inputs
    total, losses, *grads = output
    ctx.mark_non_differentiable(losses if ctx.reduce else total, *grads)
    ctx.set_materialize_grads(False)
    ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
    saved = grads if ctx.early else [hidden, weight, bias, x, codebook, mask, factor]
    ctx.save_for_backward(total if ctx.reduce else losses, *saved)


def _backward_fused(
    ctx: Any, grad_total: Tensor | None, grad_losses: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    grad = grad_total if ctx.reduce else grad_losses
    if grad is None:
        return (None,) * 11
    result, *saved = ctx.saved_tensors
    if ctx.early:
        grads = [_times(refuse_second_derivative(_FUSED, gradient, result), grad) for gradient in saved]
    else:
        *inputs, mask, factor = saved
        with torch.no_grad():
            grads = call(
                _FUSED,
                torch.ops.rqkernels.fused_linear_soft_label_cross_entropy,
                *(*inputs, ctx.tau, mask, _factor(grad, factor), False, True, ctx.dtype),
            )[2:]
        grads = [refuse_second_derivative(_FUSED, gradient, result, grad) for gradient in grads]
    wanted = (
        gradient.to(dtype) if needed else None
        for gradient, dtype, needed in zip(grads, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    )
    return *wanted, *(None,) * 8


register_derivative(_FUSED, _plain_fused, _setup_fused, _backward_fused)
