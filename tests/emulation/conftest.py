"""The fixture `emulation`: the kernels on the CPU, once per build of them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .build import Unavailable, build
from .harness import BUILDS, Emulation


@pytest.fixture(scope="session")
def emulation_folder() -> Path:
    """Folder of the builds; builds that are missing or older than the sources are made now."""
    if "RQK_EMULATION_FOLDER" in os.environ:  # the mutation check has its own
        return Path(os.environ["RQK_EMULATION_FOLDER"])
    try:
        return build()
    except Unavailable as reason:
        if os.environ.get("CI"):
            pytest.fail(f"the emulation must run in CI: {reason}")
        pytest.skip(str(reason))
    except subprocess.CalledProcessError as error:
        pytest.fail(f"the emulation does not build: {error}")


@pytest.fixture(params=BUILDS)
def emulation(request: pytest.FixtureRequest, emulation_folder: Path, tmp_path: Path) -> Emulation:
    return Emulation(request.param, emulation_folder, tmp_path)
