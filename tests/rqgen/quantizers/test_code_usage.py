from __future__ import annotations

import pytest
import torch

from rqgen.quantizers import CodeUsage


def test_counts_codes_at_their_depth(device: torch.device) -> None:
    usage = CodeUsage(depth=2, codebook_size=4, window=100).to(device)
    usage.update(torch.tensor([[[0, 3], [0, 3]], [[1, 3], [2, 3]]], device=device))
    assert usage.counts().tolist() == [[2, 1, 1, 0], [0, 0, 0, 4]]
    assert usage.codes_used().tolist() == [3, 1]
    entropy = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    expected = torch.stack([torch.exp(-(entropy * entropy.log()).sum()), torch.tensor(1.0)]).float()
    assert usage.perplexity().cpu().tolist() == pytest.approx(expected.tolist())


def test_perplexity_of_even_use_is_the_codebook_size() -> None:
    usage = CodeUsage(depth=1, codebook_size=64, window=1000)
    usage.update(torch.arange(64).repeat(3).unsqueeze(-1))
    assert usage.perplexity().item() == pytest.approx(64.0)


def test_nothing_counted() -> None:
    usage = CodeUsage(depth=2, codebook_size=4, window=10)
    assert usage.perplexity().tolist() == [0.0, 0.0]
    assert usage.codes_used().tolist() == [0, 0]
    usage.update(torch.zeros(0, 2, dtype=torch.int64))
    assert usage.counts().sum() == 0


def test_codes_of_non_finite_positions_count_nowhere() -> None:
    usage = CodeUsage(depth=2, codebook_size=4, window=10)
    usage.update(torch.tensor([[1, -1], [-1, -1], [1, 2]]))
    assert usage.counts().tolist() == [[0, 2, 0, 0], [0, 0, 1, 0]]


def test_figures_do_not_depend_on_the_batch_size() -> None:
    codes = torch.randint(32, (1200, 3))
    figures = []
    for batch in (1, 10, 100):
        usage = CodeUsage(depth=3, codebook_size=32, window=500)
        for part in codes.split(batch):
            usage.update(part)
        figures.append((usage.codes_used(), usage.perplexity()))
    for used, perplexity in figures[1:]:
        assert torch.equal(used, figures[0][0])
        assert torch.equal(perplexity, figures[0][1])


def test_old_codes_leave_the_window() -> None:
    usage = CodeUsage(depth=1, codebook_size=4, window=10)
    early, late = torch.zeros(10, 1, dtype=torch.int64), torch.full((10, 1), 3)
    usage.update(early)
    usage.update(late)
    assert usage.codes_used().tolist() == [2]
    usage.update(late)
    assert usage.counts().tolist() == [[0, 0, 0, 20]]
    assert usage.codes_used().tolist() == [1]


def test_state_is_saved_and_goes_on_exactly() -> None:
    torch.manual_seed(1)
    batches = [torch.randint(8, (7, 2)) for _ in range(6)]
    whole, first, second = (CodeUsage(depth=2, codebook_size=8, window=15) for _ in range(3))
    for batch in batches:
        whole.update(batch)
    for batch in batches[:3]:
        first.update(batch)
    second.load_state_dict(first.state_dict())
    for batch in batches[3:]:
        second.update(batch)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_reset() -> None:
    usage = CodeUsage(depth=1, codebook_size=4, window=2)
    for _ in range(3):
        usage.update(torch.zeros(2, 1, dtype=torch.int64))
    usage.reset()
    assert all(not tensor.any() for tensor in usage.state_dict().values())
