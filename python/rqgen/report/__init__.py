"""Pictures of what was learnt."""

from .figures import draw_coarse_to_fine, draw_code_usage, draw_losses, draw_reconstructions, draw_samples

__all__ = [
    "draw_coarse_to_fine",
    "draw_code_usage",
    "draw_losses",
    "draw_reconstructions",
    "draw_samples",
]
