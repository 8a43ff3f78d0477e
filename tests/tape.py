"""What tests of whole runs share: a meter that keeps what it counts, and curves without their times."""
import dataclasses
import functools

from fedmpqkd.data.images import load_dataset
from fedmpqkd.wire.format import Meter


@functools.cache
def digits(train: int, test: int):
    "Digits, cut to size; each size once."
    return load_dataset('digits').subset(train=train, test=test)


@dataclasses.dataclass
class Tape(Meter):
    "A meter that keeps what it has counted: (direction, client, bytes)."
    tape: list = dataclasses.field(default_factory=list)

    def add(self, direction, data, client):
        self.tape.append((direction, client, data))
        return super().add(direction, data, client)


def timeless(curve: list[dict]) -> list[dict]:
    "A curve without what the clock says."
    clock = ('phases', 'seconds', 'seconds_training')
    return [{k: v for k, v in line.items() if k not in clock} for line in curve]


@dataclasses.dataclass
class Played:
    "A finished run: its parts, its curve, everything that crossed."
    run: object
    curve: list

    @property
    def timeless(self) -> list[dict]: return timeless(self.curve)
