"""Residual quantization over scales."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import rqkernels
from rqgen.quantizers import MultiScaleConfig, MultiScaleQuantizer

SCALES = [1, [2, 3], [4, 5]]


def make(**settings: Any) -> MultiScaleQuantizer:
    settings = {"codebook_size": 16, "scales": SCALES, "refinements": 2, "init": "random", **settings}
    return MultiScaleQuantizer(MultiScaleConfig(**settings), 6)


@pytest.fixture
def features() -> torch.Tensor:
    return torch.randn(3, 6, 4, 5)


@pytest.mark.parametrize("normalize", [False, True])
def test_encoding_is_the_residual_loop_of_the_paper(features: torch.Tensor, normalize: bool) -> None:
    quantizer = make(normalize=normalize).eval()
    rest, total = features, torch.zeros_like(features)
    expected = []
    with torch.no_grad():
        for k, (h, w) in enumerate(quantizer.config.scales):
            shrunk = F.adaptive_avg_pool2d(rest, (h, w)).permute(0, 2, 3, 1)
            codebook = quantizer.codebook
            if normalize:
                tokens = (F.normalize(shrunk, dim=-1) @ F.normalize(codebook, dim=-1).t()).argmax(-1)
            else:
                tokens = torch.cdist(shrunk, codebook).argmin(-1)
            enlarged = F.interpolate(codebook[tokens].permute(0, 3, 1, 2), size=(4, 5), mode="bicubic")
            phi = quantizer.refinements[0 if k == 0 else 1 if k == 2 else quantizer_index(quantizer, k)]
            added = 0.5 * enlarged + 0.5 * F.conv2d(enlarged, phi.weight, phi.bias, padding=1)
            rest, total = rest - added, total + added
            expected.append(tokens)
    codes = quantizer.encode(features)
    assert all(torch.equal(a, b) for a, b in zip(codes, expected, strict=True))
    torch.testing.assert_close(quantizer.decode(codes), total, atol=1e-5, rtol=0)


def quantizer_index(quantizer: MultiScaleQuantizer, k: int) -> int:
    # Two refinements stand at 1/4 and 3/4, the middle scale of three at 1/2: the first of the two serves.
    assert (len(quantizer.refinements), quantizer.num_scales, k) == (2, 3, 1)
    return 0


def test_decoding_of_some_scales_adds_up(features: torch.Tensor) -> None:
    quantizer = make().eval()
    codes = quantizer.encode(features)
    with torch.no_grad():
        totals = [quantizer.decode(codes, k + 1) for k in range(3)]
        inputs = list(quantizer.next_inputs(codes))
    assert torch.equal(quantizer.decode(codes), totals[-1])
    for k in range(2):
        assert torch.equal(inputs[k], quantizer.downsample(totals[k], k + 1))
    # The last scale looks at single places, so it can only come closer than it was.
    error = [(features - total).square().mean() for total in totals]
    assert not torch.equal(totals[0], totals[1]) and error[2].isfinite()


def test_output_and_gradients(features: torch.Tensor) -> None:
    quantizer = make().train()
    wanted = features.clone().requires_grad_()
    output = quantizer(wanted)
    totals = [quantizer.decode(output.codes, k + 1) for k in range(3)]
    assert torch.equal(output.quantized, totals[-1])
    loss = torch.stack([(features - total).square().mean() for total in totals]).mean()
    torch.testing.assert_close(output.commitment_loss, loss)
    torch.testing.assert_close(output.codebook_loss, loss)

    (straight,) = torch.autograd.grad(output.quantized.sum(), wanted, retain_graph=True)
    assert torch.equal(straight, torch.ones_like(straight))
    (committed,) = torch.autograd.grad(output.commitment_loss, wanted, retain_graph=True)
    expected = sum(2 * (features - total) for total in totals) / (3 * features.numel())
    torch.testing.assert_close(committed, expected.detach())
    output.codebook_loss.backward()
    assert wanted.grad is None  # the codebook term moves the codebook alone
    assert quantizer.codebook.grad.abs().sum() > 0
    assert all(phi.weight.grad.abs().sum() > 0 for phi in quantizer.refinements)


def test_the_value_does_not_depend_on_autocast(features: torch.Tensor) -> None:
    quantizer = make().eval()
    plain = quantizer(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = quantizer(features)
    assert torch.equal(plain.quantized, cast.quantized)
    assert quantizer(features.bfloat16()).quantized.dtype == torch.bfloat16


def test_the_first_training_batch_gives_the_codebook() -> None:
    features = torch.randn(64, 6, 4, 5) * 3 + 5
    quantizer = make(codebook_size=60, init="data").train()
    before = quantizer(features)
    assert quantizer.initialized
    # From the data's scale, and of use: most of the signal's power is explained at once.
    assert before.commitment_loss < 0.5 * features.square().mean()
    codebook = quantizer.codebook.detach().clone()
    quantizer(features)
    assert torch.equal(codebook, quantizer.codebook)
    quantizer = make(init="data").eval()
    quantizer(features)
    assert not quantizer.initialized


def test_usage_counts_every_scale_and_only_in_training(features: torch.Tensor) -> None:
    quantizer = make().eval()
    quantizer(features)
    assert all(int(usage.counts().sum()) == 0 for usage in quantizer.usage)
    output = quantizer.train()(features)
    for usage, tokens in zip(quantizer.usage, output.codes, strict=True):
        assert int(usage.counts().sum()) == tokens.numel()
        assert int(usage.codes_used()) == tokens.unique().numel()


def test_a_place_that_is_not_finite_has_no_token(features: torch.Tensor) -> None:
    quantizer = make(scales=[[4, 5]]).eval()
    features[1, 2, 3, 4] = torch.nan
    codes = quantizer.encode(features)[0]
    assert codes[1, 3, 4] == -1 and (codes == -1).sum() == 1
    assert quantizer.embed(codes)[1, 3, 4].isnan().all()


def test_no_refinement_adds_what_was_looked_up(features: torch.Tensor) -> None:
    quantizer = make(refinements=0, scales=[[4, 5]]).eval()
    codes = quantizer.encode(features)
    found = rqkernels.residual_search(features.permute(0, 2, 3, 1), quantizer.codebook.detach(), 1)
    assert torch.equal(codes[0], found.codes[..., 0])
    assert torch.equal(quantizer.decode(codes).permute(0, 2, 3, 1), found.quantized)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": []}, "scales: expected at least one"),
        ({"scales": [1, 0]}, r"scales: expected \[h, w\] or one number >= 1 for each, got 0"),
        ({"scales": [[1, 2, 3]]}, r"scales: expected \[h, w\] or one number >= 1 for each, got \[1, 2, 3\]"),
        ({"scales": [4, 3]}, r"expected none larger than the last, \[3, 3\], got \[4, 4\]"),
        ({"codebook_size": 0}, "codebook_size: expected at least 1"),
        ({"refinements": -1}, "refinements: expected at least 0, got -1"),
        ({"refinement_ratio": 1.5}, "refinement_ratio: expected a number within"),
        ({"init": "zeros"}, "init: expected one of data, random"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MultiScaleConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": ["2"]}, r"scales\[0\]: expected an integer or a list"),
        ({"codebook_size": "8"}, "codebook_size: expected an integer, got '8'"),
        ({"normalize": 1}, "normalize: expected true or false, got 1"),
    ],
)
def test_settings_of_wrong_types_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        MultiScaleConfig(**settings)


def test_bad_arguments_are_named(features: torch.Tensor) -> None:
    quantizer = make().eval()
    codes = quantizer.encode(features)
    with pytest.raises(ValueError, match=r"features: expected \(B, 6, 4, 5\), got shape \(3, 6, 5, 4\)"):
        quantizer(features.transpose(2, 3))
    with pytest.raises(ValueError, match="code_dim: expected at least 1"):
        MultiScaleQuantizer(MultiScaleConfig(), 0)
    with pytest.raises(TypeError, match="codes: expected a list of token maps, got Tensor"):
        quantizer.decode(codes[0])
    with pytest.raises(ValueError, match="codes: expected 3 token maps, got 2"):
        quantizer.decode(codes[:2])
    with pytest.raises(TypeError, match=r"codes\[1\]: expected int64, got torch.int32"):
        quantizer.decode([codes[0], codes[1].int(), codes[2]])
    with pytest.raises(ValueError, match=r"codes\[2\]: expected shape \(B, 4, 5\), got \(3, 5, 4\)"):
        quantizer.decode([codes[0], codes[1], codes[2].transpose(1, 2)])
    with pytest.raises(IndexError, match=r"codes\[2\]: expected values in \[0, 16\), got 16"):
        quantizer.decode([codes[0], codes[1], torch.full((3, 4, 5), 16).index_fill(1, torch.tensor(0), 0)])
    with pytest.raises(ValueError, match=r"scales: expected 1..3, got 4"):
        quantizer.decode(codes, 4)


def train_in_a_group(store: str, rank: int, out: str) -> None:
    """One of two processes, each with images and random numbers of its own, whose gradients are averaged."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    quantizer = make(init="data").train()
    wrapped = DistributedDataParallel(quantizer)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)
    states = []
    for _ in range(3):
        wrapped(torch.randn(3, 6, 4, 5)).codebook_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        states.append({name: parameter.detach().clone() for name, parameter in quantizer.named_parameters()})
    torch.save((states, quantizer.usage.counts()), out)
    dist.barrier()  # a process that is left behind by the other may abort while it ends
    dist.destroy_process_group()


def test_two_processes_train_one_codebook(two_processes: Callable[[str], list[Any]]) -> None:
    (first, first_counts), (second, second_counts) = two_processes(__file__)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert all((first[0][name] != first[-1][name]).any() for name in first[0])
    assert not torch.equal(first_counts, second_counts)  # they did see other images


if __name__ == "__main__":
    train_in_a_group(sys.argv[1], int(sys.argv[2]), sys.argv[3])


def test_a_parametrized_codebook_is_not_drawn_from_data() -> None:
    class Half(torch.nn.Module):
        def forward(self, codebook: torch.Tensor) -> torch.Tensor:
            return 0.5 * codebook

    quantizer = MultiScaleQuantizer(MultiScaleConfig(codebook_size=16, scales=[1, 2], refinements=1), 4)
    value = quantizer.codebook.detach() * 0.5
    torch.nn.utils.parametrize.register_parametrization(quantizer, "codebook", Half())
    assert torch.equal(quantizer.fixed_tensors()["codebook"], value)
    with pytest.raises(ValueError, match="quantizer: its codebook is parametrized"):
        quantizer.train()(torch.randn(3, 4, 2, 2))
