"""Learning rate, parameter groups, averaged weights."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from rqgen.training.optim import AveragedWeights, OptimizerConfig, build_optimizer, learning_rate


def test_warmup_then_cosine():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=4, final_lr_fraction=0.1)
    rates = [learning_rate(config, step, 14) for step in range(15)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and rates[4] == 2.0
    assert rates[9] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5)) and rates[14] == pytest.approx(0.2)
    assert all(later <= earlier for earlier, later in pairwise(rates[4:]))
    assert learning_rate(OptimizerConfig(warmup_steps=0), 0, 1) == 1e-3
    assert math.isclose(learning_rate(OptimizerConfig(warmup_steps=10), 9, 5), 1e-3)


def test_weight_decay_spares_biases_and_norms():
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    model[0].bias.requires_grad_(False)
    decayed, spared = build_optimizer(model, OptimizerConfig(weight_decay=0.3)).param_groups
    assert [p.shape for p in decayed["params"]] == [(2, 3)] and decayed["weight_decay"] == 0.3
    assert len(spared["params"]) == 2 and spared["weight_decay"] == 0


def test_averaged_weights_follow_slowly_and_buffers_at_once():
    model = nn.BatchNorm1d(2)
    averaged = AveragedWeights(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.running_mean.fill_(5.0)
    averaged.update(model)
    assert torch.allclose(averaged.model.weight, torch.full((2,), 0.1 * 1 + 0.9 * 3.0))  # decay 1/10 at first
    assert torch.equal(averaged.model.running_mean, torch.full((2,), 5.0))
    for _ in range(20):
        before = averaged.model.weight.clone()
        averaged.update(model)
    assert torch.allclose(averaged.model.weight, 0.5 * before + 0.5 * 3.0)
    assert not averaged.model.weight.requires_grad and not averaged.model.training

    restored = AveragedWeights(nn.BatchNorm1d(2), 0.5)
    restored.load_state_dict(averaged.state_dict())
    assert restored.updates == 21 and torch.equal(restored.model.weight, averaged.model.weight)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"learning_rate": 0}, "learning_rate"),
        ({"final_lr_fraction": 1.5}, "final_lr_fraction"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"beta1": 1.0}, "beta1"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"clip_norm": 0}, "clip_norm"),
    ],
)
def test_bad_settings(settings, word):
    with pytest.raises(ValueError, match=word):
        OptimizerConfig(**settings)
    with pytest.raises(ValueError, match="ema_decay"):
        AveragedWeights(nn.Linear(1, 1), 1.0)
