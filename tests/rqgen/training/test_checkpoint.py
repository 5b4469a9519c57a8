"""Checkpoints: whole or not at all."""

import os
import pickle
import random

import numpy as np
import pytest
import torch

from rqgen.training import latest_checkpoint
from rqgen.training.checkpoint import (
    load_checkpoint,
    random_states,
    restore_random_states,
    save_checkpoint,
)


def test_round_trip_and_only_the_newest_stay(tmp_path):
    assert latest_checkpoint(tmp_path / "nowhere") is None
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, step, {"w": torch.full((2,), float(step))}, {"step": step}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    state, info = load_checkpoint(latest_checkpoint(tmp_path))
    assert torch.equal(state["w"], torch.full((2,), 100.0)) and info == {"step": 100}


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"w": 1}, {"step": 1}, keep=1)

    def interrupted(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, 2, {"w": 2}, {"step": 2}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(latest_checkpoint(tmp_path))[0] == {"w": 1}


def test_what_a_killed_process_leaves_is_not_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, {"w": 1}, {}, keep=1)
    (tmp_path / ".step-00000002.123.tmp").mkdir()
    (tmp_path / "step-2").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-00000001"


def test_damaged_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"state\.pt is missing"):
        load_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected the folder of a checkpoint, got no file"):
        load_checkpoint(tmp_path / "nowhere")
    path = save_checkpoint(tmp_path, 1, {"w": torch.zeros(100)}, {}, keep=1)
    state = path / "state.pt"
    with pytest.raises(FileNotFoundError, match=r"state\.pt: expected the folder of a checkpoint, got a torch check"):
        load_checkpoint(state)
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"step-00000001: damaged checkpoint: .*it is a zip archive that is cut short"):
        load_checkpoint(path)
    state.unlink()
    state.mkdir()
    with pytest.raises(FileNotFoundError, match=r"not a checkpoint: .*state\.pt is a folder"):
        load_checkpoint(path)


def test_every_generator_is_restored(tmp_path):
    def draws():
        return random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))

    np.random.randn()  # leaves half of a pair of normal draws behind, which is state too
    save_checkpoint(tmp_path, 1, {"random": random_states()}, {}, keep=1)
    expected = draws()
    assert draws() != expected
    restore_random_states(load_checkpoint(tmp_path / "step-00000001")[0]["random"])
    assert draws() == expected


def test_every_wrong_bit_is_found(tmp_path):
    path = save_checkpoint(tmp_path, 1, {"w": torch.arange(50.0), "random": random_states()}, {"step": 1}, keep=1)
    for name, step in (("info.json", 1), ("state.pt", 97)):
        whole = (path / name).read_bytes()
        for position in range(0, len(whole), step):
            changed = bytearray(whole)
            changed[position] ^= 1 << (position % 8)
            (path / name).write_bytes(changed)
            with pytest.raises(ValueError, match="step-00000001: damaged checkpoint: "):
                load_checkpoint(path)
        (path / name).write_bytes(whole)
    assert load_checkpoint(path)[1] == {"step": 1}


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "an empty file"),
        (b"x", "a file of 1 byte"),
        (b"<!DOCTYPE html>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"PK\3\4" + b"x" * 99, "a zip archive that is cut short"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 99, "a PNG image"),
        (pickle.dumps({"w": 1}), "a Python pickle that torch.save did not write"),
    ],
)
def test_other_files_are_told_without_advice_to_run_their_code(tmp_path, content, kind):
    path = save_checkpoint(tmp_path, 1, {"w": 1}, {}, keep=1)
    (path / "state.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"state\.pt: not a readable torch checkpoint: it is {kind}") as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [[1, 2], {"w": os.getpid}, torch.zeros(2)])
def test_states_of_another_kind_are_told(tmp_path, state):
    path = save_checkpoint(tmp_path, 1, {"w": 1}, {}, keep=1)
    torch.save(state, path / "state.pt")
    with pytest.raises(ValueError, match=r"state\.pt: (expected a dictionary|not a readable .*of tensors)") as caught:
        load_checkpoint(path)
    assert "weights_only" not in str(caught.value)


def test_later_checkpoints_do_not_push_out_the_new_one(tmp_path):
    """After a damaged one, a run goes on from an earlier step."""
    for step in (500, 1000):
        save_checkpoint(tmp_path, step, {"w": step}, {}, keep=2)
    save_checkpoint(tmp_path, 600, {"w": 600}, {}, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000600", "step-00001000"]


def test_the_newest_is_that_of_the_highest_step(tmp_path):
    for step in (99_999_999, 100_000_000):
        save_checkpoint(tmp_path, step, {"w": step}, {}, keep=2)
    assert latest_checkpoint(tmp_path).name == "step-100000000"


def test_a_kill_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path, killed_at_every_step):
    save_checkpoint(tmp_path, 1, {"w": torch.ones(3)}, {"step": 1}, keep=1)
    seen = set()

    def check():
        state, info = load_checkpoint(latest_checkpoint(tmp_path))
        assert torch.equal(state["w"], torch.full((3,), float(info["step"])))
        seen.add(info["step"])

    def save():
        save_checkpoint(tmp_path, 2, {"w": torch.full((3,), 2.0)}, {"step": 2}, keep=1)

    killed_at_every_step(save, check)
    save()
    assert seen == {1, 2} and [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
