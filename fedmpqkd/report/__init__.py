"""From records to tables, figures, captions and verdicts."""
from fedmpqkd._names import rooms

__getattr__ = rooms(__name__, __file__)
