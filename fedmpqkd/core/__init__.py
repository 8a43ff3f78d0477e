"""What a run is: configuration, named randomness, records that are never half-written, the machine."""
from fedmpqkd._names import rooms

__getattr__ = rooms(__name__, __file__)
