"""What published checkpoints have in common: pickles of tensors, and VQ-GAN's names of its encoder and decoder."""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

# Our names to the published ones, applied in this order.
RENAMES = (
    (r"^to_latents\.", "quant_conv."),
    (r"^from_latents\.", "post_quant_conv."),
    (r"^encoder\.levels\.(\d+)\.resample\.", r"encoder.down.\1.downsample."),
    (r"^encoder\.levels\.", "encoder.down."),
    (r"^decoder\.levels\.(\d+)\.resample\.", r"decoder.up.\1.upsample."),
    (r"^decoder\.levels\.", "decoder.up."),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.middle\.0\.", ".mid.block_1."),
    (r"\.middle\.1\.", ".mid.attn_1."),
    (r"\.middle\.2\.", ".mid.block_2."),
    (r"\.shortcut\.", ".nin_shortcut."),
    (r"\.query\.", ".q."),
    (r"\.key\.", ".k."),
    (r"\.value\.", ".v."),
    (r"\.output\.", ".proj_out."),
)


def unpickle(path: Path) -> Any:
    """What a torch checkpoint holds: tensors and plain values, nothing else. ValueError for anything but that."""
    try:
        # Files of the older, non-zip layout cannot be mapped into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: refused: damaged, or holds more than tensors and plain values ({reason})") from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{path}: not a readable torch checkpoint ({str(error).splitlines()[:1]})") from error


def published_name(name: str, num_levels: int) -> str:
    """The published name of one of our encoder, decoder or 1x1 convolution tensors."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    # The published decoder numbers its levels from the finest, although it runs from the coarsest.
    return re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{num_levels - 1 - int(m[1])}", name)
