"""The ablation of soft labels runs, goes on where it stopped, and reports what it measured."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F

from rqgen.cli.demo import digits
from rqgen.models import RQVAE, RQTransformer

BENCHMARKS = Path(__file__).resolve().parent.parent.parent / "benchmarks"
SMALL = [
    "tokenizer.model.base_channels=8",
    "tokenizer.model.channel_multipliers=[1,1,1,1]",
    "tokenizer.model.z_channels=8",
    "tokenizer.model.embed_dim=8",
    "tokenizer.model.quantizer.codebook_size=16",
    "tokenizer.loop.steps=6",
    "prior.prior.embed_dim=16",
    "prior.prior.spatial.layers=1",
    "prior.prior.spatial.heads=2",
    "prior.prior.depth.heads=2",
    "prior.loop.steps=2",
    "sampling.count=100",
]


@pytest.fixture(scope="module")
def ablation() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        spec = importlib.util.spec_from_file_location("ablation_soft_labels", BENCHMARKS / "ablation_soft_labels.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def done(ablation: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("ablation")
    return out, ablation.run(out, [3], SMALL)


def test_every_combination_is_trained_on_one_tokenizer(done: tuple[Path, list[dict]]) -> None:
    out, records = done
    assert [(r["seed"], r["soft_labels"], r["stochastic_codes"]) for r in records] == [
        (3, False, False),
        (3, False, True),
        (3, True, False),
        (3, True, True),
    ]
    folders = [path.parent for path in sorted((out / "seed-3").glob("*-codes/model"))]
    assert len(folders) == 4 and len(list(out.glob("seed-3/tokenizer*"))) == 1
    vae = RQVAE.from_pretrained(out / "seed-3" / "tokenizer" / "model")
    priors = [RQTransformer.from_pretrained(folder / "model") for folder in folders]
    assert all(torch.equal(prior.codebooks, vae.codebooks) for prior in priors)
    # Each switch reached the training.
    assert len({prior.classifier.weight.sum().item() for prior in priors}) == 4


def test_the_nll_is_that_of_nearest_codes(ablation: ModuleType, done: tuple[Path, list[dict]]) -> None:
    out, records = done
    vae = RQVAE.from_pretrained(out / "seed-3" / "tokenizer" / "model").eval()
    prior = RQTransformer.from_pretrained(out / "seed-3" / "soft-labels-stochastic-codes" / "model").eval()
    held_out = digits(ablation.load_demo(3, SMALL), "held_out")
    with torch.no_grad():
        codes = vae.encode(held_out.images)
        expected = F.cross_entropy(prior(codes, held_out.labels).logits.flatten(0, -2), codes.flatten())
    assert records[3]["hard_label_nll"] == pytest.approx(expected.item(), rel=1e-4)


def test_what_is_done_is_not_done_again(
    ablation: ModuleType, done: tuple[Path, list[dict]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, records = done
    trained = []
    fit = ablation.fit_prior
    monkeypatch.setattr(ablation, "fit_prior", lambda *a, **k: trained.append(k["resume"]) or fit(*a, **k))
    monkeypatch.setattr(ablation, "fit_tokenizer", None)
    assert ablation.run(out, [3], SMALL) == records and trained == []
    # An interrupted prior goes on from its checkpoint.
    folder = out / "seed-3" / "soft-labels-nearest-codes"
    (folder / "metrics.json").unlink()
    (folder / "model").rename(folder / "model-before")
    assert ablation.run(out, [3], SMALL) == records
    assert trained == [folder / "checkpoints" / "step-00000002"]
    with pytest.raises(ValueError, match=r"--out: .*seed-3 holds runs of other settings"):
        ablation.run(out, [3], [*SMALL, "prior.loop.steps=3"])


def test_the_table(ablation: ModuleType, tmp_path: Path) -> None:
    records = [
        {
            "seed": seed,
            "soft_labels": soft,
            "stochastic_codes": stochastic,
            "sample_accuracy": 0.5 + 0.1 * seed + 0.2 * soft,
            "plain_sample_accuracy": 0.25,
            "hard_label_nll": 1.0 + seed + stochastic,
        }
        for seed in (0, 1)
        for soft, stochastic in ablation.VARIANTS.values()
    ]
    environment = ablation._measure.environment(torch.device("cpu"), ablation._measure.Checkout("0123abc", False))
    text = ablation.table({"environment": environment, "records": records})
    assert f"torch {torch.__version__}" in text and "commit 0123abc" in text
    assert (
        text.splitlines()[-1]
        == "| soft | stochastic | 75.0 % (70.0, 80.0) | 25.0 % (25.0, 25.0) | 2.500 (2.000, 3.000) |"
    )
    page = tmp_path / "page.md"
    page.write_text(f"before\n{ablation.BEGIN}\nold\n{ablation.END}\nafter\n")
    ablation._harness.write_between(page, ablation.BEGIN, ablation.END, text)
    assert page.read_text() == f"before\n{ablation.BEGIN}\n\n{text}\n\n{ablation.END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="must hold"):
        ablation._harness.write_between(page, ablation.BEGIN, ablation.END, text)


def test_the_table_in_the_docs_is_that_of_the_results(ablation: ModuleType) -> None:
    content = json.loads((BENCHMARKS / "results" / "ablation-soft-labels.json").read_text())
    page = (BENCHMARKS.parent / "docs" / "soft_labels.md").read_text()
    assert f"{ablation.BEGIN}\n\n{ablation.table(content)}\n\n{ablation.END}" in page
