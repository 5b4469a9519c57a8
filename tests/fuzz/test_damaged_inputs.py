"""A few cases of each fuzzer, as `make test` has time for; CONTRIBUTING.md says how to run them all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def test_damaged_files_are_refused_by_name_or_read_as_they_were() -> None:
    command = [sys.executable, FOLDER / "damaged_inputs.py", "--cases", "120", "--seed", "7"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.splitlines()[-1].startswith("120 cases: ")


def test_a_fault_is_found(tmp_path: Path) -> None:
    """The fuzzer itself: weights that are read without their checksum change without a word."""
    script = tmp_path / "without.py"
    script.write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "import damaged_inputs as fuzz, rqgen.models.pretrained as pretrained\n"
        "from pathlib import Path\n"
        "import tempfile\n"
        "pretrained.check_tensors = lambda *paths: None\n"
        "with tempfile.TemporaryDirectory() as folder:\n"
        "    root = Path(folder)\n"
        "    fuzz.make_whole(root)\n"
        "    kinds = [kind for kind in fuzz.kinds() if kind.name == 'model']\n"
        "    fuzz.kinds = lambda: [kinds[0].__class__(**{**vars(kinds[0]), 'damages': ('flip',)})]\n"
        "    faults = [verdict.fault for verdict in fuzz.run_cases(root, 0, range(20))]\n"
        "assert 'read without a word' in faults, faults\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
