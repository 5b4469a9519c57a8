"""Two processes with the discriminator in DistributedDataParallel, each with a half of the batch."""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rqgen.losses import AdversarialLoss, PatchDiscriminator


class Output(NamedTuple):
    reconstruction: Tensor


class Loss(NamedTuple):
    total: Tensor
    output: Output


def parts() -> list[Tensor]:
    return list((torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1).split(2))


def modules() -> tuple[nn.Conv2d, PatchDiscriminator]:
    torch.manual_seed(1)
    return nn.Conv2d(3, 3, 3, padding=1), PatchDiscriminator(3, 4, 2, "actnorm")


def step(tokenizer: nn.Conv2d, losses: AdversarialLoss, images: Tensor) -> tuple[Tensor, Tensor]:
    """Adaptive weight, and the gradient that the generator's loss leaves in the tokenizer."""
    reconstruction = tokenizer(images)
    loss = Loss(F.mse_loss(reconstruction, images), Output(reconstruction))
    generator = losses.generator(loss, images, last_layer=tokenizer.weight)
    tokenizer.zero_grad()
    generator.total.backward()
    losses.critic.zero_grad()
    losses.discriminator(images, reconstruction).total.backward()
    return generator.adaptive_weight, tokenizer.weight.grad


def worker(store: str, rank: str, out: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=2, timeout=timedelta(seconds=60)
    )
    tokenizer, discriminator = modules()
    losses = AdversarialLoss(nn.parallel.DistributedDataParallel(discriminator), lecam_weight=0.5)
    results = {}
    for number in range(2):
        weight, gradient = step(tokenizer, losses, parts()[int(rank)])
        results[f"weight{number}"], results[f"tokenizer{number}"] = weight, gradient.clone()
        results |= {f"{name}{number}": p.grad.clone() for name, p in discriminator.named_parameters()}
    torch.save({**results, "averages": losses.logit_averages}, out)
    torch.distributed.barrier()  # a process that is left behind by the other may abort while it ends
    torch.distributed.destroy_process_group()


def test_gradients_of_two_processes(two_processes: Callable[[str], list[Any]]) -> None:
    """The discriminator's gradients are averaged over the ranks, each rank has an adaptive weight of its own, and
    LeCam's averages are those of all images."""
    ranks = two_processes(__file__)
    tokenizer, discriminator = modules()
    # ActNorm is set by the first pass over all ranks' images.
    discriminator(torch.cat([tokenizer(part) for part in parts()]).detach())
    losses = AdversarialLoss(discriminator, lecam_weight=0.5)
    for name, parameter in discriminator.named_parameters():
        assert torch.equal(ranks[0][f"{name}1"], ranks[1][f"{name}1"]), name
        assert parameter.grad is None
    for rank, part in zip(ranks, parts(), strict=True):
        weight, gradient = step(tokenizer, AdversarialLoss(discriminator), part)
        for number in range(2):
            torch.testing.assert_close(rank[f"weight{number}"], weight, rtol=1e-4, atol=0)
            torch.testing.assert_close(rank[f"tokenizer{number}"], gradient, rtol=1e-4, atol=1e-6)
    # One process that has all images: the loss is a mean, and so are LeCam's averages.
    discriminator.zero_grad()
    with torch.no_grad():
        reconstruction = tokenizer(torch.cat(parts()))
    losses.discriminator(torch.cat(parts()), reconstruction).total.backward()
    torch.testing.assert_close(ranks[0]["averages"], losses.logit_averages, rtol=1e-4, atol=1e-6)
    for name, parameter in discriminator.named_parameters():
        torch.testing.assert_close(ranks[0][f"{name}0"], parameter.grad, rtol=1e-3, atol=1e-5)


if __name__ == "__main__":
    worker(*sys.argv[1:])
