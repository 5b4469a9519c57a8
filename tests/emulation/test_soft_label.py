"""The CUDA kernels of the soft labels, on the CPU, against the definition in float64."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from rqkernels import reference

from .harness import SCHEDULES, Device, Emulation, ragged_grid

# A block has 64 rows, a warp 16 of them and 64 of a tile's 128 codes, 16 channels at a time; on the direct path 32
# rows, a warp four of them, and 128 codes, 32 channels at a time.
ROWS = {"plain": 129, "asan": 66, "race": 66}
TYPES = (torch.float32, torch.float16, torch.bfloat16)


H100 = Device()
DIRECT = Device(shared_kib=43)  # no room for tiles of more than 32 channels


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def to_numpy(t: torch.Tensor) -> np.ndarray:
    """The tensor as numpy holds it; bfloat16 as its bits."""
    return t.view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.numpy()


def distance_softmax(
    emulation: Emulation, x_oic: np.ndarray, codebooks: np.ndarray, tau: float, device: Device = H100
) -> np.ndarray:
    return labels_and_direct_rows(emulation, x_oic, codebooks, tau, device)[0]


def labels_and_direct_rows(
    emulation: Emulation, x_oic: np.ndarray, codebooks: np.ndarray, tau: float, device: Device = H100
) -> tuple[np.ndarray, int]:
    """Q, and the number of rows that took the direct path; -1 without tiles."""
    # Each schedule has errors of its own.
    schedules = (3,) if device.mma_bits > 0 else SCHEDULES
    q, direct = emulation.run(
        "distance_softmax", x=x_oic, codebooks=codebooks, tau=tau, device=device, schedules=schedules
    )
    return q, int(direct[0])


def true_labels(x_oic: np.ndarray, codebooks: np.ndarray, tau: float) -> np.ndarray:
    """Q in float64 from squared differences; the reference expands the square."""
    difference = x_oic.astype(np.float64)[:, :, None] - codebooks.astype(np.float64)
    exponent = -np.square(difference).sum(-1) / tau
    exponent -= exponent.max(-1, keepdims=True)
    labels = np.exp(exponent)
    return labels / labels.sum(-1, keepdims=True)


class Result(NamedTuple):
    losses: np.ndarray
    total: float
    gradient: torch.Tensor  # (o, i, k)
    direct_rows: int  # that the tiles did not serve; -1: there are none


def cross_entropy(
    emulation: Emulation,
    logits: torch.Tensor,
    x_oic: np.ndarray,
    codebooks: np.ndarray,
    tau: float,
    *,
    mask: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    swapped: bool = False,
    padding: int = 0,
    how: str = "packed",
    device: Device = H100,
) -> Result:
    k = logits.shape[-1]
    given = torch.nn.functional.pad(logits, (0, padding), value=7.0)
    given = given.transpose(0, 1).contiguous() if swapped else given
    losses, total, gradient, direct = emulation.run(
        "soft_label_cross_entropy",
        logits=to_numpy(given),
        x=x_oic,
        codebooks=codebooks,
        tau=tau,
        mask=np.ones(x_oic.shape[:2], np.uint8) if mask is None else mask.astype(np.uint8),
        weight=weight,
        swapped=swapped,
        gradient=how,
        device=device,
    )
    written = torch.from_numpy(gradient)
    written = written.view(torch.bfloat16) if logits.dtype == torch.bfloat16 else written
    if how == "in_place":
        assert (written[..., k:] == 7.0).all()  # what lies between rows
        written = (written.transpose(0, 1) if swapped else written)[..., :k]
    return Result(losses, float(total[0]), written, int(direct[0]))


def check(
    emulation: Emulation, logits: torch.Tensor, x_oic: np.ndarray, codebooks: np.ndarray, tau: float, **how: object
) -> None:
    """Losses, their total and the gradient of finite input that the tiles serve, if there are any."""
    result = cross_entropy(emulation, logits, x_oic, codebooks, tau, **how)
    assert result.direct_rows == (0 if len(x_oic) > 0 and how.get("device", H100) == H100 else -1)
    truth, labels = logits.double(), torch.from_numpy(true_labels(x_oic, codebooks, tau))
    below = truth.log_softmax(-1)
    losses = -(labels * below).sum(-1)
    weight = how.get("weight")
    factor = torch.ones(losses.shape, dtype=torch.float64)
    if weight is not None:
        factor *= torch.from_numpy(weight).double().expand(losses.numel()).view(losses.shape)
    gradient = (below.exp() - labels) * factor[..., None]
    if how.get("mask") is not None:
        mask = torch.from_numpy(how["mask"]).bool()
        losses = torch.where(mask, losses, 0.0)
        gradient = torch.where(mask[..., None], gradient, 0.0)
    np.testing.assert_allclose(result.losses, losses.numpy(), rtol=3e-6, atol=3e-6)
    first = 1.0 if weight is None else float(weight[0])
    np.testing.assert_allclose(result.total, losses.sum() * first, rtol=3e-6, atol=3e-6)
    # A rounding to the dtype, and the error of float32 arithmetic.
    last_place = torch.finfo(logits.dtype).eps
    largest = factor.abs().max().item() if factor.numel() else 1.0
    np.testing.assert_allclose(
        result.gradient.double().numpy(),
        gradient.numpy(),
        rtol=0.501 * last_place + (1e-5 if logits.dtype == torch.float32 else 0),
        atol=3e-6 * largest + torch.finfo(logits.dtype).smallest_normal * last_place,
    )


@pytest.mark.parametrize(("n", "k", "c"), ragged_grid(N=(0, 1, 129), K=(1, 257), C=(1, 17, 70)))
def test_shapes(emulation: Emulation, n: int, k: int, c: int) -> None:
    n = min(n, ROWS[emulation.build])
    if emulation.build != "plain":
        k, c = min(k, 130), min(c, 34)  # two of every tile all the same
    x, e = normal(n, 1, c), normal(1, k, c, seed=1)
    q = distance_softmax(emulation, x, e, 1.5)
    truth = true_labels(x, e, 1.5)
    # The bound of float32 distances, which tiles keep too, in Q and in the sum that it is divided by; other roundings.
    distances = np.square(x[:, :, None].astype(np.float64) - e).sum(-1)
    relative = (min(c, 32) + -(-c // 32) + 5) * 2.0**-24
    seen = relative * (distances + distances.min(-1, initial=np.inf, keepdims=True)) / 1.5
    assert (np.abs(q - truth) <= truth * (2 * seen + 2e-6) + 1e-37).all()
    check(emulation, torch.from_numpy(3 * normal(n, 1, k, seed=2)), x, e, 1.5)


def exponent_error(x_nc: np.ndarray, codebook: np.ndarray, tau: float) -> np.ndarray:
    """4 E / tau of each row, as tiles.cuh derives it."""
    k, c = codebook.shape
    middle = codebook[np.arange(32) * k // 32].mean(0)
    a, n = np.linalg.norm(x_nc - middle, axis=-1), np.linalg.norm(codebook - middle, axis=-1).max()
    return 4 / tau * 2.0**-24 * ((78 + 1.01 * -(-c // 16)) * a * n + 1.4 * n * n)


@pytest.mark.parametrize("tau", [0.005, 1.0, 60.0])  # all in float64 that count; some; none
def test_an_mma_may_err(emulation: Emulation, tau: float) -> None:
    x, e = normal(3, 1, 40), normal(1, 140, 40, seed=1)
    error = exponent_error(x[:, 0], e[0], tau)
    assert (error > 1 / 16).all() if tau < 0.1 else (error < 1 / 16).all()
    q, direct = labels_and_direct_rows(emulation, x, e, tau, Device(mma_bits=18))
    truth = true_labels(x, e, tau)
    assert direct == 0
    assert (
        np.abs(q - truth) <= truth * (2 * error[:, None, None] + 3e-6) + np.exp(-39.0) * (error > 1 / 16)[:, None, None]
    ).all()
    if tau == 0.005:
        np.testing.assert_allclose(q, truth, rtol=1e-5, atol=np.exp(-39.0))


def climbing_codes(tau: float, near: int) -> tuple[np.ndarray, np.ndarray]:
    """`near` codes, each nearer by 5 tau than the one before, between far ones that make scores coarse."""
    rng = np.random.default_rng(6)
    x = np.zeros((1, 1, 4), np.float32)
    e = rng.standard_normal((1, 2 * near, 4))
    e /= np.linalg.norm(e, axis=-1, keepdims=True)
    e[0, 0::2] *= np.sqrt(5 * tau * np.arange(near, 0, -1))[:, None]
    e[0, 1::2] = 1000 * np.sqrt(tau) + e[0, 1::2]
    return x, e.astype(np.float32)


def test_a_full_list_gives_way_to_nearer_codes(emulation: Emulation) -> None:
    # Some nine of a warp's 32 near codes of a tile come within reach: the fourth tile finds the list full.
    x, e = climbing_codes(1.0, 320)
    assert exponent_error(x[:, 0], e[0], 1.0) > 1 / 16
    q, direct = labels_and_direct_rows(emulation, x, e, 1.0)
    assert direct == 0
    np.testing.assert_allclose(q, true_labels(x, e, 1.0), rtol=1e-5, atol=np.exp(-39.0))


def test_more_codes_than_a_list_holds(emulation: Emulation) -> None:
    # 40 codes at about the same distance, in one warp's part of a tile, and far ones that make scores coarse.
    x, e = climbing_codes(1.0, 40)
    e[0, :40] = e[0, 78] + 1e-3 * normal(40, 4, seed=7)
    truth = true_labels(x, e, 1.0)
    q, direct = labels_and_direct_rows(emulation, x, e, 1.0)
    assert direct == 1
    np.testing.assert_allclose(q, truth, rtol=1e-5, atol=1e-37)
    # With this many codes, errors of the half scores do not show.
    e[0, 40:] = 30 + e[0, 40:] / 1000
    assert 1 / 4096 < exponent_error(x[:, 0], e[0], 1.0) < 1 / 16
    q, direct = labels_and_direct_rows(emulation, x, e, 1.0)
    assert direct == 0
    np.testing.assert_allclose(q, true_labels(x, e, 1.0), rtol=2e-3, atol=1e-37)


def test_channels_without_room_for_tiles(emulation: Emulation) -> None:
    x, e = normal(34, 2, 34), normal(2, 130, 34, seed=1)
    check(emulation, torch.from_numpy(normal(34, 2, 130, seed=2)), x, e, 5.0, device=DIRECT)


@pytest.mark.parametrize("emulation", ["plain"], indirect=True)  # the numbers are the same in every build
@pytest.mark.parametrize("ratio", [1e-3, 1e-1, 1e1, 1e3, 1e5])
def test_errors_are_no_larger_than_those_of_pytorch(emulation: Emulation, ratio: float) -> None:
    c = 64
    x, e, logits = normal(40, 1, c), normal(1, 300, c, seed=1), torch.from_numpy(3 * normal(40, 1, 300, seed=2))
    tau = 2 * c / ratio
    labels = torch.from_numpy(true_labels(x, e, tau))
    rows, codes = torch.from_numpy(x[:, 0]), torch.from_numpy(e[0])
    squares = rows.square().sum(-1, keepdim=True) + codes.square().sum(-1) - 2 * rows @ codes.T
    pytorch = torch.softmax(-squares / tau, -1)[:, None]
    result = cross_entropy(emulation, logits, x, e, tau)
    assert result.direct_rows == 0
    below = logits.double().log_softmax(-1)
    true_loss, true_gradient = -(labels * below).sum(-1), below.exp() - labels
    loss, gradient = -(pytorch * logits.log_softmax(-1)).sum(-1), logits.softmax(-1) - pytorch
    assert np.abs(result.losses - true_loss.numpy()).max() <= 1.1 * (loss - true_loss).abs().max() + 2e-7
    assert (result.gradient - true_gradient).abs().max() <= 1.1 * (gradient - true_gradient).abs().max() + 2e-7


def test_it_is_the_reference() -> None:
    x, e = normal(5, 2, 6), normal(2, 9, 6, seed=1)
    expected = reference.distance_softmax(torch.from_numpy(x), torch.from_numpy(e), 0.7, dtype=torch.float64)
    np.testing.assert_allclose(true_labels(x, e, 0.7), expected.numpy(), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("how", ["packed", "in_place"])
def test_a_codebook_per_depth_masks_weights_strides_dtypes(emulation: Emulation, dtype: torch.dtype, how: str) -> None:
    x, e = normal(34, 3, 5), normal(3, 130, 5, seed=1)
    logits = torch.from_numpy(2 * normal(34, 3, 130, seed=2)).to(dtype)
    mask = np.random.default_rng(3).random((34, 3)) < 0.7
    weight = 64 * np.random.default_rng(4).random(34 * 3).astype(np.float32)
    padded = dict(swapped=True, padding=3) if how == "in_place" else dict(padding=1)
    check(emulation, logits, x, e, 2.0, mask=mask, weight=weight, how=how, **padded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", [H100, DIRECT], ids=["tiles", "direct"])
def test_a_gradient_of_halves_overflows_and_vanishes_where_it_is_that_large_or_small(
    emulation: Emulation, dtype: torch.dtype, device: Device
) -> None:
    """Weights from 2^-30 to 2^24, as loss scaling and means over rows make them, multiplied in float32."""
    x, e = normal(56, 1, 40), normal(1, 130, 40, seed=1)
    logits = torch.from_numpy(2 * normal(56, 1, 130, seed=2)).to(dtype)
    weight = np.exp2(np.arange(-30, 26, dtype=np.float32))
    weight[1::2] *= np.float32(-1.37)
    result = cross_entropy(emulation, logits, x, e, 40.0, weight=weight, device=device).gradient.double()
    difference = logits.double().softmax(-1) - torch.from_numpy(true_labels(x, e, 40.0))
    factor = torch.from_numpy(weight).double()[:, None, None]
    true, limits = factor * difference, torch.finfo(dtype)
    error = 1e-6 * factor.abs() + 0.501 * limits.eps * true.abs()
    over = true.abs() > limits.max * (1 + limits.eps / 4)
    near = (true.abs() - limits.max).abs() <= error
    assert over.any() == (dtype == torch.float16)
    assert torch.equal(result.isinf() | near, over | near)
    kept = result.isfinite()
    assert ((result - true).abs() <= error + 0.501 * limits.smallest_normal * limits.eps)[kept].all()
    assert (result[true.abs() > limits.smallest_normal] != 0).all()


def test_masked_rows_are_not_read(emulation: Emulation) -> None:
    x, e, logits = normal(6, 1, 5), normal(1, 9, 5, seed=1), torch.from_numpy(normal(6, 1, 9, seed=2))
    mask = np.array([[1], [0], [1], [1], [0], [1]], bool)
    clean = cross_entropy(emulation, logits, x, e, 0.5, mask=mask, weight=np.full(1, 0.25, np.float32))
    x[1], logits[4] = np.nan, torch.nan
    dirty = cross_entropy(emulation, logits, x, e, 0.5, mask=mask, weight=np.full(1, 0.25, np.float32))
    np.testing.assert_array_equal(dirty.losses, clean.losses)
    assert dirty.total == clean.total and torch.equal(dirty.gradient, clean.gradient)
    assert (clean.losses[~mask] == 0).all() and (clean.gradient[torch.from_numpy(~mask)] == 0).all()


def test_no_gradient_is_asked_for(emulation: Emulation) -> None:
    # Two blocks' rows: where one block takes both, nothing but its own care keeps them apart.
    x, e, logits = normal(34, 1, 34), normal(1, 9, 34, seed=1), torch.from_numpy(normal(34, 1, 9, seed=2))
    for device in (H100, DIRECT):
        with_gradient, without = (
            cross_entropy(emulation, logits, x, e, 0.5, how=how, device=device) for how in ("packed", "none")
        )
        np.testing.assert_array_equal(without.losses, with_gradient.losses)


# |x - e|^2 / tau from 1e-3 to 1e5 and far beyond both.
@pytest.mark.parametrize("tau", [1e-300, 1e-5, 1e-3, 0.1, 1e4, 1e39, 1e300, np.inf])
def test_temperatures(emulation: Emulation, tau: float) -> None:
    x, e = normal(5, 1, 40), normal(1, 140, 40, seed=1)
    np.testing.assert_allclose(distance_softmax(emulation, x, e, tau), true_labels(x, e, tau), rtol=1e-3, atol=1e-37)
    logits = torch.from_numpy(normal(5, 1, 140, seed=2))
    result = cross_entropy(emulation, logits, x, e, tau)
    labels = torch.from_numpy(true_labels(x, e, tau))
    expected = -(labels * logits.double().log_softmax(-1)).sum(-1)
    np.testing.assert_allclose(result.losses, expected.numpy(), rtol=3e-4)
    if tau < 1e-10:
        nearest = reference.residual_search(torch.from_numpy(x[:, 0]), torch.from_numpy(e[0]), 1).codes[:, 0]
        assert (result.gradient[:, 0].argmin(-1) == nearest).all()


def test_codes_closer_than_float32_sees(emulation: Emulation) -> None:
    # Distances of 40 that differ by 5e-9 of themselves: float32 sums do not tell them apart.
    x, e = np.full((1, 1, 40), 1.0, np.float32), np.zeros((1, 40, 40), np.float32)
    e[0, :, 0] = 1e-7 * np.random.default_rng(5).permutation(40)
    np.testing.assert_allclose(distance_softmax(emulation, x, e, 1e-5), true_labels(x, e, 1e-5), rtol=1e-5, atol=1e-37)
    assert distance_softmax(emulation, x, e, 1e-9)[0, 0].argmax() == e[0, :, 0].argmax()


def test_equal_codes_share(emulation: Emulation) -> None:
    x, e = normal(2, 1, 5), np.repeat(normal(1, 3, 5, seed=1), 43, axis=1)
    for tau in (1e-20, 1.0):
        q = distance_softmax(emulation, x, e, tau).reshape(2, 3, 43)
        assert (q == q[..., :1]).all()
        np.testing.assert_allclose(q.sum((1, 2)), 1, rtol=1e-6)


def test_logits_of_minus_infinity(emulation: Emulation) -> None:
    x, e = normal(4, 1, 5), normal(1, 140, 5, seed=1)
    codes = reference.residual_search(torch.from_numpy(x[:, 0]), torch.from_numpy(e[0]), 1).codes[:, 0]
    logits = torch.from_numpy(normal(4, 1, 140, seed=2))
    hidden = (codes + 1) % 140
    clean = cross_entropy(emulation, logits, x, e, 1e-6)
    logits[torch.arange(3), 0, hidden[:3]] = -torch.inf  # a label of zero there
    logits[2, 0, codes[2]] = -torch.inf  # one above zero
    logits[3] = -torch.inf
    result = cross_entropy(emulation, logits, x, e, 1e-6)
    expected = logits[:2, 0].double().logsumexp(-1) - logits[[0, 1], 0, codes[:2]].double()
    np.testing.assert_allclose(result.losses[:2, 0], expected.numpy(), rtol=1e-6)
    assert (result.losses[:2] != clean.losses[:2]).all()
    assert result.losses[2] == np.inf and np.isnan(result.losses[3])
    assert clean.direct_rows == 0 and result.direct_rows == 4
    assert result.gradient[:3].isfinite().all() and result.gradient[3].isnan().all()
    assert (result.gradient[torch.arange(2), 0, hidden[:2]] == 0).all()


def test_what_is_not_finite(emulation: Emulation) -> None:
    x, e, logits = normal(6, 2, 5), normal(2, 140, 5, seed=1), torch.from_numpy(normal(6, 2, 140, seed=2))
    clean = cross_entropy(emulation, logits, x, e, 0.5)
    x[1, 0, 3], x[2, 1, 0], logits[3, 1, 139], logits[4, 0, 5] = np.nan, np.inf, torch.nan, torch.inf
    bad = np.zeros((6, 2), bool)
    bad[[1, 2, 3, 4], [0, 1, 1, 0]] = True
    result = cross_entropy(emulation, logits, x, e, 0.5)
    np.testing.assert_array_equal(np.isnan(result.losses), bad)
    np.testing.assert_array_equal(result.losses[~bad], clean.losses[~bad])
    assert result.gradient[torch.from_numpy(bad)].isnan().all()
    assert torch.equal(result.gradient[torch.from_numpy(~bad)], clean.gradient[torch.from_numpy(~bad)])
    assert np.isnan(distance_softmax(emulation, x, e, 0.5)[[1, 2], [0, 1]]).all()
    e[1, 77, 2] = np.inf
    assert np.isnan(cross_entropy(emulation, logits, x, e, 0.5).losses[:, 1]).all()


def test_far_values_and_large_logits(emulation: Emulation) -> None:
    # Squares beyond float32, differences far below its squares, a common offset; logits to 1e4.
    x, e = normal(3, 1, 6), normal(1, 20, 6, seed=1)
    logits = torch.from_numpy(1e4 * np.random.default_rng(2).uniform(-1, 1, (3, 1, 20)).astype(np.float32))
    for scale in (1e25, 1e-25):
        x_far, e_far = (x * np.float32(scale)), (e * np.float32(scale))
        expected = true_labels(x_far, e_far, scale * scale)
        np.testing.assert_allclose(distance_softmax(emulation, x_far, e_far, scale * scale), expected, rtol=1e-5)
    e += 4096
    check(emulation, logits, x + np.float32(4096), e, 1.0)


def test_numbers_of_two_bytes(emulation: Emulation) -> None:
    # Logits of (v, 0) show what was read; a label of zero for v leaves its softmax as the gradient: what was written.
    for dtype in (torch.float16, torch.bfloat16):
        values = torch.arange(0, 2**16, 331, dtype=torch.int32).to(torch.uint16).view(dtype)
        values = values[values.isfinite() & (values.abs() < 1e4)]
        logits = torch.stack([values, torch.zeros_like(values)], -1)[:, None]
        x, e = np.zeros((len(values), 1, 1), np.float32), np.array([[[1e3], [0]]], np.float32)
        result = cross_entropy(emulation, logits, x, e, 1.0)
        np.testing.assert_allclose(
            result.losses, np.logaddexp(0, values.double().numpy())[:, None], rtol=1e-6, atol=1.2e-7
        )
        expected, half_a_place = logits.double().softmax(-1)[..., 0].numpy(), 0.501 * torch.finfo(dtype).eps
        denormal = half_a_place * torch.finfo(dtype).smallest_normal
        written = result.gradient[..., 0].double().numpy()
        np.testing.assert_allclose(written, expected, rtol=half_a_place, atol=max(denormal, 1e-37))
