"""`rqgen.accelerate` on the published RQ-Transformer: a stand-in with its names, codes that the published code drew."""

from __future__ import annotations

import copy
import json
import pickle
from collections import UserDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import rqgen
from rqgen.convert import load_kakaobrain
from rqgen.convert.kakaobrain.rqtransformer import build_rqtransformer
from rqgen.inference import LevelParams
from rqgen.inference.packed import PackedPrior

LAYOUTS = Path(__file__).parents[2] / "data" / "rqtransformer" / "published_layouts.safetensors"
NAMES = (
    "unconditional-own-table",
    "start-symbol-own-tables",
    "table-in-codebook-out",
    "codebook-in-shared-table-out",
    "previous-code-text",
    "depth-one",
)


class Tokenizer:
    """The part of a published RQ-VAE that the transformer calls."""

    def __init__(self, codebooks: Tensor | None) -> None:
        self.codebooks = codebooks

    def get_code_emb_with_depth(self, codes: Tensor) -> tuple[Tensor, None]:
        books = self.codebooks.expand(codes.shape[-1], -1, -1)
        return torch.stack([book[code] for book, code in zip(books, codes.unbind(-1), strict=True)], dim=-2), None


class Settings(UserDict[str, Any]):
    """A config as OmegaConf makes it: a mapping, but no dictionary, with its names as attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("data", {}):
            return self[name]
        raise AttributeError(name)


class NaiveTransformer(nn.Module):
    """Parameters and attributes of the published RQTransformer; it cannot sample by itself."""

    def __init__(self, arch: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        super().__init__()
        depth = arch["block_size"][2]
        sizes = arch["vocab_size"] if isinstance(arch["vocab_size"], list) else [arch["vocab_size"]] * depth
        defaults = {"input_emb_vqvae": False, "head_emb_vqvae": False}
        self.config = Settings({**defaults, **arch, "vocab_size": sizes})
        self.block_size, self.vocab_size = torch.Size(arch["block_size"]), sizes
        self.block_size_cond = max(arch.get("block_size_cond", 0), 1)
        self.vocab_size_cond = max(arch.get("vocab_size_cond", 0), 1)
        for stack in ("body_transformer", "head_transformer"):
            self.add_module(stack, nn.Module())
        for name, tensor in state.items():
            module: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            if tensor.is_floating_point():
                module.register_parameter(leaf, nn.Parameter(tensor.clone()))
            else:
                module.register_buffer(leaf, tensor.clone())

    def embed_with_model_aux(self, xs: Tensor, model_aux: Tokenizer) -> Tensor:
        return model_aux.get_code_emb_with_depth(xs)[0]

    def cached_forward(self) -> None:
        raise AssertionError("the published loop ran")

    def init_cache(self) -> None: ...

    def sample(self, *args: Any, **kwargs: Any) -> None:
        self.cached_forward()


class Case:
    """A small published prior: its stand-in, its tokenizer and what the published code computed."""

    def __init__(self, arch: Mapping[str, Any], state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
        self.arch, self.state, self.expected = arch, state, tensors
        self.codebooks = tensors.get("codebooks")
        self.tokenizer = Tokenizer(self.codebooks)
        self.model = NaiveTransformer(arch, state)

    def sample(self, codes: Tensor, **settings: Any) -> Tensor:
        settings = {"model_aux": self.tokenizer, "cond": self.expected.get("cond"), **settings}
        return self.model.sample(codes, **settings)


def layout(name: str) -> Case:
    with safe_open(LAYOUTS, framework="pt") as file:
        keys = [key for key in file.keys() if key.startswith(f"{name}/")]  # noqa: SIM118 (not a dictionary)
        tensors = {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in keys}
        arch = json.loads(file.metadata()[name])
    state = {key[6:]: tensor for key, tensor in tensors.items() if key.startswith("state/")}
    return Case(arch, state, tensors)


@pytest.fixture(scope="module")
def published(kakaobrain: Path) -> Case:
    folder = kakaobrain / "rqtransformer-class"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    arch = {**config["arch"], "vocab_size": config["dataset"]["vocab_size"]}
    state = torch.load(folder / "model.pt", weights_only=True)["state_dict"]
    codebooks = load_kakaobrain(kakaobrain / "rqvae-shared-8x8x4").codebooks
    return Case(arch, state, {**load_file(folder / "expected.safetensors"), "codebooks": codebooks})


@pytest.mark.parametrize("name", NAMES)
def test_the_likeliest_codes_of_every_layout(name: str) -> None:
    case = layout(name)
    greedy = case.expected["greedy"]
    with pytest.raises(AssertionError, match="the published loop ran"):
        case.sample(torch.zeros_like(greedy))
    assert rqgen.accelerate(case.model) is case.model
    start = torch.zeros_like(greedy)
    assert torch.equal(case.sample(start, top_k=1), greedy) and not start.any()


def test_the_likeliest_codes_of_a_published_checkpoint(published: Case) -> None:
    model = rqgen.accelerate(copy.deepcopy(published.model))
    expected, aux = published.expected, published.tokenizer
    codes, condition = expected["codes"], expected["cond"]
    assert torch.equal(model.sample(torch.zeros_like(codes), aux, condition, top_k=1), expected["greedy"])
    height, width = codes.shape[1:3]
    half = model.sample(codes, aux, condition, start_loc=(height // 2, 0), top_k=[1])
    assert torch.equal(half, expected["greedy_from_half"])
    # From the middle of a row: what stands there goes on as it was sampled.
    again = model.sample(half, aux, condition, start_loc=(height // 2, width - 1), top_k=[1] * 4, top_p=1.0)
    assert torch.equal(again, half)
    assert torch.equal(model.sample(codes, aux, condition, start_loc=(height, 0)), codes)


def test_draws_are_those_of_the_converted_prior(published: Case) -> None:
    case = layout("previous-code-text")
    rqgen.accelerate(case.model)
    prior = build_rqtransformer(case.arch, case.state, case.codebooks).eval()
    condition = case.expected["cond"]
    settings = {"temperature": 0.8, "top_k": (2, 3, 4)[: prior.depth], "top_p": 0.9}
    torch.manual_seed(5)
    drawn = case.sample(torch.zeros_like(case.expected["greedy"]), **settings)
    torch.manual_seed(5)
    params = LevelParams(
        temperature=(0.8,) * prior.depth,
        top_k=settings["top_k"],
        top_p=(0.9,) * prior.depth,
        seed=int(torch.randint(2**63 - 1, ())),
    )
    assert torch.equal(drawn, PackedPrior(prior, "fp32").sample(condition, params).codes)
    assert not torch.equal(case.sample(torch.zeros_like(drawn), **settings), drawn)  # another seed


def test_weights_are_its_own(published: Case) -> None:
    model = rqgen.accelerate(copy.deepcopy(published.model))
    condition, start = published.expected["cond"], torch.zeros_like(published.expected["codes"])
    first = model.sample(start, published.tokenizer, condition, top_k=1)
    model.classifier.linear.bias.data.neg_().add_(torch.randn_like(model.classifier.linear.bias))
    second = model.sample(start, published.tokenizer, condition, top_k=1)
    assert not torch.equal(first, second)
    other = Tokenizer(published.codebooks.flip(-2))
    assert not torch.equal(model.sample(start, other, condition, top_k=1), second)
    model.sampling_precision = "int4"
    with pytest.raises(ValueError, match="precision: expected one of fp32, bf16, int8, got 'int4'"):
        model.sample(start, other, condition)
    model.sampling_precision = "int8"
    assert model.sample(start, other, condition).shape == start.shape


def test_nothing_else_of_the_module_changes(published: Case) -> None:
    model = nn.ModuleDict({"prior": copy.deepcopy(published.model)})
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    rqgen.accelerate(rqgen.accelerate(model))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before
    prior = model["prior"]
    assert isinstance(prior, NaiveTransformer) and type(prior).__name__ == "NaiveTransformer"
    start, condition = torch.zeros_like(published.expected["codes"]), published.expected["cond"]
    for again in (copy.deepcopy(prior), pickle.loads(pickle.dumps(prior))):
        assert torch.equal(again.sample(start, published.tokenizer, condition, top_k=1), published.expected["greedy"])


def test_a_progress_bar(published: Case, capsys: pytest.CaptureFixture[str]) -> None:
    case = layout("depth-one")
    rqgen.accelerate(case.model)
    case.sample(torch.zeros_like(case.expected["greedy"]))
    assert capsys.readouterr() == ("", "")
    case.sample(torch.zeros_like(case.expected["greedy"]), is_tqdm=True, desc="Drawing")
    shown = capsys.readouterr()
    assert shown.out == "" and "Drawing" in shown.err and "100%" in shown.err


def test_what_is_refused(published: Case) -> None:
    model = rqgen.accelerate(copy.deepcopy(published.model))
    with pytest.raises(ValueError, match=r"partial_sample: expected shape \(B, "):
        model.sample(torch.zeros(1, 2, 2, 1, dtype=torch.int64), published.tokenizer)
    start, condition = torch.zeros_like(published.expected["codes"]), published.expected["cond"]
    with pytest.raises(IndexError, match=r"partial_sample before start_loc: expected values in \[0, 48\), got -1"):
        model.sample(start - 1, published.tokenizer, condition, start_loc=(0, 1))
    with pytest.raises(IndexError, match="cond: expected values in"):
        model.sample(start, published.tokenizer, condition + 1000)
    odd = copy.deepcopy(published.model)
    odd.vocab_size = [48, 48, 24, 48]
    with pytest.raises(ValueError, match=r"^model\.vocab_size: sizes that differ by depth .* got \[48, 48, 24, 48\]"):
        rqgen.accelerate(odd)
    assert type(odd) is NaiveTransformer


# --- what the weights do not tell


class OwnLoop(NaiveTransformer):
    def cached_forward(self) -> None:
        raise AssertionError("the loop of the subclass ran")


class Louder(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def layer_of(model: nn.Module) -> nn.Module:
    return model.head_transformer.blocks.get_submodule("0").mlp


def as_layers(model: nn.Module) -> nn.Module:
    """Torch's layers in the places of the stand-in's bare parameters."""
    for name, module in list(model.named_modules()):
        if name.endswith(("mlp.0", "mlp.2")):
            layer = nn.Linear(*module.weight.shape[::-1], bias="bias" in module._parameters)
            layer.load_state_dict(module.state_dict())
            model.set_submodule(name, layer)
        if name.endswith("ln1"):
            norm = nn.LayerNorm(len(module.weight))
            norm.load_state_dict(module.state_dict())
            model.set_submodule(name, norm)
    return model


def louder(model: nn.Module) -> None:
    layer = layer_of(model).get_submodule("0")
    other = Louder(layer.in_features, layer.out_features)
    other.load_state_dict(layer.state_dict())
    layer_of(model).set_submodule("0", other)


def own_forward(model: nn.Module) -> None:
    layer_of(model).get_submodule("0").forward = lambda x: x


def adapted(model: nn.Module) -> None:
    layer_of(model).set_submodule("0", nn.Sequential(layer_of(model).get_submodule("0")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.classifier.register_forward_hook(lambda *_: None), "classifier has a forward hook"),
        (lambda m: layer_of(m).register_forward_pre_hook(lambda *_: None), r"blocks\.0\.mlp has a forward pre-hook"),
        (
            lambda m: nn.utils.parametrizations.spectral_norm(layer_of(m).get_submodule("0")),
            "has a parametrized weight",
        ),
        (own_forward, "mlp.0 has a forward of its own, set on the instance"),
        (louder, "mlp.0 has its forward from Louder"),
        (adapted, "mlp.0 is torch.nn.modules.container.Sequential and was torch.nn.modules.linear.Linear when acc"),
        (lambda m: setattr(m.body_transformer.blocks.get_submodule("0").ln1, "eps", 1.0), "ln1 has eps=1.0 and not"),
        (
            lambda m: setattr(m, "cached_forward", lambda: NaiveTransformer.cached_forward(m)),
            "a cached_forward of its own, set on the instance",
        ),
    ],
)
def test_a_changed_transformer_draws_as_published(published: Case, change: Any, message: str) -> None:
    model = rqgen.accelerate(as_layers(copy.deepcopy(published.model)))
    start, condition = torch.zeros_like(published.expected["codes"]), published.expected["cond"]
    drawn = model.sample(start, published.tokenizer, condition, top_k=1)
    assert torch.equal(drawn, published.expected["greedy"])
    change(model)
    with pytest.warns(UserWarning, match=f"{message}.*: so sample runs as published") as warned:
        for _ in range(2):
            with pytest.raises(AssertionError, match="the published loop ran"):
                model.sample(start, published.tokenizer, condition, top_k=1)
    assert len(warned) == 1
    model.sampling_precision = "int8"
    with pytest.raises(ValueError, match=f"sampling_precision: 'int8' has packed weights alone.* but .*{message}"):
        model.sample(start, published.tokenizer, condition)


def test_a_loop_of_a_subclass_runs(published: Case) -> None:
    model = OwnLoop(published.arch, published.state)
    rqgen.accelerate(model)
    start, condition = torch.zeros_like(published.expected["codes"]), published.expected["cond"]
    with (
        pytest.warns(UserWarning, match="OwnLoop overrides cached_forward of NaiveTransformer: so sample runs"),
        pytest.raises(AssertionError, match="the loop of the subclass ran"),
    ):
        model.sample(start, published.tokenizer, condition)


def test_hooks_of_all_modules(published: Case) -> None:
    model = rqgen.accelerate(copy.deepcopy(published.model))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        with pytest.warns(UserWarning, match="torch calls a forward hook"), pytest.raises(AssertionError, match="loop"):
            model.sample(torch.zeros_like(published.expected["codes"]), published.tokenizer, published.expected["cond"])
    finally:
        handle.remove()


def test_copies_of_a_transformer_know_what_it_was(published: Case) -> None:
    model = pickle.loads(pickle.dumps(rqgen.accelerate(as_layers(copy.deepcopy(published.model)))))
    adapted(model)
    with pytest.warns(UserWarning, match="mlp.0 is torch"), pytest.raises(AssertionError, match="loop ran"):
        model.sample(torch.zeros_like(published.expected["codes"]), published.tokenizer, published.expected["cond"])
