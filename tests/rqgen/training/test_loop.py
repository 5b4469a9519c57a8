"""The loop: it learns, logs, and a resumed run equals one that was never interrupted, bit for bit."""

import json
from dataclasses import replace
from io import StringIO

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from rqgen.data import TensorItems
from rqgen.models.changes import is_overridden
from rqgen.models.transformer import TransformerConfig
from rqgen.training import (
    LoopConfig,
    OptimizerConfig,
    PriorConfig,
    PriorStage,
    StepResult,
    TokenizerStage,
    latest_checkpoint,
    train,
)
from rqgen.training.checkpoint import load_checkpoint


class Interrupted(Exception):
    pass


def interrupt_at(stage, step):
    """Make a stage fail in its forward pass number ``step`` (from 1)."""
    original, calls = stage.step, 0

    def failing(batch):
        nonlocal calls
        calls += 1
        if calls == step:
            raise Interrupted
        return original(batch)

    stage.step = failing
    return stage


def loop_config(**settings):
    return LoopConfig(
        **{
            "steps": 8,
            "batch_size": 8,
            "window": 3,
            "log_every": 2,
            "image_every": 0,
            "checkpoint_every": 3,
            "tensorboard": False,
            "optimizer": OptimizerConfig(learning_rate=3e-3, warmup_steps=2, weight_decay=0.01),
        }
        | settings
    )


def flat(value, name=""):
    """Return every leaf of a checkpoint's state by its path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}/{i}").items()}
    return {name: value}


def assert_same_state(first, second):
    one, other = flat(first), flat(second)
    assert one.keys() == other.keys()
    for name in one:
        same = torch.equal(one[name], other[name]) if torch.is_tensor(one[name]) else one[name] == other[name]
        assert same, name


def make_prior_stage(vae):
    config = PriorConfig(
        embed_dim=16,
        spatial=TransformerConfig(layers=1, heads=2),
        depth=TransformerConfig(layers=1, heads=2),
        condition_dropout=0.3,
    )
    torch.manual_seed(1)
    return PriorStage(config.build(vae, 3), vae, config, kind="images", tau=0.1, seed=5)


@pytest.mark.parametrize("stage_name", ["tokenizer", "prior"])
@pytest.mark.parametrize(
    "settings",
    [
        {"ema_decay": 0.9},
        {"accumulation": 2},
        {"mixed_precision": "bf16", "channels_last": True},
        {"mixed_precision": "fp16"},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(stage_name, settings, make_vae, images, tmp_path):
    config = loop_config(**settings)

    def make():
        return TokenizerStage(make_vae()) if stage_name == "tokenizer" else make_prior_stage(make_vae())

    whole = train(make(), images, config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(interrupt_at(make(), 5 * config.accumulation), images, config, tmp_path / "cut")
    checkpoint = latest_checkpoint(tmp_path / "cut" / "checkpoints")
    assert checkpoint.name == "step-00000003"
    torch.manual_seed(12345)  # whatever a new process happens to start with
    resumed = train(make(), images, config, tmp_path / "cut", resume=checkpoint)

    assert_same_state(whole.model.state_dict(), resumed.model.state_dict())
    assert whole.history == resumed.history
    ends = [load_checkpoint(tmp_path / run / "checkpoints" / "step-00000008")[0] for run in ("whole", "cut")]
    assert_same_state(*ends)
    start = make().model.state_dict()
    assert any(not torch.equal(start[name], value) for name, value in resumed.model.state_dict().items())


def test_training_lowers_the_loss_and_reports_usage(make_vae, images, tmp_path):
    config = loop_config(steps=60, log_every=20, checkpoint_every=0)
    result = train(TokenizerStage(make_vae()), images, config, tmp_path)
    assert result.history[-1]["reconstruction"] < 0.7 * result.history[0]["reconstruction"]
    assert [record["step"] for record in result.history] == [20, 40, 60]
    last = result.history[-1]
    assert 1 <= last["perplexity/depth_1"] <= last["codes_used/depth_1"] <= 16
    assert {"commitment", "learning_rate", "codes_used/depth_2"} <= last.keys()
    assert not result.model.training and not (tmp_path / "checkpoints").exists()


class Line(nn.Module):
    """y = w x, a model whose updates can be followed by hand."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))


class LineStage:
    name = "line"
    axis = "scale"

    def __init__(self, factor=1.0):
        self.model = Line()
        self.factor = factor
        self.seen = []

    def to(self, device):
        pass

    def step(self, batch):
        self.seen.append((batch.first_row, batch.labels.tolist()))
        loss = self.factor * (self.model.w * batch.inputs).mean()
        return StepResult(loss, {"mean": batch.inputs.mean()})

    def usage(self):
        return {"codes_used": torch.tensor([4, 7])}

    def previews(self, model):
        return {"sheet": torch.zeros(3, 4, 4, dtype=torch.uint8)}


def line_items():
    return TensorItems(torch.arange(8.0)[:, None], torch.arange(8))


def test_accumulated_batches_equal_one_large_batch(tmp_path):
    results = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        stage = LineStage()
        config = loop_config(batch_size=batch_size, accumulation=accumulation, steps=3, checkpoint_every=0)
        results.append(train(stage, line_items(), config, tmp_path))
        assert len(stage.seen) == 3 * accumulation
    assert torch.allclose(results[0].model.w, results[1].model.w)
    assert results[0].history[-1]["loss"] == pytest.approx(results[1].history[-1]["loss"])


def test_gradients_are_clipped(tmp_path, monkeypatch):
    norms = []
    plain = torch.optim.AdamW.step

    def watched(optimizer, *args, **kwargs):
        norms.append(optimizer.param_groups[1]["params"][0].grad.norm().item())
        return plain(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for clip in (0.5, None):
        config = loop_config(steps=1, checkpoint_every=0, optimizer=OptimizerConfig(clip_norm=clip))
        train(LineStage(factor=1000.0), line_items(), config, tmp_path)
    assert norms == [pytest.approx(0.5, rel=1e-3), pytest.approx(3500.0, rel=1e-3)]


def test_window_of_logged_terms(tmp_path):
    config = loop_config(batch_size=2, steps=4, window=3, log_every=4, checkpoint_every=0)
    stage = LineStage()
    record = train(stage, line_items(), config, tmp_path).history[0]
    means = [sum(labels) / 2 for _, labels in stage.seen]
    assert record["mean"] == pytest.approx(sum(means[1:]) / 3)
    assert record["codes_used/scale_2"] == 7 and "codes_used/depth_2" not in record


def test_tensorboard_gets_scalars_and_pictures(tmp_path):
    config = loop_config(steps=4, tensorboard=True, image_every=2, checkpoint_every=0)
    train(LineStage(), line_items(), config, tmp_path)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [2, 4]
    assert {"learning_rate", "images_per_second", "codes_used/scale_1"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("sheet")] == [2, 4]


def test_pictures_are_drawn_without_what_mixed_precision_sets(tmp_path):
    """On the instance, where sampling would take it for a change of the model."""
    seen = []

    class Watching(LineStage):
        def step(self, batch):
            seen.append("forward" in self.model.__dict__)
            return super().step(batch)

        def previews(self, model):
            seen.append("forward" in model.__dict__)
            return super().previews(model)

    config = loop_config(
        steps=2, batch_size=4, tensorboard=True, image_every=1, checkpoint_every=0, mixed_precision="bf16"
    )
    result = train(Watching(), line_items(), config, tmp_path)
    assert seen == [True, False, True, False]
    assert not is_overridden(result.model, "forward")


def test_progress_shows_loss_speed_and_time_left(tmp_path):
    console = Console(file=StringIO(), force_terminal=True, width=120)
    train(LineStage(), line_items(), loop_config(checkpoint_every=0), tmp_path, console=console)
    shown = console.file.getvalue()
    for part in ("line", "8/8", "loss", "images/s", "left", "codes 4/7"):
        assert part in shown


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="line: the loss is not finite at step 2"):
        train(LineStage(factor=float("nan")), line_items(), loop_config(), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_resuming_with_other_settings_is_refused(tmp_path):
    config = loop_config(steps=3)
    train(LineStage(), line_items(), config, tmp_path)
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert json.loads((checkpoint / "info.json").read_text())["stage"] == "line"
    with pytest.raises(ValueError, match=r"'loop\.batch_size' was 8 there and is 4 now"):
        train(LineStage(), line_items(), replace(config, batch_size=4), tmp_path, resume=checkpoint)
    changed = replace(config, log_every=1, checkpoint_every=0, workers=0)
    done = train(LineStage(), line_items(), changed, tmp_path, resume=checkpoint)
    assert torch.equal(done.model.w, load_checkpoint(checkpoint)[0]["model"]["w"])


def test_more_than_one_process_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    with pytest.raises(RuntimeError, match="one process, but 2 were launched"):
        train(LineStage(), line_items(), loop_config(), tmp_path)


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"steps": 0}, "steps"), ({"seed": -1}, "seed"), ({"ema_decay": 1.0}, "ema_decay")],
)
def test_bad_loop_settings(settings, word):
    with pytest.raises(ValueError, match=word):
        LoopConfig(**settings)
