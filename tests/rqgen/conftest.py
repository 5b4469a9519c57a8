"""Published checkpoints for the tests of conversion."""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

import pytest

PUBLISHED = Path(__file__).parent.parent / "data" / "kakaobrain"


@pytest.fixture(scope="session")
def kakaobrain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the published fixtures side by side, unpacked: NAME/{config.yaml,model.pt,...}."""
    root = tmp_path_factory.mktemp("kakaobrain")
    for source in sorted(path for path in PUBLISHED.iterdir() if path.is_dir()):
        target = root / source.name
        target.mkdir()
        for name in ("config.yaml", "expected.safetensors"):
            shutil.copyfile(source / name, target / name)
        (target / "model.pt").write_bytes(lzma.decompress((source / "model.pt.xz").read_bytes()))
    return root
