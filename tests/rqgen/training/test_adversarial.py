"""Training against a discriminator and with a perceptual distance, by the ordinary loop."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from rqgen.cli.settings import RECIPES
from rqgen.config import load
from rqgen.data import TensorItems
from rqgen.data.stream import Batch, BatchStream
from rqgen.files import write_signed_json
from rqgen.models import Tokenizer
from rqgen.systems.rq import RQTokenizerRun
from rqgen.training import (
    AdversarialConfig,
    LoopConfig,
    OptimizerConfig,
    PerceptualConfig,
    StepResult,
    TokenizerStage,
    TrainingResult,
    tokenizer_stage,
    train,
)
from rqgen.training.adversary import Adversary
from rqgen.training.checkpoint import checkpoints, load_checkpoint
from rqgen.training.loop import AdversarialStage
from rqgen.training.losses import DiscriminatorOptimizerConfig
from rqgen.training.resume import read_state
from rqgen.training.tokenizer import AdversarialTokenizerStage, PerceptualTokenizerStage

OPTIMIZER = DiscriminatorOptimizerConfig(learning_rate=2e-3)


def adversarial(**settings: Any) -> AdversarialConfig:
    return AdversarialConfig(**{"base_channels": 4, "layers": 1, "start_step": 2, "optimizer": OPTIMIZER, **settings})


def loop_config(**settings: Any) -> LoopConfig:
    usual = {"steps": 6, "batch_size": 4, "window": 3, "log_every": 1, "checkpoint_every": 3, "keep_checkpoints": 3}
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=2)
    return LoopConfig(**{**usual, "image_every": 0, "tensorboard": False, "optimizer": optimizer, **settings})


class Blurred(nn.Module):
    """The mean squared difference of 2x2 means: a perceptual distance without a file."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x - y, 2).square().mean(dim=(1, 2, 3))


@pytest.fixture
def small_images() -> TensorItems:
    generator = torch.Generator().manual_seed(7)
    coarse = torch.rand(24, 1, 2, 2, generator=generator) * 2 - 1
    return TensorItems(nn.functional.interpolate(coarse, size=8), torch.arange(24) % 3)


def make_stage(
    config: AdversarialConfig | None, *, system: str = "rq", perceptual_weight: float | None = 0.5, seed: int = 0
) -> TokenizerStage:
    torch.manual_seed(seed)
    make: dict[str, Callable[[], Tokenizer]] = {"rq": tiny.rqvae, "var": tiny.multiscale_vqvae}
    model = make[system]().train()
    if perceptual_weight is None:
        return tokenizer_stage(model, adversarial=config)
    return tokenizer_stage(model, perceptual=Blurred(), perceptual_weight=perceptual_weight, adversarial=config, seed=3)


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Every leaf of a checkpoint's state by its path."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flat(item, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: v for i, item in enumerate(value) for k, v in flat(item, f"{name}/{i}").items()}
    return {name: value}


def assert_same_state(first: Any, second: Any) -> None:
    one, other = flat(first), flat(second)
    assert one.keys() == other.keys()
    for name in one:
        same = torch.equal(one[name], other[name]) if torch.is_tensor(one[name]) else one[name] == other[name]
        assert same, name


@pytest.mark.parametrize(
    ("system", "settings", "changes"),
    [
        ("rq", {"ema_decay": 0.9}, {}),
        ("rq", {"accumulation": 2}, {"lecam_weight": 0.1, "warmup_steps": 3}),
        ("rq", {"mixed_precision": "bf16", "channels_last": True}, {"augment": ["colour", "translation", "cutout"]}),
        ("rq", {"mixed_precision": "fp16"}, {"norm": "actnorm", "spectral_norm": True, "r1_weight": 0.5}),
        ("var", {"accumulation": 2}, {"lecam_weight": 0.1, "loss": "vanilla"}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(
    system: str, settings: Any, changes: Any, small_images: TensorItems, tmp_path: Path
) -> None:
    """The discriminator starts before the checkpoint, and may still warm up after it."""

    def run(folder: str, resume: Path | None = None) -> TrainingResult[Any]:
        stage = make_stage(adversarial(**changes), system=system)
        return train(stage, small_images, loop_config(**settings), tmp_path / folder, resume=resume)

    whole = run("whole")
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-00000003"
    torch.manual_seed(12345)  # whatever a new process happens to start with
    resumed = run("resumed", checkpoint)

    assert_same_state(whole.model.state_dict(), resumed.model.state_dict())
    assert whole.history == resumed.history
    ends = [load_checkpoint(tmp_path / run / "checkpoints" / "step-00000006")[0] for run in ("whole", "resumed")]
    assert_same_state(*ends)
    at_three, at_six = load_checkpoint(checkpoint)[0]["adversary"], ends[0]["adversary"]
    assert (at_three["updates"], at_six["updates"]) == (1, 4)
    moved = {name for name, value in at_six["model"].items() if not torch.equal(value, at_three["model"][name])}
    assert any(name.endswith(("weight", "original")) for name in moved)
    assert ("logit_averages" in moved) == ("lecam_weight" in changes)
    assert any("_extra_state" in name for name in moved) == ("augment" in changes)
    assert any("running_mean" in name for name in moved) == (changes.get("norm") != "actnorm")


@pytest.mark.parametrize("accumulation", [1, 2])
def test_an_update_is_the_published_one(accumulation: int, small_images: TensorItems, tmp_path: Path) -> None:
    """Against the loop that docs/losses.md writes out, the adaptive weight found for each batch of an update."""
    optimizer = OptimizerConfig(learning_rate=3e-3, warmup_steps=0, final_lr_fraction=1.0, beta2=0.9, clip_norm=None)
    config = loop_config(steps=4, accumulation=accumulation, checkpoint_every=0, optimizer=optimizer)
    looped = make_stage(adversarial(start_step=1))
    train(looped, small_images, config, tmp_path)

    stage = make_stage(adversarial(start_step=1))
    assert isinstance(stage, AdversarialTokenizerStage) and isinstance(looped, AdversarialTokenizerStage)
    vae, losses = stage.model.train(), stage.adversary.train()
    for_vae = torch.optim.AdamW(vae.parameters(), lr=3e-3, betas=(0.9, 0.9), weight_decay=0.0)
    for_discriminator = torch.optim.AdamW(losses.parameters(), lr=2e-3, betas=(0.5, 0.9), weight_decay=0.0)
    set_seed(0)
    batches = iter(BatchStream(small_images, 4, seed=0))
    for step in range(4):
        pairs = []
        for _ in range(accumulation):
            images = next(batches).inputs
            loss = vae.loss(images)
            generator = losses.generator(loss, images, last_layer=vae.last_layer, step=step)
            (generator.total / accumulation).backward()
            pairs.append((images, loss.output.reconstruction.detach()))
            if accumulation > 1:  # the statistics of the discriminator move batch by batch
                (losses.discriminator(*pairs[-1], step=step).total / accumulation).backward()
        for_vae.step()
        for_vae.zero_grad()
        if accumulation == 1:
            losses.discriminator(*pairs[0], step=step).total.backward()
        if step >= 1:
            for_discriminator.step()
            for_discriminator.zero_grad()
    assert_same_state(looped.model.state_dict(), vae.state_dict())
    assert_same_state(looped.adversary.state_dict(), losses.state_dict())


def test_without_sections_a_run_is_what_it_was(small_images: TensorItems, tmp_path: Path) -> None:
    stage = make_stage(None, perceptual_weight=None)
    assert type(stage) is TokenizerStage and not isinstance(stage, AdversarialStage)
    train(stage, small_images, loop_config(steps=3), tmp_path)
    state, _ = load_checkpoint(tmp_path / "checkpoints" / "step-00000003")
    assert state.keys() == {"step", "history", "window", "model", "optimizer", "averaged", "scaler", "random"}


def test_terms_are_logged_from_their_first_step_on(small_images: TensorItems, tmp_path: Path) -> None:
    """A mean over the window never mixes steps with and without a discriminator."""
    config = adversarial(r1_weight=0.1, lecam_weight=0.1)
    names = {"adversarial", "adaptive_weight", "discriminator", "real_logits", "fake_logits", "r1", "lecam"}
    histories = {
        window: train(make_stage(config), small_images, loop_config(window=window), tmp_path / str(window)).history
        for window in (1, 3)
    }
    for history in histories.values():
        assert [names & record.keys() for record in history] == [set()] * 2 + [names] * 4
        assert all("perceptual" in record and "commitment" in record for record in history)
    assert histories[1][2] == histories[3][2]
    for name in names:
        expected = sum(record[name] for record in histories[1][2:5]) / 3
        assert histories[3][4][name] == pytest.approx(expected, rel=1e-5)
    header, *rows = (tmp_path / "3" / "history.csv").read_text().splitlines()
    assert names <= set(header.split(",")) and len(rows) == 6


def test_a_perceptual_distance_alone(small_images: TensorItems, tmp_path: Path) -> None:
    stage, plain = make_stage(None, perceptual_weight=0.5), make_stage(None, perceptual_weight=None)
    assert isinstance(stage, PerceptualTokenizerStage) and not isinstance(stage, AdversarialStage)
    images = torch.stack([small_images.item(index, 0)[0] for index in range(4)])
    batch = Batch(images, torch.full((4,), -1), 0)
    results = []
    for one in (stage, plain):
        torch.manual_seed(1)  # of the first codes, which are sampled from the batch
        results.append(one.step(batch))
    found, own = results
    distance = found.terms["perceptual"]
    assert distance > 0 and torch.equal(found.loss, own.loss + 0.5 * distance)
    gradients = [torch.autograd.grad(one.loss, s.model.last_layer)[0] for one, s in ((found, stage), (own, plain))]
    assert not torch.allclose(*gradients)
    history = train(make_stage(None), small_images, loop_config(steps=2), tmp_path).history
    assert all("perceptual" in record for record in history)


# --- states that are not finite


def broken_at(step: int, spoil: Callable[[AdversarialTokenizerStage], Tensor]) -> AdversarialTokenizerStage:
    """A stage with a tensor that becomes NaN before update number ``step``, from 0."""
    stage = make_stage(adversarial())
    assert isinstance(stage, AdversarialTokenizerStage)
    start = stage.start

    def spoiling(number: int) -> None:
        start(number)
        if number == step:
            with torch.no_grad():
                spoil(stage).fill_(math.nan)

    stage.start = spoiling  # type: ignore[method-assign]
    return stage


@pytest.mark.parametrize(
    ("spoil", "log_every", "words"),
    [
        (lambda stage: stage.adversary.get_buffer("logit_averages"), 1, "adversary.model.logit_averages is not finite"),
        (lambda stage: next(stage.adversary.parameters()), 1, "the loss is not finite at step 4"),
        (lambda stage: next(stage.adversary.parameters()), 100, "is not finite at step 4"),
        (lambda stage: stage.model.last_layer, 100, "a reconstruction is not finite at step 4"),
    ],
)
def test_a_discriminator_that_is_not_finite_is_never_saved(
    spoil: Any, log_every: int, words: str, small_images: TensorItems, tmp_path: Path
) -> None:
    config = loop_config(checkpoint_every=2, keep_checkpoints=1, log_every=log_every)
    with pytest.raises(FloatingPointError, match=f"{words}.*the newest good checkpoint is .*step-00000002"):
        train(broken_at(3, spoil), small_images, config, tmp_path)
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000002"]


def test_a_discriminator_that_is_not_finite_at_the_end_is_no_result(small_images: TensorItems, tmp_path: Path) -> None:
    stage = broken_at(3, lambda stage: stage.adversary.get_buffer("logit_averages"))
    with pytest.raises(FloatingPointError, match=r"adversary\.logit_averages is not finite"):
        train(stage, small_images, loop_config(steps=4, checkpoint_every=0), tmp_path)


# --- checkpoints


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("adversary"), "adversary: missing with these settings"),
        (lambda state: state.update(adversary="x"), "adversary: expected nothing, or 'updates', 'model'"),
        (lambda state: state["adversary"].pop("updates"), "adversary: expected nothing, or 'updates'"),
        (lambda state: state["adversary"].update(updates=-1), "adversary: expected nothing, or 'updates'"),
        (lambda state: state["adversary"].update(scaler={}), "adversary.scaler: not expected with these settings"),
        (lambda state: state["adversary"]["model"].pop("critic.main.0.bias"), "adversary.model: .*critic.main.0.bias"),
        (lambda state: state["adversary"]["optimizer"].pop("state"), "adversary.optimizer: 'state' is missing"),
    ],
)
def test_a_damaged_part_of_a_checkpoint_is_named(
    change: Callable[[Any], Any], words: str, small_images: TensorItems, tmp_path: Path
) -> None:
    train(make_stage(adversarial()), small_images, loop_config(steps=3), tmp_path)
    path = tmp_path / "checkpoints" / "step-00000003"
    state, info = load_checkpoint(path)
    change(state)
    torch.save(state, path / "state.pt")
    write_signed_json(path / "info.json", info, path / "state.pt")
    with pytest.raises(ValueError, match=words):
        train(make_stage(adversarial()), small_images, loop_config(steps=3), tmp_path, resume=path)


def test_a_checkpoint_without_an_adversary_is_not_resumed_with_one(small_images: TensorItems, tmp_path: Path) -> None:
    train(make_stage(None), small_images, loop_config(steps=3), tmp_path)
    path = tmp_path / "checkpoints" / "step-00000003"
    assert read_state(path)[0]["adversary"] is None
    with pytest.raises(ValueError, match="adversary: missing with these settings"):
        train(make_stage(adversarial()), small_images, loop_config(steps=4), tmp_path, resume=path)


# --- the second optimizer, by itself


class Duel:
    """A stage of which only the adversary matters: a line w . x with a given loss."""

    name, axis = "duel", "depth"

    def __init__(self, optimizer: OptimizerConfig, *, start: int = 0) -> None:
        torch.manual_seed(0)
        self.adversary, self.adversary_optimizer = nn.Linear(3, 1), optimizer
        self.factor, self._start, self._active = 1.0, start, False

    def start(self, step: int) -> None:
        self._active = step >= self._start

    def oppose(self) -> StepResult | None:
        loss = self.factor * self.adversary(torch.tensor([[1.0, 2.0, 3.0]])).square().mean()
        return StepResult(loss, {"opposed": loss.detach()}) if self._active else None

    def remarks(self, record: dict[str, float]) -> list[str]:
        return []


def make_adversary(stage: Any, *, scaled: bool = False, steps: int = 4) -> Adversary:
    accelerator: Any = SimpleNamespace(
        scaler=object() if scaled else None,
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        sync_gradients=True,
    )
    return Adversary(stage, LoopConfig(steps=steps), accelerator)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_a_gradient_scaler_changes_nothing(clip_norm: float | None) -> None:
    weights = []
    for scaled in (False, True):
        stage = Duel(OptimizerConfig(learning_rate=0.1, warmup_steps=0, clip_norm=clip_norm))
        adversary = make_adversary(stage, scaled=scaled)
        for step in range(4):
            adversary.start(step)
            assert adversary.learn().keys() == {"opposed"}
        weights.append(stage.adversary.weight.detach().clone())
        assert (adversary.state_dict()["scaler"] is None) == (not scaled)
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_an_overflow_is_skipped_and_lowers_the_scale() -> None:
    stage = Duel(OptimizerConfig(learning_rate=0.1, warmup_steps=0))
    adversary = make_adversary(stage, scaled=True)
    before, stage.factor = stage.adversary.weight.detach().clone(), 1e36
    adversary.start(0)
    adversary.learn()
    assert torch.equal(stage.adversary.weight, before)
    state = adversary.state_dict()
    assert state["scaler"]["scale"] == 2.0**15
    restored = make_adversary(Duel(stage.adversary_optimizer), scaled=True)
    restored.restore(state, where="here")
    assert_same_state(restored.state_dict(), state)


def test_the_learning_rate_counts_from_the_first_update() -> None:
    settings = OptimizerConfig(learning_rate=0.1, warmup_steps=2, final_lr_fraction=0.0)
    adversary, rates = make_adversary(Duel(settings, start=3), steps=6), []
    for step in range(6):
        adversary.start(step)
        if adversary.learn():
            rates.append(adversary.state_dict()["optimizer"]["param_groups"][0]["lr"])
    assert rates == pytest.approx([0.05, 0.1, 0.1]) and adversary.updates == 3


# --- what is said in the log


def record(step: int, *, real: float = 0.1, fake: float = -0.1, weight: float = 1.0) -> dict[str, float]:
    return {"step": step, "real_logits": real, "fake_logits": fake, "adaptive_weight": weight}


def test_a_discriminator_that_has_won_is_said_once() -> None:
    stage = make_stage(adversarial())
    assert isinstance(stage, AdversarialTokenizerStage)
    assert not stage.remarks({"step": 0})  # before its start
    assert not any(stage.remarks(record(step, real=1.5, fake=-1.5)) for step in range(10, 210, 10))
    assert not stage.remarks(record(210)) and not stage.remarks(record(220, real=1.5, fake=-1.5))
    (remark,) = stage.remarks(record(420, real=1.5, fake=-1.5))
    assert "has won" in remark and "real 1.5, fake -1.5" in remark and "adversarial.r1_weight" in remark
    assert not stage.remarks(record(430, real=1.5, fake=-1.5))


def test_an_adaptive_weight_at_its_clamp_is_said_once() -> None:
    stage = make_stage(adversarial(max_weight=50.0))
    assert isinstance(stage, AdversarialTokenizerStage)
    assert not stage.remarks(record(1, weight=50.0)) and not stage.remarks(record(200, weight=49.9))
    (remark,) = stage.remarks(record(201, weight=50.0))
    assert "at adversarial.max_weight (50)" in remark
    assert not stage.remarks(record(500, weight=50.0))


def test_remarks_reach_the_log(
    small_images: TensorItems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("rqgen.training.tokenizer._LASTING", 2)
    monkeypatch.setattr("rqgen.training.tokenizer._WON", {"hinge": -math.inf})
    with caplog.at_level(logging.WARNING):
        train(make_stage(adversarial()), small_images, loop_config(), tmp_path)
    (line,) = (one.getMessage() for one in caplog.records if "has won" in one.getMessage())
    assert line.startswith("tokenizer: step 5: the discriminator has won")


# --- settings


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adversarial.weight=0"], "adversarial.weight: expected a positive number, got 0"),
        (["adversarial.lecam_decay=1"], "adversarial.lecam_decay: expected 0 <= lecam_decay < 1, got 1"),
        (["adversarial.layers=4"], r"adversarial.layers: expected at most 3 for images of 32 pixels.*, got 4"),
        (["adversarial.loss=wasserstein"], "'adversarial.loss': expected one of hinge, vanilla, non_saturating"),
        (["adversarial.augment=[blur]"], "adversarial.augment"),
        (["adversarial.optimizer.beta1=1"], "adversarial.optimizer.beta1: expected 0 <= beta1 < 1"),
        (["adversarial.start_step=-1"], "adversarial.start_step: expected at least 0, got -1"),
        (["perceptual.weight=0"], "perceptual.weight: expected a positive number, got 0"),
        (["perceptual.features=a.pt2", "perceptual.heads=b"], "perceptual.features: expected none with heads"),
        (["data.resolution=8", "perceptual.vgg=a.pth"], "perceptual.vgg: expected images of at least 16 pixels"),
    ],
)
def test_mistakes_in_settings_are_named(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(RQTokenizerRun, None, overrides, recipes=RECIPES)


def settings(*overrides: str) -> RQTokenizerRun:
    return load(RQTokenizerRun, None, overrides, recipes=RECIPES)


def test_one_setting_adds_a_section_and_keeps_its_defaults() -> None:
    off = settings()
    assert off.adversarial is None and off.perceptual is None
    on = settings("adversarial.optimizer.learning_rate=1e-3", "perceptual.vgg=a.pth")
    assert on.adversarial is not None
    assert on.adversarial == AdversarialConfig(optimizer=DiscriminatorOptimizerConfig(learning_rate=1e-3))
    assert on.adversarial.optimizer.beta1 == 0.5 and on.perceptual == PerceptualConfig(vgg=Path("a.pth"))
    assert settings("adversarial.weight=0.5", "adversarial=null").adversarial is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, r"perceptual\.vgg: expected .*usually vgg16-397923af\.pth.*no path was given.*perceptual\.vgg=PATH"),
        ({"vgg": Path("no.pth")}, r"perceptual\.vgg: .*there is no file no\.pth"),
        ({"features": Path("no.pt2")}, r"perceptual\.features: .*usually NAME\.pt2.*there is no file no\.pt2"),
    ],
)
def test_a_missing_file_is_named_with_its_usual_name(settings: dict[str, Path], words: str) -> None:
    for act in (PerceptualConfig.files, PerceptualConfig.build):
        with pytest.raises(FileNotFoundError, match=words):
            act(PerceptualConfig(**settings))
