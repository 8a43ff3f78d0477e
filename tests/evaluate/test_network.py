"Time and energy of a round, and the published rows."
import numpy as np
import pytest

from fedmpqkd.core.streams import rng
from fedmpqkd.evaluate.costs import Power
from fedmpqkd.evaluate.network import PUBLISHED, Link, recomputed, round_cost, spent_until, straggling_links


def test_a_round_lasts_as_long_as_its_slowest_client_and_costs_what_all_cost():
    "8 MB at 4 and at 2 Mbit/s are 16 and 32 s; with 20 % loss on the second 40; down 1 s; 3, 1 and 5 W."
    links = [Link(4e6, 64e6), Link(2e6, 64e6, latency=.5, loss=.2)]
    cost = round_cost([8e6, 8e6], [8e6, 8e6], [10, 2], links, Power(3, 1, 5))
    assert (cost.slowest, cost.seconds, cost.communication) == (1, pytest.approx(40 + 1.25 + .5 + 2), 41.25)
    assert cost.joules == pytest.approx(3 * 16 + 1 * 1 + 5 * 10 + 3 * 40 + 1 * 1.25 + 5 * 2)


def test_computing_may_be_what_takes_longest():
    cost = round_cost([1, 1], [1, 1], [100, 1], [Link(), Link(1e3, 1e3)], Power())
    assert cost.slowest == 0 and cost.seconds == pytest.approx(100, abs=1e-3)


@pytest.mark.parametrize('share', [0, .25, 1])
def test_stragglers_are_as_many_and_as_slow_as_asked(share):
    links = straggling_links(40, share, rng(3, 'dropout'))
    slow = [link for link in links if link.up != 20e6]
    assert len(slow) == 40 * share and all(.5e6 <= link.up <= 2e6 for link in slow)
    assert links == straggling_links(40, share, rng(3, 'dropout'))


def test_five_published_rows_follow_from_their_payloads_and_one_does_not():
    found = recomputed(PUBLISHED, Link(up=20e6), Power(1.5, 0, 4))
    assert (found.communication + found.computation).round(2).tolist() == found.seconds.tolist()
    assert found.time_agrees.tolist() == found.energy_agrees.tolist() == [True] * 5 + [False]
    row = found.loc['Fed-FSTQ']
    assert (round(row.air, 2), round(row.energy, 2)) == (61.44, 115.56)


def test_what_was_spent():
    assert spent_until([.1, .5, .4, .6], [3, 2, 1, 9], .5) == 5
    assert spent_until([.9, .8], [1, 1], .1, smaller=True) is None
    assert spent_until([], [], .1) is None


@pytest.mark.parametrize('call, why', [
    (lambda: Link(up=0), 'positive'), (lambda: Link(latency=-1), 'latency'), (lambda: Link(loss=1), 'loss'),
    (lambda: Link().seconds(-1), 'fewer than 0'),
    (lambda: round_cost([], [], [], [], Power()), 'no duration'),
    (lambda: straggling_links(3, 2, np.random.default_rng(0)), 'share=2')])
def test_what_is_refused(call, why):
    with pytest.raises(ValueError, match=why): call()
