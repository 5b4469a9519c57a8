"""The definition of drawing a code from logits."""

from __future__ import annotations

import pytest
import torch

from rqkernels.reference import sample_logits


def frequencies(logits: torch.Tensor, **options: object) -> torch.Tensor:
    draws = sample_logits(logits.expand(50_000, -1), seed=1, **options)
    return torch.bincount(draws, minlength=logits.numel()).double() / 50_000


def test_plain_softmax() -> None:
    logits = torch.randn(12)
    torch.testing.assert_close(frequencies(logits), logits.double().softmax(-1), atol=0.01, rtol=0)
    torch.testing.assert_close(
        frequencies(logits, temperature=2.0), (logits.double() / 2).softmax(-1), atol=0.01, rtol=0
    )


def test_zero_temperature_and_top_1_are_argmax_with_the_lowest_index() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert sample_logits(logits, temperature=0, seed=9).tolist() == [1, 0]
    assert sample_logits(logits, top_k=1, seed=9).tolist() == [1, 0]


def test_top_k_keeps_exactly_k_and_prefers_the_lower_index() -> None:
    observed = frequencies(torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0]), top_k=3)
    torch.testing.assert_close(observed, torch.tensor([0, 1, 1, 1, 0]).double() / 3, atol=0.01, rtol=0)
    assert frequencies(torch.zeros(4), top_k=100).min() > 0.2  # more than there are: all


def test_top_p_keeps_a_code_while_the_mass_before_it_is_below() -> None:
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    torch.testing.assert_close(frequencies(logits, top_p=0.49), torch.tensor([0, 1, 0]).double())
    observed = frequencies(logits, top_p=0.51)
    torch.testing.assert_close(observed, torch.tensor([0, 0.625, 0.375]).double(), atol=0.01, rtol=0)
    torch.testing.assert_close(frequencies(logits, top_p=1.0), logits.double().exp(), atol=0.01, rtol=0)


def test_top_k_comes_before_top_p() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Among the two kept, the first has 4/7 of the mass: 0.5 < 4/7, so it alone stays.
    torch.testing.assert_close(frequencies(logits, top_k=2, top_p=0.5), torch.tensor([1, 0, 0, 0]).double())


def test_draws_depend_on_row_stream_and_seed_alone() -> None:
    logits = torch.randn(64, 20)
    whole = sample_logits(logits, seed=4, offset=10, stream=3)
    parts = [sample_logits(logits[i : i + 5], seed=4, offset=10 + i, stream=3) for i in range(0, 64, 5)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(sample_logits(logits.view(8, 8, 20), seed=4, offset=10, stream=3), whole.view(8, 8))
    for other in ({"seed": 5}, {"offset": 11}, {"stream": 4}):
        assert not torch.equal(sample_logits(logits, **{"seed": 4, "offset": 10, "stream": 3, **other}), whole)


def test_forbidden_codes_are_never_drawn() -> None:
    logits = torch.full((1000, 5), -torch.inf)
    logits[:, 3] = -1e4
    assert sample_logits(logits, seed=0).eq(3).all()


def test_no_rows() -> None:
    assert sample_logits(torch.zeros(0, 5), seed=0).shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(temperature=-1.0), "temperature must be >= 0"),
        (dict(temperature=float("nan")), "temperature must be >= 0"),
        (dict(top_k=0), "top_k must be >= 1"),
        (dict(top_p=0.0), "top_p must be in"),
        (dict(top_p=1.5), "top_p must be in"),
        (dict(logits=torch.tensor([[0.0, torch.nan]])), "a row has NaN"),
        (dict(logits=torch.tensor([[0.0, torch.inf]])), "a row has NaN"),
        (dict(logits=torch.full((1, 2), -torch.inf)), "nothing but -inf"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_logits(**{"logits": torch.zeros(1, 2), "seed": 0, **change})
