"""`accelerate` on the published quantizer: the stand-in below, computed naively, is the definition of right.

It has the published quantizer's structure (state dict, attributes, methods, the calls to the generator), which is
all that recognition looks at. The fixtures hold what the published code itself computed.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rqgen
import rqkernels
from rqgen.integrations.kakaobrain import Bottleneck
from rqgen.integrations.kakaobrain_soft_codes import SoftCodes

TOLERANCE = 1e-5  # relative to the largest value; sums of the averages and of decoding are rounded differently
FIXTURE_TOLERANCE = 1e-4


# --- the stand-in


class NaiveCodebook(nn.Embedding):
    def __init__(self, size: int, dim: int, decay: float, restart: bool) -> None:
        super().__init__(size + 1, dim, padding_idx=size)
        self.n_embed, self.decay, self.restart_unused_codes = size, decay, restart
        self.ema, self.eps = True, 1e-5
        self.weight.requires_grad_(False)
        self.register_buffer("cluster_size_ema", torch.zeros(size))
        self.register_buffer("embed_ema", self.weight[:-1].clone())

    def compute_distances(self, inputs: Tensor) -> Tensor:
        return (inputs.unsqueeze(-2) - self.weight[:-1]).square().sum(-1)

    def find_nearest_embedding(self, inputs: Tensor) -> Tensor:
        return self.compute_distances(inputs).argmin(-1)

    def embed(self, idxs: Tensor) -> Tensor:
        return super().forward(idxs)

    def _tile_with_noise(self, x: Tensor, target_n: int) -> Tensor:
        tiled = x.repeat(-(-target_n // x.shape[0]), 1)
        return tiled + torch.rand_like(tiled) * (0.01 / x.shape[1] ** 0.5)

    def _update_buffers(self, vectors: Tensor, idxs: Tensor) -> None:
        vectors = vectors.reshape(-1, vectors.shape[-1])
        assigned = nn.functional.one_hot(idxs.reshape(-1), self.n_embed).to(vectors.dtype)
        sums, counts = assigned.T @ vectors, assigned.sum(0)
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(counts)
        self.cluster_size_ema.copy_(self.decay * self.cluster_size_ema + (1 - self.decay) * counts)
        self.embed_ema.copy_(self.decay * self.embed_ema + (1 - self.decay) * sums)
        if self.restart_unused_codes:
            if vectors.shape[0] < self.n_embed:
                vectors = self._tile_with_noise(vectors, self.n_embed)
            drawn = vectors[torch.randperm(vectors.shape[0])][: self.n_embed]
            if dist.is_initialized():
                dist.broadcast(drawn, 0)
            for k in (self.cluster_size_ema < 1).nonzero().squeeze(1).tolist():
                self.embed_ema[k], self.cluster_size_ema[k] = drawn[k], 1.0

    def _update_embedding(self) -> None:
        total = self.cluster_size_ema.sum()
        smoothed = (self.cluster_size_ema + self.eps) * total / (total + self.n_embed * self.eps)
        self.weight[:-1] = self.embed_ema / smoothed.unsqueeze(1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        idxs = self.find_nearest_embedding(inputs)
        if self.training:
            self._update_buffers(inputs, idxs)
        embeds = self.embed(idxs)
        if self.training:
            self._update_embedding()
        return embeds, idxs


class NaiveBottleneck(nn.Module):
    def __init__(
        self,
        latent_shape: Sequence[int],
        code_shape: Sequence[int],
        n_embed: int | Sequence[int],
        decay: float | Sequence[float] = 0.9,
        shared_codebook: bool = False,
        restart_unused_codes: bool = True,
    ) -> None:
        super().__init__()
        depth = code_shape[2]
        self.latent_shape, self.code_shape = torch.Size(latent_shape), torch.Size(code_shape)
        self.patch = (latent_shape[0] // code_shape[0], latent_shape[1] // code_shape[1])
        self.shared_codebook = shared_codebook
        sizes = [n_embed] * depth if isinstance(n_embed, int) else n_embed
        decays = [decay] * depth if isinstance(decay, float) else decay
        dim = self.patch[0] * self.patch[1] * latent_shape[2]
        books = [
            NaiveCodebook(sizes[d], dim, decays[d], restart_unused_codes)
            for d in range(1 if shared_codebook else depth)
        ]
        self.codebooks = nn.ModuleList(books * depth if shared_codebook else books)

    def to_code_shape(self, x: Tensor) -> Tensor:
        x = x.unflatten(2, (-1, self.patch[1])).unflatten(1, (-1, self.patch[0]))
        return x.transpose(2, 3).flatten(3)

    def to_latent_shape(self, x: Tensor) -> Tensor:
        x = x.unflatten(3, (*self.patch, -1)).transpose(2, 3)
        return x.flatten(3, 4).flatten(1, 2)

    def quantize(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        residual, total, sums, codes = x.detach().clone(), torch.zeros_like(x), [], []
        for codebook in self.codebooks:
            quantized, code = codebook(residual)
            residual, total = residual - quantized, total + quantized
            sums.append(total)
            codes.append(code)
        return sums, torch.stack(codes, -1)

    def compute_commitment_loss(self, x: Tensor, quant_list: list[Tensor]) -> Tensor:
        return torch.stack([(x - partial.detach()).square().mean() for partial in quant_list]).mean()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        patches = self.to_code_shape(x)
        sums, codes = self.quantize(patches)
        loss = self.compute_commitment_loss(patches, sums)
        return x + (self.to_latent_shape(sums[-1]) - x).detach(), loss, codes

    def _embed(self, code: Tensor) -> Tensor:
        return torch.stack([book.embed(code[..., d]) for d, book in enumerate(self.codebooks)], -2)

    def embed_code(self, code: Tensor) -> Tensor:
        return self.to_latent_shape(self._embed(code).sum(-2))

    def embed_code_with_depth(self, code: Tensor, to_latent_shape: bool = False) -> tuple[Tensor, None]:
        embeds = self._embed(code)
        if to_latent_shape:
            embeds = torch.stack([self.to_latent_shape(e) for e in embeds.unbind(-2)], -2)
        return embeds, None

    def embed_partial_code(self, code: Tensor, code_idx: int, decode_type: str = "select") -> Tensor:
        embeds = self._embed(code)
        part = embeds[..., code_idx, :] if decode_type == "select" else embeds[..., : code_idx + 1, :].sum(-2)
        return self.to_latent_shape(part)

    def get_soft_codes(self, x: Tensor, temp: float = 1.0, stochastic: bool = False) -> tuple[Tensor, Tensor]:
        residual, soft, codes = self.to_code_shape(x).detach(), [], []
        for book in self.codebooks:
            distances = book.compute_distances(residual)
            soft.append(torch.softmax(-distances / temp, -1))
            code = distances.argmin(-1)
            if stochastic:
                code = torch.multinomial(soft[-1].flatten(0, -2), 1).reshape(code.shape)
            codes.append(code)
            residual = residual - book.embed(code)
        return torch.stack(soft, -2), torch.stack(codes, -1)


class NaiveTransformer(nn.Module):
    """The published transformer's attributes and losses, over a trunk of one layer."""

    def __init__(self, code_shape: Sequence[int], num_codes: int, width: int = 12) -> None:
        super().__init__()
        self.block_size, self.vocab_size = torch.Size(code_shape), [num_codes] * code_shape[2]
        self.tok_emb = nn.Embedding(num_codes, width)
        self.body_transformer, self.head_transformer = nn.Linear(width, width), nn.Identity()
        self.classifier = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_codes))

    def forward(self, xs: Tensor, model_aux: nn.Module | None = None, cond: Tensor | None = None) -> Tensor:
        return self.classifier(self.head_transformer(self.body_transformer(self.tok_emb(xs))))

    def embed_with_model_aux(self, xs: Tensor, model_aux: nn.Module) -> Tensor:
        raise NotImplementedError

    def cached_forward(self, xs: Tensor) -> Tensor:
        raise NotImplementedError

    def sample(self, partial_sample: Tensor) -> Tensor:
        raise NotImplementedError

    def compute_cond_loss(self, cond_logits: Tensor, conds: Tensor) -> Tensor:
        raise NotImplementedError

    def _losses(self, logits: Tensor, targets: Tensor, use_soft_target: bool) -> Tensor:
        logits = logits.reshape(-1, logits.shape[-1])
        if not use_soft_target:
            return nn.functional.cross_entropy(logits, targets.reshape(-1), reduction="none")
        shifted = logits - logits.max(dim=-1, keepdim=True).values
        log_prob = shifted - torch.log(shifted.exp().sum(-1, keepdim=True) + 1e-7)
        return (-targets.reshape(-1, targets.shape[-1]) * log_prob).sum(-1)

    def compute_loss(self, logits: Tensor, targets: Tensor, use_soft_target: bool = False) -> Tensor:
        return self._losses(logits, targets, use_soft_target).mean()

    @torch.no_grad()
    def compute_codebook_loss(self, logits: Tensor, targets: Tensor, use_soft_target: bool = False) -> Tensor:
        return self._losses(logits, targets, use_soft_target).reshape(-1, self.block_size[-1]).mean(0)


LAYOUTS: dict[str, dict] = {
    "shared": dict(latent_shape=(4, 4, 6), code_shape=(4, 4, 3), n_embed=40, shared_codebook=True),
    "separate": dict(latent_shape=(4, 4, 6), code_shape=(4, 4, 3), n_embed=40),
    "patches": dict(latent_shape=(8, 4, 5), code_shape=(4, 4, 2), n_embed=9, decay=[0.9, 0.5]),
    "sizes": dict(latent_shape=(4, 2, 6), code_shape=(4, 1, 3), n_embed=[40, 5, 17], decay=[0.9, 0.8, 0.5]),
    "tiled": dict(latent_shape=(2, 2, 3), code_shape=(2, 2, 2), n_embed=50, shared_codebook=True),
    "kept": dict(latent_shape=(4, 4, 6), code_shape=(4, 4, 3), n_embed=40, restart_unused_codes=False),
    "one": dict(latent_shape=(3, 2, 4), code_shape=(3, 2, 1), n_embed=1),
}


class Pair:
    """A stand-in, the same one accelerated, and batches for both."""

    def __init__(self, name: str) -> None:
        self.naive = NaiveBottleneck(**LAYOUTS[name])
        self.fast = rqgen.accelerate(copy.deepcopy(self.naive))

    def batch(self, size: int = 2) -> Tensor:
        return torch.randn(size, *self.naive.latent_shape)

    def run(self, call: Callable[[nn.Module], object]) -> Iterator[object]:
        """The call on both, from one state of the generator, which both must leave in one state."""
        state = torch.get_rng_state()
        first = call(self.naive)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        second = call(self.fast)
        assert torch.equal(after, torch.get_rng_state())
        return iter((second, first))


@pytest.fixture(params=LAYOUTS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def close(got: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> bool:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    return bool((got - expected).abs().max() <= tolerance * max(1.0, float(expected.abs().max())))


# --- the same results


def assert_same_forward(pair: Pair, x: Tensor) -> None:
    def call(module: nn.Module) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        quantized, loss, codes = module(leaf)
        (quantized.square().sum() + loss).backward()
        return quantized.detach(), loss.detach(), leaf.grad, codes

    got, expected = pair.run(call)
    assert torch.equal(got[-1], expected[-1])
    for mine, theirs in zip(got[:-1], expected[:-1], strict=True):
        assert close(mine, theirs)


def assert_same_state(pair: Pair) -> None:
    got, expected = pair.fast.state_dict(), pair.naive.state_dict()
    assert list(got) == list(expected)
    assert all(close(got[name], expected[name]) for name in expected)


def test_eval(pair: Pair) -> None:
    pair.naive.eval()
    pair.fast.eval()
    before = copy.deepcopy(pair.fast.state_dict())
    x = pair.batch()
    assert_same_forward(pair, x)
    got, expected = pair.run(lambda module: module.quantize(module.to_code_shape(x)))
    assert torch.equal(got[1], expected[1]) and len(got[0]) == len(expected[0])
    assert all(close(mine, theirs) for mine, theirs in zip(got[0], expected[0], strict=True))
    assert all(torch.equal(pair.fast.state_dict()[name], tensor) for name, tensor in before.items())


def test_training_steps(pair: Pair) -> None:
    """The shared codebook moves between depths, unused codes restart, few vectors are tiled with noise."""
    for _ in range(4):
        assert_same_forward(pair, pair.batch())
        assert_same_state(pair)
    assert_same_forward(pair, pair.batch(5))
    pair.naive.eval()
    pair.fast.eval()
    assert_same_forward(pair, pair.batch())


def test_frozen_codebooks_in_a_training_bottleneck(pair: Pair) -> None:
    for module in (pair.naive, pair.fast):
        module.train()
        module.codebooks[-1].eval()
    for _ in range(2):
        assert_same_forward(pair, pair.batch())
    assert_same_state(pair)


def test_embedding_of_codes(pair: Pair) -> None:
    codes = pair.naive.eval()(pair.batch())[2]
    depth = codes.shape[-1]
    codes[0, 0, 0, 0] = pair.naive.codebooks[0].n_embed  # the padding row may be embedded, never found
    for call in (
        lambda module: module.embed_code(codes),
        lambda module: module.embed_code_with_depth(codes)[0],
        lambda module: module.embed_code_with_depth(codes, to_latent_shape=True)[0],
        *(lambda module, i=i: module.embed_partial_code(codes, i) for i in range(depth)),
        *(lambda module, i=i: module.embed_partial_code(codes, i, "add") for i in range(depth)),
        *(lambda module, i=i: module.codebooks[i].embed(codes[..., i]) for i in range(1, depth)),
    ):
        got, expected = pair.run(call)
        assert close(got, expected)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("layout", ["shared", "separate", "patches"])
def test_soft_codes(layout: str, stochastic: bool) -> None:
    pair = Pair(layout)
    x = pair.batch()
    got, expected = pair.run(lambda module: module.get_soft_codes(x, temp=0.7, stochastic=stochastic))
    assert close(got[0], expected[0]) and torch.equal(got[1], expected[1])
    if not stochastic:
        assert torch.equal(got[1], pair.fast.eval()(x)[2])


def test_soft_codes_of_different_sizes_have_no_common_tensor() -> None:
    with pytest.raises(RuntimeError, match="equal size"):  # the stand-in's own error, as without us
        Pair("sizes").fast.get_soft_codes(torch.randn(1, 4, 2, 6))


def test_codes_are_certified() -> None:
    """Codes 1e-6 apart next to an offset of 100: float32 distances cannot tell them apart, ours can."""
    fast = Pair("separate").fast.eval()
    for book in fast.codebooks:
        book.weight[:-1] = torch.randn(1, 6) + 1e-6 * torch.randn(40, 6)
    x = torch.randn(2, 4, 4, 6) + 100.0
    codebooks = torch.stack([book.weight[:-1] for book in fast.codebooks])
    expected = rqkernels.reference.residual_search(x, codebooks).codes
    assert torch.equal(fast(x)[2], expected)
    assert torch.equal(fast.get_soft_codes(x)[1], expected)


@pytest.mark.parametrize("layout", ["shared", "separate", "sizes"])
def test_a_write_without_a_trace_is_seen(layout: str) -> None:
    pair = Pair(layout)
    pair.naive.eval()
    pair.fast.eval()
    x = pair.batch()
    assert_same_forward(pair, x)
    for d, book in enumerate(pair.naive.codebooks):
        book.weight.data[:-1].normal_()
        pair.fast.codebooks[d].weight.data.copy_(book.weight)
    assert_same_forward(pair, x)


# --- how it is computed


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_nothing_of_rows_times_codes(shared: bool, training: bool) -> None:
    naive = NaiveBottleneck((8, 8, 4), (8, 8, 3), 300, shared_codebook=shared)
    rows_times_codes = 4 * 8 * 8 * 300
    naive.train(training)
    x = torch.randn(4, 8, 8, 4)
    for module, limit in ((naive, None), (rqgen.accelerate(copy.deepcopy(naive)), rows_times_codes // 10)):
        with LargestTensor() as largest:
            codes = module(x)[2]
            module.embed_code(codes)
        assert largest.numel >= rows_times_codes if limit is None else largest.numel <= limit


@pytest.mark.parametrize(
    ("layout", "training", "searches"), [("shared", 0, 1), ("separate", 0, 1), ("sizes", 0, 3), ("shared", 1, 3)]
)
def test_number_of_searches(layout: str, training: int, searches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(layout)
    calls = []
    search = rqkernels.residual_search
    monkeypatch.setattr(rqkernels, "residual_search", lambda *a, **k: calls.append(a) or search(*a, **k))
    pair.fast.train(bool(training))(pair.batch())
    assert len(calls) == searches


# --- the same module, seen from outside


def test_nothing_of_the_module_is_replaced() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ModuleDict({"quantizer": NaiveBottleneck(**LAYOUTS["shared"])}))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    called = []
    quantizer = model[1]["quantizer"]
    quantizer.register_forward_hook(lambda *_: called.append(True))
    assert rqgen.accelerate(model) is model
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert all(modules[name] is module for name, module in model.named_modules())
    assert isinstance(quantizer, NaiveBottleneck) and isinstance(quantizer, Bottleneck)
    assert type(quantizer).__name__ == "NaiveBottleneck"
    assert isinstance(quantizer.codebooks[0], NaiveCodebook)
    quantizer(torch.randn(1, 4, 4, 6))
    assert called


def test_a_compiled_module_is_seen_through() -> None:
    """torch.compile's wrapper shows the attributes of what it wraps, and must keep its own class."""
    pair = Pair("shared")
    wrapper = torch.compile(NaiveBottleneck(**LAYOUTS["shared"]), backend="eager")
    wrapper.load_state_dict({f"_orig_mod.{name}": t for name, t in pair.naive.state_dict().items()})
    kind = type(wrapper)
    pair.fast = rqgen.accelerate(wrapper)
    assert type(wrapper) is kind and isinstance(wrapper._orig_mod, Bottleneck)
    pair.naive.eval()
    wrapper.eval()
    assert_same_forward(pair, pair.batch())


def test_twice_is_once(pair: Pair) -> None:
    classes = [type(module) for module in pair.fast.modules()]
    assert rqgen.accelerate(pair.fast) is pair.fast
    assert [type(module) for module in pair.fast.modules()] == classes
    assert_same_forward(pair, pair.batch())


def test_state_dicts_travel_both_ways(pair: Pair) -> None:
    for source, target in ((pair.fast, pair.naive), (pair.naive, pair.fast)):
        source(pair.batch())
        file = io.BytesIO()
        torch.save(source.state_dict(), file)
        file.seek(0)
        target.load_state_dict(torch.load(file, weights_only=True))
        for name, tensor in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], tensor)
        assert_same_forward(pair, pair.batch())


def through_torch(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module, 0)), through_torch])
def test_copies_stay_accelerated(pair: Pair, copied: Callable[[nn.Module], nn.Module]) -> None:
    original, pair.fast = pair.fast, copied(pair.fast)
    assert [type(module) for module in pair.fast.modules()] == [type(module) for module in original.modules()]
    shared = pair.naive.shared_codebook
    assert all((book is pair.fast.codebooks[0]) is shared for book in pair.fast.codebooks[1:])
    before = copy.deepcopy(original.state_dict())
    assert_same_forward(pair, pair.batch())
    assert all(torch.equal(original.state_dict()[name], tensor) for name, tensor in before.items())


# --- precision and bad values


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_half_input_is_searched_as_float32(pair: Pair, dtype: torch.dtype, training: bool) -> None:
    pair.naive.train(training)
    pair.fast.train(training)
    x = pair.batch().to(dtype)
    state = torch.get_rng_state()
    with torch.autocast("cpu", dtype):
        quantized, _, codes = pair.fast(x)
    torch.set_rng_state(state)
    expected, _, expected_codes = pair.naive(x.float())
    assert torch.equal(codes, expected_codes)
    assert quantized.dtype == dtype
    assert close(quantized.float(), expected, torch.finfo(dtype).eps * 4)
    assert_same_state(pair)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_model(pair: Pair, dtype: torch.dtype) -> None:
    fast = pair.fast.to(dtype).eval()
    pair.naive.to(dtype).float().eval()  # the same rounded codebooks
    x = pair.batch()
    assert torch.equal(fast(x.to(dtype))[2], pair.naive(x.to(dtype).float())[2])
    codes = fast.train()(x.to(dtype))[2]
    assert all(tensor.dtype == dtype for tensor in fast.state_dict().values())
    assert all(tensor.isfinite().all() for name, tensor in fast.state_dict().items() if name.endswith("_ema"))
    assert fast.embed_code(codes).dtype == dtype


def test_double_is_refused(pair: Pair) -> None:
    with pytest.raises(TypeError, match="float64"):
        pair.fast.double()(pair.batch().double())


@pytest.mark.parametrize("training", [False, True])
def test_a_vector_that_is_not_finite_touches_nothing_else(pair: Pair, training: bool) -> None:
    pair.fast.train(training)
    x = pair.batch()
    x[0, 0, 0, 0] = torch.nan
    for _ in range(3):  # restarts may sample it
        quantized, loss, codes = pair.fast(x)
        assert (codes[0, 0, 0] == -1).all() and (codes == -1).sum() == codes.shape[-1]
        assert quantized[0, 0, 0].isnan().all() and quantized[1].isfinite().all() and loss.isnan()
        assert all(tensor.isfinite().all() for tensor in pair.fast.state_dict().values())


def test_bad_arguments_are_named(pair: Pair) -> None:
    pair.fast.eval()
    codes = pair.fast(pair.batch())[2]
    depth = codes.shape[-1]
    with pytest.raises(ValueError, match=r"^code: expected \(B, .*got \(2, "):
        pair.fast.embed_code(codes[:, :1, :1, :0])
    with pytest.raises(ValueError, match=rf"^code_idx: expected 0\.\.{depth - 1}, got {depth}"):
        pair.fast.embed_partial_code(codes, depth)
    with pytest.raises(NotImplementedError, match=r"decode_type: .* got 'all'"):
        pair.fast.embed_partial_code(codes, 0, "all")
    with pytest.raises(IndexError):
        pair.fast.embed_code(codes + 1000)
    with pytest.raises(ValueError, match="channels"):
        pair.fast.quantize(torch.randn(1, 2, 2, 7))


# --- recognition


def test_a_model_without_anything_known_is_refused() -> None:
    known = r"nothing to accelerate in Sequential.*RQBottleneck.*RQTransformer.*Known models: kaka"
    with pytest.raises(ValueError, match=known):
        rqgen.accelerate(nn.Sequential(nn.Linear(2, 2), NaiveCodebook(3, 2, 0.9, True)))
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        rqgen.accelerate({})  # type: ignore[type-var]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: setattr(q.codebooks, "1", nn.Embedding(5, 6)), "Embedding has no compute_distances, .*eps"),
        (lambda q: setattr(q.codebooks[1], "ema", False), r"moving averages \(ema=True\)"),
        (lambda q: setattr(q.codebooks[1], "n_embed", 41), r"n_embed \+ 1 = 42 rows.*got \(41, 6\)"),
        (lambda q: delattr(q.codebooks[1], "embed_ema"), r"buffer embed_ema \(40, 6\), got None"),
        (lambda q: setattr(q.codebooks[1], "cluster_size_ema", torch.ones(3)), r"\(40,\), got \(3,\)"),
    ],
)
def test_a_codebook_that_is_not_as_published_is_named(change: Callable[[nn.Module], None], message: str) -> None:
    model = nn.ModuleDict({"vq": NaiveBottleneck(**LAYOUTS["separate"])})
    change(model["vq"])
    with pytest.raises(ValueError, match=rf"^vq\.codebooks\.1: not a VQEmbedding as published: .*{message}"):
        rqgen.accelerate(model)
    assert type(model["vq"]) is NaiveBottleneck and type(model["vq"].codebooks[0]) is NaiveCodebook


def test_codebooks_must_be_as_many_as_depths() -> None:
    quantizer = NaiveBottleneck(**LAYOUTS["separate"])
    quantizer.codebooks.append(NaiveCodebook(40, 6, 0.9, True))
    with pytest.raises(ValueError, match=r"^model\.codebooks: expected 3, from code_shape, got 4"):
        rqgen.accelerate(quantizer)


# --- the loss of soft codes


class TwoStages:
    """A quantizer and a transformer of its codes, and both again, accelerated."""

    def __init__(self, layout: dict) -> None:
        self.quantizer = NaiveBottleneck(**layout).eval()
        num_codes = self.quantizer.codebooks[0].n_embed
        self.transformer = NaiveTransformer(self.quantizer.code_shape, num_codes)
        self.fast_quantizer = rqgen.accelerate(copy.deepcopy(self.quantizer), lazy_soft_codes=True)
        self.fast_transformer = rqgen.accelerate(copy.deepcopy(self.transformer))

    def batch(self, size: int = 2) -> Tensor:
        return torch.randn(size, *self.quantizer.latent_shape)


def stage_two(transformer: nn.Module, logits: Tensor, soft: object) -> tuple[Tensor, ...]:
    """A training script's use of soft codes: loss, logged losses, gradients."""
    loss = transformer.compute_loss(logits, soft, use_soft_target=True)
    by_depth = transformer.compute_codebook_loss(logits, soft, use_soft_target=True)
    assert loss.requires_grad and not by_depth.requires_grad
    return loss.detach(), by_depth, *torch.autograd.grad(loss, transformer.parameters())


@pytest.mark.parametrize("layout", ["shared", "separate", "patches", "one"])
def test_lazy_soft_codes_give_the_published_loss(layout: str) -> None:
    stages, size = TwoStages(LAYOUTS[layout]), 3
    x = stages.batch(size)
    soft, codes = stages.quantizer.get_soft_codes(x, temp=0.7)
    lazy, fast_codes = stages.fast_quantizer.get_soft_codes(x, temp=0.7)
    assert isinstance(lazy, SoftCodes) and torch.equal(fast_codes, codes)
    assert (lazy.shape, lazy.dtype, lazy.device) == (soft.shape, soft.dtype, soft.device)
    assert close(lazy.materialize(), soft)
    expected = stage_two(stages.transformer, stages.transformer(codes), soft)
    for targets in (lazy, soft):  # a tensor of soft codes is served as published
        got = stage_two(stages.fast_transformer, stages.fast_transformer(codes), targets)
        assert all(close(mine, theirs) for mine, theirs in zip(got, expected, strict=True))
    hard = [t.compute_loss(t(codes), codes) for t in (stages.fast_transformer, stages.transformer)]
    assert torch.equal(*hard)


def test_logits_may_be_flat() -> None:
    stages = TwoStages(LAYOUTS["shared"])
    lazy, codes = stages.fast_quantizer.get_soft_codes(stages.batch(), temp=0.7)
    logits, transformer = stages.transformer(codes), stages.fast_transformer
    flat = transformer.compute_loss(logits.reshape(-1, logits.shape[-1]), lazy, use_soft_target=True)
    assert torch.equal(flat, transformer.compute_loss(logits, lazy, use_soft_target=True))


def test_half_logits_are_summed_up_in_float32() -> None:
    stages = TwoStages(LAYOUTS["shared"])
    lazy, codes = stages.fast_quantizer.get_soft_codes(stages.batch(), temp=0.7)
    logits = stages.transformer(codes).detach().half().requires_grad_()
    loss = stages.fast_transformer.compute_loss(logits, lazy, use_soft_target=True)
    wide = logits.detach().float().requires_grad_()
    expected = stages.transformer.compute_loss(wide, lazy.materialize(), use_soft_target=True)
    assert close(loss.detach(), expected.detach())
    (gradient,), (expected,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, wide)
    assert gradient.dtype == torch.float16
    assert (gradient.float() - expected).abs().max() < 1e-3 * expected.abs().max()


def test_drawn_codes_have_the_published_distribution() -> None:
    """At both depths: the second given the first, of many copies of one vector."""
    stages, copies = TwoStages(dict(latent_shape=(1, 1, 3), code_shape=(1, 1, 2), n_embed=5)), 4000
    x = torch.randn(1, 1, 1, 3).expand(copies, -1, -1, -1)
    torch.manual_seed(3)
    lazy, codes = stages.fast_quantizer.get_soft_codes(x, temp=2.0, stochastic=True)
    after = torch.rand(())
    torch.manual_seed(3)
    again = stages.fast_quantizer.get_soft_codes(x, temp=2.0, stochastic=True)[1]
    assert torch.equal(again, codes) and torch.equal(torch.rand(()), after)
    assert not torch.equal(stages.fast_quantizer.get_soft_codes(x, temp=2.0, stochastic=True)[1], codes)

    def residual_of(parents: Tensor) -> Tensor:
        return x - stages.quantizer.embed_partial_code(parents, 0)

    soft = lazy.materialize()
    distances = [stages.quantizer.codebooks[d].compute_distances(r) for d, r in enumerate((x, residual_of(codes)))]
    for d in range(2):
        expected = torch.softmax(-distances[d] / 2.0, -1)
        assert close(soft[..., d, :], expected)
        counts = torch.bincount(codes[..., d].flatten(), minlength=5)
        mean, variance = expected.sum((0, 1, 2)), (expected * (1 - expected)).sum((0, 1, 2))
        assert ((counts - mean).abs() < 5 * variance.sqrt()).all()


def test_soft_codes_are_those_of_the_call() -> None:
    """A codebook that moves on afterwards does not change them."""
    stages = TwoStages(LAYOUTS["shared"])
    lazy, _ = stages.fast_quantizer.get_soft_codes(stages.batch(), temp=0.7)
    before = lazy.materialize()
    stages.fast_quantizer.codebooks[0].weight.data.mul_(2)
    assert torch.equal(lazy.materialize(), before)


def test_soft_codes_never_make_an_array_of_rows_times_codes() -> None:
    """From the latents to the gradient of the logits, which is the only one; published, there are many."""
    counts = []
    quantizer = NaiveBottleneck((8, 8, 4), (8, 8, 2), 300, shared_codebook=True)
    x = torch.randn(2, 8, 8, 4)
    logits = torch.randn(2, 8, 8, 2, 300, requires_grad=True)
    for fast in (False, True):
        transformer = NaiveTransformer(quantizer.code_shape, 300)
        if fast:
            rqgen.accelerate(nn.ModuleList([quantizer, transformer]), lazy_soft_codes=True)
        with CountTensors(logits.numel() // 2) as large:
            soft, _ = quantizer.get_soft_codes(x, temp=0.7, stochastic=True)
            torch.autograd.grad(transformer.compute_loss(logits, soft, use_soft_target=True), logits)
        counts.append(large.count)
    assert counts[0] > 8 and counts[1] == 1


class CountTensors(TorchDispatchMode):
    """Counts the tensors of at least `numel` elements, without views, that are made."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor) and tensor.numel() >= self.numel and not func.is_view:
                self.count += 1
        return result


@pytest.mark.parametrize(
    ("touch", "message"),
    [
        (lambda soft: torch.log(soft), "log: expected a tensor, got SoftCodes"),
        (lambda soft: torch.ones(3) * soft, "SoftCodes"),
        (lambda soft: soft * torch.ones(3), "SoftCodes"),
        (lambda soft: -soft, "SoftCodes"),
        (lambda soft: soft[0], "SoftCodes"),
        (
            lambda soft: nn.functional.cross_entropy(torch.zeros(4, 40), soft),
            "cross_entropy: expected a tensor, got SoftCodes",
        ),
        (lambda soft: np.asarray(soft), "numpy: expected a tensor, got SoftCodes"),
        (lambda soft: [*soft], "SoftCodes"),
    ],
)
def test_whatever_else_touches_soft_codes_is_refused(touch: Callable[[object], object], message: str) -> None:
    stages = TwoStages(LAYOUTS["shared"])
    soft, _ = stages.fast_quantizer.get_soft_codes(stages.batch())
    with pytest.raises(TypeError, match=message):
        touch(soft)


def test_wrong_uses_of_soft_codes_are_named() -> None:
    stages = TwoStages(LAYOUTS["shared"])
    soft, codes = stages.fast_quantizer.get_soft_codes(stages.batch())
    with pytest.raises(AttributeError, match=r"no attribute 'reshape': .*call \.materialize\(\) for the tensor"):
        soft.reshape(-1, 40)
    with pytest.raises(AttributeError, match="no attribute 'reshape'"):  # a transformer that was not accelerated
        stages.transformer.compute_loss(stages.transformer(codes), soft, use_soft_target=True)
    logits = stages.fast_transformer(codes)
    for loss in (stages.fast_transformer.compute_loss, stages.fast_transformer.compute_codebook_loss):
        with pytest.raises(ValueError, match="got SoftCodes with use_soft_target=False"):
            loss(logits, soft)
        with pytest.raises(ValueError, match=r"logits: expected \(2, 4, 4, 3, 40\) for .* got \(1, 4, 4, 3, 40\)"):
            loss(logits[:1], soft, use_soft_target=True)
    sizes = rqgen.accelerate(NaiveBottleneck(**LAYOUTS["sizes"]), lazy_soft_codes=True)
    with pytest.raises(ValueError, match=r"different sizes \(40, 5, 17\) have no common soft codes"):
        sizes.get_soft_codes(torch.randn(1, 4, 2, 6))
    with pytest.raises(ValueError, match="lazy_soft_codes: no quantizer in NaiveTransformer"):
        rqgen.accelerate(stages.transformer, lazy_soft_codes=True)


@pytest.mark.parametrize("first", [False, True])
def test_an_accelerated_transformer_is_the_same_module(first: bool) -> None:
    """And its quantizer keeps its kind of soft codes through copies, and through further calls of accelerate."""
    model = nn.ModuleDict({"vq": NaiveBottleneck(**LAYOUTS["shared"]), "ar": NaiveTransformer((4, 4, 3), 40)})
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    for lazy in (first, True, False):
        assert rqgen.accelerate(model, lazy_soft_codes=lazy) is model
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert isinstance(model["ar"], NaiveTransformer) and type(model["ar"]).__name__ == "NaiveTransformer"
    assert isinstance(model["vq"], NaiveBottleneck) and isinstance(model["vq"], Bottleneck)
    x = torch.randn(2, 4, 4, 6)
    expected, codes = model.eval()["vq"].get_soft_codes(x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), through_torch(model)):
        assert [type(module) for module in copied.modules()] == [type(module) for module in model.modules()]
        soft, _ = copied["vq"].get_soft_codes(x)
        losses = [m["ar"].compute_loss(m["ar"](codes), t, True) for m, t in ((model, expected), (copied, soft))]
        assert torch.equal(*losses)


# --- what the published code computed


@pytest.fixture(params=["rqvae-shared-8x8x4", "rqvae-separate-4x4x3"])
def published(request: pytest.FixtureRequest, kakaobrain: Path) -> tuple[Bottleneck, dict[str, Tensor]]:
    folder = kakaobrain / request.param
    hparams = yaml.safe_load((folder / "config.yaml").read_text())["arch"]["hparams"]
    names = ("latent_shape", "code_shape", "n_embed", "decay", "shared_codebook")
    quantizer = NaiveBottleneck(**{name: hparams[name] for name in names}, restart_unused_codes=False)
    state = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
    prefix = "quantizer."
    rqgen.accelerate(quantizer)
    quantizer.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    return quantizer, load_file(folder / "expected.safetensors")


def test_published_results(published: tuple[Bottleneck, dict[str, Tensor]]) -> None:
    quantizer, expected = published
    quantized, loss, codes = quantizer.eval()(expected["z_e"])
    assert torch.equal(codes, expected["codes"])
    assert close(quantized, expected["z_q"], FIXTURE_TOLERANCE)
    assert close(loss.reshape(1), expected["commit_loss"], FIXTURE_TOLERANCE)
    assert close(quantizer.embed_code(codes), expected["z_q"], FIXTURE_TOLERANCE)
    assert close(quantizer.embed_code_with_depth(codes)[0], expected["code_emb"], FIXTURE_TOLERANCE)
    soft, hard = quantizer.get_soft_codes(expected["z_e"], temp=0.5)
    assert torch.equal(hard, expected["soft_hard_codes"])
    assert close(soft, expected["soft_codes"], FIXTURE_TOLERANCE)


@pytest.mark.parametrize("published", ["rqvae-shared-8x8x4"], indirect=True)
def test_published_soft_loss(published: tuple[Bottleneck, dict[str, Tensor]], kakaobrain: Path) -> None:
    """From the latents of one published model and the logits of the other."""
    quantizer, vae = published
    expected = load_file(kakaobrain / "rqtransformer-class" / "expected.safetensors")
    soft, codes = rqgen.accelerate(quantizer.eval(), lazy_soft_codes=True).get_soft_codes(vae["z_e"], temp=0.5)
    assert torch.equal(codes, expected["codes"])
    assert close(soft.materialize(), vae["soft_codes"], FIXTURE_TOLERANCE)
    transformer = rqgen.accelerate(NaiveTransformer(quantizer.code_shape, soft.shape[-1]))
    loss = transformer.compute_loss(expected["logits"], soft, use_soft_target=True)
    assert close(loss.reshape(1), expected["soft_loss"], FIXTURE_TOLERANCE)


def test_published_averages_after_a_training_pass(published: tuple[Bottleneck, dict[str, Tensor]]) -> None:
    quantizer, expected = published
    quantizer.train()(expected["z_e"])
    for d in range(1 if quantizer.shared_codebook else len(quantizer.codebooks)):
        book = quantizer.codebooks[d]
        assert close(book.weight.detach(), expected[f"ema_weight_{d}"], FIXTURE_TOLERANCE)
        assert close(book.cluster_size_ema, expected[f"ema_cluster_{d}"], FIXTURE_TOLERANCE)
        assert close(book.embed_ema, expected[f"ema_embed_{d}"], FIXTURE_TOLERANCE)


# --- several processes


def train_in_a_group(store: str, rank: int, out: str) -> None:
    """One of two processes: both see other data and sample other numbers, the averages must not differ."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    pair = Pair("shared")
    torch.manual_seed(1 + rank)
    for _ in range(3):
        assert_same_forward(pair, pair.batch())
        assert_same_state(pair)
    torch.save(pair.fast.state_dict(), out)
    dist.barrier()  # a process that is left behind by the other may abort while it ends
    dist.destroy_process_group()


def test_two_processes_keep_one_codebook(two_processes: Callable[[str], list[dict[str, Tensor]]]) -> None:
    first, second = two_processes(__file__)
    assert all(torch.equal(first[name], second[name]) for name in first)


if __name__ == "__main__":
    train_in_a_group(sys.argv[1], int(sys.argv[2]), sys.argv[3])


# --- what others have changed


class FartherCodebook(NaiveCodebook):
    def compute_distances(self, inputs: Tensor) -> Tensor:
        return -super().compute_distances(inputs)


class DoubledBottleneck(NaiveBottleneck):
    def quantize(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        sums, codes = super().quantize(x)
        return [2 * partial for partial in sums], codes

    def embed_code(self, code: Tensor) -> Tensor:
        return 2 * super().embed_code(code)


def hook_codebook(quantizer: nn.Module) -> None:
    quantizer.codebooks[1].register_forward_hook(lambda module, inputs, output: (2 * output[0], output[1]))


def hook_codebook_before(quantizer: nn.Module) -> None:
    quantizer.codebooks[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))


def method_of_codebook(quantizer: nn.Module) -> None:
    codebook = quantizer.codebooks[1]
    before = codebook.compute_distances
    codebook.compute_distances = lambda inputs: -before(inputs)


def search_of_codebook(quantizer: nn.Module) -> None:
    codebook = quantizer.codebooks[1]
    codebook.find_nearest_embedding = lambda inputs: torch.zeros(inputs.shape[:-1], dtype=torch.int64)


def vectors_of_codebook(quantizer: nn.Module) -> None:
    codebook = quantizer.codebooks[1]
    codebook.embed = lambda idxs: 2 * codebook.weight[idxs]


def codebook_of_another_class(quantizer: nn.Module) -> None:
    quantizer.codebooks[1].__class__ = FartherCodebook


def parametrized_codebook(quantizer: nn.Module) -> None:
    class Half(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 0.5 * weight

    nn.utils.parametrize.register_parametrization(quantizer.codebooks[1], "weight", Half())


CODEBOOK_CHANGES = (
    hook_codebook,
    hook_codebook_before,
    method_of_codebook,
    search_of_codebook,
    vectors_of_codebook,
    parametrized_codebook,
)


@pytest.mark.parametrize(
    ("change", "after"),
    [
        *((change, after) for change in CODEBOOK_CHANGES for after in (False, True)),
        (codebook_of_another_class, False),
    ],
)
def test_codebooks_that_others_changed(change: Callable[[nn.Module], None], after: bool) -> None:
    """Methods called as published have the same effect on accelerated codebooks, changed before or after."""
    torch.manual_seed(3)
    naive = NaiveBottleneck(**LAYOUTS["separate"]).eval()
    plain, fast = copy.deepcopy(naive), copy.deepcopy(naive)
    if after:
        rqgen.accelerate(fast)
    for quantizer in (naive, fast):
        change(quantizer)
    if not after:
        rqgen.accelerate(fast)
    x = torch.randn(2, 4, 4, 6)
    calls: list[Callable[[nn.Module], object]] = [
        lambda module: module(x),
        lambda module: module.embed_code(plain(x)[2]),
        lambda module: module.embed_partial_code(plain(x)[2], 1, "add"),
        lambda module: module.get_soft_codes(x),
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for call in calls * 2:
            expected, got = (call(module) for module in (naive, fast))
            for mine, theirs in zip(
                *([result] if isinstance(result, Tensor) else result for result in (got, expected)), strict=True
            ):
                assert close(mine, theirs)
    said = [str(warning.message) for warning in caught]
    assert len(said) == len(set(said)) and bool(said) == (change is not parametrized_codebook)
    assert all("runs as published, and is not accelerated" in text for text in said)
    assert not torch.equal(naive(x)[0], plain(x)[0])
    if said:
        lazy = rqgen.accelerate(fast, lazy_soft_codes=True)
        with pytest.raises(ValueError, match=r"get_soft_codes: codebooks\.1.*, which lazy soft codes do not include"):
            lazy.get_soft_codes(x)


def test_a_subclass_is_not_passed_by() -> None:
    naive = DoubledBottleneck(**LAYOUTS["shared"]).eval()
    fast = rqgen.accelerate(copy.deepcopy(naive))
    x = torch.randn(2, 4, 4, 6)
    with pytest.warns(UserWarning, match="DoubledBottleneck overrides quantize of NaiveBottleneck: so quantize runs"):
        assert close(fast(x)[0], naive(x)[0])
    codes = naive(x)[2]
    with pytest.warns(UserWarning, match="DoubledBottleneck overrides embed_code"):
        assert close(fast.embed_code(codes), naive.embed_code(codes))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast.get_soft_codes(x)  # not overridden


def test_a_loss_of_a_subclass_is_not_passed_by() -> None:
    class Weighted(NaiveTransformer):
        def compute_loss(self, logits: Tensor, targets: Tensor, use_soft_target: bool = False) -> Tensor:
            return 2 * super().compute_loss(logits, targets, use_soft_target)

    quantizer = rqgen.accelerate(NaiveBottleneck(**LAYOUTS["shared"]).eval(), lazy_soft_codes=True)
    transformer = rqgen.accelerate(Weighted((4, 4, 3), 40))
    soft, codes = quantizer.get_soft_codes(torch.randn(2, 4, 4, 6))
    logits = transformer(codes)
    with pytest.raises(
        ValueError, match=r"targets: got SoftCodes, but .*Weighted overrides compute_loss of NaiveTrans"
    ):
        transformer.compute_loss(logits, soft, use_soft_target=True)
    transformer.compute_codebook_loss(logits, soft, use_soft_target=True)
    assert transformer.compute_loss(logits, soft.materialize(), use_soft_target=True) > 0
