"""The same bits on any number of threads, where nothing is learnt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rqgen.quantizers import Convolution, silu

THREADS = (1, 2, 3, 5, 12)


def on_all_threads(f: Callable[[], Tensor]) -> list[Tensor]:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in THREADS:
            torch.set_num_threads(threads)
            results.append(f())
    finally:
        torch.set_num_threads(before)
    return results


# Each differs between numbers of threads where torch chooses (on a processor with AVX-512).
@pytest.mark.parametrize(
    ("channels", "kernel", "size"),
    [((256, 512), 3, 8), ((512, 256), 1, 8), ((128, 128), 1, 16), ((128, 128), 3, 2), ((24, 24), 1, 32)],
)
def test_convolutions_do_not_depend_on_threads(channels: tuple[int, int], kernel: int, size: int) -> None:
    torch.manual_seed(0)
    convolution = Convolution(*channels, kernel, padding=kernel // 2)
    x = torch.randn(1, channels[0], size, size)
    # An image whose channels lie innermost, and one that says so by strides alone, as attention leaves it.
    rows = x.flatten(2).transpose(1, 2).contiguous()
    single = rows.as_strided(rows.shape, (7, *rows.stride()[1:])).transpose(1, 2).view(x.shape)
    with torch.no_grad():
        found = [y for image in (x, single) for y in on_all_threads(lambda image=image: convolution(image))]
        expected = F.conv2d(x.double(), convolution.weight.double(), convolution.bias.double(), padding=kernel // 2)
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert found[0].is_contiguous()
    torch.testing.assert_close(found[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_silu_does_not_depend_on_threads() -> None:
    x = 5 * torch.randn(1, 128, 50, 50)
    with torch.no_grad():
        found = on_all_threads(lambda: silu(x))
    assert all(torch.equal(other, found[0]) for other in found[1:])
    torch.testing.assert_close(found[0].double(), F.silu(x.double()), atol=0, rtol=1e-6)


def test_training_is_as_torch_has_it() -> None:
    torch.manual_seed(0)
    ours, theirs = Convolution(16, 24, 1), nn.Conv2d(16, 24, 1)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 16, 6, 6)
    assert torch.equal(ours(x), theirs(x)) and torch.equal(silu(ours(x)), F.silu(theirs(x)))
    silu(ours(x)).sum().backward()
    F.silu(theirs(x)).sum().backward()
    assert torch.equal(ours.weight.grad, theirs.weight.grad)
