"""Checkpoints: whole or not at all."""

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
    path = save_checkpoint(tmp_path, 1, {"w": torch.zeros(100)}, {}, keep=1)
    state = path / "state.pt"
    state.write_bytes(state.read_bytes()[:200])
    with pytest.raises(ValueError, match="step-00000001: damaged checkpoint"):
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
