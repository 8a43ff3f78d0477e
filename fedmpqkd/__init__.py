"""A literate laboratory for federated learning with quantised models."""
__version__ = "0.1.0"

from fedmpqkd._names import install

install()
