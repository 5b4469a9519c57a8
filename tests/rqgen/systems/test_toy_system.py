"""A third system in a file of its own: the ordinary loop and commands train, encode, sample, evaluate and save it.

Its tokenizer has one codebook of grey levels, a code for each quarter of an image; its prior is a table: the first code
depends on the class, each further one on the code before it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rqgen.systems
from rqgen.config import Given, load
from rqgen.data import DataConfig, open_dataset, read_codes
from rqgen.evaluation import evaluate_reconstruction, evaluate_token_prediction
from rqgen.inference import Engine, StepSampler, make_sampler
from rqgen.models import Prior, Tokenizer, load_pretrained
from rqgen.models.condition import condition_ids
from rqgen.quantizers import CodeLayout
from rqgen.sampling import edit, generate
from rqgen.sampling.pipeline import Pipeline
from rqgen.systems import TITLES
from rqgen.systems.system import PriorRun, System, TokenizerRun, preview_samples
from rqgen.training import CodesStage, code_items


@dataclass
class ToyTokenizerConfig:
    image_channels: int = 1
    resolution: int = 8
    levels: int = 6
    class_names: tuple[str, ...] = ()

    @property
    def image_shape(self) -> tuple[int, int]:
        return self.resolution, self.resolution


class ToyOutput(NamedTuple):
    reconstruction: Tensor


class ToyLoss(NamedTuple):
    total: Tensor
    reconstruction: Tensor
    output: ToyOutput


class ToyTokenizer(Tokenizer):
    model_type = "toy_tokenizer"
    config_class = ToyTokenizerConfig

    def __init__(self, config: ToyTokenizerConfig) -> None:
        super().__init__(config)
        self.values = nn.Parameter(torch.linspace(-1, 1, config.levels))

    @property
    def layout(self) -> CodeLayout:
        return CodeLayout.stacks((2, 2, 1), self.config.levels)

    def encode_latents(self, images: Tensor, *, check: bool = True) -> Tensor:
        return F.adaptive_avg_pool2d(images.mean(1, keepdim=True), 2)

    def decode_latents(self, latents: Tensor) -> Tensor:
        shape = self.config.image_channels, *self.config.image_shape
        return F.interpolate(latents, size=shape[1:]).expand(-1, *shape)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        latents = self.encode_latents(images).permute(0, 2, 3, 1)
        return (latents[..., None] - self.values).abs().argmin(-1)

    def decode(self, codes: Tensor) -> Tensor:
        return self.decode_latents(self.values[codes].permute(0, 3, 1, 2))

    def decode_partial(self, codes: Tensor, levels: int, /) -> Tensor:
        return self.decode(codes)

    def forward(self, images: Tensor) -> ToyOutput:
        return ToyOutput(self.decode(self.encode(images)))

    def loss(self, images: Tensor) -> ToyLoss:
        output = self(images)
        loss = F.mse_loss(output.reconstruction, images)
        return ToyLoss(loss, loss, output)

    def code_tensors(self) -> list[Tensor]:
        return [self.values]


@dataclass
class BigramConfig:
    codebook_size: int
    num_classes: int
    class_names: tuple[str, ...] = ()


class BigramOutput(NamedTuple):
    logits: Tensor


class Bigram(Prior):
    model_type = "bigram"
    config_class = BigramConfig
    tokenizer_class = ToyTokenizer
    condition_kind = "class"
    has_null_condition = True

    def __init__(self, config: BigramConfig) -> None:
        super().__init__(config)
        self.first = nn.Embedding(config.num_classes + 1, config.codebook_size)
        self.following = nn.Embedding(config.codebook_size, config.codebook_size)

    @property
    def layout(self) -> CodeLayout:
        return CodeLayout.stacks((2, 2, 1), self.config.codebook_size)

    @property
    def condition_size(self) -> int:
        return self.config.num_classes

    def condition_ids(self, condition: Tensor | None, batch: int) -> Tensor:
        settings = {"kind": "class", "vocab_size": self.config.num_classes, "length": 1, "has_null": True}
        return condition_ids(condition, batch, device=self.device, **settings)

    def forward(self, codes: Tensor, condition: Tensor | None = None) -> BigramOutput:
        self.layout.check(codes, device=self.device)
        first = self.first(self.condition_ids(condition, len(codes)))
        return BigramOutput(torch.cat([first, self.following(self.layout.flatten(codes)[:, :-1])], dim=1))


@dataclass
class ToyTokenizerRun(TokenizerRun):
    model: ToyTokenizerConfig = field(default_factory=ToyTokenizerConfig)

    @classmethod
    def implied(cls, given: Given[Any]) -> dict[str, Any]:
        data = given.read("data")
        return {"model": {"image_channels": data.channels, "resolution": data.resolution}}


@dataclass
class ToyPriorConfig:
    cache_codes: bool = True
    """Encode every image once."""

    def model_config(self, vae: ToyTokenizer, num_classes: int, class_names: tuple[str, ...] = ()) -> BigramConfig:
        return BigramConfig(vae.codebook_size, num_classes, class_names)


@dataclass
class ToyPriorRun(PriorRun):
    prior: ToyPriorConfig = field(default_factory=ToyPriorConfig)


def prior_stage(run: ToyPriorRun, vae: ToyTokenizer, source: Any, console: Any) -> tuple[CodesStage, Any]:
    items = code_items(vae, source, cache=run.prior.cache_codes, batch_size=run.loop.batch_size, console=console)
    prior = Bigram(run.prior.model_config(vae, len(source.class_names), source.class_names))
    return CodesStage(prior, vae, preview=preview_samples), items


SYSTEM = System(
    name="toy",
    tokenizer=ToyTokenizer,
    prior=Bigram,
    tokenizer_run=ToyTokenizerRun,
    prior_run=ToyPriorRun,
    prior_stage=prior_stage,
)


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    """The one line."""
    rqgen.systems.register(SYSTEM, "one code for each quarter, and a bigram over them")
    yield
    rqgen.systems.unregister("toy")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tokenizer/ and prior/, trained by the command line."""
    from rqgen.cli.app import main

    folder = tmp_path_factory.mktemp("toy")
    often = ["loop.batch_size=32", "loop.optimizer.learning_rate=0.05", "loop.checkpoint_every=20"]
    for arguments in (
        ["tokenizer", "--out", folder / "t", "data.resolution=8", "loop.steps=40", "loop.image_every=40"],
        ["prior", "--out", folder / "p", f"tokenizer={folder / 't' / 'model'}", "loop.steps=60", "loop.image_every=60"],
    ):
        with pytest.raises(SystemExit) as left:
            main(["train", *map(str, arguments), "--system", "toy", *often])
        assert not left.value.code
    for part, name in (("t", "tokenizer"), ("p", "prior")):
        load_pretrained(folder / part / "model").save_pretrained(folder / "run" / name)
    return folder


def test_training_moves_both_models(run: Path) -> None:
    vae, prior = load_pretrained(run / "t" / "model"), load_pretrained(run / "p" / "model")
    assert isinstance(vae, ToyTokenizer) and isinstance(prior, Bigram)
    assert not torch.equal(vae.values, torch.linspace(-1, 1, 6)) and vae.class_names[7] == "seven"
    losses = [float(line.split(",")[2]) for line in (run / "p" / "history.csv").read_text().splitlines()[1:]]
    assert losses[-1] < 0.95 * losses[0]
    assert "loss/depth_1" in (run / "p" / "history.csv").read_text().splitlines()[0]


def test_a_run_is_resumed_without_naming_the_system(run: Path, rqgen: Any) -> None:
    code, _, err = rqgen("train", "prior", "--out", run / "p", "--resume", "loop.steps=61")
    assert code == 0, err


def test_encode_and_training_from_codes(run: Path, rqgen: Any, tmp_path: Path) -> None:
    tokenizer, file = run / "t" / "model", tmp_path / "codes.safetensors"
    code, out, err = rqgen("encode", "--tokenizer", tokenizer, "--out", file)
    assert code == 0, err
    encoded = read_codes(file)
    assert "as 2x2x1 codes" in out and encoded.codebook_id == load_pretrained(tokenizer).fingerprint()
    settings = [f"codes={file}", f"tokenizer={tokenizer}", "loop.steps=2", "--out", tmp_path / "p"]
    code, _, err = rqgen("train", "prior", "--system", "toy", *settings)
    assert code == 0, err


def test_sample_by_the_command_line(run: Path, rqgen: Any, tmp_path: Path) -> None:
    file = tmp_path / "codes.safetensors"
    arguments = ["--class", "seven", "--class", "0", "--num", 3, "--cfg-scale", 1, "--out", tmp_path / "s.png"]
    code, out, err = rqgen("sample", run / "run", *arguments, "--codes", file)
    assert code == 0 and "6 images" in out, err
    assert read_codes(file).labels.tolist() == [7] * 3 + [0] * 3


def test_samples_are_those_of_the_definition(run: Path) -> None:
    vae, prior = load_pretrained(run / "t" / "model"), load_pretrained(run / "p" / "model")
    assert isinstance(make_sampler(prior, Engine()), StepSampler)
    whole = generate(prior, vae, [3, 7, 7], seed=2, cfg_scale=0.5)
    split = generate(prior, vae, [7, 7], seed=2, cfg_scale=0.5, offset=1)
    assert torch.equal(whole.codes[1:], split.codes) and torch.equal(vae.decode(whole.codes), whole.images)
    likeliest = generate(prior, vae, [4], temperature=0).codes.flatten()
    assert (
        likeliest[0] == prior.first.weight[4].argmax() and likeliest[1] == prior.following.weight[likeliest[0]].argmax()
    )
    with pytest.raises(ValueError, match="precision: a Bigram is sampled in 'fp32', got 'bf16'"):
        generate(prior, vae, [1], precision="bf16")
    with pytest.raises(TypeError, match="prior: a Bigram cannot edit images; expected a VAR or an RQTransformer"):
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[4:] = True
        edit(prior, vae, torch.zeros(1, 1, 8, 8), mask, [1])
    with pytest.raises(TypeError, match="vae: expected an ToyTokenizer, got NoneType"):
        generate(prior, None, [1])


def test_evaluation(run: Path) -> None:
    vae, prior = load_pretrained(run / "t" / "model"), load_pretrained(run / "p" / "model")
    held_out = open_dataset(DataConfig(resolution=8), "held_out")
    quality = evaluate_reconstruction(vae, held_out)
    assert quality.code_counts.shape == (1, 6) and quality.code_counts.sum() == 4 * len(held_out)
    found = evaluate_token_prediction(prior, vae, held_out)
    fresh = evaluate_token_prediction(Bigram(prior.config), vae, held_out)
    assert all(ours < theirs for ours, theirs in zip(asdict(found).values(), asdict(fresh).values(), strict=True))


def test_evaluation_by_the_command_line(run: Path, rqgen: Any, tmp_path: Path) -> None:
    out = tmp_path / "evaluation.json"
    settings = ["sampling.count=20", "images=40", "classifier.training_images=200", "classifier.side=4"]
    code, _, err = rqgen("evaluate", run / "run", "--out", out, *settings)
    assert code == 0, err
    found = json.loads(out.read_text())
    assert {"reconstruction", "token_prediction", "classifier"} <= set(found["metrics"]) and not found["failed"]
    assert {"precision", "inpainting"} <= set(found["not_computed"])
    assert found["models"]["prior"]["model_type"] == "bigram"
    prediction = found["metrics"]["token_prediction"]["result"]
    assert len(prediction["level_losses"]) == 1 and 0 < prediction["loss"] == prediction["level_losses"][0]


def test_it_is_listed(rqgen: Any) -> None:
    code, out, err = rqgen("list", "systems")
    assert code == 0, err
    assert "  toy\n" in out and "Bigram" in out


def test_pipeline(run: Path, tmp_path: Path) -> None:
    pipe = Pipeline.from_pretrained(run / "run")
    out = pipe("seven", num=2, seed=1)
    assert len(out.images) == 2 and out.images[0].size == (8, 8)
    pipe.save_pretrained(tmp_path / "pipe")
    again = Pipeline.from_pretrained(tmp_path / "pipe")("seven", num=2, seed=1)
    assert torch.equal(again.tensors, out.tensors) and torch.equal(again.codes, out.codes)


def test_mistakes(run: Path, rqgen: Any, tmp_path: Path) -> None:
    for arguments, words in (
        (["demo", "--system", "toy"], "--system: expected a system with a demo, got 'toy', which has none"),
        (
            ["train", "tokenizer", "--system", "tiy"],
            f"--system: expected one of {', '.join(TITLES)}, got 'tiy'; did you mean 'toy'?",
        ),
        (
            ["train", "prior", "--system", "rq", f"tokenizer={run / 't' / 'model'}"],
            "tokenizer: --system rq expects a rqvae, got a toy_tokenizer",
        ),
    ):
        code, _, err = rqgen(*arguments, "--out", tmp_path / "out")
        assert code == 1 and words in err and err.count("\n") == 1, err
    with pytest.raises(ValueError, match="name: expected one that is not taken"):
        register_again()


def register_again() -> None:
    import rqgen.systems as systems

    systems.register(SYSTEM, "again")


def test_its_settings_are_explained(rqgen: Any) -> None:
    code, out, err = rqgen("config", "--system", "toy", "train", "prior")
    assert code == 0, err
    assert "# Encode every image once. [true]" in out and "cache_codes: true" in out
    assert load(ToyPriorRun, None).prior.cache_codes
