"""One client's local round: task, losses, teachers, steps."""
from fedmpqkd._names import rooms

__getattr__ = rooms(__name__, __file__)
