"""Fixtures of the benchmarks: one run per file and device, written at its end."""

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
    try:
        run = _harness.Run(slug, torch.device(request.param))
    except ValueError as error:
        pytest.exit(str(error), returncode=pytest.ExitCode.USAGE_ERROR)
    yield run
    if run.cases:
        run.write()
