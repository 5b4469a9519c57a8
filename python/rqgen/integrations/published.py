"""The foreign modules that ours derive from, as far as ours use them; for type checkers alone.

At run time each of these is `Accelerated`: a foreign class is never imported, and joins ours in `swap_class`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from .swap import Accelerated

if TYPE_CHECKING:

    class VQEmbedding(Accelerated):
        """A codebook of kakaobrain's RQ-VAE."""

        weight: Tensor  # (K + 1, C), the last row for padding
        n_embed: int
        decay: float
        eps: float
        restart_unused_codes: bool
        cluster_size_ema: Tensor  # (K,)
        embed_ema: Tensor  # (K, C)

        def compute_distances(self, inputs: Tensor) -> Tensor: ...
        def embed(self, idxs: Tensor) -> Tensor: ...
        def _tile_with_noise(self, x: Tensor, target_n: int) -> Tensor: ...
        def _update_embedding(self) -> None: ...

    class Codebooks(Protocol):
        """A ModuleList of `VQEmbedding`."""

        def __getitem__(self, index: int, /) -> VQEmbedding: ...
        def __iter__(self) -> Iterator[VQEmbedding]: ...
        def __len__(self) -> int: ...

    class RQBottleneck(Accelerated):
        """The quantizer of kakaobrain's RQ-VAE."""

        codebooks: Codebooks
        code_shape: Sequence[int]
        shared_codebook: bool

        def to_code_shape(self, x: Tensor) -> Tensor: ...
        def to_latent_shape(self, x: Tensor) -> Tensor: ...
        def quantize(self, x: Tensor) -> tuple[list[Tensor], Tensor]: ...
        def get_soft_codes(self, x: Tensor, temp: float = 1.0, stochastic: bool = False) -> tuple[Any, Tensor]: ...

    class TransformerSettings(Protocol):
        """The config of kakaobrain's RQ-Transformer."""

        input_emb_vqvae: bool
        head_emb_vqvae: bool

    class RQTransformer(Accelerated):
        """Kakaobrain's RQ-Transformer."""

        config: TransformerSettings
        block_size: tuple[int, int, int]
        vocab_size: Sequence[int]
        block_size_cond: int
        vocab_size_cond: int
        pos_emb_d: Tensor

        def embed_with_model_aux(self, xs: Tensor, model_aux: Any) -> Tensor: ...
        def compute_loss(self, logits: Tensor, targets: Any, use_soft_target: bool = False) -> Tensor: ...
        def compute_codebook_loss(self, logits: Tensor, targets: Any, use_soft_target: bool = False) -> Tensor: ...
        def sample(
            self,
            partial_sample: Tensor,
            model_aux: Any = None,
            cond: Tensor | None = None,
            start_loc: tuple[int, int] = (0, 0),
            temperature: float = 1.0,
            top_k: int | Sequence[int] | None = None,
            top_p: float | Sequence[float] | None = None,
            amp: bool = False,
            cached: bool = True,
            is_tqdm: bool = False,
            desc: str = "Sampling",
            fast: bool = True,
        ) -> Tensor: ...

    class Embedding(Protocol):
        """An `nn.Embedding`."""

        weight: Tensor

        def __call__(self, codes: Tensor) -> Tensor: ...

    class Refinements(Protocol):
        """The convolutions after enlarging, found by a scale's place in [0, 1]."""

        def __getitem__(self, place: float, /) -> Any: ...

    class VectorQuantizer2(Accelerated):
        """The quantizer of VAR's tokenizer."""

        vocab_size: int  # K
        Cvae: int  # C
        using_znorm: bool
        v_patch_nums: Sequence[int]
        quant_resi: Refinements
        ema_vocab_hit_SV: Tensor  # (S, K)
        record_hit: int
        beta: float
        embedding: Embedding
        prog_si: int

else:
    VQEmbedding = RQBottleneck = RQTransformer = VectorQuantizer2 = Accelerated

__all__ = ["RQBottleneck", "RQTransformer", "VQEmbedding", "VectorQuantizer2"]
