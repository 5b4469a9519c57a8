"""One position of an RQ-Transformer, its spatial step and all D codes, against eager loops over the same weights.

Peers do what rqgen's sampling does without these operators: PyTorch modules with a static cache, one call per depth,
and PyTorch's top-k, top-p and multinomial; in float32, in bfloat16, and with `quantize_dynamic` (int8 weights and
activations). On a GPU each of them, ours too, also runs as a CUDA graph, its fastest form there. `agrees`: codes of a
greedy position that equal those of the model in float64.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import _harness
import pytest
import torch
from _harness import QUICK, Contender, Work
from torch import Tensor, nn

import rqkernels as rqk
from rqgen.inference.kv_cache import stack_caches
from rqgen.models import RQTransformer, RQTransformerConfig
from rqgen.models.transformer import Transformer, TransformerConfig

TOP_K, TOP_P = 2048, 0.95
SEEN = 32  # positions in the spatial cache: half of an 8 x 8 map


class Case(NamedTuple):
    """A prior of `width` with `layers` (spatial, depth), D codes out of K, and `batch` rows at once."""

    precision: str
    batch: int
    width: int = 16 if QUICK else 512
    layers: tuple[int, int] = (1, 1) if QUICK else (12, 4)
    heads: int = 2 if QUICK else 8
    depth: int = 2 if QUICK else 4
    codes: int = 32 if QUICK else 16384
    channels: int = 8 if QUICK else 256
    preset: str = ""

    @property
    def name(self) -> str:
        return f"{self.preset}{self.precision}-{self.batch}"


BATCHES = (2,) if QUICK else (1, 4, 16, 64)
CASES = [Case(precision, batch) for precision, batch in itertools.product(("int8", "bf16", "fp32"), BATCHES)]
if torch.cuda.is_available() and not QUICK:
    CASES = [Case("bf16", batch, 1536, (42, 6), 24, preset="1.4B-") for batch in (1, 100)] + CASES


def prior_of(case: Case, device: torch.device) -> RQTransformer:
    torch.manual_seed(0)
    spatial, depths = (TransformerConfig(layers, case.heads, residual_dropout=0.0) for layers in case.layers)
    config = RQTransformerConfig(
        (8, 8, case.depth), case.codes, case.channels, embed_dim=case.width, spatial=spatial, depth=depths
    )
    with device:
        prior = RQTransformer(config, torch.randn(case.codes, case.channels)).eval()
    # With its usual initialisation all codes would be almost equally likely.
    nn.init.normal_(prior.classifier.weight, std=2 * case.width**-0.5)
    return prior


def sample_in_torch(logits: Tensor) -> Tensor:
    """Apply top-k, top-p and multinomial as published (on a GPU the same without a host sync)."""
    if logits.shape[1] > TOP_K:
        logits = logits.masked_fill(logits < logits.topk(TOP_K)[0][:, -1:], -torch.inf)
    ordered, order = torch.softmax(logits, -1).sort(-1, descending=True)
    ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= TOP_P, 0.0)
    if ordered.is_cuda:
        drawn = (ordered / torch.empty_like(ordered).exponential_()).argmax(-1, keepdim=True)
    else:
        drawn = torch.multinomial(ordered, 1)
    return order.gather(-1, drawn)[:, 0]


class LinearClassifier(nn.Module):
    """Classifier made of a module that quantize_dynamic supports."""

    def __init__(self, prior: RQTransformer) -> None:
        super().__init__()
        self.norm, weight = prior.classifier.norm, prior.classifier.weight
        self.linear = nn.Linear(weight.shape[1], weight.shape[0])
        with torch.no_grad():
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(prior.classifier.bias)

    def forward(self, x: Tensor, d: int) -> Tensor:
        return self.linear(self.norm(x)).float()


def quantized(prior: RQTransformer) -> RQTransformer:
    prior = copy.deepcopy(prior)
    prior.classifier = LinearClassifier(prior)
    return torch.ao.quantization.quantize_dynamic(prior, {nn.Linear}, dtype=torch.qint8)


Position = Callable[[bool], Tensor]  # greedy or sampled, to codes (B, D)


def eager(prior: RQTransformer, history: tuple[Tensor, Tensor], codes_bd: Tensor) -> Position:
    """Return a position of this model after the codes, with these keys and values of earlier positions."""
    spatial, depths = stack_caches(prior, codes_bd.shape[0])
    spatial.keys[:, :, :, :SEEN], spatial.values[:, :, :, :SEEN] = history

    def draw(logits: Tensor, d: int) -> Tensor:
        return sample_in_torch(logits)

    def position(greedy: bool) -> Tensor:
        spatial.length = SEEN
        context = prior.spatial_outputs(codes_bd[:, None], cache=spatial)[:, 0]
        return prior.sample_stack(context, (lambda logits, d: logits.argmax(-1)) if greedy else draw, depths)

    return position


def blocks_of(transformer: Transformer) -> list[rqk.BlockWeights]:
    found = []
    for block in transformer.blocks:
        parts = (block.attention_norm, block.attention.qkv, block.attention.out, block.mlp_norm, *block.mlp[::2])
        found.append(rqk.BlockWeights(*(tensor for part in parts for tensor in (part.weight, part.bias))))
    return found


def ours(case: Case, prior: RQTransformer, history: tuple[Tensor, Tensor], codes_bd: Tensor) -> Position:
    spatial = rqk.PackedTransformer(blocks_of(prior.spatial_transformer), case.heads, precision=case.precision)
    depths = rqk.PackedTransformer(blocks_of(prior.depth_transformer), case.heads, precision=case.precision)
    decoder = rqk.PackedDepthDecoder(
        depths,
        torch.cat([prior.depth_positions[:1], prior.depth_positions[1:] + prior.depth_projection.bias]),
        nn.functional.linear(prior.codebooks, prior.depth_projection.weight),
        norm_weight=prior.classifier.norm.weight,
        norm_bias=prior.classifier.norm.bias,
        classifier_weight=prior.classifier.weight,
        classifier_bias=prior.classifier.bias,
    )
    vectors = nn.functional.linear(prior.codebooks, prior.spatial_projection.weight)
    place = prior.spatial_positions[SEEN - 1] + prior.spatial_projection.bias
    cache = stack_caches(prior, codes_bd.shape[0])[0]
    cache.keys[:, :, :, :SEEN], cache.values[:, :, :, :SEEN] = history

    def position(greedy: bool) -> Tensor:
        x_bw = nn.functional.embedding_bag(codes_bd, vectors, mode="sum") + place
        context = rqk.transformer_step(x_bw, spatial, cache.keys, cache.values, SEEN)
        options = {"temperature": 0.0} if greedy else {"top_k": TOP_K, "top_p": TOP_P}
        return rqk.depth_decode(context, decoder, **options, seed=0)

    return position


def captured(position: Position) -> Position:
    """Capture a position as one CUDA graph, which serves sampling; greedy positions run without it."""
    graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        position(False)
    torch.cuda.current_stream().wait_stream(aside)
    with torch.cuda.graph(graph, stream=aside):
        codes = position(False)

    def replayed(greedy: bool) -> Tensor:
        if greedy:
            return position(True)
        graph.replay()
        return codes

    return replayed


def run_case(case: Case, device: torch.device, benchmark: Any = None) -> dict[str, Any]:
    with torch.no_grad():
        prior = prior_of(case, device)
        codes_bd = torch.randint(case.codes, (case.batch, case.depth)).to(device)
        shape = (case.layers[0], case.batch, case.heads, SEEN, case.width // case.heads)
        history = (torch.randn(shape, device=device), torch.randn(shape, device=device))
        positions = {f"rqkernels {case.precision}": ours(case, prior, history, codes_bd)}
        positions["eager fp32"] = eager(prior, history, codes_bd)
        if case.precision == "bf16":
            positions["eager bf16"] = eager(copy.deepcopy(prior).bfloat16(), history, codes_bd)
        if case.precision == "int8" and device.type == "cpu":
            positions["quantize_dynamic int8"] = eager(quantized(prior), history, codes_bd)
        truth = eager(copy.deepcopy(prior).double(), history, codes_bd)(True)
        if device.type == "cuda":
            graphs = {f"{name}, CUDA graph": captured(position) for name, position in positions.items()}
            positions = graphs | positions
        contenders = [
            Contender(name, lambda position=position: position(False), case.batch)
            for name, position in positions.items()
        ]

        def check(results: Mapping[str, Any]) -> dict[str, float]:
            agreement = {name: (position(True) == truth).double().mean().item() for name, position in positions.items()}
            assert case.precision != "fp32" or agreement["rqkernels fp32"] == 1, "greedy codes differ from float64's"
            return agreement

        # Each weight is read once per depth, whatever the batch; operations are proportional to rows.
        block = 12 * case.width**2
        weights = case.layers[0] * block + case.depth * (case.layers[1] * block + case.codes * case.width)
        size = {"fp32": 4, "bf16": 2, "int8": 1}[case.precision]
        work = Work(bytes=size * weights, operations=2 * case.batch * weights)
        shape = {"B": case.batch, "width": case.width, "layers": case.layers, "K": case.codes, "D": case.depth}
        return _harness.compare(case.name, shape, device, contenders, work, check, benchmark)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_depth_decode(run: _harness.Run, case: Case, benchmark: Any) -> None:
    run.cases.append(run_case(case, run.device, benchmark))


if __name__ == "__main__":
    _harness.main("depth_decode", CASES, run_case)
