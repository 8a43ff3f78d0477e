"""Presets, sweeps, tuning, and reading records back."""
from fedmpqkd._names import rooms

__getattr__ = rooms(__name__, __file__)
