"""Quantisers and bit allocation, without networks and without a federation."""
from fedmpqkd._names import rooms

__getattr__ = rooms(__name__, __file__)
