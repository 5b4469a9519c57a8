"""Loading of the compiled library: what loads, what does not, and readable errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rqkernels as rqk
from rqkernels import _library


def test_info_says_what_is_there() -> None:
    info = rqk.info()
    assert info["torch"] == torch.__version__
    assert info["cpu_capability"] in ("default", "avx2", "avx512")
    assert info["cpu_library"] == "loaded"
    assert info["package"] == str(Path(rqk.__file__).parent)
    assert Path(info["cpu_library_file"]).parent == Path(info["package"])
    assert Path(info["cpu_library_file"]).is_file()
    assert not any("/" in str(fact) for fact in rqk.info(paths=False).values())
    if not torch.cuda.is_available():
        assert info["cuda_library"] == "not loaded: torch.cuda.is_available() is False"


def test_info_on_the_command_line() -> None:
    printed = subprocess.run([sys.executable, "-m", "rqkernels"], capture_output=True, text=True, check=True).stdout
    for name, value in rqk.info().items():
        assert f"{name}  {value}" in printed


def test_every_public_function_has_a_reference_of_the_same_name() -> None:
    for name in set(rqk.__all__) - {"info", "reference"}:
        assert hasattr(rqk.reference, name)


def test_a_missing_library_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    with pytest.raises(ImportError, match=r"_C.abi3.so is not in .* Build it with 'pip install --no-build-isolation"):
        _library._load_cpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "was not built" in _library._load_cuda()


@pytest.mark.parametrize(
    ("capability", "architectures", "served"),
    [
        ((8, 0), [80, 90], True),
        ((8, 9), [80, 90], True),  # machine code of 8.0
        ((9, 0), [80, 90], True),
        ((12, 0), [80, 90], True),  # PTX of 9.0
        ((7, 5), [80, 90], False),
        ((8, 0), [86, 90], False),
        ((9, 0), [80, 120], False),  # PTX of 12.0 is too new
    ],
)
def test_which_gpus_a_build_serves(capability: tuple[int, int], architectures: list[int], served: bool) -> None:
    assert _library._serves(capability, architectures) is served


def test_a_gpu_that_the_build_does_not_serve_is_told_what_to_build(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "_cuda.abi3.so").write_bytes(b"")
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    monkeypatch.setattr(_library, "CUDA_ARCHITECTURES", ["80", "90"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "compiled for compute capabilities 80, 90, the device has 75" in _library._load_cuda()


def test_a_library_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    for name in ("_C", "_cuda"):
        (tmp_path / f"{name}.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    with pytest.raises(ImportError, match="could not be loaded into torch"):
        _library._load_cpu()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(_library, "CUDA_ARCHITECTURES", ["90"])
    assert "could not be loaded into torch" in _library._load_cuda()


_LOAD_CUDA_LIBRARY = """
import ctypes, os, sys, torch, rqkernels
if os.path.exists(sys.argv[2]):
    ctypes.CDLL(sys.argv[2])  # stands in for the libtorch_cuda.so of a torch with CUDA
if rqkernels._library.CUDA_UNAVAILABLE is not None:
    torch.ops.load_library(sys.argv[1])
for op in ("residual_search", "residual_decode", "code_statistics"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rqkernels::{op}", "CUDA"), op
"""


def test_the_cuda_library_finds_all_its_symbols() -> None:
    library = _library._FOLDER / "_cuda.abi3.so"
    if not library.exists():
        pytest.skip("the CUDA library was not built (no nvcc, or RQK_CUDA=0)")
    stub = Path(__file__).parents[2] / "build" / "cmake" / "libtorch_cuda.so"
    command = [sys.executable, "-c", _LOAD_CUDA_LIBRARY, str(library), str(stub)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_an_old_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
    with pytest.raises(ImportError, match=r"needs torch >= 2.11, found 2.10.1\+cu128"):
        _library._load_cpu()


def test_a_device_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(torch.Tensor):
        device = torch.device("mps")

    x = torch.zeros(2, 4).as_subclass(Elsewhere)
    with pytest.raises(ValueError, match="x must be on cpu or cuda, got mps"):
        rqk.residual_search(x, torch.zeros(3, 4), 1)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda", 0)

    monkeypatch.setattr(_library, "CUDA_UNAVAILABLE", "it was not built")
    with pytest.raises(RuntimeError, match="x is on cuda:0, but the CUDA library is not loaded: it was not built"):
        rqk.residual_search(torch.zeros(2, 4).as_subclass(OnGpu), torch.zeros(3, 4), 1)
