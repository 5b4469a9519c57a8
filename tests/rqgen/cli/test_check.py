"""`rqgen check`, and the ways to start the command line."""

import subprocess
import sys

import rqkernels


def test_check_says_what_is_installed_and_loaded(rqgen):
    import torch

    code, out, _ = rqgen("check")
    assert code == 0
    assert any(line.split() == ["torch", torch.__version__] for line in out.splitlines())
    for fact in rqkernels.info():
        assert f"{fact}:" in out


def test_a_missing_package_is_named(rqgen, monkeypatch):
    from rqgen.cli import check

    monkeypatch.setattr(check, "PACKAGES", ("surely-no-such-package",))
    _, out, _ = rqgen("check")
    assert "surely-no-such-package  not installed" in out


def test_python_m_rqgen_lists_the_commands():
    done = subprocess.run([sys.executable, "-m", "rqgen", "--help"], capture_output=True, text=True, check=True)
    for command in ("train", "encode", "sample", "convert", "demo", "check"):
        assert command in done.stdout


def test_wrong_usage_exits_with_two(rqgen):
    for arguments in (["paint"], ["train"], ["encode"], ["demo", "--seed", "-1"], ["convert", "kakaobrain"]):
        assert rqgen(*arguments)[0] == 2
