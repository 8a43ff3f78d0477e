"""The speed of all this, next to a bare loop and Flower."""
from fedmpqkd._names import rooms

__getattr__ = rooms(__name__, __file__)
