from __future__ import annotations

import pytest
import torch

from rqgen.quantizers.seeding import kmeans, sample_vectors


def test_draws_rows_without_replacement(device: torch.device) -> None:
    vectors = torch.arange(40.0, device=device).reshape(20, 2)
    drawn = sample_vectors(vectors, 20)
    assert torch.equal(drawn[drawn[:, 0].argsort()], vectors)
    assert not torch.equal(drawn, vectors)


def test_draws_follow_the_global_generator() -> None:
    vectors = torch.randn(50, 3)
    torch.manual_seed(5)
    first = sample_vectors(vectors, 7)
    other = sample_vectors(vectors, 7)
    torch.manual_seed(5)
    assert torch.equal(sample_vectors(vectors, 7), first)
    assert not torch.equal(other, first)


def test_more_codes_than_vectors_are_near_copies_and_all_different() -> None:
    vectors = torch.randn(5, 3) * torch.tensor([1.0, 100.0, 0.01])
    drawn = sample_vectors(vectors, 17)
    assert drawn.unique(dim=0).shape[0] == 17
    spread = vectors.std(dim=0, correction=0)
    nearest = ((drawn[:, None] - vectors[None]) / spread).abs().amax(-1).amin(1)
    assert nearest.max() <= 0.0101


def test_nothing_to_draw_from() -> None:
    with pytest.raises(ValueError, match="at least one finite vector"):
        sample_vectors(torch.zeros(0, 3), 2)


def test_kmeans_finds_separate_clusters(device: torch.device) -> None:
    centres = torch.randn(6, 4, device=device) * 50
    vectors = (centres.repeat_interleave(40, 0) + torch.randn(240, 4, device=device))[torch.randperm(240)]
    # A start without one code per cluster may settle elsewhere: the best of a few starts must not.
    errors = [torch.cdist(centres, kmeans(vectors, 6, iterations=20)).amin(dim=1).max().item() for _ in range(10)]
    assert min(errors) < 1.0


def test_kmeans_lowers_the_error_of_drawn_codes() -> None:
    vectors = torch.randn(2000, 8)
    drawn = torch.cdist(vectors, sample_vectors(vectors, 32)).amin(dim=1).square().mean()
    clustered = torch.cdist(vectors, kmeans(vectors, 32, iterations=10)).amin(dim=1).square().mean()
    assert clustered < 0.85 * drawn


def test_kmeans_leaves_no_centre_without_vectors() -> None:
    # 30 copies of one point and 10 apart: most drawn centres coincide, and lose every tie.
    vectors = torch.cat([torch.zeros(30, 2), torch.randn(10, 2) * 10])
    centres = kmeans(vectors, 8, iterations=30)
    assert centres.isfinite().all()
    owners = torch.cdist(vectors, centres).argmin(dim=1)
    assert owners.unique().numel() >= 7


def test_kmeans_takes_a_sample_of_much_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rqgen.quantizers.seeding.KMEANS_VECTORS_PER_CODE", 4)
    seen = []

    def search(x: torch.Tensor, *args: object) -> object:
        seen.append(x.shape[0])
        return original(x, *args)

    import rqkernels

    original = rqkernels.residual_search
    monkeypatch.setattr(rqkernels, "residual_search", search)
    assert kmeans(torch.randn(1000, 2), 5, iterations=2).shape == (5, 2)
    assert seen == [20, 20]
