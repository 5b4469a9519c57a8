"""Version of the distribution and both of its packages. pyproject.toml reads it from here."""

__version__ = "0.1.0"
