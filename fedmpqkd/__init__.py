"""A literate laboratory for federated learning with quantised models."""
__version__ = "0.1.0"

from fedmpqkd._names import install

install()


def __getattr__(name: str) -> object:
    "`fedmpqkd.load` and `load_model`, imported when they are asked for."
    if name in ("load", "load_model"):
        from fedmpqkd.report import frames
        return getattr(frames, name)
    raise AttributeError(f"module 'fedmpqkd' has no attribute {name!r}")
