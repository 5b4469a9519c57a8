"""Figures of runs and benchmarks."""

from .figures import plot_coarse_to_fine, plot_code_usage, plot_edits, plot_losses, plot_reconstructions, plot_samples
from .sampling_speed import plot_sampling_speed, plot_systems
from .scaling import plot_scaling, power_of_ten

__all__ = [
    "plot_coarse_to_fine",
    "plot_code_usage",
    "plot_edits",
    "plot_losses",
    "plot_reconstructions",
    "plot_samples",
    "plot_sampling_speed",
    "plot_scaling",
    "plot_systems",
    "power_of_ten",
]
