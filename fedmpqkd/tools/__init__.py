"""Doors to the outside: papermill."""
from fedmpqkd._names import rooms

__getattr__ = rooms(__name__, __file__)
