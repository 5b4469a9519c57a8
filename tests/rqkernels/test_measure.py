"""The measuring library of all benchmarks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from rqkernels import _measure

CPU = torch.device("cpu")


def test_slow_calls_have_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, called = [0], []

    def call(name: str, seconds: int) -> None:
        called.append(name)
        clock[0] += seconds * 10**9

    monkeypatch.setattr(_measure.time, "perf_counter_ns", lambda: clock[0])
    calls = [lambda name=name, takes=takes: call(name, takes) for name, takes in {"a": 1, "b": 4, "c": 30}.items()]
    times = _measure.interleave(calls, CPU, 24.0, warm_up=False)
    assert [(one.median / 1e9, len(one.samples)) for one in times] == [(1, 8), (4, 2), (30, 1)]
    assert "".join(called) == "abcaaaabaaa"
    assert _measure.interleave([], CPU, 1.0) == []
    assert len(_measure.interleave(calls[:1], CPU, 2.0)[0].samples) == 2
    assert "".join(called)[11:] == "aaa"  # one to warm up


def test_times_are_summed_up() -> None:
    times = _measure.Times([5, 1, 4])
    assert (times.median, times.least, times.most) == (4, 1, 5)


def test_the_floor_is_of_the_unit_that_takes_longer() -> None:
    rates = _measure.Rates(100.0, {"fp32": 10.0, "int8": 40.0})
    assert rates.floor_ns(300, 20, "fp32") == (3e9, "memory bandwidth")
    assert rates.floor_ns(300, 40, "fp32") == (4e9, "matrix unit")
    assert rates.floor_ns(300, 40, "int8") == (3e9, "memory bandwidth")


def test_a_peak_is_the_best_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_measure, "COPIED_BYTES", {"cpu": 4000})
    monkeypatch.setattr(_measure, "PRODUCT_SIDE", {"cpu": 10})
    # Copy, fp32, bf16 and int8 by turns; int8 is the slowest here, and never counts for less than the wider ones.
    times = iter([10, 20, 40, 80, 8, 40, 10, 80, 20, 40, 40, 80, 4, 40, 40, 80])
    monkeypatch.setattr(_measure, "time_call", lambda call, device: (next(times), call()))
    peaks = _measure.Peaks(CPU)
    rates = peaks.rates
    assert rates.copy_bytes_per_s == 2e9 * 4000 / 8
    assert rates.operations_per_s == {"fp32": 2e9 * 1000 / 20, "bf16": 2e9 * 1000 / 10, "int8": 2e9 * 1000 / 10}
    peaks.probe()
    assert peaks.rates.copy_bytes_per_s == 2e9 * 4000 / 4
    assert set(rates.described()) == {"copy_bytes_per_s", "operations_per_s"}


def test_memory_of_a_call_counts_its_result_and_not_what_stood_before() -> None:
    before = torch.ones(1 << 22)
    needed = _measure.peak_memory(lambda: before + 1, CPU)
    assert needed is not None and before.nbytes <= needed < 2 * before.nbytes


def test_a_checkout_is_dirty_where_tracked_files_changed(tmp_path: Path) -> None:
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert _measure.checkout(tmp_path) == (None, None)
    git("init")
    (tmp_path / "results").mkdir()
    for name in ("source", "results/table"):
        (tmp_path / name).write_text("one")
    git("add", ".")
    git("commit", "-m", "one")
    (tmp_path / "untracked").write_text("two")
    assert _measure.checkout(tmp_path).dirty is False
    (tmp_path / "results" / "table").write_text("two")
    assert _measure.checkout(tmp_path).dirty is True
    assert _measure.checkout(tmp_path, ignored=["results"]).dirty is False
    (tmp_path / "source").write_text("two")
    state = _measure.checkout(tmp_path, ignored=["results"])
    assert state.dirty is True and state.commit is not None and len(state.commit) == 40


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [
        ("model name\t: A Processor 9\ncpu family\t: 6\nmodel\t\t: 1\n", "A Processor 9"),
        ("model name\t: AMD EPYC\ncpu family\t: 26\nmodel\t\t: 2\n", "AMD EPYC, family 26 model 2"),
    ],
)
def test_a_generic_name_is_completed(monkeypatch: pytest.MonkeyPatch, cpuinfo: str, name: str) -> None:
    second = cpuinfo.replace("model name", "nobody reads")
    monkeypatch.setattr(_measure.Path, "read_text", lambda path: f"{cpuinfo}\n{second}")
    assert _measure.device_name(CPU) == name
    assert _measure.slug(name) == name.lower().replace(",", "").replace(" ", "-")


def test_an_environment_says_where_a_number_comes_from() -> None:
    facts = _measure.environment(CPU, _measure.Checkout("abc", False), ["torch", "no-such-package"])
    assert facts["versions"] == {"torch": torch.__version__}
    assert (facts["commit"], facts["dirty"], facts["threads"]) == ("abc", False, torch.get_num_threads())
    assert {"device", "platform", "python", "cuda", "rqkernels", "warm_heap", "time"} <= set(facts)
