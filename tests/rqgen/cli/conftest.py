"""The command line, called in this process, with models that train in a second."""

import signal

import pytest

from rqgen.cli.app import main

TOKENIZER = [
    "model.base_channels=8",
    "model.channel_multipliers=[1,1,1,1]",
    "model.z_channels=8",
    "model.embed_dim=8",
    "model.quantizer.codebook_size=16",
    "loop.batch_size=16",
    "loop.optimizer.warmup_steps=2",
]
PRIOR = [
    "prior.embed_dim=16",
    "prior.spatial.layers=1",
    "prior.spatial.heads=2",
    "prior.depth.heads=2",
    "loop.batch_size=16",
    "loop.optimizer.warmup_steps=2",
]


@pytest.fixture(scope="package", autouse=True)
def interrupts():
    """Let Ctrl-C arrive: a run of tests in the background ignores it, and so would the commands that it starts."""
    before = signal.getsignal(signal.SIGINT)
    if before == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def small_tokenizer():
    """Overrides for a tokenizer run."""
    return [*TOKENIZER, "loop.checkpoint_every=2"]


@pytest.fixture(scope="session")
def small_prior():
    """Overrides for a prior run."""
    return [*PRIOR, "loop.checkpoint_every=2"]


@pytest.fixture(scope="session")
def small_demo():
    """Overrides for a demo."""
    return [
        *(f"tokenizer.{setting}" for setting in TOKENIZER),
        *(f"prior.{setting}" for setting in PRIOR),
        "tokenizer.loop.steps=12",
        "prior.loop.steps=4",
        "sampling.count=100",
    ]


@pytest.fixture(autouse=True)
def no_tracebacks(monkeypatch):
    monkeypatch.delenv("RQGEN_DEBUG", raising=False)


@pytest.fixture(scope="package")
def trained(tmp_path_factory, small_tokenizer, small_prior):
    """Folders of a tokenizer and of a class-conditional prior, each trained for three steps."""
    folder = tmp_path_factory.mktemp("trained")
    tokenizer, prior = folder / "tokenizer", folder / "prior"
    for arguments in (
        ["train", "tokenizer", "--out", str(tokenizer), *small_tokenizer, "loop.steps=3"],
        ["train", "prior", "--out", str(prior), f"tokenizer={tokenizer / 'model'}", *small_prior, "loop.steps=3"],
    ):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert not left.value.code
    return tokenizer, prior
