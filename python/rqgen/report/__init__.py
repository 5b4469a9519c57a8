"""Pictures of what was learnt."""

from .figures import draw_coarse_to_fine, draw_code_usage, draw_edits, draw_losses, draw_reconstructions, draw_samples
from .sampling_speed import draw_sampling_speed, draw_systems
from .scaling import draw_scaling, power_of_ten

__all__ = [
    "draw_coarse_to_fine",
    "draw_code_usage",
    "draw_edits",
    "draw_losses",
    "draw_reconstructions",
    "draw_samples",
    "draw_sampling_speed",
    "draw_scaling",
    "draw_systems",
    "power_of_ten",
]
