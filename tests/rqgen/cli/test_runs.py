"""Folders of runs: nothing is lost to a mistake, to a second process, or to Ctrl-C, and a run goes on by its name."""

import logging
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from rqgen import files
from rqgen.cli import runs
from rqgen.cli.app import main
from rqgen.models import RQVAE
from rqgen.training import loop


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def cut(trained, tmp_path):
    """A tokenizer's run that was stopped after two of three steps, as it lies on disk."""
    out = tmp_path / "cut"
    shutil.copytree(trained[0] / "checkpoints" / "step-00000002", out / "checkpoints" / "step-00000002")
    shutil.copy(trained[0] / "config.yaml", out / "config.yaml")
    return out


# --- resuming --------------------------------------------------------------------------------------------


def test_resume_needs_no_settings(rqgen, trained, cut, tmp_path):
    code, _, err = rqgen("train", "tokenizer", "--out", cut, "--resume")
    assert code == 0, err
    for file in ("config.json", "model.safetensors"):
        assert (cut / "model" / file).read_bytes() == (trained[0] / "model" / file).read_bytes()
    assert (cut / "history.csv").read_bytes() == (trained[0] / "history.csv").read_bytes()
    prior = tmp_path / "prior"
    shutil.copytree(trained[1] / "checkpoints" / "step-00000002", prior / "checkpoints" / "step-00000002")
    code, _, err = rqgen("train", "prior", "--out", prior, "--resume")
    assert code == 0, err
    assert (prior / "model" / "model.safetensors").read_bytes() == (
        trained[1] / "model" / "model.safetensors"
    ).read_bytes()


def test_resume_takes_repeated_and_moved_images(rqgen, tmp_path, small_tokenizer, monkeypatch, caplog):
    """A relative path that is given again is the same path, and images that moved are the same images."""
    generator = np.random.default_rng(0)
    for number in range(24):
        path = tmp_path / "photos" / ("a" if number % 2 else "b") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    small = [*small_tokenizer, "loop.batch_size=8", "loop.tensorboard=false"]
    train = ["train", "tokenizer", "--out", "run"]
    assert rqgen(*train, *small, "loop.steps=2", "data.folder=photos")[0] == 0
    code, _, err = rqgen(*train, "--resume", *small, "loop.steps=3", "data.folder=photos")
    assert code == 0, err
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    code, _, err = rqgen(*train, "--resume", "loop.steps=4")
    assert code == 1 and f"error: data.folder.path: no folder {tmp_path / 'photos'}" in err and err.count("\n") == 1
    with caplog.at_level(logging.INFO):
        code, _, err = rqgen(*train, "--resume", "loop.steps=4", "data.folder=elsewhere")
    assert code == 0, err
    assert f"'data.folder.path' was {tmp_path / 'photos'} and is {tmp_path / 'elsewhere'} from now on" in caplog.text
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["folder"]["path"] == str(
        tmp_path / "elsewhere"
    )
    # Other images are refused, and so is another source.
    for number in (1, 3, 5, 7, 9):  # not all of them are held out
        (tmp_path / "elsewhere" / "a" / f"{number}.png").unlink()
    before = content(tmp_path / "run")
    code, _, err = rqgen(*train, "--resume", "loop.steps=5")
    assert code == 1 and "its images have changed" in err
    code, _, err = rqgen(*train, "--resume", "loop.steps=5", "data.source=photos", "data.folder=null")
    assert code == 1 and "cannot resume" in err and err.count("\n") == 1
    assert content(tmp_path / "run") == before


def test_resume_takes_codes_that_moved(rqgen, trained, tmp_path, small_prior, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert rqgen("encode", "--tokenizer", trained[0], "--out", "codes.safetensors")[0] == 0
    codes = ["prior.soft_labels=false", "prior.stochastic_codes=false", f"tokenizer={trained[0]}"]
    train = ["train", "prior", "--out", "run"]
    assert rqgen(*train, *small_prior, *codes, "codes=codes.safetensors", "loop.steps=2")[0] == 0
    (tmp_path / "codes.safetensors").rename(tmp_path / "moved.safetensors")
    code, _, err = rqgen(*train, "--resume", "loop.steps=3", "codes=moved.safetensors")
    assert code == 0, err
    other = ["encode", "--tokenizer", trained[0], "--split", "held_out", "--out", "other.safetensors"]
    assert rqgen(*other)[0] == 0
    code, _, err = rqgen(*train, "--resume", "loop.steps=4", "codes=other.safetensors")
    assert code == 1 and "its images have changed" in err and err.count("\n") == 1


def test_resume_knows_the_system(rqgen, tmp_path):
    small = ["model.base_channels=8", "model.channel_multipliers=[1,1,1,1]", "model.z_channels=8"]
    small += ["model.quantizer.codebook_size=16", "model.quantizer.scales=[1,4]", "model.quantizer.refinements=1"]
    small += ["loop.batch_size=16", "loop.steps=1", "loop.tensorboard=false"]
    arguments = ["train", "tokenizer", "--out", tmp_path / "var"]
    assert rqgen(*arguments, "--system", "var", *small)[0] == 0
    code, _, err = rqgen(*arguments, "--resume", "loop.steps=2")
    assert code == 0, err
    code, _, err = rqgen(*arguments, "--resume", "--system", "rq", "loop.steps=3")
    assert code == 1 and "step-00000002" in err and err.count("\n") == 1
    code, _, err = rqgen("train", "prior", "--out", tmp_path / "var", "--resume")
    assert code == 1 and "holds the run of a tokenizer, not of a prior" in err


def test_resume_goes_on_to_more_steps_and_not_to_fewer(rqgen, cut):
    code, _, err = rqgen("train", "tokenizer", "--out", cut, "--resume", "loop.steps=5")
    assert code == 0, err
    assert yaml.safe_load((cut / "config.yaml").read_text())["loop"]["steps"] == 5
    assert [path.name for path in sorted((cut / "checkpoints").iterdir())] == ["step-00000004", "step-00000005"]
    before = content(cut)
    code, _, err = rqgen("train", "tokenizer", "--out", cut, "--resume", "loop.steps=4")
    assert code == 1 and "loop.steps: expected at least 5, where" in err and err.count("\n") == 1
    assert before == content(cut)


@pytest.mark.parametrize("override", ["loop.seed=9", "model.base_channels=16", "loop.optimizer.learning_rate=1"])
def test_a_refused_resume_changes_nothing(rqgen, cut, override):
    before = content(cut)
    code, _, err = rqgen("train", "tokenizer", "--out", cut, "--resume", override)
    assert code == 1 and "cannot resume" in err and override.split("=")[0] in err and err.count("\n") == 1
    assert before == content(cut)


def test_a_damaged_newest_checkpoint_is_passed_over(rqgen, trained, tmp_path, caplog):
    out = tmp_path / "out"
    shutil.copytree(trained[0] / "checkpoints", out / "checkpoints")
    state = out / "checkpoints" / "step-00000003" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1] + b"?")
    code, _, err = rqgen("train", "tokenizer", "--out", out, "--resume")
    assert code == 0, err
    assert "step-00000003" in caplog.text and "resuming from step-00000002" in caplog.text
    assert (out / "model" / "model.safetensors").read_bytes() == (
        trained[0] / "model" / "model.safetensors"
    ).read_bytes()


# --- what is there stays ---------------------------------------------------------------------------------


def test_a_finished_run_without_checkpoints_is_not_replaced(rqgen, tmp_path, small_tokenizer):
    arguments = ["train", "tokenizer", "--out", tmp_path / "run", *small_tokenizer, "loop.steps=1"]
    arguments += ["loop.checkpoint_every=0", "loop.tensorboard=false"]
    assert rqgen(*arguments)[0] == 0
    before = content(tmp_path)
    code, _, err = rqgen(*arguments)
    assert code == 1 and "already holds a trained model and no checkpoint: choose another --out" in err
    code, _, err = rqgen(*arguments, "--resume")
    assert code == 1 and "no checkpoint in" in err
    assert before == content(tmp_path)


def test_a_run_that_saved_nothing_starts_again(rqgen, cut, small_tokenizer, caplog):
    caplog.set_level(logging.INFO)
    shutil.rmtree(cut / "checkpoints")
    code, _, err = rqgen("train", "tokenizer", "--out", cut, *small_tokenizer, "loop.steps=1")
    assert code == 0, err
    assert "starting over, since the run there saved no checkpoint" in caplog.text


def test_files_of_something_else_are_not_replaced(rqgen, tmp_path, small_tokenizer):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("mine: 1\n")
    (tmp_path / "other" / "model").mkdir(parents=True)
    (tmp_path / "other" / "model" / "notes.txt").write_text("mine")
    (tmp_path / "demo" / "prior").mkdir(parents=True)
    (tmp_path / "demo" / "prior" / "notes.txt").write_text("mine")
    before = content(tmp_path)
    code, _, err = rqgen("train", "tokenizer", "--out", tmp_path / "run", *small_tokenizer)
    assert code == 1 and "config.yaml is not the config of such a run: choose" in err and err.count("\n") == 1
    code, _, err = rqgen("train", "tokenizer", "--out", tmp_path / "other", *small_tokenizer)
    assert code == 1 and "notes.txt" in err
    code, _, err = rqgen("demo", "--out", tmp_path / "demo")
    assert code == 1 and "notes.txt" in err
    code, _, err = rqgen("convert", "kakaobrain", tmp_path / "model.pt", tmp_path / "demo" / "prior")
    assert code == 1 and "notes.txt" in err
    assert before == content(tmp_path)


def test_a_linked_model_folder_is_filled_and_stays_a_link(rqgen, cut, tmp_path):
    (tmp_path / "store").mkdir()
    (cut / "model").symlink_to(tmp_path / "store")
    code, _, err = rqgen("train", "tokenizer", "--out", cut, "--resume")
    assert code == 0, err
    assert (cut / "model").is_symlink() and RQVAE.from_pretrained(tmp_path / "store").codebook_size == 16


def test_a_demo_that_is_replaced_says_so(rqgen, tmp_path, monkeypatch, caplog):
    from rqgen.cli import demo

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(demo, "_run_demo", lambda *arguments: (_ for _ in ()).throw(ValueError("reached")))
    for metrics in (False, True):
        assert "reached" in rqgen("demo", "--out", tmp_path / "out")[2]
        assert ("replacing the demo there" in caplog.text) == metrics
        files.write_json(tmp_path / "out" / "metrics.json", {"reconstruction_mse": 0.1, "versions": {}})


def test_checkpoints_of_a_demo_are_replaced_with_it(rqgen, tmp_path, monkeypatch):
    from rqgen.cli import demo

    monkeypatch.setattr(demo, "_run_demo", lambda *arguments: (_ for _ in ()).throw(ValueError("reached")))
    checkpoint = tmp_path / "out" / "training" / "prior" / "checkpoints" / "step-00000003"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.pt").write_text("")
    code, _, err = rqgen("demo", "--out", tmp_path / "out")
    assert code == 1 and err.count("\n") == 1 and checkpoint.exists()
    assert f"error: --out: {tmp_path / 'out' / 'training'} holds checkpoints of a demo that did not end" in err
    files.write_json(tmp_path / "out" / "metrics.json", {"reconstruction_mse": 0.1, "versions": {}})
    assert "reached" in rqgen("demo", "--out", tmp_path / "out")[2]
    assert not checkpoint.parent.exists()


# --- places ----------------------------------------------------------------------------------------------

COMMANDS = {
    "train": ["train", "tokenizer"],
    "encode": ["encode", "--tokenizer", "nowhere"],
    "sample": ["sample", "--prior", "nowhere"],
    "sample codes": ["sample", "--prior", "nowhere"],
    "edit": ["edit", "inpaint", "--image", "nowhere", "--mask", "nowhere"],
    "demo": ["demo"],
    "scaling": ["scaling", "--tokenizer", "nowhere"],
    "bench sampling": ["bench", "sampling"],
    "bench systems": ["bench", "systems"],
    "convert kakaobrain": ["convert", "kakaobrain", "nowhere.pt"],
    "convert var": ["convert", "var", "--vae", "nowhere", "--var", "nowhere"],
}

# Of names that a command does not refuse.
SUFFIXES = {"sample": ".png", "edit": ".png"}


@pytest.fixture
def writing_to():
    def arguments(command, out):
        """A command that writes to ``out``."""
        option = {"sample codes": ["--codes"], "convert kakaobrain": [], "convert var": []}.get(command, ["--out"])
        return [*COMMANDS[command], *option, str(out)]

    return arguments


@pytest.fixture(autouse=True)
def no_work(request, monkeypatch):
    """Fails where a command goes to work though it cannot write."""
    if "writing_to" in request.fixturenames:

        def work(*arguments, **keywords):
            raise AssertionError("it went to work")

        monkeypatch.setattr(runs, "fit_tokenizer", work)
        monkeypatch.setattr(torch, "load", work)


@pytest.mark.parametrize("command", COMMANDS)
def test_places_are_tried_before_the_work(rqgen, tmp_path, monkeypatch, writing_to, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    suffix = SUFFIXES.get(command, "")
    for out in (tmp_path / "file" / f"out{suffix}", tmp_path / f"{'x' * 300}{suffix}"):
        code, _, err = rqgen(*writing_to(command, out))
        assert code == 1 and err.count("\n") == 1 and "went to work" not in err
        assert str(out)[:200] in err and ("Not a directory" in err or "File name too long" in err), err
    assert content(tmp_path) == {tmp_path / "file": b"mine"} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_do_not_share_an_output(rqgen, tmp_path, monkeypatch, writing_to, command):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / f"out{SUFFIXES.get(command, '')}"
    folder = command.split()[0] in ("train", "demo", "scaling", "bench")
    claimed = out / "tokenizer" if command == "convert var" else out
    with files.claim_folder(out) if folder else files.claim(claimed):
        code, _, err = rqgen(*writing_to(command, out))
    assert code == 1 and err.count("\n") == 1
    assert f"{claimed}: in use by process {os.getpid()} on " in err and "went to work" not in err
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import contextlib, resource, signal, sys
import sklearn.datasets  # joblib warns if not even a semaphore can be made
from rqgen.cli.app import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit, tensorboard in ((20, "false"), (2000, "true"), (20_000, "false")):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    with contextlib.suppress(SystemExit):
        main([*sys.argv[1:], f"loop.tensorboard={tensorboard}"])
"""


def test_a_full_disk_is_one_line_that_names_the_file(tmp_path, small_tokenizer):
    """No file may grow beyond some bytes."""
    out = tmp_path / "run"
    more = [*small_tokenizer, "loop.steps=2", "loop.image_every=1"]
    failed = run_alone([sys.executable, "-c", FULL_DISK, "train", "tokenizer", "--out", str(out), *more])
    lines = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    names = ("config.yaml", "tensorboard", "checkpoints/step-00000002")
    assert lines == [f"error: {out / name}: File too large" for name in names]
    assert len(failed.stderr.splitlines()) == len(lines) + failed.stderr.count("starting over")


# --- interruptions ---------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys
import rqgen
interrupted, way = sys.argv[1], sys.argv[2]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == interrupted:
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                if way == "hidden":
                    raise ImportError("half an import")
                if way == "plain":
                    raise

sys.meta_path.insert(0, Finder())
sys.argv = sys.argv[3:]
from rqgen.__main__ import main
main()
"""


def run_alone(command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    ("module", "way"),
    [
        ("rqgen.cli.interrupts", "plain"),
        ("typer", "plain"),
        ("rqgen.cli.app", "plain"),
        ("rqgen.cli.app", "swallowed"),
        ("rqgen.cli.runs", "plain"),
        ("rqgen.cli.runs", "hidden"),
        ("torch", "plain"),
    ],
)
def test_an_interrupt_while_modules_are_imported_is_one_line(tmp_path, module, way):
    """Also where an import makes another error of it, or goes on."""
    arguments = ["rqgen", "train", "tokenizer", "--out", str(tmp_path / "run")]
    stopped = run_alone([sys.executable, "-c", SCRIPT, module, way, *arguments])
    assert stopped.stderr == "interrupted: the same command starts over\n"
    assert stopped.returncode == 130 and list(tmp_path.iterdir()) == []


AT_THE_END = """
import atexit, os, signal, sys
from rqgen.__main__ import main
atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT))
main()
"""


@pytest.mark.parametrize(("command", "code"), [("--version", 0), ("check", 0), ("nothing", 2)])
def test_an_interrupt_at_the_end_is_not_a_traceback(command, code):
    stopped = run_alone([sys.executable, "-c", AT_THE_END, command])
    assert stopped.returncode == code and "Traceback" not in stopped.stderr
    assert (stopped.stderr == "") == (code == 0)


def test_an_interrupt_while_options_are_read_is_one_line(rqgen, monkeypatch):
    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("rqgen.cli.app._Group.parse_args", interrupted)
    assert rqgen("check") == (130, "", "interrupted: the same command starts over\n")


@pytest.mark.parametrize(
    ("number", "step", "said"),
    [
        (signal.SIGINT, 1, "no checkpoint in {out} yet: the same command starts over"),
        (signal.SIGINT, 4, "resume from step-00000002 with: rqgen train tokenizer --out {out} --resume"),
        (signal.SIGTERM, 4, "resume from step-00000002 with: rqgen train tokenizer --out {out} --resume"),
    ],
)
def test_an_interrupted_run_says_how_to_go_on(rqgen, tmp_path, small_tokenizer, monkeypatch, number, step, said):
    out = tmp_path / "run"
    update, calls = loop._update, []

    def counted(*arguments):
        calls.append(1)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return update(*arguments)

    monkeypatch.setattr(loop, "_update", counted)
    code, _, err = rqgen("train", "tokenizer", "--out", out, *small_tokenizer, "loop.steps=5")
    assert err == f"{'terminated' if number == signal.SIGTERM else 'interrupted'}: {said.format(out=out)}\n"
    assert code == 128 + number and not list(tmp_path.rglob(".rqgen*"))


def test_the_command_that_is_named_goes_on(rqgen, tmp_path, small_tokenizer, trained, monkeypatch):
    out = tmp_path / "a run"
    update, calls = loop._update, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return update(*arguments)

    monkeypatch.setattr(loop, "_update", interrupted)
    code, _, err = rqgen("train", "tokenizer", "--out", out, *small_tokenizer, "loop.steps=3")
    assert code == 130 and f"--out '{out}' --resume" in err
    assert rqgen("train", "tokenizer", "--out", out, "--resume")[0] == 0
    assert torch.equal(
        RQVAE.from_pretrained(out / "model").codebooks, RQVAE.from_pretrained(trained[0] / "model").codebooks
    )


@pytest.mark.parametrize("command", ["demo", "scaling", "encode"])
def test_other_commands_say_how_to_go_on(rqgen, tmp_path, monkeypatch, command):
    from rqgen.cli import demo, encode, scaling

    def interrupted(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "fit_tokenizer", interrupted)
    monkeypatch.setattr(scaling, "_run_scaling", interrupted)
    monkeypatch.setattr(encode, "load_tokenizer", interrupted)
    code, _, err = rqgen(command, "--out", tmp_path / "out")
    assert code == 130 and err.startswith("interrupted: ") and err.count("\n") == 1
    assert (f"rqgen scaling --out {tmp_path / 'out'} --resume" in err) == (command == "scaling")
    assert not (tmp_path / "out").exists()


def test_signals_are_as_before_afterwards(rqgen):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    rqgen("check")
    assert before == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup does
    try:
        with pytest.raises(SystemExit):
            main(["check"])
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, ignored)
