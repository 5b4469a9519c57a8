"""Published priors: the published code's results, tensor by tensor, and every option of their config."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

import rqkernels
from rqgen.convert import load_kakaobrain
from rqgen.convert.kakaobrain.rqtransformer import build_rqtransformer
from rqgen.models import RQVAE, RQTransformer, prior_loss
from rqgen.sampling import KnownRows, generate

TOLERANCE = 1e-4
PRIORS = {"rqtransformer-class": "rqvae-shared-8x8x4", "rqtransformer-text": "rqvae-separate-4x4x3"}
# Six small priors in layouts that the fixtures leave out, with what the published code computed: in one file,
# tensors as CASE/state/NAME, CASE/codes and so on, `arch` as JSON in the metadata.
LAYOUTS = Path(__file__).parents[2] / "data" / "rqtransformer" / "published_layouts.safetensors"


class Published:
    """A published prior and its tokenizer, loaded, with what the published code computed."""

    def __init__(self, root: Path, name: str) -> None:
        prior, vae = load_kakaobrain(root / name / "model.pt"), load_kakaobrain(root / PRIORS[name])
        assert isinstance(prior, RQTransformer) and isinstance(vae, RQVAE)
        self.prior, self.vae = prior, vae
        self.expected = load_file(root / name / "expected.safetensors")
        self.images = load_file(root / PRIORS[name] / "expected.safetensors")["xs"]
        with torch.no_grad():
            self.output = prior(self.expected["codes"], self.expected["cond"])

    def close(self, name: str, got: Tensor) -> None:
        torch.testing.assert_close(got.reshape(self.expected[name].shape), self.expected[name], atol=TOLERANCE, rtol=0)


@pytest.fixture(scope="module", params=list(PRIORS))
def published(request: pytest.FixtureRequest, kakaobrain: Path) -> Published:
    return Published(kakaobrain, request.param)


def test_logits(published: Published) -> None:
    published.close("logits", published.output.logits)
    if "cond_logits" in published.expected:
        published.close("cond_logits", published.output.condition_logits)
    else:
        assert published.output.condition_logits is None


def test_hard_losses(published: Published) -> None:
    loss = prior_loss(published.output, codes=published.expected["codes"], condition=published.expected["cond"])
    published.close("ce_loss", loss.codes)
    if "cond_loss" in published.expected:
        published.close("cond_loss", loss.condition)
        torch.testing.assert_close(loss.total, 0.9 * loss.codes + 0.1 * loss.condition)
    else:
        assert loss.condition is None and torch.equal(loss.total, loss.codes)


def test_soft_loss(kakaobrain: Path) -> None:
    published = Published(kakaobrain, "rqtransformer-class")
    vae = published.vae
    with torch.no_grad():
        latents = vae.encode_latents(published.images)
    search = rqkernels.residual_search(latents, vae.codebooks, 4, return_residuals=True)
    assert torch.equal(search.codes, published.expected["codes"])
    loss = prior_loss(published.output, residuals=search.residuals, codebooks=published.prior.codebooks, tau=0.5)
    published.close("soft_loss", loss.total)


def test_greedy_sampling(published: Published) -> None:
    drawn = generate(published.prior, published.vae, published.expected["cond"], top_k=1)
    assert torch.equal(drawn.codes, published.expected["greedy"])


def test_greedy_sampling_from_half(published: Published) -> None:
    codes = published.expected["codes"]
    drawn = generate(
        published.prior,
        published.vae,
        published.expected["cond"],
        top_k=1,
        known=KnownRows(codes, codes.shape[1] // 2),
    )
    assert torch.equal(drawn.codes, published.expected["greedy_from_half"])


# --- the layouts


class Layout:
    """One case of the layouts file."""

    def __init__(self, name: str) -> None:
        with safe_open(LAYOUTS, framework="pt") as file:
            self.arch = json.loads(file.metadata()[name])
            tensors = {
                key.removeprefix(f"{name}/"): file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118 (not a dictionary)
                if key.startswith(f"{name}/")
            }
        self.state = {key[6:]: tensor for key, tensor in tensors.items() if key.startswith("state/")}
        self.tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("state/")}
        self.codebooks = tensors.get("codebooks")

    def build(self) -> RQTransformer:
        return build_rqtransformer(self.arch, self.state, self.codebooks).eval()


LAYOUT_NAMES = {
    "unconditional-own-table": {"condition": "none", "shared_table": True, "depth_context": "previous"},
    "start-symbol-own-tables": {"condition": "none", "shared_table": False, "code_dim": 0},
    "table-in-codebook-out": {"condition": "class", "shared_codebook": False, "spatial_embedding": "table"},
    "codebook-in-shared-table-out": {"depth_embedding": "table", "shared_classifier": False},
    "previous-code-text": {"condition": "tokens", "depth_context": "previous"},
    "depth-one": {"condition": "class", "shared_classifier": True},
}


@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_layouts(name: str) -> None:
    layout = Layout(name)
    prior = layout.build()
    for field, value in LAYOUT_NAMES[name].items():
        assert getattr(prior.config, field) == value, field
    with torch.no_grad():
        output = prior(layout.tensors["codes"], layout.tensors.get("cond"))
    torch.testing.assert_close(output.logits, layout.tensors["logits"], atol=TOLERANCE, rtol=0)
    assert (output.condition_logits is None) == ("cond_logits" not in layout.tensors)
    if output.condition_logits is not None:
        torch.testing.assert_close(output.condition_logits, layout.tensors["cond_logits"], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_layouts_sample_greedily(name: str) -> None:
    layout = Layout(name)
    prior = layout.build()
    height, width, _ = prior.config.code_shape
    vae = tiny.rqvae(
        image_size=[height, width],
        base_channels=4,
        channel_multipliers=[1],
        norm_groups=2,
        embed_dim=prior.config.code_dim or 4,
        code_shape=prior.config.code_shape,
        quantizer={
            "codebook_size": prior.config.codebook_size,
            "shared_codebook": prior.config.shared_codebook,
        },
    )
    if prior.codebooks is not None:
        vae.quantizer.codebook.copy_(prior.codebooks)
    condition = layout.tensors.get("cond")
    drawn = generate(prior, vae, condition, 2 if condition is None else None, top_k=1)
    assert torch.equal(drawn.codes, layout.tensors["greedy"])


def test_a_prior_of_own_tables_keeps_the_codebooks_it_is_given() -> None:
    layout = Layout("start-symbol-own-tables")
    codebooks = torch.randn(2, 6, 5)
    prior = build_rqtransformer(layout.arch, layout.state, codebooks).eval()
    assert torch.equal(prior.codebooks, codebooks)
    with torch.no_grad():
        logits = prior(layout.tensors["codes"]).logits
    torch.testing.assert_close(logits, layout.tensors["logits"], atol=TOLERANCE, rtol=0)


def test_saved_in_our_format_and_read_back(tmp_path: Path) -> None:
    layout = Layout("table-in-codebook-out")
    prior = layout.build()
    prior.save_pretrained(tmp_path / "prior")
    again = RQTransformer.from_pretrained(tmp_path / "prior")
    assert again.config == prior.config
    codes, labels = layout.tensors["codes"], layout.tensors["cond"]
    assert torch.equal(again(codes, labels).logits, prior(codes, labels).logits)


def test_without_vocab_size_in_arch_the_data_section_has_it(kakaobrain: Path) -> None:
    config = yaml.safe_load((kakaobrain / "rqtransformer-class" / "config.yaml").read_text())
    assert "vocab_size" not in config["arch"] and config["dataset"]["vocab_size"] == 48
    prior = load_kakaobrain(kakaobrain / "rqtransformer-class")
    assert prior.config.codebook_size == 48


def test_dropouts_and_stacks_are_read() -> None:
    layout = Layout("depth-one")
    layout.arch |= {"embd_pdrop": 0.3, "ema": 0.999}
    layout.arch["body"]["block"] |= {"attn_pdrop": 0.2, "resid_pdrop": 0.4, "embed_dim": 8}
    config = layout.build().config
    assert config.embedding_dropout == 0.3
    assert (config.spatial.attention_dropout, config.spatial.residual_dropout) == (0.2, 0.4)
    assert (config.depth.attention_dropout, config.depth.residual_dropout) == (0.0, 0.1)
    assert (config.spatial.layers, config.depth.layers) == (2, 0)


@pytest.mark.parametrize("name", ["use_padding_emb", "scaled_head_emb_vqvae", "ar_hierarchy"])
def test_options_the_published_model_never_reads(name: str) -> None:
    layout = Layout("depth-one")
    layout.arch[name] = True
    with pytest.warns(UserWarning, match=f"arch.{name}: without effect"):
        prior = layout.build()
    with torch.no_grad():
        logits = prior(layout.tensors["codes"], layout.tensors["cond"]).logits
    torch.testing.assert_close(logits, layout.tensors["logits"], atol=TOLERANCE, rtol=0)


# --- what is refused


def changed(arch: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    arch = copy.deepcopy(arch)
    *sections, name = path.split(".")
    inner = arch
    for section in sections:
        inner = inner[section]
    if value is None:
        del inner[name]
    else:
        inner[name] = value
    return arch


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("cumsum_depth", True, "unknown key 'cumsum_depth'; did you mean 'cumsum_depth_ctx'"),
        ("body.block.heads", 2, "unknown key 'body.block.heads'"),
        ("type", "rq-vae", "arch.type: expected 'rq-transformer', got 'rq-vae'"),
        ("vocab_size", None, "'vocab_size' has no default"),
        ("body.n_layer", None, "n_layer' has no default"),
        ("head.block.n_head", None, "n_head' has no default"),
        ("vocab_size", "many", "arch.vocab_size: expected an integer >= 1, or one per depth"),
        ("vocab_size", [5], "arch.vocab_size: expected an integer >= 1, or one per depth"),
        ("vocab_size", [5, 5, 4], "arch.vocab_size: sizes that differ by depth are not supported"),
        ("vocab_size", 6, r"codebooks: arch expects \(6, C\) or \(3, 6, C\), got \(5, 6\)"),
        ("block_size", [2, 2], "arch.block_size: expected three integers >= 1"),
        ("block_size", [2, 0, 3], "arch.block_size: expected three integers >= 1"),
        ("body.block.gelu", "v3", "arch.body.block.gelu: expected one of v1, v2, got 'v3'"),
        ("head.block.embed_dim", 16, "arch.head.block.embed_dim: expected arch.embed_dim, 8, got 16"),
        ("input_embed_dim", 7, "arch.input_embed_dim: expected the codebooks' 6, got 7"),
        ("input_embed_dim", None, "arch.input_embed_dim: expected the codebooks' 6, got None"),
        ("vocab_size_cond", 1, None),
        ("body.block.n_head", 3, r"embed_dim: expected a multiple of spatial\.heads, 3, got 8"),
        ("block_size", [2, 3, 3], r"pos_emb_hw: expected shape \(1, 6, 8\), got \(1, 4, 8\)"),
        ("body.n_layer", 2, "missing body_transformer.blocks.1.ln1.weight"),
        ("head.n_layer", 0, "unknown head_transformer.blocks.0.attn.key.bias"),
        ("shared_cls_emb", True, r"classifier.linear.weight: expected shape \(5, 8\), got \(3, 8, 5\)"),
        ("shared_tok_emb", False, r"tok_emb.weight: expected shape \(15, 8\), got \(5, 8\)"),
        ("head_emb_vqvae", True, "missing head_mlp.weight"),
    ],
)
def test_refused_options(path: str, value: Any, message: str | None) -> None:
    layout = Layout("codebook-in-shared-table-out")
    layout.arch = changed(layout.arch, path, value)
    with pytest.raises(ValueError, match=message or "cond_emb.weight: expected shape"):
        layout.build()


def test_a_text_condition_needs_a_vocabulary() -> None:
    layout = Layout("previous-code-text")
    layout.arch["vocab_size_cond"] = 1
    with pytest.raises(ValueError, match="vocab_size_cond: expected > 1 for a condition of 3 tokens, got 1"):
        layout.build()


def test_codebooks_that_are_needed_and_missing() -> None:
    layout = Layout("codebook-in-shared-table-out")
    with pytest.raises(ValueError, match="codebooks: arch embeds codes with the tokenizer's codebooks"):
        build_rqtransformer(layout.arch, layout.state, None)


def test_codebooks_of_another_depth() -> None:
    layout = Layout("codebook-in-shared-table-out")
    with pytest.raises(ValueError, match=r"codebooks: arch expects \(5, C\) or \(3, 5, C\), got \(2, 5, 6\)"):
        build_rqtransformer(layout.arch, layout.state, torch.randn(2, 5, 6))


def test_offsets_of_another_order() -> None:
    layout = Layout("start-symbol-own-tables")
    layout.state["tok_emb.offsets"] = torch.tensor([6, 0])
    with pytest.raises(ValueError, match=r"tok_emb.offsets: expected multiples of vocab_size, got \[6, 0\]"):
        layout.build()


def test_a_stray_tensor() -> None:
    layout = Layout("depth-one")
    layout.state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match="tensors do not fit arch: unknown extra"):
        layout.build()
