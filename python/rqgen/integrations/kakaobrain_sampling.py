"""The published RQ-Transformer's `sample` (kakaobrain/rq-vae-transformer) on our operators.

The published loop embeds all codes sampled so far for every code, grows keys and values by concatenation, and sorts
all K logits and waits for the device at each code. After `rqgen.accelerate(transformer)` the same call

    codes = transformer.sample(partial_sample, model_aux=vae, cond=labels, top_k=2048, top_p=0.95)

samples a position in two calls (on a GPU in one CUDA graph), from the transformer's own weights, see
`rqgen.inference`. What is the same as before, and what is not:

- The likeliest codes (top_k=1) are the same, but where two logits agree within rounding. Other samples come from the
  same distributions, with numbers of our own generator: its seed is one number of torch's global CPU generator, so
  `torch.manual_seed` fixes them. Of codes with equal logits at the edge of top_k, the lower ones are kept.
- On the CPU the attribute `sampling_precision` of the transformer may be set to "bf16" or "int8" in place of "fp32".
  On a GPU `amp=True` computes in bfloat16 (published: float16).
- `cached`, `fast` and `desc` are accepted and change nothing; with `is_tqdm` rich shows a progress bar.
- A transformer with changes that its weights do not show (hooks, parametrizations, modules and methods replaced)
  samples by the published loop, with one warning; at a shorter `sampling_precision` that is an error.
- On the CPU packed weights, and copies that show later changes of the weights, are kept between calls; on a GPU each
  call reads the weights again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from rqgen.checks import check_range
from rqgen.convert.kakaobrain.rqtransformer import build_rqtransformer
from rqgen.inference import LevelParams, Sampler
from rqgen.inference.cuda_graph import CapturedSampler
from rqgen.inference.packed import PackedPrior, packed_once
from rqgen.inference.stacks import cast_prior, check_precision
from rqgen.models import RQTransformer as Prior
from rqgen.models.changes import warn_once

from .published import RQTransformer
from .swap import change_in_tree, has_structure, override_of, swap_class

METHODS = ("embed_with_model_aux", "cached_forward", "init_cache", "sample")
ATTRIBUTES = (
    "config",
    "block_size",
    "vocab_size",
    "block_size_cond",
    "vocab_size_cond",
    "body_transformer",
    "head_transformer",
)

SAMPLER = f"kakaobrain's RQTransformer (attributes {', '.join(ATTRIBUTES)}; methods {', '.join(METHODS)})"


def swap_samplers(model: nn.Module) -> int:
    """Accelerate `sample` of every published transformer in the tree of `model`; return how many it holds.

    Raises:
        ValueError: one whose codebooks differ in size by depth. No module has been changed then.
    """
    found = {name: module for name, module in model.named_modules() if _is_sampler(module)}
    for name, transformer in found.items():
        if len(set(transformer.vocab_size)) > 1:
            raise ValueError(
                f"{name or 'model'}.vocab_size: sizes that differ by depth are not supported, "
                f"got {list(transformer.vocab_size)}"
            )
    for transformer in found.values():
        if not isinstance(transformer, Sampling):
            transformer._parts_when_accelerated = _parts(transformer)
        swap_class(transformer, Sampling)
    return len(found)


def _is_sampler(module: nn.Module) -> TypeGuard[Sampling]:
    return has_structure(module, METHODS, ATTRIBUTES)


def _parts(transformer: nn.Module) -> dict[str, str]:
    """Return the class of every module inside."""
    kinds = {name: type(module) for name, module in transformer.named_modules() if name}
    return {name: f"{kind.__module__}.{kind.__qualname__}" for name, kind in kinds.items()}


class Sampling(RQTransformer):
    """`RQTransformer`, with our samplers."""

    sampling_precision = "fp32"
    _parts_when_accelerated: dict[str, str]

    @torch.no_grad()
    def sample(
        self,
        partial_sample: Tensor,
        model_aux: Any = None,
        cond: Tensor | None = None,
        start_loc: tuple[int, int] = (0, 0),
        temperature: float = 1.0,
        top_k: int | Sequence[int] | None = None,
        top_p: float | Sequence[float] | None = None,
        amp: bool = False,
        cached: bool = True,
        is_tqdm: bool = False,
        desc: str = "Sampling",
        fast: bool = True,
    ) -> Tensor:
        change = self._change()
        if change is not None:
            if self.sampling_precision != "fp32":
                raise ValueError(
                    f"sampling_precision: {self.sampling_precision!r} has packed weights alone and calls no modules, "
                    f"but {change}"
                )
            warn_once(self, f"{change}: so sample runs as published, and is not accelerated")
            return super().sample(
                partial_sample,
                model_aux=model_aux,
                cond=cond,
                start_loc=start_loc,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                amp=amp,
                cached=cached,
                is_tqdm=is_tqdm,
                desc=desc,
                fast=fast,
            )
        height, width, depth = self.block_size
        if partial_sample.shape[1:] != (height, width, depth):
            raise ValueError(
                f"partial_sample: expected shape (B, {height}, {width}, {depth}), got {tuple(partial_sample.shape)}"
            )
        batch, known = len(partial_sample), start_loc[0] * width + start_loc[1]
        if not 0 <= known < height * width:
            return partial_sample.clone()
        known_btd = partial_sample.flatten(1, 2)[:, :known]
        shape = batch, self.block_size_cond
        condition_bl = known_btd.new_zeros(shape) if cond is None else cond.reshape(shape)
        check_range(known_btd, self.vocab_size[0], "partial_sample before start_loc")
        check_range(condition_bl, self.vocab_size_cond, "cond")
        sampler = self._sampler(model_aux, "bf16" if amp and partial_sample.is_cuda else self.sampling_precision)
        with Progress(console=Console(stderr=True), disable=not is_tqdm) as bar:
            task = bar.add_task(desc, total=height * width - known)
            params = LevelParams(
                temperature=(temperature,) * depth,
                top_k=tuple(_per_depth(top_k, depth)),
                top_p=tuple(None if p is None else min(float(p), 1.0) for p in _per_depth(top_p, depth)),
                seed=int(torch.randint(2**63 - 1, ())),
            )
            sampled = sampler.sample(
                condition_bl, params, known=known_btd.flatten(1), advance=lambda images: bar.advance(task)
            )
        assert isinstance(sampled.codes, Tensor)  # of a prior over stacks
        return sampled.codes.view_as(partial_sample)

    def _change(self) -> str | None:
        """Describe the first change of the transformer that its weights do not show; None without any."""
        change = override_of(self, ("cached_forward", "init_cache"), ("sample",)) or change_in_tree(self)
        if change is not None:
            return change
        parts, before = _parts(self), self._parts_when_accelerated
        for name in (*before, *parts):
            if before.get(name) != parts.get(name):
                return f"{name} is {parts.get(name, 'missing')} and was {before.get(name, 'missing')} when accelerated"
        return None

    def _sampler(self, model_aux: Any, precision: str) -> Sampler:
        state, codebooks = self.state_dict(), self._codebooks(model_aux)

        def prior() -> Prior:
            built = build_rqtransformer(_plain(self.config), state, codebooks).eval()
            check_precision(built, precision)
            return built

        if self.pos_emb_d.device.type != "cpu":
            return CapturedSampler(cast_prior(prior(), precision), capture=True)
        weights = itertools.chain(state.values(), () if codebooks is None else (codebooks,))
        description = f"{precision} {self.config!r}"
        return packed_once(self, weights, description, lambda: PackedPrior(prior(), precision))

    def _codebooks(self, model_aux: Any) -> Tensor | None:
        """Return the tokenizer's vectors of all codes at every depth, (D, K, C); None where they are not embedded
        with."""
        if not (self.config.input_emb_vqvae or self.config.head_emb_vqvae):
            return None
        codes_k = torch.arange(self.vocab_size[0], device=self.pos_emb_d.device)
        codes_khwd = codes_k[:, None, None, None].expand(-1, 1, 1, self.block_size[2])
        return self.embed_with_model_aux(codes_khwd, model_aux)[:, 0, 0].transpose(0, 1).contiguous()


def _plain(config: Any) -> Any:
    """Return a config as dictionaries and lists: OmegaConf's (items come out with interpolations resolved), a
    dataclass, or plain data."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = vars(config)
    if isinstance(config, Mapping):
        return {name: _plain(value) for name, value in config.items()}
    if isinstance(config, Sequence) and not isinstance(config, (str, bytes)):
        return [_plain(value) for value in config]
    return config


def _per_depth(value: Any, depth: int) -> list[Any]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * depth if len(values) == 1 else values
