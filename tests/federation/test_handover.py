"""A run that one machine begins and another ends says so."""
import pytest

from fedmpqkd.core import machine
from fedmpqkd.core.journal import Journal
from fedmpqkd.data.images import load_dataset
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.run import run


def stopping_after(last):
    def stop(line):
        if line['round'] == last: raise KeyboardInterrupt

    stop.resume = lambda done: None
    return stop


def test_the_record_names_who_computed_earlier_rounds(tmp_path, monkeypatch):
    data = load_dataset('digits').subset(train=80, test=20)
    c = make_config('fedavg', model='cnn', clients=2, rounds=3, partition='iid', lr=0.1, batch_size=16)
    journal = Journal(tmp_path, 'g', 'n', 'id')
    for last, name in ((1, 'the first'), (2, 'the second')):
        monkeypatch.setattr(machine, '_cpu_name', lambda name=name: name)
        with pytest.raises(KeyboardInterrupt): run(c, data, journal, workers=1, progress=stopping_after(last))
    monkeypatch.setattr(machine, '_cpu_name', lambda: 'the second')
    handed = run(c, data, journal, workers=1)
    whole = run(c, data, workers=1)
    assert handed['environment']['device'] == 'the second'
    first = machine.machine_name(machine.environment() | dict(device='the first'))
    assert handed['environment']['earlier'] == [first]
    assert 'earlier' not in whole['environment']
    assert [x['loss'] for x in handed['curve']] == [x['loss'] for x in whole['curve']]
