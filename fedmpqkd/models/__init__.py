"""Networks by name, and which of their weights are quantised."""
from fedmpqkd._names import rooms

__getattr__ = rooms(__name__, __file__)
