"""Mean and covariance of features in a stream, and their files."""

import numpy as np
import pytest
import torch

from rqgen.evaluation import FeatureStatistics


def features(count=200, width=7, *, offset=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(count, width, generator=generator, dtype=torch.float64) @ mixing + offset


def statistics_of(*batches):
    statistics = FeatureStatistics()
    for batch in batches:
        statistics.update(batch)
    return statistics


def assert_moments(statistics, x, **tolerance):
    x = x.numpy()
    np.testing.assert_allclose(statistics.mean, x.mean(0), **tolerance)
    np.testing.assert_allclose(statistics.cov, np.cov(x, rowvar=False), **tolerance)
    assert statistics.count == len(x) and statistics.width == x.shape[1]


def test_one_batch_is_numpy_s_mean_and_covariance():
    x = features()
    statistics = statistics_of(x)
    assert_moments(statistics, x, rtol=1e-12)
    assert statistics.mean.dtype == statistics.cov.dtype == torch.float64
    assert torch.equal(statistics.cov, statistics.cov.T)


@pytest.mark.parametrize("sizes", [[200], [1] * 200, [0, 7, 0, 193], [100, 100], [199, 1]])
def test_the_sizes_and_the_order_of_batches_do_not_matter(sizes):
    x = features(offset=3.0)
    batches = x.split(sizes)
    for some in (batches, batches[::-1]):
        assert_moments(statistics_of(*some), x, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("cuts", [(50, 120), (0, 200), (1, 2), (200, 200)])
def test_merged_statistics_are_those_of_all(cuts):
    x = features(offset=-2.0)
    parts = [statistics_of(part) for part in (x[: cuts[0]], x[cuts[0] : cuts[1]], x[cuts[1] :])]
    merged = FeatureStatistics()
    for part in parts[::-1]:
        merged.merge(part)
    assert_moments(merged, x, rtol=1e-11, atol=1e-13)
    # What was merged stays as it was, and shares no memory.
    merged.update(x)
    assert [part.count for part in parts] == [cuts[0], cuts[1] - cuts[0], 200 - cuts[1]]
    merged.merge(merged)
    assert_moments(merged, x.repeat(4, 1), rtol=1e-11, atol=1e-13)


def test_a_large_mean_costs_no_accuracy():
    """E[x^2] - E[x]^2 has nothing left of a variance of 1 at a mean of 1e9; neither has float32."""
    x = features(4000) + 1e9
    statistics = statistics_of(*x.split(37))
    exact = np.cov((x - 1e9).numpy(), rowvar=False)
    np.testing.assert_allclose(statistics.cov, exact, atol=1e-5)
    naive = (x.T @ x) / len(x) - x.mean(0)[:, None] * x.mean(0)
    assert np.abs(naive.numpy() - exact).max() > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_sums_of_short_types_are_float64(dtype):
    x = features(1000).to(dtype)
    assert_moments(statistics_of(*x.split(64)), x.double(), rtol=1e-11, atol=1e-13)
    array = x.float().numpy()
    assert_moments(statistics_of(array), x.double(), rtol=1e-11, atol=1e-13)


@pytest.mark.filterwarnings("error")
def test_arrays_of_any_layout_are_taken_and_left_alone():
    x = features()
    array = x.numpy()[::-1, ::-1]
    array.flags.writeable = False
    for same in (array, array.astype(">f8"), np.asfortranarray(array)):
        assert_moments(statistics_of(same), x.flip(0, 1), rtol=1e-12)
    assert np.array_equal(array, x.flip(0, 1).numpy())


def test_what_is_read_is_a_copy():
    statistics = statistics_of(features())
    mean, cov = statistics.mean.clone(), statistics.cov.clone()
    statistics.mean.zero_()
    statistics.cov.zero_()
    assert torch.equal(statistics.mean, mean) and torch.equal(statistics.cov, cov)


def with_row(value, row=3):
    x = features()
    x[row, 2] = value
    return x


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        (with_row(float("nan")), ValueError, "features: expected finite numbers within 1e150, got others in row 3"),
        (with_row(float("-inf")), ValueError, "got others in row 3"),
        (with_row(1e151), ValueError, "within 1e150, got others in row 3"),
        (features(width=6), ValueError, "features: expected 7 per image, as before, got 6"),
        (features()[0], ValueError, r"features: expected shape \(N, d\), got \(7,\)"),
        (features()[:, :0], ValueError, r"features: expected shape \(N, d\), got \(200, 0\)"),
        (torch.zeros(2, 7, dtype=torch.int64), TypeError, "features: expected floating-point numbers, got torch.int64"),
        (np.zeros((2, 7), dtype=np.uint8), TypeError, "features: expected floating-point numbers, got uint8"),
        (np.zeros((2, 7), dtype=complex), TypeError, "features: expected floating-point numbers, got complex128"),
        ([[1.0] * 7], TypeError, "features: expected a tensor or an array, got list"),
        (features(4).to_sparse(), TypeError, "features: expected a dense tensor, got sparse_coo"),
        (features(4).to("meta"), TypeError, "features: expected a tensor with values, got one on the meta device"),
        (np.ma.masked_array(np.zeros((2, 7)), mask=True), TypeError, "features: expected an array without a mask"),
    ],
)
def test_a_refused_batch_changes_nothing(bad, error, words):
    x = features()
    statistics = statistics_of(x)
    with pytest.raises(error, match=words):
        statistics.update(bad)
    assert_moments(statistics, x, rtol=1e-12)


def test_too_few_features_have_no_moments():
    statistics = FeatureStatistics()
    statistics.update(features()[:0])
    assert statistics.count == 0 and statistics.width is None
    with pytest.raises(ValueError, match="at least one feature vector for a mean, got none"):
        _ = statistics.mean
    statistics.update(features(1))
    with pytest.raises(ValueError, match="at least two feature vectors for a covariance, got 1"):
        _ = statistics.cov


def test_statistics_begun_in_inference_mode_go_on_outside(tmp_path):
    x, y = features(), features(seed=1)
    with torch.inference_mode():
        statistics = statistics_of(x * 1)
        other = statistics_of(y * 1)
        other.save(tmp_path / "other.npz")
        read = FeatureStatistics.load(tmp_path / "other.npz")
    statistics.update(y)
    read.update(x)
    other.merge(statistics)
    assert_moments(statistics, torch.cat([x, y]), rtol=1e-11, atol=1e-13)
    assert_moments(read, torch.cat([y, x]), rtol=1e-11, atol=1e-13)
    assert other.count == 600


def test_other_statistics_are_refused():
    statistics = statistics_of(features())
    with pytest.raises(TypeError, match="other: expected FeatureStatistics, got Tensor"):
        statistics.merge(features())
    with pytest.raises(ValueError, match="other: expected 7 features per image, got 6"):
        statistics.merge(statistics_of(features(width=6)))
    assert_moments(statistics, features(), rtol=1e-12)


def test_files_go_round_and_can_be_added_to(tmp_path):
    x = features()
    path = tmp_path / "statistics.npz"
    statistics_of(x[:150]).save(path)
    with np.load(path, allow_pickle=False) as archive:
        assert sorted(archive.files) == ["count", "mu", "sigma"] and archive["count"] == 150
        np.testing.assert_allclose(archive["mu"], x[:150].numpy().mean(0), rtol=1e-12)
        np.testing.assert_allclose(archive["sigma"], np.cov(x[:150].numpy(), rowvar=False), rtol=1e-12)
    loaded = FeatureStatistics.load(path)
    loaded.update(x[150:])
    assert_moments(loaded, x, rtol=1e-11, atol=1e-13)
    first = path.read_bytes()
    statistics_of(x[:150]).save(path)
    assert path.read_bytes() == first and [one.name for one in tmp_path.iterdir()] == ["statistics.npz"]


def test_published_files_have_moments_alone(tmp_path):
    x = features().numpy()
    path = tmp_path / "published.npz"
    np.savez(path, mu=x.mean(0).astype(np.float32), sigma=np.cov(x, rowvar=False).astype(np.float32))
    loaded = FeatureStatistics.load(str(path))
    np.testing.assert_allclose(loaded.cov, np.cov(x, rowvar=False), rtol=1e-5, atol=1e-5)
    assert loaded.count is None and loaded.width == 7
    for call in (
        lambda: loaded.update(features()),
        lambda: loaded.merge(loaded),
        lambda: statistics_of().merge(loaded),
    ):
        with pytest.raises(ValueError, match="expected statistics with a count, got ones loaded from a file without"):
            call()
    loaded.save(tmp_path / "again.npz")
    assert torch.equal(FeatureStatistics.load(tmp_path / "again.npz").cov, loaded.cov)


def archive(**arrays):
    good = {"mu": np.zeros(3), "sigma": np.eye(3)} | arrays
    return lambda path: np.savez(path, **{name: array for name, array in good.items() if array is not None})


def text(content):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (archive(sigma=None), r"expected the arrays mu and sigma, got no sigma \(it holds mu\)"),
        (archive(mu=None, sigma=None, data=np.zeros(1)), r"got no mu and sigma \(it holds data\)"),
        (archive(mu=np.zeros(2)), r"sigma: expected shape \(2, 2\), got \(3, 3\)"),
        (archive(mu=np.zeros((1, 3))), r"mu: expected shape \(d,\), got \(1, 3\)"),
        (archive(mu=np.array([0, np.nan, 0])), "mu: expected finite numbers, got NaN or infinity"),
        (archive(sigma=np.full((3, 3), np.inf)), "sigma: expected finite numbers, got NaN or infinity"),
        (archive(sigma=np.triu(np.ones((3, 3)))), "sigma: expected a symmetric matrix, got an asymmetric one"),
        (archive(sigma=-np.eye(3)), "sigma: expected variances >= 0, got -1"),
        (archive(mu=np.zeros(3, dtype=int)), "mu: expected floating-point numbers, got int64"),
        (archive(count=np.int64(1)), "count: expected an integer >= 2, got 1"),
        (archive(count=np.float64(9)), "count: expected an integer, got 9.0"),
        (
            archive(mu=np.array([{}, 1, 2])),
            r"not a readable archive of NumPy arrays \(.npz\): it is an archive of NumPy.*of Python objects",
        ),
        (text(b"hi"), r"it is a file of 2 bytes"),
        (text(b"\x89PNG\r\n\x1a\n" + b"0" * 50), r"not a readable archive of NumPy arrays \(.npz\): it is a PNG image"),
        (text(b"<!doctype html><html>"), "it is an HTML page"),
        (text(b""), "it is an empty file"),
    ],
)
def test_other_files_are_told(tmp_path, write, words):
    path = tmp_path / "bad.npz"
    write(path)
    with pytest.raises(ValueError, match=words) as caught:
        FeatureStatistics.load(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert "allow_pickle" not in str(caught.value)  # numpy's advice is to load the file unsafely


def test_damaged_files_are_told(tmp_path):
    path = tmp_path / "statistics.npz"
    statistics_of(features()).save(path)
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:300] + bytes(8) + content[308:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"not a readable archive of NumPy arrays \(.npz\)"):
            FeatureStatistics.load(path)
    with pytest.raises(FileNotFoundError, match="no file"):
        FeatureStatistics.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.npz, got '.*statistics'"):
        statistics_of(features()).save(tmp_path / "statistics")


@pytest.mark.gpu
def test_features_of_a_gpu_stay_there():
    x = features(offset=5.0)
    statistics = statistics_of(*x.cuda().split(37))
    assert_moments(statistics, x, rtol=1e-11, atol=1e-13)
    other = statistics_of(x)
    other.merge(statistics)
    assert_moments(other, x.repeat(2, 1), rtol=1e-11, atol=1e-13)
