"""The server, the methods, the round loop and its protocols."""
from fedmpqkd._names import rooms

__getattr__ = rooms(__name__, __file__)
