"""Train both stages on handwritten digits in a plain PyTorch loop, then sample.

python examples/train_and_sample.py --out digits.png         # a few minutes; `rqgen demo` trains longer and better
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import rqgen
from rqgen.data import image_grid, save_image
from rqgen.models.transformer import TransformerConfig
from rqgen.quantizers import QuantizerConfig


def fit(name: str, model: nn.Module, loss_of_batch: Callable[[], Tensor], steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        loss = loss_of_batch()  # in the tokenizer this also updates the codebook, a moving average
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(f"{name} {step}: loss {loss:.4f}")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train both stages on digits and sample.")
    parser.add_argument("--steps", type=int, default=600, help="of each stage")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("digits.png"))
    args = parser.parse_args(arguments)

    torch.manual_seed(0)
    digits = load_digits()
    images = F.interpolate(torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1, scale_factor=2)
    labels = torch.tensor(digits.target)

    vae = rqgen.RQVAE(
        rqgen.RQVAEConfig(
            image_channels=1, resolution=16, base_channels=16, channel_multipliers=[1, 2, 2], num_res_blocks=1,
            attention_resolutions=[], z_channels=16, embed_dim=16, norm_groups=8, code_shape=[4, 4, 4],
            quantizer=QuantizerConfig(codebook_size=128, depth=4),
        )
    )  # fmt: skip
    fit("tokenizer", vae, lambda: vae.loss(images[torch.randint(len(images), (args.batch_size,))]).total, args.steps)

    codes = vae.eval().encode(images)
    stack = TransformerConfig(layers=2, heads=4)
    prior = rqgen.RQTransformer(
        rqgen.RQTransformerConfig(
            code_shape=(4, 4, 4), codebook_size=128, code_dim=16, embed_dim=128, spatial=stack, depth=stack,
            condition="class", condition_vocab_size=10,
        ),
        vae.codebooks,
    )  # fmt: skip

    def prior_loss() -> Tensor:
        rows = torch.randint(len(codes), (args.batch_size,))
        logits = prior(codes[rows], labels[rows]).logits  # (B, h, w, D, K)
        return F.cross_entropy(logits.flatten(0, -2), codes[rows].flatten())

    fit("prior", prior, prior_loss, args.steps)
    samples = rqgen.generate(prior.eval(), vae, condition=list(range(10)) * 4, seed=0, top_p=0.95)
    save_image(image_grid(samples.images, columns=10), args.out, scale=4)


if __name__ == "__main__":
    main()
