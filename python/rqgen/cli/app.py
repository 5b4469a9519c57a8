"""Every command, and how errors are shown.

The options of a command are the fields of the dataclass that its function takes, see `requests`. A command's work is
imported when it runs: help and errors of usage do not wait for it.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

import rqgen
from rqgen.bench.settings import SamplingBenchSettings, SystemsBenchSettings
from rqgen.systems import DEFAULT

from .interrupts import interruptions, stop
from .options import with_options
from .requests import (
    BenchRequest,
    ConfigRequest,
    ConvertKakaobrainRequest,
    ConvertVARRequest,
    DemoRequest,
    EditRequest,
    EncodeRequest,
    EvaluateRequest,
    ListRequest,
    SampleRequest,
    ScalingRequest,
    TrainPriorRequest,
    TrainTokenizerRequest,
)


class _Interrupted(BaseException):
    """A KeyboardInterrupt in disguise: Typer would exit without a message."""


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise _Interrupted(*error.args) from error


app = typer.Typer(
    cls=_Group,
    name="rqgen",
    help="Images as residual codes: train, encode, sample and edit with RQ-VAE and RQ-Transformer, or VAR.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train_app = typer.Typer(help="Train one of the two stages.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure the speed of this machine.", no_args_is_help=True)
convert_app = typer.Typer(help="Convert published checkpoints.", no_args_is_help=True)
app.add_typer(train_app, name="train")
app.add_typer(bench_app, name="bench")
app.add_typer(convert_app, name="convert")


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"rqgen {rqgen.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error (also: RQGEN_DEBUG=1).")] = False,
) -> None:
    if debug:
        os.environ["RQGEN_DEBUG"] = "1"


@train_app.command("tokenizer")
@with_options
def train_tokenizer(request: TrainTokenizerRequest) -> None:
    """Train stage 1: a tokenizer turns images into codes and back."""
    from .runs import train_stage

    typer.echo(f"tokenizer: {train_stage('tokenizer', request)}")


@train_app.command("prior")
@with_options
def train_prior(request: TrainPriorRequest) -> None:
    """Train stage 2: a prior models the codes of a trained tokenizer (tokenizer=FOLDER), by default for its images."""
    from .runs import train_stage

    typer.echo(f"prior: {train_stage('prior', request)}")


@app.command()
@with_options
def encode(request: EncodeRequest) -> None:
    """Encode images and write their codes to a file."""
    from .encode import encode_images

    encoded = encode_images(request)
    typer.echo(f"{len(encoded.labels)} images as {encoded.layout.in_words()}: {request.out}")


@app.command()
@with_options
def sample(request: SampleRequest) -> None:
    """Sample new images."""
    from .sample import sample_images

    count = sample_images(request)
    codes = "" if request.codes is None else f"; codes: {request.codes}"
    typer.echo(f"{count} images: {request.out}{codes}")


@bench_app.command("sampling")
@with_options
def bench_sampling(settings: SamplingBenchSettings, request: BenchRequest) -> None:
    """Measure images per second by code shape and batch size (the paper's figure 4), next to this machine's lower
    bound."""
    from .bench import bench_sampling

    for path in bench_sampling(settings, request):
        typer.echo(path)


@bench_app.command("systems")
@with_options
def bench_systems(settings: SystemsBenchSettings, request: BenchRequest) -> None:
    """Measure images per second of a VAR, an RQ-Transformer and a flat prior of one code at a time, of the same width
    and number of layers, next to their counted work."""
    from .bench import bench_systems

    for path in bench_systems(settings, request):
        typer.echo(path)


@app.command()
@with_options
def edit(request: EditRequest) -> None:
    """Resample a part of an image."""
    from .edit import edit_image

    edit_image(request)
    typer.echo(f"before, mask and after: {request.out}")


@app.command()
@with_options
def evaluate(request: EvaluateRequest) -> None:
    """Evaluate models by every metric that fits: a table, and JSON with all that the numbers depend on."""
    from .evaluate import evaluate_folder, report

    for line in report(evaluate_folder(request)):
        typer.echo(line)
    typer.echo(f"\n{request.out}")


@app.command("list")
@with_options
def list_registries(request: ListRequest) -> None:
    """List systems, data sources, metrics and recipes, with their options."""
    from .listing import listing

    for line in listing(request.kind):
        typer.echo(line)


@convert_app.command("var")
@with_options
def convert_var(request: ConvertVARRequest) -> None:
    """Convert a published VAR and its tokenizer to our format."""
    from .convert import convert_var

    convert_var(request)
    typer.echo(f"tokenizer and prior: {request.destination}")


@convert_app.command("kakaobrain")
@with_options
def convert_kakaobrain(request: ConvertKakaobrainRequest) -> None:
    """Convert a published RQ-VAE or RQ-Transformer to config.json and model.safetensors."""
    from .convert import convert_kakaobrain

    typer.echo(f"{convert_kakaobrain(request)}: {request.destination}")


@app.command()
@with_options
def demo(request: DemoRequest) -> None:
    """Train both stages on handwritten digits and sample new ones (a few minutes on two cores)."""
    from rich.console import Console

    from .demo import load_demo, run_demo, summary
    from .settings import find_config

    loaded = load_demo(
        request.seed, request.overrides, system=request.system or DEFAULT, config=find_config(request.config)
    )
    typer.echo(summary(run_demo(loaded, request.out, console=Console()), request.out))


@app.command()
@with_options
def scaling(request: ScalingRequest) -> None:
    """Train VARs of several sizes for equal tokens and fit power laws to their test loss and token error."""
    from rich.console import Console

    from .scaling import scale, summary

    for line in summary(scale(request, console=Console()), request.out):
        typer.echo(line)


@app.command()
@with_options
def config(request: ConfigRequest) -> None:
    """Print every setting of a command with its help, its default and its value, as a YAML file for --config."""
    from .explain import explain

    typer.echo(explain(request.words, system=request.system, config=request.config), nl=False)


@app.command()
def check() -> None:
    """Print what is installed, which libraries loaded, and why not."""
    from .check import installation_report

    for line in installation_report():
        typer.echo(line)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0, 2 for wrong usage, 1 after one line that says what went wrong, 130 (Ctrl-C) or
    143 (SIGTERM) after one that says how to resume."""
    with interruptions() as came:
        try:
            _configure_messages()
            app(arguments)
        except SystemExit as left:
            if came and left.code == 128 + signal.SIGINT:  # typer's answer to an interrupt while it reads the options
                stop(came[0])
            raise
        except (_Interrupted, KeyboardInterrupt) as error:
            stop(came[0] if came else signal.SIGINT, str(error))
        except Exception as error:
            if came:  # an import that was cut short makes another error of it
                stop(came[0])
            if os.environ.get("RQGEN_DEBUG"):
                raise
            print(f"error: {_message(error)}", file=sys.stderr)
            sys.exit(1)


def _configure_messages() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # What torch logs at the end of a process whose import of torch was cut short.
    logging.getLogger("torch").setLevel(logging.WARNING)
    # Pillow's warnings name no file; what it cannot read is refused by name.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'standard output'}: {error.strerror}"
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__
