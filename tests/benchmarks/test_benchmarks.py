"""The benchmarks run, in their smallest shapes, and what they write can be drawn as tables."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
BENCHMARKS = ROOT / "benchmarks"


def quick(*command: object, out: Path) -> subprocess.CompletedProcess[str]:
    # In a worker of pytest-xdist, pytest-benchmark would take the run for another worker and measure nothing.
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**ours, "RQK_BENCH_QUICK": "1", "RQK_BENCH_OUT": str(out)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """Results that one quick run of all benchmarks wrote on the CPU, by benchmark."""
    out = tmp_path_factory.mktemp("results")
    options = ("-o", "python_files=bench_*.py", "-o", "pythonpath=benchmarks", "-p", "no:cacheprovider")
    run = quick("-m", "pytest", "benchmarks", *options, out=out)
    assert run.returncode == 0, run.stdout + run.stderr
    contents = [json.loads(path.read_text()) for path in out.glob("*.json")]
    return {content["slug"]: content for content in contents if content["peaks"]["device"] == "cpu"}


def test_every_benchmark_wrote_its_results(results: dict[str, dict]) -> None:
    assert set(results) == {path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py")}


@pytest.mark.parametrize(
    "slug", ["residual_search", "residual_decode", "code_statistics", "stochastic_residual_search"]
)
def test_a_result_says_what_was_measured_and_where(results: dict[str, dict], slug: str) -> None:
    result = results[slug]
    environment = result["environment"]
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["threads"] >= 1
    assert {"device", "commit", "dirty", "warm_heap", "rqkernels"} <= set(environment)
    assert result["peaks"]["copy_bytes_per_s"] > 0
    assert result["peaks"]["operations_per_s"]["fp32"] > 0
    for case in result["cases"]:
        ours, *peers = case["contenders"]
        assert ours["name"] == "rqkernels"
        assert ours["times_ours_per_row"] == 1.0
        assert peers
        for contender in case["contenders"]:
            assert len(contender["samples_ns"]) == case["rounds"] == 2
            assert contender["p20_ns"] <= contender["median_ns"] <= contender["p80_ns"]
        floor = case["floor"]
        assert floor["percent_of_floor"] == pytest.approx(100 * floor["ns"] / ours["median_ns"])


def test_a_codebook_that_changes_is_another_one_in_every_round(tmp_path: Path) -> None:
    script = tmp_path / "training.py"
    script.write_text(
        "import bench_residual_search as bench, rqkernels, torch\n"
        "seen, search = [], rqkernels.residual_search\n"
        "def watch(x, codebooks, depth):\n"
        "    seen.append(codebooks.sum().item())\n"
        "    return search(x, codebooks, depth)\n"
        "rqkernels.residual_search = watch\n"
        "(case,) = [case for case in bench.CASES if case.changes]\n"
        "bench.run_case(case, torch.device('cpu'))\n"
        "assert len(seen) == len(set(seen)) == 6, seen\n"  # called, checked, its memory and time, and two rounds
    )
    environment = {**os.environ, "RQK_BENCH_QUICK": "1", "PYTHONPATH": f"{BENCHMARKS}:{ROOT}"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_the_search_benchmark_holds_the_published_formulation(results: dict[str, dict]) -> None:
    for case in results["residual_search"]["cases"]:
        agreement = {c["name"]: c["agreement"] for c in case["contenders"]}
        assert agreement["rqkernels"] == 1.0
        assert {"published, eager", "reference (float64)"} <= set(agreement)


def test_as_a_script_and_rendered(tmp_path: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "RESULTS.md"
    run = quick(BENCHMARKS / "bench_code_statistics.py", "--out", results, out=tmp_path / "unused")
    assert run.returncode == 0, run.stderr
    (path,) = results.glob("*-code_statistics.json")
    result = json.loads(path.read_text())
    # A script starts itself again with the warm heap's settings.
    assert result["environment"]["warm_heap"] is True
    other = json.loads(path.read_text())
    other["environment"]["device"] = "Another 9"
    other["cases"][0]["contenders"][1]["setting"] = "fast=1"
    for content in (result, other):
        content["environment"]["dirty"] = False
        (results / f"{content['environment']['device']}.json").write_text(json.dumps(content))
    path.unlink()
    written = set()
    for _ in range(2):  # rendering twice changes nothing
        drawn = quick(BENCHMARKS / "render.py", "--results", results, "--out", out, out=tmp_path)
        assert drawn.returncode == 0, drawn.stderr
        written.add((out.read_text(), (results / "speedup-another-9.svg").read_text()))
    ((text, plot),) = written
    assert text.count("### code_statistics: ") == 2 and "index_add and bincount (fast=1)" in text
    (head,) = (line for line in text.splitlines() if line.startswith("| operator | case | "))
    assert "| Another 9 |" in head and head.count("|") == 5  # both machines, side by side
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (tmp_path / picture).is_file()
    assert "index_add and bincount" in plot and "tiny" in plot and "reference" not in plot


def test_results_of_a_dirty_tree_are_neither_written_nor_rendered(tmp_path: Path) -> None:
    script = (
        "import _harness, pathlib, rqkernels._measure as measure, sys, torch\n"
        "measure.checkout = lambda folder, ignored: measure.Checkout('abc', True)\n"
        "_harness.RESULTS = pathlib.Path(sys.argv[1])\n"
        "_harness.ROOT = _harness.RESULTS.parent\n"
        "_harness.Run('slug', torch.device('cpu'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{BENCHMARKS}:{ROOT}"}
    command = [sys.executable, "-c", script, tmp_path / "results"]
    refused = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "uncommitted changes: results in results must come from a commit" in refused.stderr
    environment["RQK_BENCH_OUT"] = str(tmp_path / "elsewhere")
    assert subprocess.run(command, env=environment).returncode == 0

    record = {"slug": "x", "environment": {"dirty": True, "time": "then", "device": "a"}, "peaks": {}, "cases": []}
    (tmp_path / "x.json").write_text(json.dumps(record))
    run = quick(BENCHMARKS / "render.py", "--results", tmp_path, "--out", tmp_path / "RESULTS.md", out=tmp_path)
    assert run.returncode != 0 and "x.json: measured with uncommitted changes on then" in run.stderr
    assert not (tmp_path / "RESULTS.md").exists()


def test_systems_are_rendered(tmp_path: Path) -> None:
    """From what `rqgen bench systems` writes; its own test holds the names."""
    work = {"products": 7.15e10, "attention": 2.5e9, "states": 3e6}
    systems = [
        {
            "name": name,
            "codes": codes,
            "number_of_codes": 256,
            "codebook_size": 4096,
            "layers": layers,
            "parameters": 5.1e7,
            "steps": steps,
            "counted_per_image": [{"batch": batch, "weights": 5.4e8 / batch, **work} for batch in (1, 16)],
        }
        for name, codes, layers, steps in (("VAR", "1+2", [16], [10]), ("stacks", "8x8x4", [12, 4], [64, 256]))
    ]
    case = {
        "batch": 16,
        "system": "VAR",
        "precision": "fp32",
        "cfg_scale": 1.5,
        "ar_ms_per_image": 12.34,
        "ar_ms_per_image_min_max": [11.0, 13.0],
        "images_per_s_ar_only": 81.0,
        "percent_of_floor": 45.6,
        "decoder_ms_per_image": None,
        "peak_bytes": None,
    }
    content = {
        "environment": {
            "device": "a processor",
            "threads": 2,
            "warm_heap": False,
            "python": "1.0",
            "versions": {"rqkernels": "1.0"},
            "commit": None,
            "dirty": False,
            "time": "now",
        },
        "settings": {"image_side": 256, "width": 512},
        "peaks": {"copy_bytes_per_s": 2e10, "operations_per_s": {"fp32": 1.2e11}},
        "systems": systems,
        "cases": [case],
    }
    folder = tmp_path / "systems" / "a-processor"
    folder.mkdir(parents=True)
    (folder / "systems.json").write_text(json.dumps(content))
    run = quick(BENCHMARKS / "render.py", "--results", tmp_path, "--out", tmp_path / "RESULTS.md", out=tmp_path)
    assert run.returncode == 0, run.stderr
    text = (tmp_path / "RESULTS.md").read_text()
    for row in (
        "| steps, one after another | 10 | 64 + 256 |",
        "| operations: products with weights | 71.5 G | 71.5 G |",
        "| weights read, batch 16 | 33.8 M | 33.8 M |",
        "| 16 | VAR, fp32, guidance 1.5 | 12.3 | 11 - 13 | 81 | 45.6 |",
    ):
        assert f"\n{row}\n" in text
    assert "a processor: 2 threads, COLD heap, Python 1.0, rqkernels 1.0, commit unknown, now." in text
    assert "copy 20 GB/s, fp32 matmul 120 GFLOP/s" in text


def test_the_committed_tables_are_those_of_the_committed_results(tmp_path: Path) -> None:
    results = shutil.copytree(BENCHMARKS / "results", tmp_path / "results")
    run = quick(BENCHMARKS / "render.py", "--results", results, "--out", tmp_path / "RESULTS.md", out=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "RESULTS.md").read_text() == (BENCHMARKS / "RESULTS.md").read_text()
    for name in ("README.md", "RESULTS.md"):
        for picture in re.findall(r"!\[.*?\]\((.*?)\)", (BENCHMARKS / name).read_text()):
            assert (BENCHMARKS / picture).is_file()


def test_a_wrong_result_is_never_timed(tmp_path: Path) -> None:
    script = tmp_path / "wrong.py"
    script.write_text(
        "import bench_residual_decode as bench, rqkernels, torch\n"
        "right = rqkernels.residual_decode\n"
        "rqkernels.residual_decode = lambda *a: right(*a) + 1e-3\n"
        "bench.run_case(bench.SHAPES[0], torch.device('cpu'))\n"
    )
    environment = {**os.environ, "RQK_BENCH_QUICK": "1", "PYTHONPATH": f"{BENCHMARKS}:{ROOT}"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode != 0
    assert "our sums differ from the definition" in run.stderr


def test_gpu_check_without_a_gpu_says_so_and_writes_nothing(tmp_path: Path) -> None:
    script, out = BENCHMARKS / "gpu_check.py", tmp_path / "out"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, script, "--out", out], env=environment, capture_output=True, text=True)
    assert run.returncode == 3
    (line,) = run.stderr.splitlines()
    assert line.startswith("gpu-check: no GPU: ")
    assert not out.exists()


# --- gpu_check, but for the card --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", BENCHMARKS / "gpu_check.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_whole_is_summed_up_in_one_file(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def steps(scratch: Path, environment: dict[str, str], out: Path, device: str) -> list[object]:
        assert environment["PYTHONPATH"].startswith(f"{ROOT}{os.pathsep}{ROOT / 'python'}")
        command = [sys.executable, "-c", "import rqkernels, sys; sys.exit('no kernel')"]
        return [
            gpu_check.Step("one", 1.0, 0, lambda seconds: gpu_check.execute(command, seconds, environment, scratch)),
            gpu_check.Step("two", 1.0, 0, lambda seconds: {"outcome": "passed", "budget": seconds}),
        ]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A Card")
    monkeypatch.setattr(gpu_check, "find_package", lambda scratch: ROOT)
    monkeypatch.setattr(gpu_check, "steps_on", steps)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "out"), "--budget", "60"])
    assert gpu_check.main() == 1
    command = list(sys.argv)
    monkeypatch.setattr(sys, "argv", [*command, "--only", "three*"])
    assert gpu_check.main() == 2
    assert "--only: no step is called three*; there are one, two" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command[:-1], "30", "--only", "tw*"])
    assert gpu_check.main() == 0  # of this step; the file keeps the other
    (path,) = (tmp_path / "out").iterdir()
    assert path.name == "a-card-gpu-tests.json"
    summary = json.loads(path.read_text())
    assert summary["device"] == "A Card" and summary["budget_seconds"] == 30
    assert summary["steps"]["two"]["budget"] < 30
    assert summary["steps"]["one"]["outcome"] == "failed"
    assert summary["steps"]["one"]["tail"] == "no kernel\n"


def test_the_ragged_calls_compare_with_the_cpu(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)
    gpu_check.call_ragged()
    monkeypatch.setattr(torch.Tensor, "cuda", lambda t: t * (1 + 2**-20) if t.is_floating_point() else t.clone())
    with pytest.raises(AssertionError, match="result 1 differs from the CPU's at N, K, C = "):
        gpu_check.call_ragged()


def run_script(path: Path, text: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script that finds the benchmarks, in their smallest shapes."""
    path.write_text(text)
    python_path = f"{BENCHMARKS}:{ROOT}:{ROOT / 'python'}"
    environment = {**os.environ, "RQK_BENCH_QUICK": "1", "PYTHONPATH": python_path, **environment}
    return subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)


def test_the_typical_calls_are_calls_of_every_operator(tmp_path: Path) -> None:
    run = run_script(
        tmp_path / "typical.py",
        "import gpu_check, json, torch\n"
        "from torch.utils._python_dispatch import TorchDispatchMode\n"
        "called = set()\n"
        "class Record(TorchDispatchMode):\n"
        "    def __torch_dispatch__(self, function, types, args=(), kwargs=None):\n"
        "        called.add(function._schema.name)\n"
        "        return function(*args, **(kwargs or {}))\n"
        "with Record():\n"
        "    gpu_check.call_typical('cpu')\n"
        "there = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith('rqkernels::')}\n"
        "print(json.dumps(sorted(there - called)))\n",
    )
    assert run.returncode == 0, run.stderr
    # These two ask for a number, and launch nothing.
    assert json.loads(run.stdout) == ["rqkernels::codebook_cache_state", "rqkernels::packed_has_gram"]


def test_every_benchmark_takes_its_ways_for_a_card(tmp_path: Path) -> None:
    run = run_script(
        tmp_path / "card.py",
        "import importlib, sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import _harness, fake_card, rqkernels._measure, torch\n"
        "from pathlib import Path\n"
        "rqkernels._measure._l2_flush = lambda device: torch.empty(1)\n"
        "import rqkernels\n"  # before a card is there, for which it would load a library
        f"for path in sorted(Path({str(BENCHMARKS)!r}).glob('bench_*.py')):\n"
        "    with fake_card.fake_card() as device:\n"
        "        bench = importlib.import_module(path.stem)\n"
        "        cases = getattr(bench, 'CASES', None) or bench.SHAPES\n"
        "        for case in cases:\n"
        "            record = bench.run_case(case, device)\n"
        "            print(path.stem, [c['name'] for c in record['contenders']], record.get('without'))\n",
    )
    assert run.returncode == 0, run.stderr
    ran = {line.split()[0] for line in run.stdout.splitlines()}
    assert ran == {path.stem for path in BENCHMARKS.glob("bench_*.py")}
    # Each backend by itself, and those that this machine has not by name.
    attention = [line for line in run.stdout.splitlines() if line.startswith("bench_depth_attention")]
    assert all("SDPA (flash)" in line and "'SDPA (cuDNN)': 'No viable backend" in line for line in attention)
    (decoded,) = [line for line in run.stdout.splitlines() if "rqkernels bf16" in line]
    assert decoded.startswith(
        "bench_depth_decode ['rqkernels bf16, CUDA graph', 'eager fp32, CUDA graph', 'eager bf16, C"
    )


def test_a_prior_is_sampled_on_the_card(tmp_path: Path) -> None:
    """The step of the largest preset, with a small prior on the CPU."""
    out = tmp_path / "out"
    out.mkdir()
    run = run_script(
        tmp_path / "step.py",
        "import gpu_check, os\n"
        "from pathlib import Path\n"
        "folder = Path(__file__).parent\n"
        "steps = list(gpu_check.steps_on(folder, os.environ, folder / 'out', 'a-card'))\n"
        "records = gpu_check.run_steps(gpu_check.chosen(steps, ['sampling-*']), 100)\n"
        "assert set(records) == {'sampling-2x2x2-bf16'}\n"
        "assert gpu_check.exit_status(records) == 0, records\n",
    )
    assert run.returncode == 0, run.stderr + run.stdout
    written = {path.suffix: path for path in (out / "sampling").iterdir()}
    assert {path.name for path in written.values()} == {"a-card-2x2x2-bf16.json", "a-card-2x2x2-bf16.png"}
    result = json.loads(written[".json"].read_text())
    assert [(case["batch"], case["contender"], case["precision"]) for case in result["cases"]] == [
        (batch, contender, "bf16") for batch in (1, 2) for contender in ("rqgen", "published formulation")
    ]
    assert all(case["ar_ms_per_image"] > 0 and case["floor_ms_per_image"] > 0 for case in result["cases"])


def test_the_largest_preset_is_sampled_where_there_is_a_card(gpu_check: ModuleType) -> None:
    runs = {run.name: run for run in gpu_check.SAMPLINGS}
    options = list(map(str, runs["sampling-8x8x4-bf16"].options()))
    assert options[:4] == ["--preset", "1.4B", "--device", "cuda"] and "--published" in options
    batches = [value for option, value in itertools.pairwise(options) if option == "--batch"]
    assert batches == ["1", "100", "200", "500"]
    assert {"sampling-16x16x1-bf16", "sampling-8x8x4-fp32"} <= set(runs)


def test_a_position_is_profiled(tmp_path: Path) -> None:
    run = run_script(
        tmp_path / "position.py",
        "import gpu_check, torch\n"
        "said = []\n"
        "torch.cuda.synchronize = lambda: None\n"
        "torch.cuda.profiler.start, torch.cuda.profiler.stop = lambda: said.append('on'), lambda: said.append('off')\n"
        "gpu_check.call_position('cpu')\n"
        "assert said == ['on', 'off'], said\n",
    )
    assert run.returncode == 0, run.stderr


def test_steps_that_are_asked_for_may_take_the_whole_budget(gpu_check: ModuleType) -> None:
    steps = [gpu_check.Step(name, share, 1, dict) for name, share in (("tests", 0.5), ("a-1", 0.1), ("a-2", 0.3))]
    named = gpu_check.chosen(steps, ["a-2", "test*"])
    assert [(step.name, step.share) for step in named] == [("tests", 1.0), ("a-2", 1.0)]
    with pytest.raises(ValueError, match="--only: no step is called b; there are tests, a-1, a-2"):
        gpu_check.chosen(steps, ["a-1", "b"])


def test_formulations_for_the_card_alone_do_the_same_work(tmp_path: Path) -> None:
    script = tmp_path / "formulations.py"
    script.write_text(
        "import bench_residual_search as bench, torch\n"
        "x, codebooks = torch.randn(50, 8), torch.randn(3, 20, 8)\n"
        "codes, total = bench.published_search(x, codebooks, 3)\n"
        "precisions = []\n"
        "def search(*args):\n"
        "    precisions.append(torch.get_float32_matmul_precision())\n"
        "    return bench.cdist_search(*args)\n"
        "other = bench.with_tf32(search)(x, codebooks, 3)\n"
        "assert torch.equal(other[0], codes) and torch.equal(other[1], total)\n"
        "assert [*precisions, torch.get_float32_matmul_precision()] == ['high', 'highest']\n"
    )
    environment = {**os.environ, "RQK_BENCH_QUICK": "1", "PYTHONPATH": f"{BENCHMARKS}:{ROOT}"}
    run = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_steps_beyond_the_budget_are_skipped_by_name(gpu_check: ModuleType, capsys: pytest.CaptureFixture) -> None:
    now, given = [100.0], {}

    def step(name: str, share: float, takes: float) -> object:
        def run(seconds: float) -> dict[str, str]:
            given[name] = seconds
            now[0] += takes
            return {"outcome": "passed"}

        return gpu_check.Step(name, share, 10, run)

    steps = [step("first", 0.5, 30), step("second", 0.5, 65), step("third", 0.1, 1)]
    records = gpu_check.run_steps(steps, 100, lambda: now[0])
    assert given == {"first": 50, "second": 50}
    assert records["first"] == {"outcome": "passed", "seconds": 30}
    assert records["third"] == {"outcome": "skipped", "why": "5 s of the budget were left"}
    assert gpu_check.exit_status(records) == 2
    assert "gpu-check: third: skipped (5 s of the budget were left)" in capsys.readouterr().out


def test_a_missing_tool_is_noted_and_is_no_pass(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    steps = [step for step in gpu_check.steps_on(Path(), {}, Path(), "card") if step.name in ("racecheck", "ncu")]
    records = gpu_check.run_steps(steps, 100)
    assert records["racecheck"]["outcome"] == records["ncu"]["outcome"] == "missing"
    assert records["racecheck"]["why"] == "compute-sanitizer is not installed here"
    assert gpu_check.exit_status(records) == 2


def test_a_model_that_cannot_be_imported_is_noted(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "MODEL_PACKAGES", ("no_such_package", "yaml"))
    steps = [step for step in gpu_check.steps_on(Path(), {}, Path(), "card") if step.name == "bench_prior_step"]
    record = gpu_check.run_steps(steps, 100)["bench_prior_step"]
    assert record == record | {"outcome": "missing", "why": "the models need no_such_package"}


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [(["passed"], 0), (["passed", "failed", "missing"], 1), (["timed out"], 1), (["passed", "missing"], 2)],
)
def test_exit_status(gpu_check: ModuleType, outcomes: list[str], status: int) -> None:
    assert gpu_check.exit_status({str(i): {"outcome": outcome} for i, outcome in enumerate(outcomes)}) == status


def test_all_that_is_asked_of_the_card_is_a_step(gpu_check: ModuleType) -> None:
    names = [step.name for step in gpu_check.steps_on(Path(), {}, Path(), "card")]
    assert names[:4] == ["tests", "memcheck", "racecheck", "bench_residual_search"]
    assert names[4].startswith("sampling-") and names[-2:] == ["ncu", "ncu-position"]
    assert {name for name in names if name.startswith("bench_")} == {
        path.stem for path in BENCHMARKS.glob("bench_*.py")
    }
    assert all((ROOT / path).is_file() for path in gpu_check.SMALL_TESTS)


def test_a_step_that_overruns_is_ended_with_its_children(gpu_check: ModuleType, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    child = f"import time; time.sleep(3); open({str(marker)!r}, 'w')"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    record = gpu_check.execute([sys.executable, "-c", parent], 1.5, os.environ, tmp_path)
    assert record["outcome"] == "timed out" and record["tail"] == "begun\n"
    time.sleep(3)
    assert not marker.exists()


def test_a_command_that_fails_leaves_its_last_words(gpu_check: ModuleType, tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('why'); sys.exit(3)"]
    record = gpu_check.execute(command, 60, os.environ, tmp_path)
    assert record == {"outcome": "failed", "status": 3, "why": "exit status 3", "tail": "why\n"}


def test_outcomes_of_tests_come_from_their_report(gpu_check: ModuleType, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    assert gpu_check.test_outcomes(report) == {}
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="x"/>'
        '<testcase classname="a" name="y"><failure message="m"/></testcase></testsuite></testsuites>'
    )
    assert gpu_check.test_outcomes(report) == {"a::x": "passed", "a::y": "failure"}


def test_what_ncu_measured_is_weighted_by_time(gpu_check: ModuleType) -> None:
    columns = [
        ("ID", ""),
        ("Kernel Name", ""),
        ("gpu__time_duration.sum", "us"),
        ("dram__throughput.avg.pct_of_peak_sustained_elapsed", "%"),
        ("sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active", "%"),
        ("sm__inst_executed_pipe_tensor_op_imma.avg.pct_of_peak_sustained_active", "%"),
        ("sm__inst_executed_pipe_tensor_op_imma.sum", "inst"),
    ]
    rows = [
        ("0", "rqk::residual_search::search(rqk::ResidualSearchParams)", "30", "10", "0", "80", "1,000,000"),
        ("1", "rqk::residual_search::search(rqk::ResidualSearchParams)", "10", "50", "0", "40", "9"),
        ("2", "void rqk::code_statistics::add_rows<4>(int, float)", "1,000", "90.5", "", "", "0"),
    ]
    table = [tuple(name for name, _ in columns), tuple(unit for _, unit in columns), *rows]
    text = "==PROF== Connected\n" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in table) + "\n"
    assert gpu_check.summarize_ncu(text) == {
        "rqk::residual_search::search": {"launches": 2, "ns": 40e3, "percent": {"tensor": 70.0, "dram": 20.0}},
        "void rqk::code_statistics::add_rows<4>": {"launches": 1, "ns": 1e6, "percent": {"dram": 90.5}},
    }
    assert gpu_check.summarize_ncu("==ERROR== no permission\n") == {}
