"""Every command, its options, and how errors are shown.

A command's work is imported when it runs: help and errors of usage do not wait for it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

import rqgen
from rqgen.systems import DEFAULT, TITLES


class _Interrupted(BaseException):
    """A KeyboardInterrupt in disguise: Typer would exit without a message."""


class _Group(TyperGroup):
    def invoke(self, ctx: typer.Context) -> Any:
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
bench_app = typer.Typer(help="How fast it is on this machine.", no_args_is_help=True)
convert_app = typer.Typer(help="Read models of other systems.", no_args_is_help=True)
app.add_typer(train_app, name="train")
app.add_typer(bench_app, name="bench")
app.add_typer(convert_app, name="convert")

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as loop.steps=500."),
]
Config = Annotated[
    str | None,
    typer.Option(help="A YAML file, or the name of a recipe shipped with the package. Default: the one for digits."),
]
Out = Annotated[Path, typer.Option(help="Folder for checkpoints, logs and the trained model (model/).")]
Resume = Annotated[
    bool,
    typer.Option(
        help="Resume from the newest whole checkpoint in the folder, with its settings; loop.steps may be raised."
    ),
]
System = Annotated[
    str | None,
    typer.Option(
        help="; ".join(f"{name}: {title}{' (default)' * (name == DEFAULT)}" for name, title in TITLES.items()) + "."
    ),
]
Tokenizer = Annotated[Path, typer.Option(help="Folder of a trained tokenizer.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images at once.")]


PriorFolder = Annotated[Path, typer.Option("--prior", help="Folder of a trained prior.")]
TopK = Annotated[int | None, typer.Option(help="Only the k likeliest codes.")]
TopP = Annotated[float | None, typer.Option(help="Only the likeliest codes of this total mass.")]
CfgScale = Annotated[float | None, typer.Option(help="Strength of classifier-free guidance; 0 is off.")]
Seed = Annotated[int, typer.Option(help="The same seed gives the same images.")]


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
def train_tokenizer(
    overrides: Overrides = None,
    system: System = None,
    config: Config = None,
    out: Out = Path("runs/tokenizer"),
    resume: Resume = False,
) -> None:
    """Stage 1: a tokenizer learns to turn images into codes and back."""
    _train("tokenizer", out, system, config, overrides, resume)


@train_app.command("prior")
def train_prior(
    overrides: Overrides = None,
    system: System = None,
    config: Config = None,
    out: Out = Path("runs/prior"),
    resume: Resume = False,
) -> None:
    """Stage 2: a prior learns the codes of a trained tokenizer (tokenizer=FOLDER), by default on its images."""
    _train("prior", out, system, config, overrides, resume)


def _train(
    stage: Literal["tokenizer", "prior"],
    out: Path,
    system: str | None,
    config: str | None,
    overrides: list[str] | None,
    resume: bool,
) -> None:
    from rich.console import Console

    from .runs import train_stage

    train_stage(stage, out, system=system, config=config, overrides=overrides or (), resume=resume, console=Console())
    typer.echo(f"{stage}: {out / 'model'}")


@app.command()
def encode(
    out: Annotated[Path, typer.Option(help="File to write (safetensors).")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="The images, such as folder=photos/ or source=digits."),
    ] = None,
    config: Annotated[str | None, typer.Option(help="A YAML file of such settings.")] = None,
    tokenizer: Tokenizer = Path("runs/tokenizer/model"),
    split: Annotated[str, typer.Option(help="train, held_out or all.")] = "all",
    batch_size: BatchSize = 64,
) -> None:
    """Images to codes on disk."""
    from .settings import find_config
    from .transfer import encode_images

    encoded = encode_images(tokenizer, out, find_config(config), overrides or (), split=split, batch_size=batch_size)
    typer.echo(f"{len(encoded.labels)} images as {encoded.layout.in_words()}: {out}")


@app.command()
def sample(
    out: Annotated[
        Path, typer.Option(help="Image file to write, PNG, JPEG, WebP, TIFF or BMP by its name: all on one sheet.")
    ] = Path("samples.png"),
    run: Annotated[
        Path | None, typer.Argument(metavar="[RUN]", help="Folder of a tokenizer and a prior, such as runs/demo.")
    ] = None,
    prior: Annotated[
        Path | None, typer.Option(help="Folder of a trained prior, without RUN. Default: runs/prior/model.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a trained tokenizer, without RUN. Default: runs/tokenizer/model.")
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option("--class", help="Class by name, or by number; may be repeated. Default: every class."),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Images of each class, or in all without classes.")] = 10,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest code.")] = 1.0,
    top_k: TopK = None,
    top_p: TopP = None,
    cfg_scale: CfgScale = None,
    seed: Seed = 0,
    precision: Annotated[
        str, typer.Option(help="Of the prior: fp32, bf16 or int8 (weights in 8 bits, on the CPU alone).")
    ] = "fp32",
    graphs: Annotated[bool, typer.Option(help="On a GPU: replay CUDA graphs.")] = True,
    batch_size: BatchSize = 100,
    codes: Annotated[Path | None, typer.Option(help="Also write the codes to this file (safetensors).")] = None,
) -> None:
    """Sample new images."""
    from rqgen.sampling import Engine, SamplingParams

    from .transfer import ModelFolders, SampleRequest, sample_images

    request = SampleRequest(
        classes=classes,
        num=num,
        params=SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, cfg_scale=cfg_scale, seed=seed),
        engine=Engine(precision, use_graphs=graphs),
        batch_size=batch_size,
    )
    models = ModelFolders(run=run, prior=prior, tokenizer=tokenizer)
    count = sample_images(models, request, out, codes)
    typer.echo(f"{count} images: {out}")


@bench_app.command("sampling")
def bench_sampling(
    out: Annotated[Path, typer.Option(help="Folder for sampling.json and sampling.png.")] = Path("runs/bench"),
    preset: Annotated[
        str | None, typer.Option(help="90M, 350M, 480M, 800M or 1.4B. Default: the next four options.")
    ] = None,
    width: Annotated[int, typer.Option(min=1)] = 512,
    spatial_layers: Annotated[int, typer.Option(min=0)] = 12,
    depth_layers: Annotated[int, typer.Option(min=0)] = 4,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    shape: Annotated[
        list[str] | None, typer.Option(help="Code shape; may be repeated. Default: 8x8x4 8x8x8 8x8x16 16x16x1.")
    ] = None,
    codebook_size: Annotated[int, typer.Option(min=1, help="Codes of the codebook.")] = 16384,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated. Default: 1 16 64.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="May be repeated. Default: fp32.")] = None,
    published: Annotated[bool, typer.Option(help="Also the published formulation, with the same weights.")] = False,
    flat: Annotated[bool, typer.Option(help="Also one transformer over all codes, as the cost law has it.")] = False,
    top_k: Annotated[int | None, typer.Option(help="Only the k likeliest codes.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Only the likeliest codes of this total mass.")] = None,
    decoder_channels: Annotated[
        int, typer.Option(min=0, help="Base channels of the decoder, 128 as published; 0: it is not timed.")
    ] = 128,
    graphs: Annotated[bool, typer.Option(help="On a GPU: replay CUDA graphs.")] = True,
    seconds: Annotated[float, typer.Option(help="For the rounds of one shape and batch size.")] = 20.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch. Default: its own.")] = None,
) -> None:
    """Images per second by code shape and batch size (the paper's figure 4), beside this machine's floor."""
    import torch
    from rich.console import Console

    from rqgen.bench import SamplingBench, parse_shape, run_sampling_bench
    from rqgen.files import claim_folder

    if threads is not None:
        torch.set_num_threads(threads)
    bench = SamplingBench(
        shapes=[parse_shape(text) for text in shape or ("8x8x4", "8x8x8", "8x8x16", "16x16x1")],
        preset=preset,
        width=width,
        spatial_layers=spatial_layers,
        depth_layers=depth_layers,
        heads=heads,
        codebook_size=codebook_size,
        batch_sizes=batch or [1, 16, 64],
        precisions=precision or ["fp32"],
        published=published,
        top_k=top_k,
        top_p=top_p,
        flat=flat,
        decoder_channels=decoder_channels,
        use_graphs=graphs,
        seconds=seconds,
    )
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with claim_folder(out):
        run_sampling_bench(bench, out, device=chosen, console=Console())
    typer.echo(f"{out / 'sampling.json'}, {out / 'sampling.png'}")


@bench_app.command("systems")
def bench_systems(
    out: Annotated[Path, typer.Option(help="Folder for systems.json and systems.png.")] = Path("runs/bench"),
    image_side: Annotated[int, typer.Option(help="256 or 512: decides each system's codes.")] = 256,
    width: Annotated[int, typer.Option(min=1)] = 512,
    heads: Annotated[int, typer.Option(min=1)] = 8,
    spatial_layers: Annotated[int, typer.Option(min=0)] = 12,
    depth_layers: Annotated[int, typer.Option(min=1, help="The other systems have all layers in one stack.")] = 4,
    codebook_size: Annotated[int, typer.Option(min=1, help="Of the RQ-Transformer and the flat prior.")] = 16384,
    var_codebook_size: Annotated[int, typer.Option(min=1, help="Of the VAR.")] = 4096,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="May be repeated. Default: 1 16.")] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="Of all but the VAR; may be repeated. Default: fp32.")
    ] = None,
    cfg_scale: Annotated[float | None, typer.Option(help="Also with guidance of this strength.")] = None,
    decoder: Annotated[bool, typer.Option(help="Also the decoders of the published layouts.")] = False,
    graphs: Annotated[bool, typer.Option(help="On a GPU: replay CUDA graphs.")] = True,
    seconds: Annotated[float, typer.Option(help="For the rounds of one batch size.")] = 60.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: a GPU where there is one.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch. Default: its own.")] = None,
) -> None:
    """Images per second of a VAR, an RQ-Transformer and a flat prior of one code at a time, of the same width and
    number of layers, beside their counted work."""
    import torch
    from rich.console import Console

    from rqgen.bench import SystemsBench, run_systems_bench
    from rqgen.files import claim_folder

    if threads is not None:
        torch.set_num_threads(threads)
    bench = SystemsBench(
        image_side=image_side,
        width=width,
        heads=heads,
        spatial_layers=spatial_layers,
        depth_layers=depth_layers,
        codebook_size=codebook_size,
        var_codebook_size=var_codebook_size,
        batch_sizes=batch or [1, 16],
        precisions=precision or ["fp32"],
        cfg_scale=cfg_scale,
        decoder=decoder,
        use_graphs=graphs,
        seconds=seconds,
    )
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with claim_folder(out):
        run_systems_bench(bench, out, device=chosen, console=Console())
    typer.echo(f"{out / 'systems.json'}, {out / 'systems.png'}")


@app.command()
def edit(
    kind: Annotated[
        str,
        typer.Argument(
            metavar="inpaint|outpaint|class",
            help="Resample the white part of the mask; keep it and resample the rest; resample it as another class.",
        ),
    ],
    image: Annotated[Path, typer.Option(help="The image to edit, of the tokenizer's size.")],
    mask: Annotated[Path, typer.Option(help="An image of the same size, black and white.")],
    label: Annotated[
        str | None, typer.Option(help="Class to sample, by name or by number. Default: the null condition.")
    ] = None,
    prior: PriorFolder = Path("runs/prior/model"),
    tokenizer: Tokenizer = Path("runs/tokenizer/model"),
    out: Annotated[
        Path, typer.Option(help="Image file to write, in the format of its name: before, mask and after.")
    ] = Path("edited.png"),
    background: Annotated[
        str, typer.Option(help="What shows through where the image or the mask is transparent: a colour.")
    ] = "white",
    top_k: TopK = None,
    top_p: TopP = None,
    cfg_scale: CfgScale = None,
    seed: Seed = 0,
) -> None:
    """Resample a part of an image."""
    from rqgen.sampling import SamplingParams

    from .edit import EditRequest, edit_image

    request = EditRequest(
        kind=kind,
        image=image,
        mask=mask,
        label=label,
        prior=prior,
        tokenizer=tokenizer,
        out=out,
        params=SamplingParams(top_k=top_k, top_p=top_p, cfg_scale=cfg_scale, seed=seed),
        background=background,
    )
    edit_image(request)
    typer.echo(f"before, mask and after: {out}")


@app.command()
def evaluate(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="A folder with tokenizer/ and prior/, such as the demo's; or of one training, or one model.",
        ),
    ],
    overrides: Overrides = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(help="A metric by name, see `rqgen list metrics`; may be repeated. Default: all that fit."),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Samples to draw. Default: sampling.count of the settings, 500.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer, for a prior that lies elsewhere.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="A YAML file of settings, see `rqgen config evaluate`.")] = None,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("evaluation.json"),
) -> None:
    """Judge models by every metric that fits: a table, and JSON with all that the numbers depend on."""
    from .evaluate import evaluate_folder, report

    content = evaluate_folder(
        run, out, metrics=metric, count=count, tokenizer=tokenizer, config=config, overrides=overrides or ()
    )
    for line in report(content):
        typer.echo(line)
    typer.echo(f"\n{out}")


@app.command("list")
def list_registries(
    kind: Annotated[
        str | None, typer.Argument(metavar="[systems|sources|metrics|recipes]", help="Default: all of them.")
    ] = None,
) -> None:
    """List systems, data sources, metrics and recipes, with their options."""
    from .listing import listing

    for line in listing(kind):
        typer.echo(line)


@convert_app.command("var")
def convert_var(
    vae: Annotated[Path, typer.Option(help="The published tokenizer's state dict (.pth).")],
    var: Annotated[Path, typer.Option(help="The published prior's state dict (.pth).")],
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to write tokenizer/ and prior/ into.")],
    config: Annotated[
        Path | None, typer.Option(help="JSON with the constructors' arguments. Default: the models for 256x256.")
    ] = None,
) -> None:
    """A published VAR and its tokenizer into our format."""
    from .transfer import convert_published_var

    convert_published_var(vae, var, config, destination)
    typer.echo(f"tokenizer and prior: {destination}")


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
    system: System = None,
    config: Config = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Of both trainings and the samples. Default: that of the settings, 0.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for figures, metrics.json and both models.")] = Path("runs/demo"),
) -> None:
    """Train both stages on handwritten digits and sample what they learned (a few minutes on two cores)."""
    from rich.console import Console

    from .demo import load_demo, run_demo
    from .settings import find_config

    loaded = load_demo(seed, overrides or (), system=system or DEFAULT, config=find_config(config))
    metrics = run_demo(loaded, out, console=Console())
    typer.echo(
        f"held-out reconstruction error {metrics['reconstruction_mse']:.4f}; "
        f"a classifier of real digits recognises {metrics['sample_accuracy']:.1%} of the sampled ones "
        f"and {metrics['classifier_test_accuracy']:.1%} of real held-out ones; "
        f"{metrics['seconds']['total']:.0f} s. Look at {out / 'samples.png'}"
    )


@app.command()
def scaling(
    overrides: Overrides = None,
    config: Config = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a trained multi-scale VQ-VAE. Default: one is trained first.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the table, the figure and all models.")] = Path("runs/scaling"),
    resume: Annotated[bool, typer.Option(help="Go on with the run in the folder: finished models are kept.")] = False,
) -> None:
    """Train VARs of several sizes for equal tokens and fit power laws to their test loss and token error."""
    from rich.console import Console

    from rqgen.files import claim_folder
    from rqgen.report import power_of_ten

    from .scaling import load_scaling, run_scaling
    from .settings import find_config

    with claim_folder(out):
        pass  # tried before the tokenizer is read
    loaded = load_scaling(find_config(config), overrides or (), tokenizer)
    result = run_scaling(loaded, out, tokenizer=tokenizer, resume=resume, console=Console())
    for law in result["laws"]:
        beta = power_of_ten(law["log_beta"])
        typer.echo(f"{law['title']}: ({beta} N)^{law['alpha']:.4f}, correlation {law['correlation']:.4f}")
    typer.echo(f"table and figure of {len(result['members'])} sizes: {out / 'scaling.csv'}, {out / 'scaling.png'}")


@app.command()
def config(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[COMMAND] [KEY=VALUE]...",
            help="train tokenizer (the default), train prior, encode, evaluate, demo or scaling; then settings.",
        ),
    ] = None,
    system: System = DEFAULT,
    config: Config = None,
) -> None:
    """Every setting of a command: its help, its default and its value, as a YAML file for --config."""
    from .explain import explain

    typer.echo(explain(words or [], system=system, config=config), nl=False)


@app.command()
def check() -> None:
    """What is installed, which libraries loaded, and why not."""
    from .check import installation_report

    for line in installation_report():
        typer.echo(line)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line and exits: 0, 2 for wrong usage, 1 after one line that says what went wrong, 130 (Ctrl-C)
    or 143 (SIGTERM) after one that says how to resume."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Pillow's warnings name no file; what it cannot read is refused by name.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    with _signals() as interrupts:
        try:
            app(arguments)
        except Exception as error:
            if interrupts:  # by now another error, such as of an import that was cut short
                _stop(interrupts[0], "")
            if os.environ.get("RQGEN_DEBUG"):
                raise
            print(f"error: {_message(error)}", file=sys.stderr)
            sys.exit(1)
        except _Interrupted as error:
            _stop(interrupts[0] if interrupts else signal.SIGINT, str(error))


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM raise KeyboardInterrupt; yields which came. Where the caller ignores a signal (nohup), or has
    its own handler, or this is not the main thread, nothing changes. Errors of other threads are not printed."""
    came: list[int] = []

    def interrupt(number: int, frame: Any) -> None:
        came.append(number)
        raise KeyboardInterrupt

    replaced = {}
    if threading.current_thread() is threading.main_thread():
        for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
            if signal.getsignal(number) == usual:
                replaced[number] = signal.signal(number, interrupt)
    threads, threading.excepthook = threading.excepthook, _thread_failed
    try:
        yield came
    finally:
        threading.excepthook = threads
        for number, before in replaced.items():
            signal.signal(number, before)


def _stop(number: int, hint: str) -> NoReturn:
    what = "terminated" if number == signal.SIGTERM else "interrupted"
    print(f"{what}: {hint or 'the same command starts over'}", file=sys.stderr)
    sys.exit(128 + number)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename or 'standard output'}: {error.strerror}"
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__


def _thread_failed(arguments: threading.ExceptHookArgs) -> None:
    # TensorBoard's thread hands its error on, and this thread reports it.
    if os.environ.get("RQGEN_DEBUG"):
        threading.__excepthook__(arguments)
