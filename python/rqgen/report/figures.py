"""Figures of a run. Each function writes one image, in the format of its name, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from rqgen.checks import check_integer
from rqgen.data.grid import image_grid, save_image
from rqgen.models import Tokenizer

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")


def plot_reconstructions(images: Tensor, reconstructions: Tensor, path: str | Path, *, columns: int = 10) -> None:
    """Plot rows of images, each above a row of their reconstructions; both (N, channels, H, W) in [-1, 1]."""
    _check_some(images, "images")
    columns = check_integer(columns, "columns", 1)
    if images.shape != reconstructions.shape:
        raise ValueError(f"reconstructions: expected shape {tuple(images.shape)}, got {tuple(reconstructions.shape)}")
    count = len(images)
    rows = [
        (image_grid(part, columns=len(part)), label)
        for start in range(0, count, columns)
        for part, label in (
            (images[start : start + columns], "image"),
            (reconstructions[start : start + columns], "reconstruction"),
        )
    ]
    _stack_rows(rows, "Held-out images and their reconstructions", path)


@torch.no_grad()
def plot_coarse_to_fine(vae: Tokenizer, images: Tensor, path: str | Path) -> None:
    """Plot each image decoded from depths 1..1, 1..2, ... 1..D (or scales), then the image itself (figure 5 of the
    RQ-VAE's paper)."""
    codes = vae.encode(images)
    kind, count = f"{vae.layout.axis}s", vae.layout.levels
    rows = [
        (image_grid(vae.decode_partial(codes, upto), columns=len(images)), f"{kind} 1..{upto}")
        for upto in range(1, count + 1)
    ]
    rows.append((image_grid(images, columns=len(images)), "image"))
    _stack_rows(rows, f"Decoded from the first {kind}", path)


def plot_edits(edits: Sequence[tuple[str, Tensor, Tensor, Tensor]], path: str | Path) -> None:
    """Plot three rows for each edit (name, images, mask, results): the images, the images with the masked part grey,
    and the results. Images (N, channels, H, W) in [-1, 1], mask bool (H, W) or (N, H, W)."""
    if not edits:
        raise ValueError("edits: expected at least one, got none")
    rows = []
    for index, (name, images, mask, results) in enumerate(edits):
        _check_some(images, f"edits[{index}]: images")
        if results.shape != images.shape:
            expected = tuple(images.shape)
            raise ValueError(f"edits[{index}]: results: expected shape {expected}, got {tuple(results.shape)}")
        shapes = (tuple(images.shape[2:]), (len(images), *images.shape[2:]))
        if mask.dtype != torch.bool or tuple(mask.shape) not in shapes:
            found = f"{mask.dtype} {tuple(mask.shape)}"
            raise ValueError(f"edits[{index}]: mask: expected bool {shapes[0]} or {shapes[1]}, got {found}")
        masked = torch.where(mask.expand(len(images), *images.shape[2:]).unsqueeze(1), 0.0, images)
        for part, label in ((images, "before"), (masked, "mask"), (results, name)):
            rows.append((image_grid(part, columns=len(part)), label))
    _stack_rows(rows, "Edits", path)


def plot_code_usage(counts_dk: Tensor, path: str | Path, *, axis: str = "depth") -> None:
    """Plot the use of each code at each depth (or level of ``axis``), most used first (figure 6 of the RQ-VAE's paper);
    counts (D, K)."""
    if counts_dk.ndim != 2 or 0 in counts_dk.shape or bool((counts_dk < 0).any()):
        raise ValueError(f"counts: expected numbers >= 0, (levels, codes), got {tuple(counts_dk.shape)}")
    panels = len(counts_dk)
    figure = Figure(figsize=(8, 1.7 * panels + 0.6), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for d, (panel, counts_k) in enumerate(zip(axes, counts_dk, strict=True)):
        share_k = (counts_k.double() / counts_k.sum().clamp(min=1)).sort(descending=True).values
        panel.bar(range(len(share_k)), (100 * share_k).tolist(), width=1.0, color=COLOURS[d % len(COLOURS)])
        used = int((counts_k > 0).sum())
        tidy(panel, f"{axis} {d + 1}: {used} of {len(counts_k)} codes used")
        panel.set_ylabel("% of uses")
    axes[-1].set_xlabel("codes, most used first")
    save_figure(figure, path)


def plot_losses(histories: Mapping[str, Sequence[Mapping[str, float]]], path: str | Path) -> None:
    """Plot a panel for each training run: its logged loss terms against the step. ``histories`` maps a run's name
    to its records (see `rqgen.training.TrainingResult`)."""
    if not histories:
        raise ValueError("histories: expected at least one run, got none")
    for name, records in histories.items():
        if not all("step" in record for record in records):
            raise ValueError(f"histories: {name}: expected a step in each record")
    figure = Figure(figsize=(5.5 * len(histories), 4), layout="constrained")
    axes = figure.subplots(1, len(histories), squeeze=False)[0]
    for axis, (name, records) in zip(axes, histories.items(), strict=True):
        terms = list(dict.fromkeys(key for record in records for key in record if _is_loss(key)))
        for term, colour in zip(terms, cycle(COLOURS), strict=False):
            points = [(record["step"], record[term]) for record in records if term in record]
            label = term.removeprefix("loss/").replace("_", " ")
            axis.plot(*zip(*points, strict=True), label=label, color=colour, linewidth=1.5)
        values = [record[term] for record in records for term in terms if term in record]
        # A logarithmic axis helps over decades, and only adds clutter below.
        if values and min(values) > 0 and max(values) > 20 * min(values):
            axis.set_yscale("log")
        tidy(axis, name)
        axis.set_xlabel("step")
        if terms:
            axis.legend(frameon=False)
    save_figure(figure, path)


def plot_samples(images: Tensor, path: str | Path, *, columns: int, row_labels: Sequence[str] = ()) -> None:
    """Write a grid of samples (N, channels, H, W) in [-1, 1], ``columns`` per row, such as a class per row with its
    name as the label."""
    save_image(image_grid(images, columns=columns, row_labels=row_labels), Path(path), scale=2)


def _check_some(images: Tensor, name: str) -> None:
    if images.ndim != 4 or len(images) == 0 or images.shape[1] not in (1, 3):
        expected = "(N, channels, H, W), N >= 1, 1 or 3 channels"
        raise ValueError(f"{name}: expected {expected}, got {tuple(images.shape)}")


def _is_loss(key: str) -> bool:
    return key not in ("step", "learning_rate") and not key.startswith(("codes_used", "perplexity"))


def _stack_rows(rows: Sequence[tuple[Tensor, str]], title: str, path: str | Path) -> None:
    """Plot image grids of equal height below each other, each with its label at the left."""
    height, width = rows[0][0].shape[1:]
    figure = Figure(figsize=(1.4 + 8, 0.4 + 8 * len(rows) * height / width), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (sheet_chw, label) in zip(axes, rows, strict=True):
        pixels = sheet_chw.expand(3, -1, -1).permute(1, 2, 0).numpy()
        axis.imshow(pixels, interpolation="nearest", aspect="equal")
        axis.set_ylabel(label, rotation=0, horizontalalignment="right", verticalalignment="center")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    save_figure(figure, path)


def tidy(axis: Axes, title: str) -> None:
    """Put the title at the left and remove the frame at the top and right."""
    axis.set_title(title, loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write an image, in the format of its name."""
    # Agg without pyplot: no window system, no global state.
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(110)
    canvas.draw()
    pixels_hwc = np.array(canvas.buffer_rgba())[:, :, :3]
    save_image(torch.from_numpy(pixels_hwc).permute(2, 0, 1), Path(path))
