"""The example of docs/losses.md runs, on weights by a formula under the usual names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parents[3] / "docs" / "losses.md"


def test_the_example_runs(
    weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    torch.save(weights.vgg, tmp_path / "vgg16-397923af.pth")
    torch.save(weights.heads, tmp_path / "vgg.pth")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, str(PAGE), "exec"), {})
    checksums, *steps = capsys.readouterr().out.splitlines()
    assert checksums.count("'") == 8 and len(steps) == 2
    assert all(float(value) >= 0 for step in steps for value in step.split()[:2])
