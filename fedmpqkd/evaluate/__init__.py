"""Quality, significance, cost and stress."""
from fedmpqkd._names import rooms

__getattr__ = rooms(__name__, __file__)
