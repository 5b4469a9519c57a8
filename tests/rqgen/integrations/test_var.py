"""`accelerate` on the published VAR's quantizer: the stand-in below, computed naively, is the definition of right.

It has the published quantizer's structure (state dict, attributes, methods, what is counted when), which is all that
recognition looks at. The fixture holds what the published code itself computed.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as tdist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import rqgen
import rqkernels
from rqgen.integrations.var import Quantizer

K, C = 40, 6
TOLERANCE = 1e-6  # relative to the largest value: the stand-in adds and subtracts in another order

# What the published code asks whether there is a process group.
dist = types.ModuleType("dist")
dist.initialized = lambda: False


# --- the stand-in


class NaivePhi(nn.Conv2d):
    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__(channels, channels, 3, padding=1)
        self.ratio = ratio

    def forward(self, h: Tensor) -> Tensor:
        return h * (1 - self.ratio) + super().forward(h) * self.ratio


class NaivePhis(nn.Module):
    """The nearest of some refinements, by the place of a scale in [0, 1]."""

    def __init__(self, count: int, channels: int) -> None:
        super().__init__()
        self.qresi_ls = nn.ModuleList(NaivePhi(channels, 0.5) for _ in range(count))
        margin = 1 / 12 if count == 4 else 1 / (2 * count)
        self.ticks = torch.linspace(margin, 1 - margin, count, dtype=torch.float64)

    def __getitem__(self, place: float) -> nn.Module:
        return self.qresi_ls[int((self.ticks - place).abs().argmin())]


class NaiveQuantizer(nn.Module):
    def __init__(self, scales: Sequence[int] = (1, 2, 4), znorm: bool = False, phis: int = 4, size: int = K) -> None:
        super().__init__()
        self.vocab_size, self.Cvae, self.using_znorm, self.v_patch_nums = size, C, znorm, tuple(scales)
        self.quant_resi = NaivePhis(phis, C)
        self.register_buffer("ema_vocab_hit_SV", torch.zeros(len(scales), size))
        self.record_hit, self.beta, self.prog_si = 0, 0.25, -1
        self.embedding = nn.Embedding(size, C)

    def nearest(self, vectors: Tensor) -> Tensor:
        codebook = self.embedding.weight.detach()
        if self.using_znorm:
            vectors, codebook = F.normalize(vectors, dim=-1), F.normalize(codebook, dim=-1)
        return (vectors.unsqueeze(-2).double() - codebook.double()).square().sum(-1).argmin(-1)

    def scale(self, k: int, scales: Sequence, rest: Tensor) -> tuple[Tensor, Tensor]:
        sides = scales[k] if isinstance(scales[k], tuple) else (scales[k],) * 2
        codes = self.nearest(F.interpolate(rest, size=sides, mode="area").permute(0, 2, 3, 1))
        h = self.embedding(codes).permute(0, 3, 1, 2)
        if k + 1 < len(scales):
            h = F.interpolate(h, size=rest.shape[2:], mode="bicubic")
        return codes, self.quant_resi[k / (len(scales) - 1)](h.contiguous())

    def forward(self, f_BChw: Tensor, ret_usages: bool = False) -> tuple[Tensor, list[float] | None, Tensor]:
        f_BChw = f_BChw.float()
        fixed = f_BChw.detach()
        total, losses = torch.zeros_like(fixed), []
        for k in range(len(self.v_patch_nums)):
            codes, added = self.scale(k, self.v_patch_nums, fixed - total.detach())
            total = total + added
            losses.append(self.beta * F.mse_loss(total.detach(), f_BChw) + F.mse_loss(total, fixed))
            if self.training and dist.initialized():
                hits = F.one_hot(codes.flatten(), self.vocab_size).sum(0).float()
                tdist.all_reduce(hits)
                kept = 0.0 if self.record_hit == 0 else 0.9 if self.record_hit < 100 else 0.99
                self.ema_vocab_hit_SV[k] = kept * self.ema_vocab_hit_SV[k] + (1 - kept) * hits
                self.record_hit += 1
        positions = tdist.get_world_size() * f_BChw.shape[0] * f_BChw.shape[2] * f_BChw.shape[3]
        used = (self.ema_vocab_hit_SV >= 0.08 * positions / self.vocab_size).double().mean(1) * 100
        return f_BChw + (total.detach() - fixed), used.tolist() if ret_usages else None, sum(losses) / len(losses)

    def f_to_idxBl_or_fhat(self, f_BChw: Tensor, to_fhat: bool, v_patch_nums: Sequence | None = None) -> list[Tensor]:
        total, found, scales = torch.zeros_like(f_BChw), [], v_patch_nums or self.v_patch_nums
        for k in range(len(scales) if self.prog_si < 0 else self.prog_si + 1):
            codes, added = self.scale(k, scales, f_BChw.detach() - total.detach())
            total = total + added
            found.append(total if to_fhat else codes.flatten(1))
        return found

    def embed_to_fhat(self, ms_h_BChw: list[Tensor]) -> None:
        raise NotImplementedError

    def idxBl_to_var_input(self, gt_ms_idx_Bl: list[Tensor]) -> None:
        raise NotImplementedError

    def get_next_autoregressive_input(self, si: int) -> None:
        raise NotImplementedError


class Group:
    """Two processes that always hold the same: what a process group of them does to a tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        monkeypatch.setattr(tdist, "is_initialized", lambda: True)
        monkeypatch.setattr(tdist, "get_world_size", lambda: 2)
        monkeypatch.setattr(tdist, "all_reduce", self.all_reduce)
        monkeypatch.setattr(dist, "initialized", lambda: True)

    def all_reduce(self, tensor: Tensor) -> None:
        self.calls += 1
        tensor.mul_(2)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Group:
    return Group(monkeypatch)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process group; the stand-in, as the published code, still asks how many processes there are."""
    monkeypatch.setattr(tdist, "get_world_size", lambda: 1)


LAYOUTS: dict[str, dict] = {
    "plain": {},
    "normalised": {"znorm": True},
    "a refinement per scale": {"scales": (1, 2, 3, 5), "phis": 3},
    "one refinement": {"phis": 1, "znorm": True},
    "one code": {"size": 1},
}


class Pair:
    """A stand-in, and the same one accelerated."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.naive = NaiveQuantizer(**LAYOUTS[name])
        self.fast = rqgen.accelerate(copy.deepcopy(self.naive))

    def batch(self, size: int = 3) -> Tensor:
        return torch.randn(size, C, *[self.naive.v_patch_nums[-1]] * 2)


@pytest.fixture(params=LAYOUTS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(request.param)


def close(got: Tensor, expected: Tensor) -> bool:
    assert got.shape == expected.shape and got.dtype == expected.dtype
    largest = expected.detach().abs().max()
    return bool((got - expected).abs().max() <= TOLERANCE * largest.clamp(min=1))


def assert_same_forward(pair: Pair, f: Tensor) -> None:
    results = []
    for module in (pair.fast, pair.naive):
        leaf = f.clone().requires_grad_()
        quantized, used, loss = module(leaf, ret_usages=True)
        (quantized.square().sum() + loss).backward()
        gradients = [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]
        module.zero_grad()
        results.append((used, module.record_hit, quantized.detach(), loss.detach(), leaf.grad, *gradients))
    got, expected = results
    assert got[0] == pytest.approx(expected[0]) and got[1] == expected[1] and len(got) == len(expected)
    assert all(close(mine, theirs) for mine, theirs in zip(got[2:], expected[2:], strict=True))
    mine, theirs = pair.fast.state_dict(), pair.naive.state_dict()
    assert list(mine) == list(theirs) and all(close(mine[name], theirs[name]) for name in theirs)


# --- the same results


@pytest.mark.parametrize("training", [True, False])
def test_forward(pair: Pair, training: bool, alone: None) -> None:
    for module in (pair.naive, pair.fast):
        module.train(training)
    for size in (3, 1):
        assert_same_forward(pair, pair.batch(size))
    assert pair.fast(pair.batch())[1] is None
    assert not pair.fast.ema_vocab_hit_SV.any()  # without a group nothing is counted, as published


def test_without_a_process_group() -> None:
    """The published forward stops there, because it asks for a group."""
    pair = Pair("plain")
    f = pair.batch()
    with pytest.raises(ValueError, match="process group"):
        pair.naive(f)
    assert pair.fast(f)[0].shape == f.shape


def test_codes_are_counted_in_a_group(pair: Pair, group: Group) -> None:
    """From the first scale of the first call on, which starts the averages; then slower once 100 were counted."""
    for module in (pair.naive, pair.fast):
        module.record_hit = 96
        module.ema_vocab_hit_SV.fill_(1)
    for start in (96, 0):
        for module in (pair.naive, pair.fast):
            module.record_hit = start
        for _ in range(3):
            assert_same_forward(pair, pair.batch())
    assert pair.fast.ema_vocab_hit_SV.sum() > 0
    # A call of ours exchanges the counts of all scales at once.
    scales = len(pair.naive.v_patch_nums)
    assert group.calls == 6 * (scales + 1)
    pair.fast.eval()(pair.batch())
    assert group.calls == 6 * (scales + 1)


def test_the_published_module_says_whether_there_is_a_group(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    for initialized, counted in ((dist.initialized, True), (lambda: False, False)):
        monkeypatch.setattr(dist, "initialized", initialized)
        pair = Pair("plain")
        assert_same_forward(pair, pair.batch())
        assert bool(pair.fast.ema_vocab_hit_SV.any()) is counted
    # Without such a module torch knows.
    monkeypatch.delattr(sys.modules[__name__], "dist")
    pair.fast(pair.batch())
    assert pair.fast.ema_vocab_hit_SV.any()


@pytest.mark.parametrize("scales", [None, [(1, 3), (2, 2), (4, 4)], [1, 4]])
def test_encoding(scales: list | None) -> None:
    for name in ("plain", "normalised"):
        pair = Pair(name)
        f = pair.batch()
        for to_fhat in (False, True):
            results = [module.f_to_idxBl_or_fhat(f, to_fhat, scales) for module in (pair.fast, pair.naive)]
            for mine, theirs in zip(*results, strict=True):
                assert close(mine, theirs) if to_fhat else torch.equal(mine, theirs)
        for module in (pair.naive, pair.fast):
            module.prog_si = 1
        got = pair.fast.f_to_idxBl_or_fhat(f, False, v_patch_nums=scales)
        expected = pair.naive.f_to_idxBl_or_fhat(f, False, v_patch_nums=scales)
        assert len(got) == 2 and all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


def test_features_carry_the_gradient_of_codebook_and_refinements() -> None:
    pair = Pair("plain")
    f = pair.batch()
    results = []
    for module in (pair.fast, pair.naive):
        torch.stack(module.f_to_idxBl_or_fhat(f, True)).square().sum().backward()
        results.append([parameter.grad for parameter in module.parameters() if parameter.grad is not None])
    assert len(results[0]) == len(results[1]) > 1
    assert all(close(mine, theirs) for mine, theirs in zip(*results, strict=True))


def test_codes_are_certified() -> None:
    """Codes 1e-6 apart next to an offset of 100: float32 distances cannot tell them apart, ours can."""
    pair = Pair("plain")
    with torch.no_grad():
        for module in (pair.naive, pair.fast):
            module.embedding.weight.copy_(torch.randn(C) + 1e-6 * torch.randn(K, C, generator=torch.manual_seed(1)))
    pair.fast.load_state_dict(pair.naive.state_dict())
    f = pair.batch() + 100.0
    got, expected = (module.f_to_idxBl_or_fhat(f, False)[0] for module in (pair.fast, pair.naive))
    assert torch.equal(got, expected)


def test_published_results(published_var: Path) -> None:
    expected = load_file(published_var / "expected.safetensors")
    state = torch.load(published_var / "vae.pth", weights_only=True)
    settings = json.loads((published_var / "config.json").read_text())["vae"]
    quantizer = NaiveQuantizer(settings["v_patch_nums"])
    size, channels = settings["vocab_size"], settings["z_channels"]
    quantizer.vocab_size, quantizer.Cvae, quantizer.embedding = size, channels, nn.Embedding(size, channels)
    quantizer.quant_resi = NaivePhis(4, channels)
    quantizer.ema_vocab_hit_SV = torch.zeros(4, size)
    quantizer.load_state_dict(
        {name.removeprefix("quantize."): tensor for name, tensor in state.items() if name.startswith("quantize.")}
    )
    fast = rqgen.accelerate(quantizer).eval()
    codes = fast.f_to_idxBl_or_fhat(expected["f"], False)
    features = fast.f_to_idxBl_or_fhat(expected["f"], True)
    for k in range(4):
        assert torch.equal(codes[k], expected[f"idx_{k}"])
        assert (features[k] - expected[f"fhat_{k}"]).abs().max() < 1e-4
    assert (fast(expected["f"])[0] - expected["fhat_3"]).abs().max() < 1e-4


# --- how it is computed


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return result


def test_nothing_of_rows_times_codes(alone: None) -> None:
    naive = NaiveQuantizer(size=500)
    f = torch.randn(8, C, 4, 4)
    for module, large in ((naive, True), (rqgen.accelerate(copy.deepcopy(naive)), False)):
        with LargestTensor() as largest:
            module(f)
            module.f_to_idxBl_or_fhat(f, False)
        assert (largest.numel >= 8 * 16 * 500) is large


def test_every_scale_is_one_search(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    search = rqkernels.residual_search
    monkeypatch.setattr(rqkernels, "residual_search", lambda *a, **k: calls.append(a) or search(*a, **k))
    pair.fast(pair.batch())
    pair.fast.f_to_idxBl_or_fhat(pair.batch(), False)
    assert len(calls) == 2 * len(pair.naive.v_patch_nums)


# --- the same module, seen from outside


def test_nothing_of_the_module_is_replaced() -> None:
    model = nn.ModuleDict({"encoder": nn.Linear(2, 2), "quantize": NaiveQuantizer()})
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    modules = dict(model.named_modules())
    assert rqgen.accelerate(model) is model
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    assert all(modules[name] is module for name, module in model.named_modules())
    quantizer = model["quantize"]
    assert isinstance(quantizer, NaiveQuantizer) and isinstance(quantizer, Quantizer)
    kind = type(quantizer)
    assert kind.__name__ == "NaiveQuantizer" and type(rqgen.accelerate(model)["quantize"]) is kind


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_stay_accelerated(copied: Callable[[nn.Module], nn.Module], alone: None) -> None:
    pair = Pair("plain")
    original, pair.fast = pair.fast, copied(pair.fast)
    assert type(pair.fast) is type(original)
    assert_same_forward(pair, pair.batch())


# --- bad values


def test_a_vector_that_is_not_finite_touches_no_other_image(group: Group) -> None:
    pair = Pair("plain")
    f = pair.batch()
    bad = f.clone()
    bad[1, 0, 3, 3] = torch.nan
    codes, expected = (pair.fast.f_to_idxBl_or_fhat(features, False) for features in (bad, f))
    for mine, theirs in zip(codes, expected, strict=True):
        assert torch.equal(mine[[0, 2]], theirs[[0, 2]]) and (mine[1] == -1).any()
    quantized, _, loss = pair.fast(bad)
    assert torch.equal(quantized[[0, 2]].isfinite(), torch.ones_like(f[[0, 2]], dtype=torch.bool))
    assert not quantized[1, :, 3, 3].isfinite().any() and loss.isnan()
    counted = [sum(int((tokens >= 0).sum()) for tokens in maps) for maps in zip(codes, strict=True)]
    assert pair.fast.ema_vocab_hit_SV[0].sum() == 2 * counted[0]


def test_bad_arguments_are_named() -> None:
    fast = Pair("plain").fast
    with pytest.raises(ValueError, match=r"v_patch_nums: expected \(4, 4\), as f_BChw, at last, got 3"):
        fast.f_to_idxBl_or_fhat(torch.zeros(1, C, 4, 4), False, v_patch_nums=[1, 3])
    with pytest.raises(TypeError, match="float64"):
        fast.f_to_idxBl_or_fhat(torch.zeros(1, C, 4, 4, dtype=torch.float64), False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: setattr(q, "embedding", nn.Embedding(41, C)), r"embedding\.weight: expected shape \(40, 6\), got"),
        (lambda q: setattr(q, "ema_vocab_hit_SV", torch.zeros(3, 41)), r"ema_vocab_hit_SV: expected shape \(3, 40\)"),
        (lambda q: setattr(q, "v_patch_nums", ((1, 2), 3)), r"v_patch_nums: expected the sides of the token maps"),
        (lambda q: setattr(q, "v_patch_nums", None), r"v_patch_nums: expected the sides of the token maps"),
    ],
)
def test_a_quantizer_that_is_not_as_published_is_named(change: Callable[[nn.Module], None], message: str) -> None:
    model = nn.ModuleDict({"quantize": NaiveQuantizer()})
    change(model["quantize"])
    with pytest.raises(ValueError, match=rf"^quantize\.{message}"):
        rqgen.accelerate(model)
    assert type(model["quantize"]) is NaiveQuantizer


def test_what_is_known_is_said() -> None:
    known = r"nothing to accelerate in NaivePhis.*VectorQuantizer2.*Known models: kakaobrain.*, VAR's tokenizer\."
    with pytest.raises(ValueError, match=known):
        rqgen.accelerate(NaivePhis(1, 2))
    with pytest.raises(ValueError, match="lazy_soft_codes: no quantizer in NaiveQuantizer"):
        rqgen.accelerate(NaiveQuantizer(), lazy_soft_codes=True)


def test_a_subclass_is_not_passed_by(alone: None) -> None:
    class Doubled(NaiveQuantizer):
        def f_to_idxBl_or_fhat(self, *args: object, **kwargs: object) -> list[Tensor]:
            return [2 * found for found in super().f_to_idxBl_or_fhat(*args, **kwargs)]

    naive = Doubled()
    fast = rqgen.accelerate(copy.deepcopy(naive))
    f = torch.randn(3, C, 4, 4)
    with pytest.warns(UserWarning, match="Doubled overrides f_to_idxBl_or_fhat of NaiveQuantizer: so"):
        got = fast.f_to_idxBl_or_fhat(f, True)
    for mine, theirs in zip(got, naive.f_to_idxBl_or_fhat(f, True), strict=True):
        assert close(mine, theirs)


def test_hooks_on_what_is_called_count(alone: None) -> None:
    naive = NaiveQuantizer()
    fast = rqgen.accelerate(copy.deepcopy(naive))
    for quantizer in (naive, fast):
        quantizer.embedding.register_forward_hook(lambda module, inputs, output: 2 * output)
        quantizer.quant_resi.qresi_ls[0].register_forward_hook(lambda module, inputs, output: output + 1)
    f = torch.randn(3, C, 4, 4)
    assert close(fast(f)[0], naive(f)[0])
