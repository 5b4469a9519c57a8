"""Mean and covariance of image features, accumulated batch by batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from rqgen.checks import check_integer, check_tensor
from rqgen.files import new_file
from rqgen.reading import name_some, require_file, unreadable

ARCHIVE = "archive of NumPy arrays (.npz)"
# Squares of larger values, summed over 1e7 images, leave the range of float64.
_LARGEST = 1e150

P = ParamSpec("P")
R = TypeVar("R")


def _lasting(function: Callable[P, R]) -> Callable[P, R]:
    """Run without gradients, and outside inference mode: a tensor made there could not be added to later."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return run


class FeatureStatistics:
    """Mean and covariance of feature vectors in float64, from batches of any sizes in any order.

        mean = sum_i x_i / n                     cov = sum_i (x_i - mean) (x_i - mean)^T / (n - 1)

    Batches and partial statistics are merged by the update of Chan, Golub and LeVeque ("Algorithms for computing the
    sample variance", 1983), with delta the difference of the means and S the sums of centered products:

        S = S_a + S_b + delta delta^T n_a n_b / (n_a + n_b)

    No sum of squares of uncentered features exists, so a large mean costs no accuracy. The result does not depend on
    the order and the sizes of batches, up to rounding. Memory is (d, d) float64, on the device of the first features.

    The features are those of a network that the caller runs, such as the 2048 pooled activations of Inception-v3; the
    networks that published scores use are not part of this package, so no metric of `rqgen evaluate` needs them.
    """

    def __init__(self) -> None:
        self._count: int | None = 0
        self._mean: Tensor | None = None
        self._products: Tensor | None = None

    def __repr__(self) -> str:
        return f"FeatureStatistics(count={self._count}, width={self.width})"

    @property
    def count(self) -> int | None:
        """Number of feature vectors. None after loading a file that does not hold it: such statistics have a mean and a
        covariance, but cannot be updated or merged."""
        return self._count

    @property
    def width(self) -> int | None:
        """Number of features d; None before the first update."""
        return None if self._mean is None else len(self._mean)

    @property
    def mean(self) -> Tensor:
        """The mean, float64 (d,) on the CPU.

        Raises:
            ValueError: no features yet.
        """
        if self._mean is None:
            raise ValueError("FeatureStatistics: expected at least one feature vector for a mean, got none")
        return self._mean.to("cpu", copy=True)

    @property
    def cov(self) -> Tensor:
        """The unbiased covariance, float64 (d, d) on the CPU, exactly symmetric; `numpy.cov(features, rowvar=False)`.

        Raises:
            ValueError: fewer than two feature vectors.
        """
        if self._products is None or self._count in (0, 1):
            raise ValueError(
                f"FeatureStatistics: expected at least two feature vectors for a covariance, got {self._count}"
            )
        cov = self._products if self._count is None else self._products / (self._count - 1)
        return ((cov + cov.T) / 2).cpu()

    @_lasting
    def update(self, features: Tensor | np.ndarray[Any, Any]) -> None:
        """Add a batch of feature vectors. A refused batch changes nothing.

        Args:
            features: (N, d), floating point; N may be 0. A tensor on any device, or an array.

        Raises:
            TypeError: not a tensor or an array of floating-point numbers.
            ValueError: not (N, d); d is not that of the first batch; NaN, infinity, or numbers beyond 1e150; statistics
                loaded without their count.
        """
        x_nd = check_features(features, "features")
        if self.width is not None and x_nd.shape[1] != self.width:
            raise ValueError(f"features: expected {self.width} per image, as before, got {x_nd.shape[1]}")
        count = self._known_count("update")
        if len(x_nd) == 0:
            return
        mean_d = x_nd.mean(0)
        centered_nd = x_nd - mean_d
        if self._mean is None or self._products is None:
            self._count, self._mean, self._products = len(x_nd), mean_d, centered_nd.T @ centered_nd
            return
        centered_nd, mean_d = centered_nd.to(self._mean.device), mean_d.to(self._mean.device)
        self._products.addmm_(centered_nd.T, centered_nd)
        self._shift(count, mean_d, len(x_nd))

    @_lasting
    def merge(self, other: FeatureStatistics) -> None:
        """Add all feature vectors of other statistics, which stay as they are: of another process, or another file.

        Raises:
            TypeError: not a `FeatureStatistics`.
            ValueError: another number of features; statistics loaded without their count.
        """
        if not isinstance(other, FeatureStatistics):
            raise TypeError(f"other: expected FeatureStatistics, got {type(other).__name__}")
        count, added = self._known_count("merge"), other._known_count("merge")
        if other._mean is None or other._products is None:
            return
        if self._mean is None or self._products is None:
            self._count, self._mean, self._products = added, other._mean.clone(), other._products.clone()
            return
        if other.width != self.width:
            raise ValueError(f"other: expected {self.width} features per image, got {other.width}")
        self._products += other._products.to(self._products.device)
        self._shift(count, other._mean.to(self._mean.device), added)

    def save(self, path: str | Path) -> None:
        """Write `mu` (d,), `sigma` (d, d) and `count` to a .npz file, whole or not at all.

        Published statistics files have the same keys `mu` and `sigma`, so programs that read those read this one.

        Raises:
            ValueError: the name does not end in .npz; fewer than two feature vectors.
        """
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"path: expected a name that ends in .npz, got '{path}'")
        mean, cov = self.mean.numpy(), self.cov.numpy()
        with new_file(path) as written, open(written, "wb") as file:
            if self._count is None:
                np.savez(file, mu=mean, sigma=cov)
            else:
                np.savez(file, mu=mean, sigma=cov, count=np.int64(self._count))

    @classmethod
    @_lasting
    def load(cls, path: str | Path) -> Self:
        """Read a file that `save` wrote, or any .npz file with `mu` (d,) and `sigma` (d, d).

        Raises:
            FileNotFoundError: no such file.
            ValueError: not a .npz file, or a damaged one; a missing array; shapes that do not fit; numbers that are not
                finite; a `sigma` that is not a covariance.
        """
        path = Path(path)
        require_file(path, "path")
        arrays = _read_arrays(path)
        loaded = cls()
        try:
            loaded._mean, cov = check_moments(arrays["mu"], arrays["sigma"], f"{path}: mu", f"{path}: sigma")
            loaded._count = check_integer(arrays["count"].tolist(), f"{path}: count", 2) if "count" in arrays else None
        except TypeError as error:  # of a file's content, not of an argument
            raise ValueError(str(error)) from error
        loaded._products = cov if loaded._count is None else cov * (loaded._count - 1)
        return loaded

    def _known_count(self, call: str) -> int:
        if self._count is None:
            raise ValueError(f"{call}: expected statistics with a count, got ones loaded from a file without it")
        return self._count

    def _shift(self, count: int, mean_d: Tensor, added: int) -> None:
        """Complete the merge of `added` vectors with this mean, whose centered products are already in the sum."""
        assert self._mean is not None and self._products is not None
        total = count + added
        delta_d = mean_d - self._mean
        self._products.addr_(delta_d, delta_d, alpha=count * (added / total))
        self._mean += delta_d * (added / total)
        self._count = total


def as_tensor(values: Any, name: str) -> Tensor:
    """Return a tensor or an array of floating-point numbers as a float64 tensor on its device, without gradient.

    Raises:
        TypeError: anything else.
    """
    if isinstance(values, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array without a mask, got a masked one; choose the values first")
    if isinstance(values, np.ndarray):
        if values.dtype.kind != "f":
            raise TypeError(f"{name}: expected floating-point numbers, got {values.dtype}")
        values = torch.from_numpy(np.require(values, np.float64, ["C", "W"]))  # torch warns of read-only arrays
    if not isinstance(values, Tensor):
        raise TypeError(f"{name}: expected a tensor or an array, got {type(values).__name__}")
    check_tensor(values, name)
    if not values.is_floating_point():
        raise TypeError(f"{name}: expected floating-point numbers, got {values.dtype}")
    if values.is_meta:
        raise TypeError(f"{name}: expected a tensor with values, got one on the meta device")
    return values.detach().to(torch.float64)


def check_features(values: Any, name: str, *, at_least: int = 0) -> Tensor:
    """Return features (N, d), N >= `at_least`, as float64.

    Raises:
        TypeError: see `as_tensor`.
        ValueError: another shape; too few; NaN, infinity, or numbers beyond 1e150.
    """
    x_nd = as_tensor(values, name)
    if x_nd.ndim != 2 or x_nd.shape[1] == 0 or len(x_nd) < at_least:
        bound = f", N >= {at_least}" if at_least else ""
        raise ValueError(f"{name}: expected shape (N, d){bound}, got {tuple(x_nd.shape)}")
    good_n = (x_nd.abs() <= _LARGEST).all(1)
    if not bool(good_n.all()):
        row = int(good_n.logical_not().nonzero()[0, 0])
        raise ValueError(f"{name}: expected finite numbers within 1e150, got others in row {row}")
    return x_nd


def check_moments(mean: Any, cov: Any, mean_name: str, cov_name: str) -> tuple[Tensor, Tensor]:
    """Return a mean (d,) and a covariance (d, d) as float64, the covariance made exactly symmetric.

    Raises:
        TypeError: see `as_tensor`.
        ValueError: another shape; numbers that are not finite; an asymmetric matrix, or one with a negative variance.
    """
    mean_d, cov_dd = as_tensor(mean, mean_name), as_tensor(cov, cov_name)
    if mean_d.ndim != 1 or len(mean_d) == 0:
        raise ValueError(f"{mean_name}: expected shape (d,), got {tuple(mean_d.shape)}")
    if cov_dd.shape != (len(mean_d), len(mean_d)):
        raise ValueError(f"{cov_name}: expected shape {(len(mean_d),) * 2}, got {tuple(cov_dd.shape)}")
    for name, values in ((mean_name, mean_d), (cov_name, cov_dd)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity")
    largest = cov_dd.abs().max().item()
    # Files may hold what float32 arithmetic left.
    if bool(((cov_dd - cov_dd.T).abs() > 1e-5 * largest).any()):
        raise ValueError(f"{cov_name}: expected a symmetric matrix, got an asymmetric one")
    if (least := cov_dd.diagonal().min().item()) < -1e-5 * largest:
        raise ValueError(f"{cov_name}: expected variances >= 0, got {least:.4g}")
    return mean_d, (cov_dd + cov_dd.T) / 2


def _read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = archive.files
            arrays = {name: archive[name] for name in ("mu", "sigma", "count") if name in names}
    except Exception as error:  # whatever numpy and zipfile make of the file
        told = str(error)
        if "Object arrays" in told:
            told = "of Python objects"
        elif "allow_pickle" in told:  # numpy's advice is to load the file unsafely
            told = ""
        raise unreadable(path, ARCHIVE, told) from error
    if missing := sorted({"mu", "sigma"} - arrays.keys()):
        held = name_some(names) or "none"
        raise ValueError(f"{path}: expected the arrays mu and sigma, got no {' and '.join(missing)} (it holds {held})")
    return arrays
