"""The README's Python examples run, and say what their comments promise."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rqgen import RQVAE, RQTransformer, RQTransformerConfig, RQVAEConfig
from rqgen.models.transformer import TransformerConfig
from rqgen.quantizers import QuantizerConfig

README = Path(__file__).resolve().parent.parent / "README.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)


def promised(block: str) -> list[str]:
    """The output that the comments behind `print` give, up to a colon, comma or the end."""
    return re.findall(r"^print\(.*\)\s+# (torch\.Size\(\[[\d, ]+\]\))", block, re.MULTILINE)


@pytest.fixture
def demo_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained models of the demo's shapes, where the demo would have put them."""
    quantizer = QuantizerConfig(codebook_size=32, depth=4, init="random")
    vae = RQVAE(
        RQVAEConfig(
            image_channels=1,
            resolution=32,
            base_channels=8,
            channel_multipliers=[1, 1, 1, 1],
            num_res_blocks=1,
            attention_resolutions=[],
            z_channels=8,
            embed_dim=8,
            norm_groups=4,
            code_shape=[4, 4, 4],
            quantizer=quantizer,
        )
    )
    stack = TransformerConfig(layers=1, heads=2)
    prior_config = RQTransformerConfig(
        code_shape=(4, 4, 4),
        codebook_size=32,
        code_dim=8,
        embed_dim=16,
        spatial=stack,
        depth=stack,
        condition="class",
        condition_vocab_size=10,
    )
    vae.save_pretrained(tmp_path / "runs" / "demo" / "tokenizer")
    RQTransformer(prior_config, vae.codebooks).save_pretrained(tmp_path / "runs" / "demo" / "prior")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("demo_models")
@pytest.mark.parametrize("block", BLOCKS, ids=["rqkernels", "rqgen"])
def test_the_example_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, str(README), "exec"), {})
    printed = capsys.readouterr().out
    assert promised(block)
    for text in promised(block):
        assert text in printed


def test_numbers_of_the_example_are_certified() -> None:
    """The claim under the first example: the reference finds the same codes."""
    namespace: dict[str, object] = {}
    exec(compile(BLOCKS[0], str(README), "exec"), namespace)
    x, codebook, found = namespace["x"], namespace["codebook"], namespace["found"]
    import rqkernels

    assert torch.equal(rqkernels.reference.residual_search(x, codebook, 4).codes, found.codes)
