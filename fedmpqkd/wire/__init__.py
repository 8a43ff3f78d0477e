"""Bytes: the message format, compressed updates, and the contract between client and server."""
from fedmpqkd._names import rooms

__getattr__ = rooms(__name__, __file__)
