"""The progress bar of a training run."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)


def training_progress(console: Console | None) -> Progress:
    """A bar with loss, images per second, time left and codes in use; tasks need the fields ``loss``, ``speed``
    and ``usage``.

    ``console`` None: nothing is drawn.
    """
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} images/s"),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[usage]}"),
        console=console,
        disable=console is None,
    )
