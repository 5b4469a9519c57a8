"""Every command, its options, and how errors are shown.

A command's work is imported when it runs: help and errors of usage do not wait for it.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="rqgen",
    help="Images as stacks of residual codes: train, encode and sample RQ-VAE and RQ-Transformer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(help="Train one of the two stages.", no_args_is_help=True)
convert_app = typer.Typer(help="Read models of other systems.", no_args_is_help=True)
app.add_typer(train_app, name="train")
app.add_typer(convert_app, name="convert")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as loop.steps=500."),
]
Config = Annotated[str, typer.Option(help="A YAML file, or the name of a configuration shipped with the package.")]
Out = Annotated[Path, typer.Option(help="Folder for checkpoints, logs and the trained model (model/).")]
Resume = Annotated[bool, typer.Option(help="Go on from the newest checkpoint in the folder.")]
Tokenizer = Annotated[Path, typer.Option(help="Folder of a trained tokenizer.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at once.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error (also: RQGEN_DEBUG=1).")] = False,
) -> None:
    if debug:
        os.environ["RQGEN_DEBUG"] = "1"


@train_app.command("tokenizer")
def train_tokenizer(
    overrides: Overrides = None,
    config: Config = "digits_tokenizer",
    out: Out = Path("runs/tokenizer"),
    resume: Resume = False,
) -> None:
    """Stage 1: an RQ-VAE learns to turn images into codes and back."""
    from rich.console import Console

    from rqgen.config import load

    from . import runs

    run = load(runs.TokenizerRun, runs.find_config(config), overrides or ())
    runs.train_tokenizer(run, out, resume=resume, console=Console())
    typer.echo(f"tokenizer: {out / 'model'}")


@train_app.command("prior")
def train_prior(
    overrides: Overrides = None,
    config: Config = "digits_prior",
    out: Out = Path("runs/prior"),
    resume: Resume = False,
) -> None:
    """Stage 2: an RQ-Transformer learns the codes of a trained tokenizer (tokenizer=FOLDER)."""
    from rich.console import Console

    from rqgen.config import load

    from . import runs

    run = load(runs.PriorRun, runs.find_config(config), overrides or ())
    runs.train_prior(run, out, resume=resume, console=Console())
    typer.echo(f"prior: {out / 'model'}")


@app.command()
def encode(
    out: Annotated[Path, typer.Option(help="File to write (safetensors).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="The images, such as source=folder folder=photos/."),
    ] = None,
    tokenizer: Tokenizer = Path("runs/tokenizer/model"),
    split: Annotated[str, typer.Option(help="train, held_out or all.")] = "all",
    batch_size: BatchSize = 64,
) -> None:
    """Images to codes on disk."""
    from .transfer import encode_images

    encoded = encode_images(tokenizer, out, overrides or (), split=split, batch_size=batch_size)
    count, height, width, depth = encoded.codes_nhwd.shape
    typer.echo(f"{count} images as {height}x{width}x{depth} codes: {out}")


@app.command()
def sample(
    out: Annotated[Path, typer.Option(help="PNG file to write: all images on one sheet.")] = Path("samples.png"),
    prior: Annotated[Path, typer.Option(help="Folder of a trained prior.")] = Path("runs/prior/model"),
    tokenizer: Tokenizer = Path("runs/tokenizer/model"),
    classes: Annotated[
        list[int] | None, typer.Option("--class", help="Class number; may be repeated. Default: every class.")
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Images of each class, or in all without classes.")] = 10,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest code.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest codes.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest codes of this total mass.")] = None,
    cfg: Annotated[float | None, typer.Option(help="Strength of classifier-free guidance.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same images.")] = 0,
    batch_size: BatchSize = 100,
    codes: Annotated[Path | None, typer.Option(help="Also write the codes to this file (safetensors).")] = None,
) -> None:
    """Draw new images."""
    from .transfer import SampleRequest, sample_images

    request = SampleRequest(classes, num, temperature, top_k, top_p, cfg, seed, batch_size)
    count = sample_images(prior, tokenizer, request, out, codes)
    typer.echo(f"{count} images: {out}")


@convert_app.command("kakaobrain")
def convert_kakaobrain(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="model.pt, with config.yaml beside it.")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="For a prior: its tokenizer (model.pt, or a folder in our format).")
    ] = None,
) -> None:
    """A published RQ-VAE or RQ-Transformer into config.json + model.safetensors."""
    from .transfer import convert_published

    kind = convert_published(source, destination, tokenizer)
    typer.echo(f"{kind}: {destination}")


@app.command()
def demo(
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the split, both trainings and the samples.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for figures, metrics.json and both models.")] = Path("runs/demo"),
) -> None:
    """Train both stages on handwritten digits and draw what they learned (a few minutes on two cores)."""
    from rich.console import Console

    from .demo import load_demo, run_demo

    metrics = run_demo(load_demo(seed, overrides or ()), out, console=Console())
    typer.echo(
        f"held-out reconstruction error {metrics['reconstruction_mse']:.4f}; "
        f"a classifier of real digits recognises {metrics['sample_accuracy']:.1%} of the drawn ones "
        f"and {metrics['classifier_test_accuracy']:.1%} of real held-out ones; "
        f"{metrics['seconds']['total']:.0f} s. Look at {out / 'samples.png'}"
    )


@app.command()
def check() -> None:
    """What is installed, which libraries loaded, and why not."""
    from .check import installation_report

    for line in installation_report():
        typer.echo(line)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0, 2 for wrong usage, or 1 after one line that says what went
    wrong."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        app(arguments)
    except Exception as error:
        if os.environ.get("RQGEN_DEBUG"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(1)
