"Trials of a finished run: means by hand, and the record against plain networks, one image at a time."
import json

import pytest
import torch
from samples import dataset, pool_of, states_of

from fedmpqkd.evaluate.attacks import fgsm, to_input
from fedmpqkd.evaluate.corruptions import chosen_images, corrupt
from fedmpqkd.federation.trials import attack_all, stress_test, summarize_corruptions

torch.set_num_threads(1)


@pytest.fixture(scope='module')
def data():
    return dataset()


def test_means_by_hand():
    table = dict(fog={'1': 80.0, '3': 60.0}, snow={'1': 70.0, '3': 50.0}, fair={'1': 91.0, '3': 92.0})
    reference = dict(fog={'1': 85.0, '3': 75.0}, snow={'1': 80.0, '3': 60.0}, fair={'1': 90.0, '3': 92.0})
    out = summarize_corruptions(table, 90, reference, 91)
    assert out['mca'] == pytest.approx(443 / 6) and out['severity_3'] == pytest.approx(202 / 3)
    assert out['mce'] == pytest.approx(100 * (60 / 40 + 80 / 60 + 17 / 18) / 3) and out['mce_of'] == 3
    assert out['relative_mce'] == pytest.approx(100 * (40 / 22 + 60 / 42) / 2)
    assert out['relative_mce_of'] == 2  # fair: nothing was lost
    assert summarize_corruptions(table, 90) == dict(mca=out['mca'], severity_3=out['severity_3'])
    assert summarize_corruptions(dict(fog={'1': 80.0}), 90)['severity_3'] is None


def test_the_stress_test_counts_right(data):
    "Against the plain networks, one image at a time; with one worker and with three; and as JSON."
    pools = [pool_of(data, n) for n in (1, 3)]
    states = states_of(pools[0], data)
    one, three = (stress_test(pool, states, images=60, corruptions=('contrast', 'fog'), severities=(1, 5),
                              cache=False) for pool in pools)
    assert one == three == json.loads(json.dumps(one))
    assert one['images'] == 60 and one['diverged'] == []
    assert one['corruption_set'] == 'pieces-C (rebuilt, 2 of 19, severities 1 5)'

    index, model, chosen = chosen_images(data, 60), pools[0].replica.model.eval(), {}
    x, y = data.test_x[index].float() / 255, data.test_y[index]

    def right(z: torch.Tensor) -> float:
        guesses = [int(model(to_input(z[i:i + 1], data.mean, data.std)).argmax()) for i in range(60)]
        return 100 * sum(guess == int(label) for guess, label in zip(guesses, y, strict=True)) / 60

    def close(value: float):
        "Folding may move one image over a border."
        return pytest.approx(value, abs=100 / 60 + 1e-6)

    for name in ('fp', 'deployed'):
        pools[0].replica.load(states[name])
        assert one['clean'][name] == close(right(x))
        for e in (1, 2, 4, 8):
            moved = fgsm(model, x, y, e / 255, data.mean, data.std)
            assert one['attacks'][name][f'fgsm {e}/255'] == close(right(moved))
            if (name, e) == ('fp', 2): chosen['moved'] = moved
        if name == 'deployed':
            assert one['attacks'][name]['transfer fgsm 2/255'] == close(right(chosen['moved']))
        foggy = corrupt(data.test_x[index], 'fog', 5).float() / 255
        assert one['corruptions'][name]['fog']['5'] == close(right(foggy))
    assert 'transfer fgsm 2/255' not in one['attacks']['fp']
    parts = [attack_all(pool, states, index, 0, batch=20) for pool in pools]
    assert parts[0] == parts[1]
    assert parts[0]['fp']['fgsm 2/255'] == close(one['attacks']['fp']['fgsm 2/255'])
    for pool in pools: pool.close()


def test_what_may_be_left_out(data):
    pool = pool_of(data, 1)
    states = states_of(pool, data)
    attacks = stress_test(pool, dict(deployed=states['deployed']), 'attacks', images=20)
    assert set(attacks) == {'images', 'seed', 'diverged', 'clean', 'attacks'}
    assert set(attacks['attacks']) == {'deployed'}

    corruptions = stress_test(pool, dict(deployed=states['deployed']), 'corruptions', images=20,
                              corruptions=['contrast'], cache=False)
    assert set(corruptions['corruption_means']['deployed']) == {'mca', 'severity_3'}

    broken = {n: torch.full_like(t, float('inf')) if t.is_floating_point() else t
              for n, t in states['fp'].items()}
    half = stress_test(pool, dict(deployed=broken, fp=states['fp']), 'attacks', images=20)
    assert half['diverged'] == ['deployed'] and set(half['attacks']) == {'fp'}
    with pytest.raises(ValueError, match="must be 'attacks', 'corruptions' or 'all'"):
        stress_test(pool, states, 'none')
    pool.close()
