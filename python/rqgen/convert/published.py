"""Common parts of published checkpoints: whose tensors they are, and VQ-GAN's names of its encoder and decoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

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


def expect_model(state_dict: Mapping[str, Tensor], expected: str, path: Path) -> None:
    """Raise ValueError if the names of the tensors are clearly those of another model than `expected`, which is one
    of `KNOWN_MODELS`."""
    for pattern, model in KNOWN_MODELS:
        if any(re.match(pattern, name) for name in state_dict):
            if model != expected:
                raise ValueError(f"{path}: expected the tensors of {expected}, got those of {model}")
            return


KAKAOBRAIN_RQVAE, KAKAOBRAIN_PRIOR = "kakaobrain's RQ-VAE", "kakaobrain's RQ-Transformer"
VAR_TOKENIZER, VAR_PRIOR = "VAR's tokenizer", "a VAR"
# A name that only this model has; the first that is found counts.
KNOWN_MODELS = (
    (r"module\.", "a model inside DataParallel (save its .module)"),
    (r"_orig_mod\.", "a compiled model (save its ._orig_mod)"),
    (r"quantizer\.codebooks\.\d+\.", KAKAOBRAIN_RQVAE),
    (r"(body|head)_transformer\.", KAKAOBRAIN_PRIOR),
    (r"quantize\.(quant_resi|ema_vocab_hit_SV)\b", VAR_TOKENIZER),
    (r"blocks\.\d+\.attn\.mat_qkv\.", VAR_PRIOR),
    (r"quantize\.embedding\.", "a VQ-GAN"),
    (r"(quantizer\.(codebook|refinements)|spatial_transformer\.)", "a model of rqgen, which needs no conversion"),
    (r"model\.diffusion_model\.", "a latent diffusion model"),
    (r"(transformer\.h|model\.layers)\.\d+\.", "a language model"),
    (r"(visual|text_model|vision_model)\.", "a CLIP model"),
    (r"layer\d\.\d+\.conv\d\.", "a ResNet"),
    (r"features\.\d+\.", "a VGG or another classifier of torchvision"),
)


def published_name(name: str, num_levels: int) -> str:
    """Return the published name of one of our encoder, decoder or 1x1 convolution tensors."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    # The published decoder numbers its levels from the finest, although it runs from the coarsest.
    return re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up.{num_levels - 1 - int(m[1])}", name)
