"""Checks of arguments that several rooms share, and of settings that are made in Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tiny

from rqgen.checks import check_nonnegative
from rqgen.evaluation import SamplingConfig
from rqgen.inference.params import SamplingParams
from rqgen.models.multiscale_vqvae import MultiScaleVQVAEConfig
from rqgen.models.rqtransformer import RQTransformerConfig
from rqgen.models.rqvae import RQVAE, RQVAEConfig
from rqgen.models.var import VARConfig
from rqgen.sampling import generate
from rqgen.training import LoopConfig, OptimizerConfig, PriorConfig


def test_settings_of_numpy_integers_make_the_same_models() -> None:
    """Sizes of NumPy were left out of the codes' layout: 8 codes of an image instead of 32."""
    size = np.int64
    vae = tiny.rqvae(code_shape=[size(4), size(4), size(2)], quantizer={"codebook_size": size(12)})
    assert vae.layout == tiny.rqvae().layout and vae.layout.count == 32
    prior = tiny.rq_prior(vae)
    assert prior.layout.count == 32 and generate(prior, vae, num=1).codes.shape == (1, 4, 4, 2)
    scales = tiny.multiscale_config(scales=[size(1), [size(2), 2], size(4)])
    assert scales == tiny.multiscale_config()


def prior_config(**settings: Any) -> RQTransformerConfig:
    return RQTransformerConfig(
        **{"code_shape": (2, 2, 2), "code_dim": 4, "codebook_size": 8, "embed_dim": 8, **settings}
    )


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (RQVAEConfig, {"dropout": "a"}, "dropout: expected a finite number, got 'a'"),
        (RQVAEConfig, {"base_channels": 32.0}, "base_channels: expected an integer, got 32.0"),
        (RQVAEConfig, {"channel_multipliers": [1, "2"]}, "channel_multipliers[1]: expected an integer, got '2'"),
        (RQVAEConfig, {"quantizer": {"depth": 3}}, "quantizer: expected settings (QuantizerConfig), got {'depth': 3}"),
        (RQVAEConfig, {"commitment_weight": 1e39}, "commitment_weight: expected a finite number of at most 3.4e+38"),
        (MultiScaleVQVAEConfig, {"latent_kernel": "3"}, "latent_kernel: expected an integer, got '3'"),
        (prior_config, {"code_dim": "4"}, "code_dim: expected an integer, got '4'"),
        (VARConfig, {"layers": "2"}, "layers: expected an integer, got '2'"),
        (VARConfig, {"mlp_ratio": 1e39}, "mlp_ratio: expected a finite number of at most 3.4e+38 (float32), got 1e+39"),
        (LoopConfig, {"steps": "3"}, "steps: expected an integer, got '3'"),
        (LoopConfig, {"seed": "3"}, "seed: expected an integer, got '3'"),
        (LoopConfig, {"mixed_precision": "fp8"}, "mixed_precision: expected one of no, fp16, bf16, got 'fp8'"),
        (OptimizerConfig, {"learning_rate": "1e-3"}, "learning_rate: expected a finite number, got '1e-3'"),
        (OptimizerConfig, {"warmup_steps": 2**40}, "warmup_steps: expected at most 2147483648, got 1099511627776"),
        (PriorConfig, {"tau": "a"}, "tau: expected a finite number, got 'a'"),
        (SamplingConfig, {"count": "100"}, "count: expected an integer, got '100'"),
        (SamplingConfig, {"cfg_scale": 1e39}, "cfg_scale: expected a finite number of at most 3.4e+38"),
        (SamplingParams, {"cfg_scale": 1e39}, "cfg_scale: expected a number of at most 3.4e+38 (float32), got 1e+39"),
        (SamplingParams, {"temperature": [1, 1e39]}, "temperature[1]: expected a number of at most 3.4e+38 (float32)"),
    ],
)
def test_settings_of_other_types_are_refused_by_name(
    make: Callable[..., Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((TypeError, ValueError)) as caught:
        make(**settings)
    assert str(caught.value).startswith(message)


def test_a_model_checks_what_was_set_since_its_config_was_made() -> None:
    config = RQVAEConfig(base_channels=8, norm_groups=8, channel_multipliers=[1, 1], resolution=8)
    config.dropout = "a"  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"^config\.dropout: expected a finite number, got 'a'"):
        RQVAE(config)


def test_numbers_that_float32_holds_pass() -> None:
    assert check_nonnegative(3.4e38, "x") == 3.4e38 and check_nonnegative(0, "x") == 0
    with pytest.raises(ValueError, match=r"^x: expected a number of at most 3\.4e\+38 \(float32\), got 1e\+39"):
        check_nonnegative(1e39, "x")
    with pytest.raises(ValueError, match=r"^x: expected a finite number >= 0, got inf"):
        check_nonnegative(10**400, "x")
