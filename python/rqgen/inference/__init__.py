"""Everything between a prior and sampled codes: settings, samplers, caches, packed weights, CUDA graphs."""

from .params import LevelParams, SamplingParams
from .sampler import PRECISIONS, Engine, Sampled, Sampler, StepSampler, make_sampler
from .scales import KnownRegion, ScaleSampler
from .stacks import can_pack, cast_prior, change_of_prior

__all__ = [
    "PRECISIONS",
    "Engine",
    "KnownRegion",
    "LevelParams",
    "Sampled",
    "Sampler",
    "SamplingParams",
    "ScaleSampler",
    "StepSampler",
    "can_pack",
    "cast_prior",
    "change_of_prior",
    "make_sampler",
]
