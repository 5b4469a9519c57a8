"""Priors whose weights do not tell all: hooks, adapters, parametrizations, modules and methods replaced."""

from __future__ import annotations

import copy
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrize, prune

import rqkernels
from rqgen.evaluation import evaluate_precision
from rqgen.inference import Engine, make_sampler
from rqgen.models import RQVAE, RQTransformer
from rqgen.models.changes import find_change
from rqgen.models.transformer import Transformer, TransformerBlock, TransformerConfig
from rqgen.sampling import KnownRows, edit, generate

K, C, W = 11, 4, 32
SHAPE = (2, 2, 3)
LABELS = torch.arange(8) % 5


@pytest.fixture(scope="module")
def vae() -> RQVAE:
    torch.manual_seed(1)
    return tiny.rqvae(resolution=4, embed_dim=C, code_shape=SHAPE, quantizer={"codebook_size": K})


def make_prior(vae: RQVAE, cls: type[RQTransformer] = RQTransformer, **settings: Any) -> RQTransformer:
    torch.manual_seed(2)
    prior = tiny.rq_prior(vae, cls=cls, embed_dim=W, layers=2, heads=4, num_classes=5, **settings)
    # Larger weights than the initial ones: the condition and the codes before must matter.
    return tiny.resample_weights(prior, std=0.25)


def draw_plainly(prior: RQTransformer, guidance: float = 0.0) -> Tensor:
    """The definition: a whole pass of the prior, called as anyone calls it, for every code."""
    codes = torch.zeros(len(LABELS), *SHAPE, dtype=torch.int64)
    with torch.no_grad():
        for t in range(4):
            for d in range(SHAPE[2]):
                place = slice(None), t // 2, t % 2, d
                logits = prior(codes, LABELS).logits[place]
                if guidance:
                    logits = (1 + guidance) * logits - guidance * prior(codes).logits[place]
                codes[place] = rqkernels.reference.sample_logits(logits, seed=7, offset=0, stream=t * SHAPE[2] + d)
    return codes


@pytest.fixture
def packed_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the packed operators that were called."""
    calls: list[str] = []
    for name in ("depth_decode", "transformer_step", "depth_logits"):
        operator = getattr(rqkernels, name)

        def watched(*args: Any, name: str = name, operator: Any = operator, **kwargs: Any) -> Any:
            calls.append(name)
            return operator(*args, **kwargs)

        monkeypatch.setattr(rqkernels, name, watched)
    return calls


# --- changes: each takes a prior and returns it, or another one, changed


class Lora(nn.Module):
    """A module structured like the one that peft puts in place of a linear layer or an embedding."""

    def __init__(self, base_layer: nn.Module, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inputs, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, outputs, bias=False)})
        for layer in (self.lora_A["default"], self.lora_B["default"]):
            nn.init.normal_(layer.weight, std=0.5)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor:
        return self.base_layer.bias

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        return self.base_layer(x, *args) + self.lora_B["default"](self.lora_A["default"](x))


class LoraEmbedding(Lora):
    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer(x)
        return base + self.lora_B["default"](self.lora_A["default"](base))


class Louder(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 1.5 * super().forward(input)


class Computed(nn.Linear):
    """Its weight is a function of another."""

    weight = property(lambda self: 2 * self._parameters["weight"])


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


class Sharper(RQTransformer):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        return output._replace(logits=3 * output.logits)


class OtherEmbedding(RQTransformer):
    def embed_stacks(self, codes_bnd: Tensor) -> Tensor:
        return 3 * super().embed_stacks(codes_bnd)


def mixed(module: Any, inputs: Any, output: Any) -> Any:
    return output + 0.7 * output.roll(1, -1)  # what no norm takes back


def mixed_before(module: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0] + 0.7 * inputs[0].roll(1, -1), *inputs[1:])


def hooked(path: str, hook: Any = mixed, **options: Any) -> Callable[[RQTransformer], RQTransformer]:
    def change(prior: RQTransformer) -> RQTransformer:
        register = "register_forward_pre_hook" if hook is mixed_before else "register_forward_hook"
        getattr(prior.get_submodule(path), register)(hook, **options)
        return prior

    return change


def replaced(path: str, make: Callable[[Any], nn.Module]) -> Callable[[RQTransformer], RQTransformer]:
    def change(prior: RQTransformer) -> RQTransformer:
        prior.set_submodule(path, make(prior.get_submodule(path)).eval())
        return prior

    return change


def changed(path: str, action: Callable[[Any], Any]) -> Callable[[RQTransformer], RQTransformer]:
    def change(prior: RQTransformer) -> RQTransformer:
        action(prior.get_submodule(path) if path else prior)
        return prior

    return change


def as_class(cls: type[RQTransformer]) -> Callable[[RQTransformer], RQTransformer]:
    def change(prior: RQTransformer) -> RQTransformer:
        other = cls(prior.config, prior.codebooks).eval()
        other.load_state_dict(prior.state_dict())
        return other

    return change


def louder(linear: nn.Linear) -> nn.Linear:
    made = Louder(linear.in_features, linear.out_features)
    made.load_state_dict(linear.state_dict())
    return made


def computed(linear: nn.Linear) -> nn.Linear:
    linear.__class__ = Computed
    return linear


def own_forward(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda *args: 1.7 * before(*args)


def own_method(block: TransformerBlock) -> None:
    def forward(self: TransformerBlock, x_bnw: Tensor, cache: Any, layer: int) -> Tensor:
        return x_bnw + self.mlp(self.mlp_norm(x_bnw))

    block.forward = types.MethodType(forward, block)


def own_embedding(prior: RQTransformer) -> None:
    before = prior.embed_stacks
    prior.embed_stacks = lambda codes: 3 * before(codes)


def shadow(linear: nn.Linear) -> None:
    linear.__dict__["weight"] = 2 * linear.weight.detach()


BLOCK = "spatial_transformer.blocks.1"
CHANGES: dict[str, tuple[Callable[[RQTransformer], RQTransformer], str]] = {
    "hook on a linear layer": (hooked(f"{BLOCK}.mlp.0"), f"prior.{BLOCK}.mlp.0 has a forward hook (mixed)"),
    "hook on an attention": (hooked(f"{BLOCK}.attention"), f"{BLOCK}.attention has a forward hook"),
    "hook on a block": (hooked(BLOCK), f"{BLOCK} has a forward hook"),
    "hook on a stack": (hooked("spatial_transformer"), "spatial_transformer has a forward hook"),
    "hook on the depth stack": (hooked("depth_transformer"), "depth_transformer has a forward hook"),
    "hook on a norm": (hooked("depth_transformer.blocks.0.attention_norm"), "attention_norm has a forward hook"),
    "hook on the classifier": (hooked("classifier"), "prior.classifier has a forward hook"),
    "hook on an embedding": (hooked("condition_embedding"), "condition_embedding has a forward hook"),
    "hook on a projection": (hooked("depth_projection"), "depth_projection has a forward hook"),
    "hook on a dropout": (hooked("embedding_dropout"), "embedding_dropout has a forward hook"),
    "pre-hook on a linear layer": (
        hooked(f"{BLOCK}.mlp.2", mixed_before),
        "mlp.2 has a forward pre-hook (mixed_before)",
    ),
    "pre-hook on the classifier": (hooked("classifier", mixed_before), "classifier has a forward pre-hook"),
    "hook with keywords": (
        hooked("classifier", lambda m, i, k, o: 1.7 * o, with_kwargs=True),
        "prior.classifier has a forward hook",
    ),
    "hook on the prior": (
        hooked("", lambda m, i, o: o._replace(logits=3 * o.logits)),
        "prior has a forward hook",
    ),
    "adapter on a linear layer": (
        replaced(f"{BLOCK}.attention.qkv", lambda base: Lora(base, W, 3 * W)),
        f"{BLOCK}.attention.qkv is a {__name__}.Lora and not a Linear",
    ),
    "adapter on a projection": (
        replaced("spatial_projection", lambda base: Lora(base, C, W)),
        "spatial_projection is a",
    ),
    "adapter on the classifier": (replaced("classifier", lambda base: Lora(base, W, K)), "prior.classifier is a"),
    "adapter on an embedding": (
        replaced("condition_embedding", lambda base: LoraEmbedding(base, W, W)),
        "condition_embedding is a",
    ),
    "parametrization": (
        changed(f"{BLOCK}.mlp.0", lambda m: parametrize.register_parametrization(m, "weight", Half())),
        f"{BLOCK}.mlp.0 has a parametrized weight",
    ),
    "parametrized positions": (
        changed("", lambda m: parametrize.register_parametrization(m, "depth_positions", Half())),
        "prior has a parametrized depth_positions",
    ),
    "weight norm": (
        changed(f"{BLOCK}.mlp.0", lambda m: nn.utils.parametrizations.weight_norm(m).parametrizations.weight[0]),
        "has a parametrized weight",
    ),
    "spectral norm": (
        changed(f"{BLOCK}.mlp.0", nn.utils.parametrizations.spectral_norm),
        "has a parametrized weight",
    ),
    "weight norm of old": (changed(f"{BLOCK}.mlp.0", lambda m: old_weight_norm(m)), "mlp.0 has a"),
    "pruning": (changed(f"{BLOCK}.mlp.0", lambda m: prune.l1_unstructured(m, "weight", 0.7)), "mlp.0 has a"),
    "another activation": (replaced(f"{BLOCK}.mlp.1", lambda _: nn.ReLU()), "mlp.1 is a torch.nn.modules"),
    "another setting of the activation": (
        changed(f"{BLOCK}.mlp.1", lambda m: setattr(m, "approximate", "tanh")),
        "mlp.1 has approximate='tanh' and not 'none'",
    ),
    "another epsilon": (
        changed(f"{BLOCK}.mlp_norm", lambda m: setattr(m, "eps", 1.0)),
        "mlp_norm has eps=1.0 and not 1e-05",
    ),
    "a largest norm": (
        changed("condition_embedding", lambda m: setattr(m, "max_norm", 0.5)),
        "condition_embedding has max_norm=0.5 and not None",
    ),
    "a linear layer of another class": (replaced(f"{BLOCK}.mlp.2", louder), "mlp.2 has its forward from Louder"),
    "a weight that is a property": (
        replaced(f"{BLOCK}.mlp.2", computed),
        "mlp.2 has its weight from the class Computed",
    ),
    "a longer sequence": (
        changed(f"{BLOCK}.mlp", lambda m: m.append(nn.Tanh())),
        f"{BLOCK}.mlp holds 4 modules and not 3",
    ),
    "a block less": (
        changed("spatial_transformer.blocks", lambda m: m.__delitem__(1)),
        "spatial_transformer.blocks holds 1 modules and not 2",
    ),
    "a wider layer": (changed(BLOCK, lambda block: widen(block)), f"{BLOCK}.mlp.0 has a weight that is (256, 32)"),
    "a bias less": (
        changed(f"{BLOCK}.mlp.0", lambda m: m.register_parameter("bias", None)),
        "mlp.0 has a bias that is missing",
    ),
    "a compiled module": (
        replaced(BLOCK, lambda m: torch.compile(m, backend="eager")),
        f"{BLOCK} is a torch._dynamo.eval_frame.OptimizedModule",
    ),
    "forward of the classifier": (
        changed("classifier", own_forward),
        "prior.classifier has a forward of its own, set on the instance",
    ),
    "forward of a block": (changed(BLOCK, own_method), f"{BLOCK} has a forward of its own"),
    "a method of the prior": (changed("", own_embedding), "prior has a embed_stacks of its own"),
    "a shadowed weight": (changed(f"{BLOCK}.mlp.0", shadow), "mlp.0 has a weight of its own"),
    "a subclass": (as_class(Sharper), "prior has its forward from Sharper"),
    "a subclass in a part": (as_class(OtherEmbedding), "prior has its embed_stacks from OtherEmbedding"),
}


def old_weight_norm(module: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(module)
    module.weight_g.data.mul_(1.5)  # what stands in `weight` is of before


def widen(block: TransformerBlock) -> None:
    block.mlp[0], block.mlp[2] = nn.Linear(W, 8 * W), nn.Linear(8 * W, W)
    nn.init.normal_(block.mlp[0].weight, std=0.3)
    nn.init.normal_(block.mlp[2].weight, std=0.3)


# What changes no logits, or too little for codes.
UNSEEN = ("weight norm", "a compiled module", "another setting of the activation")


@pytest.fixture(scope="module")
def untouched(vae: RQVAE) -> Tensor:
    return draw_plainly(make_prior(vae))


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_prior_draws_what_it_computes(
    vae: RQVAE, untouched: Tensor, packed_calls: list[str], name: str
) -> None:
    change, text = CHANGES[name]
    prior = make_prior(vae)
    generate(prior, vae, LABELS[:1])  # packed before it is changed: that must not be kept
    packed_calls.clear()
    torch.manual_seed(3)
    prior = change(prior)
    expected = draw_plainly(prior)
    assert torch.equal(expected, untouched) == (name in UNSEEN)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        drawn = generate(prior, vae, LABELS, seed=7, batch_size=3).codes
        again = generate(prior, vae, LABELS, seed=7).codes
    assert torch.equal(drawn, expected) and torch.equal(again, expected)
    assert not packed_calls
    (warning,) = caught
    assert text in str(warning.message) and "modules are called instead" in str(warning.message)
    assert warning.filename == __file__
    with pytest.raises(ValueError, match='precision: "int8" has packed weights alone and calls no modules, but prior'):
        generate(prior, vae, LABELS, precision="int8")


@pytest.mark.parametrize("name", ["hook on a block", "hook on the prior", "adapter on a linear layer", "a subclass"])
def test_a_changed_prior_is_guided_and_continued(vae: RQVAE, name: str) -> None:
    prior = CHANGES[name][0](make_prior(vae))
    expected = draw_plainly(prior, guidance=1.5)
    with pytest.warns(UserWarning, match="modules are called instead"):
        drawn = generate(prior, vae, LABELS, seed=7, cfg_scale=1.5)
    assert torch.equal(drawn.codes, expected)
    again = generate(prior, vae, LABELS, seed=7, cfg_scale=1.5, known=KnownRows(drawn.codes, 1))
    assert torch.equal(again.codes, expected)
    mask = torch.zeros(4, 4, dtype=torch.bool)
    mask[2:] = True
    assert edit(prior, vae, drawn.images, mask, LABELS).codes.shape == (8, *SHAPE)
    unconditional = generate(prior, vae, num=2, seed=7).codes
    codes = torch.zeros(2, *SHAPE, dtype=torch.int64)
    logits = prior(codes).logits[:, 0, 0, 0]
    first = rqkernels.reference.sample_logits(logits.detach(), seed=7, offset=0, stream=0)
    assert torch.equal(unconditional[:, 0, 0, 0], first)


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_hooks_on_all_modules(vae: RQVAE, untouched: Tensor, packed_calls: list[str], register: Any) -> None:
    def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any = None) -> Any:
        if isinstance(module, RQTransformer) and output is not None:
            return output._replace(logits=2 * output.logits)
        if isinstance(module, nn.LayerNorm):
            return (1.5 * inputs[0],) if output is None else 1.5 * output
        return None

    def pre_hook(module: nn.Module, inputs: tuple[Any, ...]) -> Any:
        return (inputs[0] + 0.5,) if isinstance(module, nn.Linear) else None

    prior = make_prior(vae)
    handle = register(hook if register is register_module_forward_hook else pre_hook)
    try:
        expected = draw_plainly(prior)
        with pytest.warns(UserWarning, match="torch calls a forward hook for all modules"):
            drawn = generate(prior, vae, LABELS, seed=7).codes
    finally:
        handle.remove()
    assert torch.equal(drawn, expected) and not torch.equal(drawn, untouched) and not packed_calls
    assert torch.equal(generate(prior, vae, LABELS, seed=7).codes, untouched) and packed_calls


@pytest.mark.parametrize(
    "patched",
    [(TransformerBlock, "forward"), (Transformer, "forward"), (nn.Linear, "forward"), (nn.Module, "__call__")],
)
def test_classes_that_were_patched(
    vae: RQVAE, monkeypatch: pytest.MonkeyPatch, packed_calls: list[str], patched: tuple[type, str]
) -> None:
    cls, name = patched
    prior, before = make_prior(vae), getattr(cls, name)

    def other(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        output = before(self, *args, **kwargs)
        return 1.1 * output if isinstance(output, Tensor) else output

    with monkeypatch.context() as patch:
        patch.setattr(cls, name, other)
        expected = draw_plainly(prior)
        with pytest.warns(UserWarning, match=f"its {name} from outside of the class"):
            drawn = generate(prior, vae, LABELS, seed=7).codes
    assert torch.equal(drawn, expected) and not packed_calls


@pytest.mark.parametrize(
    "layout",
    [
        {"spatial_embedding": "table", "depth_embedding": "table"},
        {"spatial_embedding": "table", "depth_embedding": "table", "shared_table": False, "depth_context": "previous"},
    ],
)
@pytest.mark.parametrize("change", [hooked("table"), replaced("table", lambda base: LoraEmbedding(base, W, W))])
def test_the_table_of_codes_is_called(vae: RQVAE, layout: dict[str, Any], change: Any) -> None:
    prior = make_prior(vae, **layout)
    before = draw_plainly(prior)
    expected = draw_plainly(change(prior))
    assert not torch.equal(expected, before)
    with pytest.warns(UserWarning, match=r"prior\.table "):
        assert torch.equal(generate(prior, vae, LABELS, seed=7).codes, expected)


def test_a_quantized_layer_is_called(vae: RQVAE, packed_calls: list[str]) -> None:
    """Its activations have one scale for all rows, so that codes depend on what is computed at once."""
    prior = make_prior(vae)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(prior, {nn.Linear}, torch.qint8)
    seen: list[int] = []
    quantized.spatial_transformer.blocks[0].mlp[0].register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match="is a torch.ao.nn.quantized.dynamic.*Linear and not a Linear"):
        drawn = generate(quantized, vae, LABELS, seed=7).codes
    assert len(seen) == 4 and not packed_calls
    assert (drawn == generate(prior, vae, LABELS, seed=7).codes).double().mean() > 0.5


def test_peft(vae: RQVAE, packed_calls: list[str]) -> None:
    peft = pytest.importorskip("peft")
    prior = make_prior(vae)
    config = peft.LoraConfig(r=4, target_modules=["qkv", "out", "mlp.0", "mlp.2"], init_lora_weights=False)
    adapted = peft.inject_adapter_in_model(config, prior).eval()
    with pytest.warns(UserWarning, match=r"is a peft\.tuners\.lora"):
        assert torch.equal(generate(adapted, vae, LABELS, seed=7).codes, draw_plainly(adapted))
    assert not packed_calls


def test_a_sharded_prior(vae: RQVAE, untouched: Tensor, packed_calls: list[str], tmp_path: Path) -> None:
    prior = make_prior(vae)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in prior.spatial_transformer.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(prior, mesh=mesh)
        with pytest.warns(UserWarning, match="prior has a forward hook"):
            assert torch.equal(generate(prior, vae, LABELS, seed=7).codes, untouched)
    finally:
        dist.destroy_process_group()
    assert not packed_calls


# --- what is no change


@pytest.fixture
def silent() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("error")
        yield


class Named(RQTransformer):
    """Nothing that is sampled from is another's."""

    def describe(self) -> str:
        return "mine"


def other_dropout(prior: RQTransformer) -> RQTransformer:
    for module in prior.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return prior


def backward_hook(prior: RQTransformer) -> RQTransformer:
    prior.classifier.register_full_backward_hook(lambda *_: None)
    return prior


def more_attributes(prior: RQTransformer) -> RQTransformer:
    prior.note, prior.metric = "trained on Tuesday", nn.Linear(2, 2)
    return prior


def own_method_on_the_instance(prior: RQTransformer) -> RQTransformer:
    for module in (prior, prior.classifier, prior.spatial_transformer.blocks[0]):
        module.forward = module.forward
    return prior


def tied(prior: RQTransformer) -> RQTransformer:
    blocks = prior.spatial_transformer.blocks
    blocks[1] = blocks[0]
    return prior


def other_weights(prior: RQTransformer) -> RQTransformer:
    prior.spatial_transformer.blocks[0].mlp[0] = nn.Linear(W, 4 * W)
    return prior


def no_hook_any_more(prior: RQTransformer) -> RQTransformer:
    prior.classifier.register_forward_hook(mixed).remove()
    return prior


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        as_class(Named),
        other_dropout,
        backward_hook,
        more_attributes,
        tied,
        own_method_on_the_instance,
        lambda prior: copy.deepcopy(own_method_on_the_instance(prior)),
        other_weights,
        no_hook_any_more,
        lambda prior: prior.requires_grad_(False),
    ],
)
@pytest.mark.usefixtures("silent")
def test_a_prior_that_its_weights_tell_all_about_is_packed(vae: RQVAE, packed_calls: list[str], change: Any) -> None:
    prior = change(make_prior(vae))
    drawn = generate(prior, vae, LABELS, seed=7).codes
    assert packed_calls.count("depth_decode") == packed_calls.count("transformer_step") == 4
    assert torch.equal(drawn, draw_plainly(prior))


@pytest.mark.usefixtures("silent")
def test_weights_of_several_dtypes_are_packed(vae: RQVAE, packed_calls: list[str]) -> None:
    prior = make_prior(vae)
    prior.spatial_transformer.half()
    prior.classifier.bfloat16()
    drawn = generate(prior, vae, LABELS, seed=7).codes
    assert packed_calls and torch.equal(drawn, draw_plainly(prior.float()))


def test_a_changed_prior_of_several_dtypes_is_drawn_from_in_float32(vae: RQVAE) -> None:
    prior = hooked("classifier")(make_prior(vae))
    prior.spatial_transformer.half()
    with pytest.warns(UserWarning, match="classifier has a forward hook"):
        drawn = generate(prior, vae, LABELS, seed=7).codes
    assert prior.spatial_transformer.blocks[0].mlp[0].weight.dtype == torch.float16
    assert torch.equal(drawn, draw_plainly(prior.float()))


def test_a_second_kind_of_change_is_said_too(vae: RQVAE) -> None:
    prior = make_prior(vae)
    handle = prior.classifier.register_forward_hook(mixed)
    with pytest.warns(UserWarning, match="classifier has a forward hook"):
        generate(prior, vae, LABELS, seed=7)
    handle.remove()
    replaced(f"{BLOCK}.mlp.1", lambda _: nn.ReLU())(prior)
    with pytest.warns(UserWarning, match="mlp.1 is a"):
        generate(prior, vae, LABELS, seed=7)


@pytest.mark.usefixtures("silent")
def test_the_random_generator_is_left_alone(vae: RQVAE) -> None:
    prior = make_prior(vae)
    state = torch.get_rng_state()
    generate(prior, vae, LABELS[:2], seed=7)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_changed_config_is_seen(vae: RQVAE) -> None:
    """The settings that stand in no weight."""
    prior = make_prior(vae)
    first = generate(prior, vae, LABELS, seed=7).codes
    prior.config.depth_context = "previous"
    second = generate(prior, vae, LABELS, seed=7).codes
    assert torch.equal(second, draw_plainly(prior)) and not torch.equal(first, second)


@pytest.mark.parametrize("name", ["hook on a block", "a subclass"])
def test_bfloat16_through_modules(vae: RQVAE, name: str) -> None:
    prior = CHANGES[name][0](make_prior(vae))
    dtypes = set()
    prior.classifier.norm.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    with pytest.warns(UserWarning, match="modules are called"):
        short = generate(prior, vae, LABELS, seed=7, precision="bf16").codes
    assert dtypes == {torch.bfloat16} and next(prior.parameters()).dtype == torch.float32
    # The first code of an image has the same inputs in both ways, a position alone and all at once.
    same = short == draw_plainly(copy.deepcopy(prior).bfloat16())
    assert same[:, 0, 0, 0].double().mean() > 0.9 and (name != "a subclass" or same.all())


def test_weights_without_values_are_refused(vae: RQVAE) -> None:
    prior = make_prior(vae)
    prior.depth_transformer.to("meta")
    with pytest.raises(ValueError, match=r"prior: depth_transformer\.\S+ is on the meta device and has no values"):
        generate(prior, vae, LABELS)
    prior = make_prior(vae)
    prior.classifier.double()
    with pytest.raises(TypeError, match=r"prior: expected weights of torch\.float32 .* got float64 \(classifier"):
        generate(prior, vae, LABELS)


def test_logits_that_are_not_numbers(vae: RQVAE) -> None:
    for change in (hooked("classifier", lambda m, i, o: o * torch.nan), as_class(Sharper)):
        prior = change(make_prior(vae))
        prior.classifier.norm.bias.data.fill_(torch.nan)
        with pytest.warns(UserWarning), pytest.raises(ValueError, match="NaN"):
            generate(prior, vae, LABELS, offset=5)


# --- the other callers


@pytest.mark.parametrize("name", ["hook on a block", "hook on the prior", "adapter on a linear layer"])
def test_precisions_of_a_changed_prior(vae: RQVAE, packed_calls: list[str], name: str) -> None:
    prior = CHANGES[name][0](make_prior(vae)).train()
    codes = torch.randint(0, K, (6, *SHAPE))
    with pytest.warns(UserWarning, match="modules are called"):
        effect = evaluate_precision(prior, codes, LABELS[:6], precision="bf16")
    assert prior.training and effect.weight_error == {} and not packed_calls
    with torch.no_grad():
        p, q = (
            model(codes, LABELS[:6]).logits.double().softmax(-1)
            for model in (prior.eval(), copy.deepcopy(prior).bfloat16())
        )
    expected = (p * (p / q).log()).sum(-1).mean(dim=(0, 1, 2))
    torch.testing.assert_close(torch.tensor(effect.kl, dtype=torch.float64), expected, rtol=0.05, atol=1e-7)
    with pytest.raises(ValueError, match='precision: "int8" has packed weights alone'):
        evaluate_precision(prior, codes, LABELS[:6], precision="int8")


def test_every_module_of_a_prior_is_known(vae: RQVAE) -> None:
    """A class without `as_written` would be a KeyError for whoever samples."""
    for layout in ({}, {"spatial_embedding": "table"}, {"spatial": TransformerConfig(2, 4, activation="quick_gelu")}):
        prior = make_prior(vae, **layout)
        assert find_change(prior, copy.deepcopy(prior), "prior") is None
        assert make_sampler(prior, Engine()).precision == "fp32"
