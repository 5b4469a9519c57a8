"""Fixtures of the benchmarks: one run per file and device, written when it is over."""

from __future__ import annotations

from collections.abc import Iterator

import _harness
import pytest
import torch

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(scope="module", params=DEVICES)
def run(request: pytest.FixtureRequest) -> Iterator[_harness.Run]:
    _harness.set_threads()
    slug = request.path.stem.removeprefix("bench_")
    run = _harness.Run(slug, torch.device(request.param))
    yield run
    if run.cases:
        run.write()
