"""Data sets on the device, who holds what, and wrong labels."""
from fedmpqkd._names import rooms

__getattr__ = rooms(__name__, __file__)
