from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import register_parametrization
from torch.utils._python_dispatch import TorchDispatchMode

from rqgen.config import from_dict, to_dict
from rqgen.inference.kv_cache import stack_caches
from rqgen.models import RQTransformer, RQTransformerConfig, RQTransformerOutput, SoftLabels, prior_loss
from rqgen.models.rqtransformer import CodeClassifier, PriorLoss
from rqgen.models.transformer import TransformerConfig

K, C, W = 7, 5, 12


def config(**settings: Any) -> RQTransformerConfig:
    sizes = {"code_shape": (2, 3, 3), "codebook_size": K, "code_dim": C, "embed_dim": W}
    stacks = {"spatial": TransformerConfig(layers=2, heads=2), "depth": TransformerConfig(layers=2, heads=3)}
    return tiny.rq_prior_config(**{**sizes, **stacks, **settings})


def make_prior(**settings: Any) -> RQTransformer:
    # Larger weights than the initial ones, so that a wrong input shows in the logits.
    return tiny.resample_weights(tiny.rq_prior(**vars(config(**settings))), std=0.4)


def make_codes(prior: RQTransformer, batch: int = 3) -> Tensor:
    return torch.randint(0, K, (batch, *prior.config.code_shape))


def make_condition(prior: RQTransformer, batch: int = 3) -> Tensor | None:
    if prior.config.condition == "none":
        return None
    return torch.randint(0, prior.config.condition_vocab_size, (batch, prior.config.condition_length))


CLASS = {"condition": "class", "condition_vocab_size": 4}
TOKENS = {"condition": "tokens", "condition_vocab_size": 6, "condition_length": 3}
TABLES = {"spatial_embedding": "table", "depth_embedding": "table"}
LAYOUTS = [
    pytest.param({}, id="unconditional"),
    pytest.param(CLASS, id="class"),
    pytest.param(TOKENS, id="tokens"),
    pytest.param({"shared_codebook": False, "shared_classifier": False}, id="all-per-depth"),
    pytest.param({**TABLES, "code_dim": 0}, id="shared-table"),
    pytest.param({**TABLES, "shared_table": False, "depth_context": "previous"}, id="tables-previous"),
    pytest.param({"spatial_embedding": "table", "depth_context": "previous"}, id="table-then-codebook"),
    pytest.param({"depth_embedding": "table", "shared_codebook": False}, id="codebook-then-table"),
    pytest.param({"code_shape": (3, 2, 1), "depth": TransformerConfig(layers=0, heads=1)}, id="depth-one"),
    pytest.param({**CLASS, "code_shape": (1, 1, 4)}, id="one-position"),
]


def vector(prior: RQTransformer, kind: str, code: Tensor, d: int) -> Tensor:
    """e(S_td) of one code, looked up in the plainest way."""
    if kind == "codebook":
        return (prior.codebooks if prior.config.shared_codebook else prior.codebooks[d])[code]
    rows = prior.table.weight if prior.config.shared_table else prior.table.weight[d * K : (d + 1) * K]
    return rows[code]


def logits_by_the_equations(prior: RQTransformer, codes: Tensor, condition: Tensor | None) -> Tensor:
    """Equations (8)-(13), one position and one depth after the other."""
    settings, batch = prior.config, codes.shape[0]
    height, width, depth = settings.code_shape
    stacks = codes.reshape(batch, height * width, depth)
    ids = torch.zeros(batch, 1, dtype=torch.int64) if condition is None else condition.reshape(batch, -1)
    u = [prior.condition_embedding(ids[:, i]) + prior.condition_positions[i] for i in range(ids.shape[1])]
    for t in range(1, height * width):
        e = sum(vector(prior, settings.spatial_embedding, stacks[:, t - 1, d], d) for d in range(depth))
        e = prior.spatial_projection(e) if settings.spatial_embedding == "codebook" else e
        u.append(e + prior.spatial_positions[t - 1])
    h = prior.spatial_transformer(torch.stack(u, dim=1))[:, ids.shape[1] - 1 :]
    rows = []
    for t in range(height * width):
        v = [h[:, t] + prior.depth_positions[0]]
        for d in range(1, depth):
            first = 0 if settings.depth_context == "cumulative" else d - 1
            e = sum(vector(prior, settings.depth_embedding, stacks[:, t, i], i) for i in range(first, d))
            e = prior.depth_projection(e) if settings.depth_embedding == "codebook" else e
            v.append(e + prior.depth_positions[d])
        states = prior.classifier.norm(prior.depth_transformer(torch.stack(v, dim=1)))
        per_depth = []
        for d in range(depth):
            shared = settings.shared_classifier
            weight = prior.classifier.weight if shared else prior.classifier.weight[d]
            bias = prior.classifier.bias if shared else prior.classifier.bias[d]
            per_depth.append(states[:, d] @ weight.T + bias)
        rows.append(torch.stack(per_depth, dim=1))
    return torch.stack(rows, dim=1).reshape(*codes.shape, K)


@pytest.mark.parametrize("settings", LAYOUTS)
def test_logits_follow_the_equations(settings: dict[str, Any]) -> None:
    prior = make_prior(**settings)
    codes, condition = make_codes(prior), make_condition(prior)
    output = prior(codes, condition)
    torch.testing.assert_close(output.logits, logits_by_the_equations(prior, codes, condition), atol=1e-4, rtol=1e-4)
    assert output.logits.shape == (*codes.shape, K) and output.condition_dropped is None
    assert (output.condition_logits is not None) == (prior.config.condition == "tokens")


@pytest.mark.parametrize("settings", LAYOUTS)
def test_stacks_drawn_with_caches_see_the_same_logits(settings: dict[str, Any]) -> None:
    prior = make_prior(**settings)
    codes, condition = make_codes(prior), make_condition(prior)
    expected = prior(codes, condition).logits.reshape(3, prior.positions, prior.depth, K)
    stacks = codes.reshape(3, prior.positions, prior.depth)
    spatial_cache, depth_cache = stack_caches(prior, 3)
    outputs = prior.spatial_outputs(stacks[:, :0], prior.condition_ids(condition, 3), spatial_cache)
    for t in range(prior.positions):

        def draw(logits: Tensor, d: int, t: int = t) -> Tensor:
            torch.testing.assert_close(logits, expected[:, t, d], atol=1e-4, rtol=1e-4)
            return stacks[:, t, d]

        assert torch.equal(prior.sample_stack(outputs[:, -1], draw, depth_cache), stacks[:, t])
        if t + 1 < prior.positions:
            outputs = prior.spatial_outputs(stacks[:, t : t + 1], cache=spatial_cache)
    assert spatial_cache.length == spatial_cache.capacity == prior.config.condition_length + prior.positions - 1
    assert depth_cache.length == prior.depth


def test_a_code_depends_on_those_before_it_alone() -> None:
    prior = make_prior()
    codes = make_codes(prior, batch=1)
    before = prior(codes).logits.reshape(18, K)
    for place in range(18):
        changed = codes.flatten().clone()
        changed[place] = (changed[place] + 1) % K
        after = prior(changed.view_as(codes)).logits.reshape(18, K)
        same = (after - before).abs().amax(-1) < 1e-5
        assert same[: place + 1].all()
        assert not same[place + 1 :].any()


def test_condition_tokens_are_predicted_from_those_before_them() -> None:
    prior = make_prior(**TOKENS)
    codes, tokens = make_codes(prior), make_condition(prior)
    before = prior(codes, tokens).condition_logits
    assert before.shape == (3, 2, 6)
    changed = tokens.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 6
    after = prior(codes, changed).condition_logits
    torch.testing.assert_close(after[:, 0], before[:, 0])
    assert ((after - before)[:, 1].abs().amax(-1) > 1e-3).all()


def test_labels_may_have_one_or_two_dimensions() -> None:
    prior = make_prior(**CLASS)
    codes, labels = make_codes(prior), torch.tensor([3, 0, 2])
    assert torch.equal(prior(codes, labels).logits, prior(codes, labels[:, None]).logits)
    other = prior(codes, torch.tensor([2, 0, 2])).logits
    assert not torch.allclose(other[0], prior(codes, labels).logits[0])


@pytest.mark.parametrize("kind", [CLASS, TOKENS], ids=["class", "tokens"])
def test_label_dropout(kind: dict[str, Any]) -> None:
    still = TransformerConfig(layers=1, heads=2, residual_dropout=0.0)
    prior = make_prior(**kind, condition_dropout=0.5, spatial=still, depth=still)
    codes, condition = make_codes(prior, batch=64), make_condition(prior, batch=64)
    kept, null = prior(codes, condition), prior(codes)
    assert kept.condition_dropped is None and null.condition_logits is None
    prior.train()
    output = prior(codes, condition)
    dropped = output.condition_dropped
    assert 10 < dropped.sum() < 54
    expected = torch.where(dropped[:, None, None, None, None], null.logits, kept.logits)
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=1e-4)
    torch.manual_seed(5)
    first = prior(codes, condition).condition_dropped
    torch.manual_seed(5)
    assert torch.equal(prior(codes, condition).condition_dropped, first)


def test_the_null_condition_is_learned() -> None:
    prior = make_prior(**CLASS, condition_dropout=0.1)
    prior(make_codes(prior)).logits.sum().backward()
    touched = prior.condition_embedding.weight.grad.abs().sum(-1) > 0
    assert touched.tolist() == [False] * 4 + [True]


def test_logits_are_float32_under_autocast() -> None:
    prior = make_prior(**TOKENS, shared_classifier=False)
    codes, tokens = make_codes(prior), make_condition(prior)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = prior(codes, tokens)
        spatial_cache, _ = stack_caches(prior, 3)
        prior.spatial_outputs(codes.reshape(3, 6, 3)[:, :1], prior.condition_ids(tokens, 3), spatial_cache)
    assert output.logits.dtype == output.condition_logits.dtype == torch.float32
    assert spatial_cache.keys.dtype == torch.bfloat16
    assert (output.logits - prior(codes, tokens).logits).abs().max() < 1


def test_dropout_of_embeddings() -> None:
    still = TransformerConfig(layers=1, heads=2, residual_dropout=0.0)
    prior = make_prior(embedding_dropout=0.5, spatial=still, depth=still)
    codes = make_codes(prior)
    assert torch.equal(prior(codes).logits, prior(codes).logits)
    prior.train()
    assert not torch.equal(prior(codes).logits, prior(codes).logits)


def test_initial_weights() -> None:
    prior = RQTransformer(config(embed_dim=240, shared_classifier=False, **TOKENS, depth_embedding="table"))
    for name, parameter in prior.named_parameters():
        if "norm" in name or name == "condition_classifier.0.weight":
            assert parameter.unique().tolist() == [1.0 if name.endswith("weight") else 0.0], name
        elif name.endswith("bias"):
            assert parameter.abs().max() == 0, name
        else:
            assert 0.015 < parameter.std() < 0.025, name


def test_a_prior_learns_a_batch() -> None:
    torch.manual_seed(1)
    one = TransformerConfig(layers=1, heads=2, residual_dropout=0.0)
    prior = RQTransformer(
        config(code_shape=(1, 2, 3), embed_dim=24, spatial=one, depth=one, **CLASS), torch.randn(K, C)
    )
    codes, labels = make_codes(prior, batch=4), torch.arange(4)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=2e-2)
    losses = []
    for _ in range(80):
        loss = prior_loss(prior(codes, labels), codes=codes).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.8 and losses[-1] < 0.3


# --- codebooks


def test_codebooks_are_a_buffer_saved_with_the_model(tmp_path: Path) -> None:
    prior = make_prior(**CLASS, condition_dropout=0.2, shared_codebook=False)
    assert "codebooks" not in dict(prior.named_parameters())
    prior.save_pretrained(tmp_path / "prior")
    again = RQTransformer.from_pretrained(tmp_path / "prior")
    assert again.config == prior.config and torch.equal(again.codebooks, prior.codebooks)
    codes, labels = make_codes(prior), make_condition(prior)
    assert torch.equal(again(codes, labels).logits, prior(codes, labels).logits)


def test_a_prior_waits_for_its_codebooks() -> None:
    prior = RQTransformer(config())
    codes = make_codes(prior)
    with pytest.raises(ValueError, match="no codebooks yet; call set_codebooks"):
        prior(codes)
    prior.set_codebooks(torch.randn(K, C))
    assert torch.isfinite(prior(codes).logits).all()


def test_wrong_codebooks() -> None:
    with pytest.raises(ValueError, match=r"codebooks: expected shape \(7, 5\), got \(3, 7, 5\)"):
        RQTransformer(config(), torch.randn(3, K, C))
    with pytest.raises(ValueError, match="codebooks: expected finite values, got NaN or infinity"):
        RQTransformer(config(), torch.full((K, C), torch.inf))
    with pytest.raises(ValueError, match="expected none, as this prior carries no codebooks"):
        RQTransformer(config(**TABLES, code_dim=0)).set_codebooks(torch.randn(K, C))


# --- arguments of forward


@pytest.mark.parametrize(
    ("codes", "error", "message"),
    [
        ([[1]], TypeError, "codes: expected a tensor, got list"),
        (torch.zeros(2, 2, 3, 3), TypeError, "codes: expected int64, got torch.float32"),
        (torch.zeros(2, 3, 2, 3, dtype=torch.int64), ValueError, r"codes: expected shape \(B, 2, 3, 3\)"),
        (torch.zeros(2, 3, 3, dtype=torch.int64), ValueError, r"codes: expected shape \(B, 2, 3, 3\)"),
        (torch.full((1, 2, 3, 3), K), IndexError, r"codes: expected values in \[0, 7\), got 7"),
        (torch.full((1, 2, 3, 3), -1), IndexError, r"codes: expected values in \[0, 7\), got -1"),
    ],
)
def test_wrong_codes(codes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_prior()(codes)


@pytest.mark.parametrize(
    ("settings", "condition", "error", "message"),
    [
        ({}, torch.tensor([0, 0]), ValueError, "condition: this prior is unconditional"),
        (CLASS, None, ValueError, "condition: this prior needs one"),
        (CLASS, [0, 1], TypeError, "condition: expected a tensor, got list"),
        (CLASS, torch.zeros(2), TypeError, "condition: expected int64, got torch.float32"),
        (CLASS, torch.tensor([0, 1, 2]), ValueError, r"condition: expected shape \(2,\) or \(2, 1\), got \(3,\)"),
        (CLASS, torch.tensor([0, 4]), IndexError, r"condition: expected values in \[0, 4\), got 4"),
        (CLASS, torch.tensor([0, -1]), IndexError, r"condition: expected values in \[0, 4\), got -1"),
        (TOKENS, torch.zeros(2, 2).long(), ValueError, r"condition: expected shape \(2, 3\), got \(2, 2\)"),
        (TOKENS, torch.zeros(2).long(), ValueError, r"condition: expected shape \(2, 3\), got \(2,\)"),
    ],
)
def test_wrong_conditions(settings: dict[str, Any], condition: Any, error: type[Exception], message: str) -> None:
    prior = make_prior(**settings)
    with pytest.raises(error, match=message):
        prior(make_codes(prior, batch=2), condition)


def test_the_null_label_is_nobodys_to_pass() -> None:
    prior = make_prior(**CLASS, condition_dropout=0.1)
    with pytest.raises(IndexError, match="got 4"):
        prior(make_codes(prior, batch=1), torch.tensor([4]))


def test_another_device() -> None:
    prior = make_prior(**CLASS)
    with pytest.raises(ValueError, match="codes: expected on cpu, where the prior is, got meta"):
        prior(make_codes(prior).to("meta"), torch.zeros(3).long())
    with pytest.raises(ValueError, match="condition: expected on cpu"):
        prior(make_codes(prior), torch.zeros(3, dtype=torch.int64, device="meta"))


# --- the loss


def test_hard_loss() -> None:
    prior = make_prior()
    codes = make_codes(prior)
    logits = prior(codes).logits
    loss = prior_loss(RQTransformerOutput(logits), codes=codes)
    expected = F.cross_entropy(logits.reshape(-1, K), codes.flatten(), reduction="none").view(-1, 3)
    torch.testing.assert_close(loss.total, expected.mean())
    torch.testing.assert_close(loss.per_depth, expected.mean(0))
    assert loss.condition is None and loss.total.requires_grad


@pytest.mark.parametrize("books", [(), (3,)], ids=["shared", "per-depth"])
def test_soft_loss(books: tuple[int, ...]) -> None:
    logits = torch.randn(2, 2, 3, 3, K, requires_grad=True)
    residuals, codebooks = torch.randn(2, 2, 3, 3, C), torch.randn(*books, K, C)
    loss = prior_loss(RQTransformerOutput(logits), residuals=residuals, codebooks=codebooks, tau=0.7)
    distances = (residuals[..., None, :] - codebooks).square().sum(-1)
    labels = (-distances / 0.7).softmax(-1)
    expected = -(labels * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(loss.total, expected.mean())
    torch.testing.assert_close(loss.per_depth, expected.mean((0, 1, 2)).detach())
    (gradient,) = torch.autograd.grad(loss.total, logits)
    torch.testing.assert_close(gradient, (logits.softmax(-1) - labels) / labels[..., 0].numel())


SOFT_LAYOUTS = [
    {},
    TOKENS,
    {**CLASS, "condition_dropout": 0.5, "embedding_dropout": 0.2},
    {"shared_codebook": False},
    {"shared_classifier": False},
    {"shared_codebook": False, "shared_classifier": False},
]


def soft_labels(prior: RQTransformer, batch: int = 3) -> SoftLabels:
    return SoftLabels(torch.randn(batch, *prior.config.code_shape, C), prior.codebooks, 0.7)


def loss_and_gradients(prior: RQTransformer, loss: PriorLoss) -> tuple[Tensor, ...]:
    parameters = [p for p in prior.parameters() if p.requires_grad]
    return (*loss, *torch.autograd.grad(loss.total, parameters, allow_unused=True))


@pytest.mark.parametrize("settings", SOFT_LAYOUTS)
def test_soft_labels_in_the_call_give_the_loss_without_logits(settings: dict[str, Any]) -> None:
    """Few rows at a time, and the loss, its terms and every gradient are those of whole logits."""
    prior = make_prior(**settings).train()
    codes, condition, labels = make_codes(prior), make_condition(prior), soft_labels(prior)
    given = {"condition": condition} if prior.config.condition == "tokens" else {}
    results = []
    for whole in (True, False):
        torch.manual_seed(1)
        if whole:
            loss = prior_loss(prior(codes, condition), **labels._asdict(), **given)
        else:
            output = prior(codes, condition, labels)
            assert output.logits is None
            loss = prior_loss(output, **given)
        assert loss.total.requires_grad and not loss.per_depth.requires_grad
        results.append(loss_and_gradients(prior, loss))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_soft_labels_in_the_call_never_make_an_array_of_codes_times_k(
    shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In forward and backward, with a budget of two rows of logits; whole logits would be 54."""
    prior = make_prior(shared_classifier=shared)
    codes, labels = make_codes(prior), soft_labels(prior)
    monkeypatch.setattr("rqkernels.ops.soft_label._LOGITS_BUDGET", 2 * K * 4)
    rows = []
    loss = torch.ops.rqkernels.soft_label_cross_entropy_
    monkeypatch.setattr(
        torch.ops.rqkernels,
        "soft_label_cross_entropy_",
        lambda logits, *a: rows.append(len(logits)) or loss(logits, *a),
    )
    prior_loss(prior(codes, None, labels)).total.backward()
    assert sum(rows) == codes.numel() and max(rows) == 2


def test_the_loss_in_place_of_the_logits() -> None:
    prior = make_prior()
    codes, labels = make_codes(prior), soft_labels(prior)
    expected = loss_and_gradients(prior, prior_loss(prior(codes), **labels._asdict()))
    logits = prior(codes).logits
    before, address = logits.detach().clone(), logits.data_ptr()
    loss = prior_loss(RQTransformerOutput(logits), **labels._asdict(), inplace=True)
    for got, wanted in zip(loss_and_gradients(prior, loss), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    label = (-(labels.residuals[..., None, :] - prior.codebooks).square().sum(-1) / 0.7).softmax(-1)
    assert logits.data_ptr() == address
    torch.testing.assert_close(logits.detach(), (before.softmax(-1) - label) / codes.numel())


class CountTensors(TorchDispatchMode):
    """Counts the tensors of `numel` elements, without views, that are made."""

    def __init__(self, numel: int) -> None:
        super().__init__()
        self.numel, self.count = numel, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, list | tuple) else [result]:
            self.count += isinstance(tensor, Tensor) and tensor.numel() >= self.numel and not func.is_view
        return result


@pytest.mark.parametrize(("inplace", "expected"), [(False, 1), (True, 0)])
def test_the_gradient_of_soft_labels_is_written_once(inplace: bool, expected: int) -> None:
    leaf = torch.randn(2, 2, 3, 3, 64, requires_grad=True)
    logits, labels = leaf * 1, SoftLabels(torch.randn(2, 2, 3, 3, C), torch.randn(64, C), 0.7)
    with CountTensors(leaf.numel()) as large:
        loss = prior_loss(RQTransformerOutput(logits), **labels._asdict(), inplace=inplace)
        torch.autograd.grad(loss.total, logits)
    assert large.count == expected


@pytest.mark.parametrize("find_unused", [False, True])
def test_the_loss_in_the_call_through_distributed_data_parallel(find_unused: bool, tmp_path: Path) -> None:
    """One process; with the search for unused parameters, one that is used outside of the call would be an error."""
    prior = make_prior()
    codes, labels = make_codes(prior), soft_labels(prior)
    expected = loss_and_gradients(prior, prior_loss(prior(codes, None, labels)))[4:]
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(prior, find_unused_parameters=find_unused)
        prior_loss(wrapped(codes, None, labels)).total.backward()
    finally:
        dist.destroy_process_group()
    for parameter, gradient in zip(prior.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, gradient)


class OtherClassifier(nn.Module):
    def __init__(self, inner: CodeClassifier) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, d: int | None = None) -> Tensor:
        return 2 * self.inner(x, d)


class LouderClassifier(CodeClassifier):
    def forward(self, x: Tensor, d: int | None = None) -> Tensor:
        return 2 * super().forward(x, d)


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


def double_on_the_instance(prior: RQTransformer) -> None:
    forward = prior.classifier.forward
    prior.classifier.forward = lambda x, d=None: 2 * forward(x, d)


def double_by_class(prior: RQTransformer) -> None:
    state = prior.classifier.state_dict()
    prior.classifier = LouderClassifier(W, K, 3, True)
    prior.classifier.load_state_dict(state)


def double_for_all(prior: RQTransformer) -> Any:
    return register_module_forward_hook(
        lambda module, inputs, output: 2 * output if isinstance(module, CodeClassifier) else None
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda prior: prior.classifier.register_forward_hook(lambda module, inputs, output: 2 * output),
        lambda prior: prior.classifier.register_forward_pre_hook(lambda module, inputs: (inputs[0].roll(1, -1),)),
        lambda prior: setattr(prior, "classifier", OtherClassifier(prior.classifier)),
        double_on_the_instance,
        double_by_class,
        double_for_all,
        lambda prior: register_parametrization(prior.classifier, "weight", Half()),
        lambda prior: prior.classifier.norm.register_forward_hook(lambda module, inputs, output: output.roll(1, -1)),
    ],
)
def test_the_loss_in_the_call_is_that_of_the_classifier_as_it_is(change: Any) -> None:
    prior = make_prior()
    codes, labels = make_codes(prior), soft_labels(prior)
    before = prior_loss(prior(codes, None, labels)).total
    handle = change(prior)
    try:
        whole, fused = prior(codes), prior(codes, None, labels)
    finally:
        if change is double_for_all:
            handle.remove()
    assert fused.logits is None
    expected = loss_and_gradients(prior, prior_loss(whole, **labels._asdict()))
    got = loss_and_gradients(prior, prior_loss(fused))
    assert not torch.isclose(expected[0], before, rtol=1e-3)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_a_classifier_whose_class_was_patched_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    prior, forward = make_prior(), CodeClassifier.forward
    codes, labels = make_codes(prior), soft_labels(prior)
    monkeypatch.setattr(CodeClassifier, "forward", lambda self, x, d=None: 2 * forward(self, x, d))
    expected = prior_loss(prior(codes), **labels._asdict()).total
    torch.testing.assert_close(prior_loss(prior(codes, None, labels)).total, expected)


def test_the_loss_in_the_call_compiled_in_one_graph() -> None:
    prior = make_prior(spatial=TransformerConfig(layers=1, heads=2), depth=TransformerConfig(layers=1, heads=2))
    codes, labels = make_codes(prior), soft_labels(prior)
    compiled = torch.compile(prior, fullgraph=True, backend="aot_eager")
    results = [loss_and_gradients(prior, prior_loss(call(codes, None, labels))) for call in (prior, compiled)]
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_the_loss_in_the_call_under_autocast() -> None:
    prior = make_prior()
    codes, labels = make_codes(prior), soft_labels(prior)
    with torch.autocast("cpu", torch.bfloat16):
        whole = prior_loss(prior(codes), **labels._asdict())
        fused = prior_loss(prior(codes, None, labels))
    assert fused.total.dtype == fused.per_depth.dtype == torch.float32
    torch.testing.assert_close(fused.total, whole.total, rtol=1e-5, atol=0)
    gradients = (torch.autograd.grad(loss.total, prior.classifier.weight)[0] for loss in (fused, whole))
    torch.testing.assert_close(*gradients, rtol=0, atol=0.01 * whole.total.item())


def test_condition_loss_leaves_dropped_rows_out() -> None:
    logits, tokens = torch.randn(3, 2, 6), torch.randint(0, 6, (3, 3))
    codes = torch.randint(0, K, (3, 2, 3, 3))
    output = RQTransformerOutput(torch.randn(3, 2, 3, 3, K), logits)
    rows = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none").mean(1)
    loss = prior_loss(output, codes=codes, condition=tokens)
    torch.testing.assert_close(loss.condition, rows.mean())
    torch.testing.assert_close(loss.total, 0.9 * loss.codes + 0.1 * rows.mean())
    dropped = torch.tensor([False, True, False])
    loss = prior_loss(output._replace(condition_dropped=dropped), codes=codes, condition=tokens, condition_weight=0.5)
    torch.testing.assert_close(loss.condition, rows[[0, 2]].mean())
    torch.testing.assert_close(loss.total, 0.5 * loss.codes + 0.5 * loss.condition)
    everything = output._replace(condition_dropped=torch.ones(3, dtype=torch.bool))
    assert prior_loss(everything, codes=codes, condition=tokens).condition == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "expected either codes, or residuals"),
        ({"codes": True, "residuals": True, "codebooks": True, "tau": 1.0}, "expected either codes, or residuals"),
        ({"codes": True, "tau": 1.0}, "expected either codes, or residuals"),
        ({"residuals": True, "tau": 1.0}, "expected either codes, or residuals"),
        ({"residuals": True, "codebooks": True}, "expected either codes, or residuals"),
        ({"residuals": True, "codebooks": True, "tau": 0.0}, "tau must be > 0, got 0"),
        ({"codes": torch.zeros(1, 2, 3, 3).long()}, r"codes: expected shape \(3, 2, 3, 3\), got \(1, 2, 3, 3\)"),
        ({"codes": True}, "condition: expected token ids, as the output has condition_logits"),
        ({"codes": True, "condition": torch.zeros(3, 2).long()}, r"condition: expected shape \(3, 3\), got \(3, 2\)"),
        ({"codes": True, "condition_weight": 1.5}, r"condition_weight: expected a number in \[0, 1\], got 1.5"),
        ({"codes": True, "inplace": True}, "inplace: expected False with codes"),
    ],
)
def test_wrong_arguments_of_the_loss(arguments: dict[str, Any], message: str) -> None:
    given = {
        "codes": torch.zeros(3, 2, 3, 3, dtype=torch.int64),
        "residuals": torch.randn(3, 2, 3, 3, C),
        "codebooks": torch.randn(K, C),
    }
    output = RQTransformerOutput(torch.randn(3, 2, 3, 3, K), torch.randn(3, 2, 6))
    arguments = {name: given.get(name, True) if value is True else value for name, value in arguments.items()}
    with pytest.raises(ValueError, match=message):
        prior_loss(output, **arguments)


def test_targets_of_the_loss_are_codes_in_range() -> None:
    output = RQTransformerOutput(torch.randn(3, 2, 3, 3, K), torch.randn(3, 2, 6))
    codes, tokens = torch.zeros(3, 2, 3, 3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64)
    prior_loss(output, codes=codes, condition=tokens)
    for wrong in (-1, K):
        with pytest.raises(IndexError, match=rf"codes: expected values in \[0, {K}\), got {wrong}"):
            prior_loss(output, codes=codes.index_fill(0, torch.tensor(1), wrong), condition=tokens)
    for wrong in (-1, 6):
        with pytest.raises(IndexError, match=rf"condition: expected values in \[0, 6\), got {wrong}"):
            prior_loss(output, codes=codes, condition=tokens.index_fill(0, torch.tensor(1), wrong))
    for dtype in (torch.float32, torch.int32, torch.bool):
        with pytest.raises(TypeError, match=f"codes: expected int64, got {dtype}"):
            prior_loss(output, codes=codes.to(dtype), condition=tokens)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(TypeError, match=f"condition: expected int64, got {dtype}"):
            prior_loss(output, codes=codes, condition=tokens.to(dtype))


@pytest.mark.parametrize("arguments", [{"codes": torch.zeros(3, 2, 3, 3).long()}, {"tau": 0.7}, {"inplace": True}])
def test_labels_are_given_once(arguments: dict[str, Any]) -> None:
    prior = make_prior()
    output = prior(make_codes(prior), None, soft_labels(prior))
    with pytest.raises(ValueError, match="expected neither labels nor inplace, as the output holds the loss"):
        prior_loss(output, **arguments)


def test_residuals_of_another_shape() -> None:
    prior = make_prior()
    with pytest.raises(ValueError, match=r"soft_labels\.residuals: expected shape \(3, 2, 3, 3, C\), got \(2, 2, 3, 3"):
        prior(make_codes(prior), None, soft_labels(prior, 2))


# --- the config


def test_a_config_survives_plain_data() -> None:
    made = config(**TOKENS, condition_dropout=0.25, code_shape=[2, 3, 3])
    assert made.code_shape == (2, 3, 3)
    assert from_dict(RQTransformerConfig, to_dict(made), where="test") == made


@pytest.mark.parametrize(
    ("name", "depth", "expected"),
    [
        ("90M", 4, (512, 24, 4, 8)),
        ("350M", 4, (1024, 24, 4, 16)),
        ("480M", 4, (1536, 12, 4, 24)),
        ("800M", 4, (1536, 24, 4, 24)),
        ("1.4B", 4, (1536, 42, 6, 24)),
        ("1.4B", 1, (1536, 48, 0, 24)),
    ],
)
def test_presets(name: str, depth: int, expected: tuple[int, ...]) -> None:
    made = RQTransformerConfig.preset(
        name, code_shape=(8, 8, depth), codebook_size=16384, code_dim=256, condition_dropout=0.1, **CLASS
    )
    assert (made.embed_dim, made.spatial.layers, made.depth.layers, made.spatial.heads) == expected
    assert made.depth.heads == made.spatial.heads and made.condition == "class" and made.has_null_condition
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in RQTransformer(made).parameters())
    assert 0.95 < count / {"90M": 97e6, "350M": 371e6, "480M": 481e6, "800M": 821e6, "1.4B": 1387e6}[name] < 1.05


def test_wrong_presets() -> None:
    sizes = {"code_shape": (8, 8, 4), "codebook_size": 16, "code_dim": 4}
    with pytest.raises(ValueError, match=r"name: expected one of 90M, 350M, .*, got '3B'"):
        RQTransformerConfig.preset("3B", **sizes)
    with pytest.raises(ValueError, match="embed_dim: decided by preset '90M'"):
        RQTransformerConfig.preset("90M", **sizes, embed_dim=64)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"code_shape": (2, 3)}, r"code_shape: expected a list of 3 values, got \[2, 3\]"),
        ({"code_shape": (2, 0, 3)}, "code_shape: expected three numbers"),
        ({"codebook_size": 0}, "codebook_size: expected a number >= 1, got 0"),
        ({"code_dim": -1}, "code_dim: expected a number >= 0, got -1"),
        ({"code_dim": 0}, 'code_dim: expected that of the codebooks where an embedding is "codebook"'),
        ({"embed_dim": 0}, "embed_dim: expected a number >= 1"),
        ({"embed_dim": 13}, r"embed_dim: expected a multiple of spatial\.heads, 2, got 13"),
        ({"spatial_embedding": "codes"}, "spatial_embedding: expected one of codebook, table, got 'codes'"),
        ({"depth_embedding": "codes"}, "depth_embedding: expected one of"),
        ({"depth_context": "all"}, "depth_context: expected one of cumulative, previous, got 'all'"),
        ({"condition": "text"}, "condition: expected one of none, class, tokens, got 'text'"),
        ({"condition_vocab_size": 3}, 'condition is "none"'),
        ({"condition_dropout": 0.1}, 'condition is "none"'),
        ({**CLASS, "condition_vocab_size": 0}, "condition_vocab_size: expected a number >= 1"),
        ({**CLASS, "condition_length": 2}, 'condition_length: expected 1 where condition is "class"'),
        ({**TOKENS, "condition_length": 1}, 'condition_length: expected a number >= 2 where condition is "tokens"'),
        ({**CLASS, "condition_dropout": 1.0}, "condition_dropout: expected a number in"),
        ({"embedding_dropout": -0.5}, "embedding_dropout: expected a number in"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**settings)
