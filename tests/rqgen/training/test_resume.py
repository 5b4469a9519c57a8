"""Going on with a run: damaged checkpoints are named and passed over, states that are not finite never saved."""

import csv
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

from rqgen.data import TensorItems
from rqgen.files import write_signed_json
from rqgen.models.transformer import TransformerConfig
from rqgen.training import (
    LoopConfig,
    OptimizerConfig,
    PriorConfig,
    PriorStage,
    StepResult,
    TokenizerStage,
    newest_whole_checkpoint,
    refuse_other_run,
    train,
)
from rqgen.training.checkpoint import load_checkpoint
from rqgen.training.optim import learning_rate


def loop_config(**settings):
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
    usual = {"steps": 6, "batch_size": 4, "window": 2, "log_every": 2, "checkpoint_every": 2, "keep_checkpoints": 3}
    return LoopConfig(**{**usual, "image_every": 0, "tensorboard": False, "optimizer": optimizer, **settings})


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))


class PairStage:
    name, axis = "pair", "depth"

    def __init__(self, bad_at=None, value=math.nan):
        self.model, self._bad_at, self._value = Pair(), bad_at, value

    def to(self, device):
        pass

    def step(self, batch):
        self.model.seen += 1
        loss = (self.model.weight * batch.inputs.mean()).square().mean()
        if self.model.seen == self._bad_at:
            with torch.no_grad():
                self.model.weight[0, 1] = self._value
        return StepResult(loss, {})

    def usage(self):
        return {"codes_used": torch.tensor([3.0])}

    def previews(self, model):
        return {}


def items():
    return TensorItems(torch.arange(8.0)[:, None], torch.arange(8))


def run(folder, *, resume=None, stage=None, **settings):
    return train(stage or PairStage(), items(), loop_config(**settings), folder, resume=resume)


@pytest.fixture
def checkpoint(tmp_path):
    run(tmp_path, ema_decay=0.9)
    return tmp_path / "checkpoints" / "step-00000006"


def rewrite(checkpoint, change_state=None, change_info=None):
    """Write a changed checkpoint with a valid checksum."""
    state, info = load_checkpoint(checkpoint)
    state = change_state(state) or state if change_state else state
    info = change_info(info) or info if change_info else info
    torch.save(state, checkpoint / "state.pt")
    write_signed_json(checkpoint / "info.json", info, checkpoint / "state.pt")


def deep(*path, value=None):
    """Set or, without a value, remove an entry."""

    def change(state):
        holder = state
        for key in path[:-1]:
            holder = holder[key]
        if value is None:
            del holder[path[-1]]
        else:
            holder[path[-1]] = value

    change.__name__ = ".".join(map(str, path)) + ("" if value is None else f"={type(value).__name__}")
    return change


STATE_KEYS = ("step", "history", "window", "model", "optimizer", "averaged", "scaler", "random")
NAN = torch.full((2, 3), math.nan)
DAMAGE = [
    *((deep(key), f"'{key}' is missing") for key in STATE_KEYS),
    *((deep(key, value="x"), f"{key}: expected") for key in STATE_KEYS),
    (deep("more", value=1), "unknown entry 'more'"),
    (deep("step", value=-1), "step: expected a number of steps, got -1"),
    (deep("step", value=True), "step: expected a number of steps, got True"),
    (deep("step", value=4), "step: expected 6, as info.json says, got 4"),
    (deep("history", 0, value=3), "history: expected a list of dictionaries of numbers"),
    (deep("history", 0, "loss", value="x"), "history: expected a list of dictionaries of numbers"),
    (deep("history", 0, "step"), "history: expected a step in each record"),
    (deep("history", 0, "step", value=2.0), "history: expected a step in each record"),
    (deep("history", 0, "step", value=4), "history: expected records of ascending steps"),
    (deep("history", 2, "step", value=7), "history: expected steps up to 6, got 7"),
    (deep("window", 0, "loss", value=torch.tensor(1)), "window: expected a list of dictionaries of finite"),
    (deep("window", 0, "loss"), "window: expected the names of the last record in each"),
    (deep("window", 0, "loss", value=torch.tensor(math.nan)), "window: expected a list of dictionaries of finite"),
    (deep("window", 0, "loss", value=torch.zeros(2)), "window: expected a list of dictionaries of finite"),
    (deep("model", "weight"), "model: does not fit Pair: 1 tensors missing: weight"),
    (deep("model", "more", value=torch.zeros(1)), "model: does not fit Pair: 1 tensors unknown: more"),
    (deep("model", "weight", value=torch.zeros(3, 2)), r"weight: expected \(2, 3\), got \(3, 2\)"),
    (deep("model", "weight", value=torch.zeros(2, 3).half()), "weight: expected torch.float32, got torch.float16"),
    (deep("model", "weight", value=[1]), "model: expected a dictionary of tensors"),
    (deep("model", "weight", value=NAN), "model: weight is not finite"),
    (deep("averaged", "updates"), "averaged: expected nothing, or 'updates' and 'model'"),
    (deep("averaged", "updates", value="x"), "averaged: expected nothing, or 'updates' and 'model'"),
    (deep("averaged", "model", "weight", value=NAN), "averaged: weight is not finite"),
    (deep("optimizer", "state"), "optimizer: 'state' is missing"),
    (deep("optimizer", "param_groups", value=[]), "optimizer.param_groups: not those of this optimizer"),
    (deep("optimizer", "param_groups", 0, "eps", value=0.5), "optimizer.param_groups: not those of this optimizer"),
    (deep("optimizer", "state", 0, "exp_avg"), "optimizer.state.0: 'exp_avg' is missing"),
    (deep("optimizer", "state", 0, "exp_avg", value=torch.zeros(6)), r"exp_avg: expected shape \(2, 3\), got \(6,\)"),
    (deep("optimizer", "state", 0, "exp_avg_sq", value=NAN), "exp_avg_sq: expected finite numbers"),
    (deep("optimizer", "state", 7, value={}), "optimizer.state.7: expected one of 1 parameters"),
    (deep("random", "numpy"), "random: expected states of random generators"),
    (deep("random", "python", value=3), "random: expected states of random generators"),
    (deep("random", "torch", value=torch.zeros(3)), "random: expected states of random generators"),
    (lambda state: {**state, "averaged": None}, "averaged: missing with these settings"),
]


@pytest.mark.parametrize(("change", "words"), DAMAGE, ids=lambda value: getattr(value, "__name__", None) or value[:30])
def test_what_is_wrong_in_a_state_is_named(checkpoint, change, words):
    rewrite(checkpoint, change)
    with pytest.raises(ValueError, match=rf"step-00000006/state\.pt: .*{words}"):
        run(checkpoint.parents[1], resume=checkpoint, ema_decay=0.9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (deep("step"), "'step' is missing"),
        (deep("stage"), "'stage' is missing"),
        (deep("description"), "'description' is missing"),
        (deep("step", value="6"), "step: expected a number of steps, got '6'"),
        (deep("stage", value=3), "stage: expected str, got 3"),
        (deep("description", value=[]), "description: expected dict, got list"),
        (deep("description", "loop", value=3), "cannot resume .*'loop' was 3 there"),
        (deep("description", "loop", "seed"), "cannot resume .*'loop.seed' was None there and is 0 now"),
        (deep("more", value=1), "unknown entry 'more'"),
    ],
)
def test_what_is_wrong_in_the_info_is_named(checkpoint, change, words):
    rewrite(checkpoint, change_info=change)
    with pytest.raises(ValueError, match=rf"(step-00000006.*: )?{words}"):
        run(checkpoint.parents[1], resume=checkpoint, ema_decay=0.9)


def test_checkpoints_without_a_checksum_are_read(checkpoint):
    _, info = load_checkpoint(checkpoint)
    (checkpoint / "info.json").write_text(json.dumps(info))
    assert run(checkpoint.parents[1], resume=checkpoint, ema_decay=0.9).history[-1]["step"] == 6


@pytest.mark.parametrize("damage", ["bit", "cut", "missing", "empty", "info", "folder"])
def test_a_damaged_newest_checkpoint_is_passed_over(checkpoint, damage, caplog):
    state, folder = checkpoint / "state.pt", checkpoint.parent
    whole = state.read_bytes()
    if damage == "bit":
        state.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    elif damage == "cut":
        state.write_bytes(whole[:-100])
    elif damage == "info":
        (checkpoint / "info.json").write_text("{")
    else:
        state.unlink()
        if damage == "empty":
            state.touch()
        elif damage == "folder":
            state.mkdir()
    path, info = newest_whole_checkpoint(folder)
    assert path.name == "step-00000004" and info["step"] == 4
    assert "step-00000006" in caplog.text and "resuming from step-00000004" in caplog.text
    for other in folder.iterdir():
        (other / "info.json").write_text("{")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole: .*00000006.*00000004.*00000002"):
        newest_whole_checkpoint(folder)
    assert newest_whole_checkpoint(folder / "nowhere") is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("keep", [1, 2])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, value, keep):
    """The loss is still finite when the weights are not: they changed after it was computed."""
    with pytest.raises(FloatingPointError, match=r"pair: model\.weight is not finite at step 4; .*step-00000002"):
        run(tmp_path, stage=PairStage(bad_at=4, value=value), keep_checkpoints=keep, log_every=100)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    path, _ = newest_whole_checkpoint(tmp_path / "checkpoints")
    whole = run(tmp_path / "whole")
    assert torch.equal(run(tmp_path, resume=path).model.weight, whole.model.weight)


def test_weights_that_are_not_finite_at_the_end_are_no_result(tmp_path):
    with pytest.raises(FloatingPointError, match=r"model\.weight is not finite at step 6; no checkpoint was saved"):
        run(tmp_path, stage=PairStage(bad_at=6), checkpoint_every=0)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_checkpoints_is_not_begun_again(tmp_path):
    run(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="already holds a run, such as step-00000006"):
        run(tmp_path, steps=2)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (".", "expected a folder or nothing, got an empty file"),
        ("checkpoints", "expected a folder or nothing, got an empty file"),
        ("tensorboard", "expected a folder or nothing, got an empty file"),
        ("history.csv", "expected a file or nothing, got a folder"),
    ],
)
def test_what_stands_in_the_way_is_told_before_the_first_step(tmp_path, name, words):
    """A history that cannot be written ended a run at its first checkpoint."""
    folder = tmp_path / "run"
    place = folder / name
    place.parent.mkdir(exist_ok=True)
    place.mkdir() if name == "history.csv" else place.touch()
    stage = PairStage()
    stage.step = lambda batch: pytest.fail("a step was taken")
    with pytest.raises(FileExistsError, match=words):
        run(folder, stage=stage)


def test_a_damaged_history_is_written_again(tmp_path):
    run(tmp_path, steps=4)
    (tmp_path / "history.csv").write_bytes(b"\xff\0step,,\n")
    run(tmp_path, resume=tmp_path / "checkpoints" / "step-00000004")
    resumed = (tmp_path / "history.csv").read_text()
    run(tmp_path / "whole")
    steps = [line.partition(",")[0] for line in resumed.splitlines()]
    assert steps == ["step", "2", "4", "6"]
    assert steps == [line.partition(",")[0] for line in (tmp_path / "whole/history.csv").read_text().splitlines()]


def test_paths_may_be_text_and_settings_may_not(tmp_path):
    run(str(tmp_path), steps=4)
    assert run(str(tmp_path), resume=str(tmp_path / "checkpoints" / "step-00000004")).history[-1]["step"] == 6
    with pytest.raises(TypeError, match="config: expected LoopConfig, got dict"):
        train(PairStage(), items(), {"steps": 1}, tmp_path)


def test_a_run_goes_on_to_more_steps(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run(tmp_path)
    result = run(tmp_path, resume=tmp_path / "checkpoints" / "step-00000006", steps=10)
    assert [record["step"] for record in result.history] == [2, 4, 6, 8, 10]
    assert "'loop.steps' was 6 and is 10 from now on" in caplog.text
    config = loop_config(steps=10)
    assert result.history[-1]["learning_rate"] == learning_rate(config.optimizer, 9, 10) > 0
    with pytest.raises(ValueError, match=r"loop\.steps: expected at least 10, where .*step-00000010 is, got 7"):
        run(tmp_path, resume=tmp_path / "checkpoints" / "step-00000010", steps=7)


def test_the_history_is_a_table(tmp_path):
    whole = run(tmp_path / "whole")
    with open(tmp_path / "whole" / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == whole.history
    assert list(rows[0]) == ["step", "learning_rate", "loss", "codes_used/depth_1"]
    run(tmp_path / "cut", resume=tmp_path / "whole" / "checkpoints" / "step-00000004")
    assert (tmp_path / "cut" / "history.csv").read_bytes() == (tmp_path / "whole" / "history.csv").read_bytes()
    run(tmp_path / "without", history_csv=False, checkpoint_every=0)
    assert not (tmp_path / "without").exists()


@pytest.fixture
def mine():
    """Accelerator of the caller."""
    yield Accelerator(mixed_precision="bf16", gradient_accumulation_steps=3)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_precisions_follow_one_another_in_one_process(make_vae, images, tmp_path, mine, caplog):
    weights = []
    for number, precision in enumerate(("no", "fp16", "bf16", "no")):
        config = loop_config(mixed_precision=precision, checkpoint_every=0, steps=3)
        result = train(TokenizerStage(make_vae()), images, config, tmp_path / str(number))
        weights.append(result.model.state_dict()["encoder.conv_in.weight"])
        assert (mine.mixed_precision, mine.gradient_state.num_steps) == ("bf16", 3) and mine.sync_gradients
    assert torch.equal(weights[0], weights[3]) and not torch.equal(weights[0], weights[2])
    on_cpu = not torch.cuda.is_available()
    assert torch.equal(weights[0], weights[1]) == on_cpu == ("fp16 needs a GPU" in caplog.text)


def test_a_failed_run_leaves_accelerate_as_it_was(tmp_path, mine):
    with pytest.raises(FloatingPointError):
        run(tmp_path, stage=PairStage(bad_at=2), mixed_precision="no")
    assert mine.mixed_precision == Accelerator().mixed_precision == "bf16"


def test_a_prior_goes_on_with_its_own_tokenizer_alone(make_vae, images, tmp_path):
    config = PriorConfig(
        embed_dim=16, spatial=TransformerConfig(layers=1, heads=2), depth=TransformerConfig(layers=1, heads=2)
    )

    def fit(vae, **more):
        vae.quantizer.initialized.fill_(True)
        stage = PriorStage(config.build(vae, 3), vae, config, kind="images", tau=0.1, seed=5)
        return train(stage, images, loop_config(), tmp_path, **more)

    fit(make_vae(0))
    path, _ = newest_whole_checkpoint(tmp_path / "checkpoints")
    with pytest.raises(ValueError, match=r"state\.pt: model: codebooks differs from that of the given tokenizer"):
        fit(make_vae(1), resume=path)
    fit(make_vae(0), resume=path)


def test_a_folder_of_an_older_version_was_split_by_the_order_of_its_files():
    saved = {"prior": {"data": {"source": "folder", "folder": {"path": "/a"}}}, "loop": {"steps": 3}}
    now = {"prior": {"data": {"source": "folder", "folder": {"path": "/a", "split": "order"}}}, "loop": {"steps": 3}}
    assert refuse_other_run(saved, now, Path("run")) == []
    now["prior"]["data"]["folder"]["split"] = "name"
    with pytest.raises(ValueError, match=r"'prior\.data\.folder\.split' was 'order' there and is 'name' now"):
        refuse_other_run(saved, now, Path("run"))
