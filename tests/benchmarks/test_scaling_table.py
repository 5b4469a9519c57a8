"""The tables of docs/scaling.md say what a run's JSON says, and are those of the kept results."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        spec = importlib.util.spec_from_file_location("scaling_table", BENCHMARKS / "scaling_table.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_a_row_for_each_model_and_each_law(script: ModuleType) -> None:
    member = {
        "depth": 2,
        "block_parameters": 593412,
        "parameters": 662340,
        "training_tokens": 480000,
        "learning_rate": 2e-3,
        "training_loss": 2.5,
        "loss": 2.39414,
        "last_scale_loss": 2.57981,
        "error_rate": 0.65633,
        "last_scale_error_rate": 0.6781,
        "seconds": 59.6,
    }
    result = {
        "members": [member, {**member, "depth": 3, "seconds": 120.4}],
        "laws": [{"title": "test loss", "alpha": -0.03214, "log_beta": -36.841361, "correlation": -0.98765}],
        "held_out_images": 299,
        "tokens_per_image": 30,
        "tokenizer_seconds": 60.0,
        "config": {"prior": {"loop": {"steps": 500, "batch_size": 32, "seed": 0}}},
        "environment": {
            "device": "a processor",
            "threads": 2,
            "warm_heap": True,
            "python": "3.11",
            "versions": {"torch": "2.13", "rqkernels": "0.1.0"},
            "commit": "0123456789abcdef",
            "dirty": False,
            "time": "2026-01-01T00:00:00Z",
        },
    }
    lines = script.tables(result).splitlines()
    assert lines[0].startswith(
        "a processor, 2 threads, warm heap, Python 3.11, torch 2.13, rqkernels 0.1.0, commit 0123456789ab, "
    )
    assert "480000 tokens each, in 500 updates of 32 images, seed 0;" in lines[0]
    assert lines[0].endswith("tested on 299 images of 30 tokens. Trained in 4.0 minutes, tokenizer included.")
    assert lines[4] == "| 2 | 593,412 | 662,340 | 0.002 | 2.500 | 2.3941 | 2.5798 | 65.63 % | 67.81 % | 60 |"
    assert lines[5].startswith("| 3 |") and lines[5].endswith("| 120 |")
    assert lines[-1] == "| test loss | -0.0321 | 1.00e-16 | -0.9877 |"
    result["tokenizer_seconds"] = None
    assert "Trained in 3.0 minutes" in script.tables(result).splitlines()[0]
    result["environment"]["dirty"] = True
    with pytest.raises(ValueError, match="measured with uncommitted changes on 2026-01-01T00:00:00Z"):
        script.tables(result)


def test_the_tables_in_the_docs_are_those_of_the_results(script: ModuleType) -> None:
    result = json.loads(script.RESULTS.read_text())
    assert f"{script.BEGIN}\n\n{script.tables(result)}\n\n{script.END}" in script.DOCS.read_text()
