"Attacks against closed forms and torchattacks, and through the deployed network."
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import dataset, pool_of, states_of

from fedmpqkd.evaluate.attacks import attack, count_right, fgsm, input_gradient, live, pgd, to_input

torch.set_num_threads(1)
few = settings(max_examples=10, deadline=None, derandomize=True)
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@pytest.fixture(scope='module')
def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 2), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        torch.nn.Conv2d(8, 8, 3, 2), torch.nn.ReLU(),
        torch.nn.Flatten(), torch.nn.Linear(8 * 49, 10)).eval()


@pytest.fixture(scope='module')
def data():
    return dataset()


def batch(seed: int, n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 32, 32, generator=g), torch.randint(0, 10, (n,), generator=g)


# ---- on plain networks

@pytest.mark.parametrize('levels', [0, 1, 2, 4, 8, 255])
def test_attacks_stay_in_the_box_and_in_range(network, levels):
    x, y = batch(levels)
    x[0], x[1] = 0, 1
    for moved in (fgsm(network, x, y, levels / 255, MEAN, STD), pgd(network, x, y, levels / 255, MEAN, STD),
                  pgd(network, x, y, levels / 255, MEAN, STD, start=torch.Generator().manual_seed(0))):
        assert (moved - x).abs().max() <= levels / 255 + 1e-7
        assert moved.min() >= 0 and moved.max() <= 1 and not moved.requires_grad
        assert levels or torch.equal(moved, x)


@few
@given(st.integers(0, 10**6), st.integers(1, 8))
def test_a_linear_margin_rises_by_the_dual_norm(seed, levels):
    "Two classes, x far from the borders: the margin's rise is epsilon times the sum of |w_1 - w_0| / std."
    g = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2)).double().eval()
    with torch.no_grad(): model[1].weight.copy_(torch.randn(2, 48, generator=g))
    x, y = 0.25 + 0.5 * torch.rand(3, 3, 4, 4, generator=g, dtype=torch.float64), torch.tensor([0, 1, 0])

    def margin(z: torch.Tensor) -> torch.Tensor:
        "How far the wrong class is ahead."
        return (model(to_input(z, MEAN, STD)) * torch.tensor([[-1, 1], [1, -1], [-1, 1]])).sum(1)

    difference = (model[1].weight[1] - model[1].weight[0]).view(3, 16)
    v = difference / torch.tensor(STD, dtype=torch.float64)[:, None]
    for moved in (fgsm(model, x, y, levels / 255, MEAN, STD), pgd(model, x, y, levels / 255, MEAN, STD)):
        rise = levels / 255 * v.abs().sum().expand(3)
        assert torch.allclose(margin(moved) - margin(x), rise, rtol=1e-9)


def test_epsilon_counts_pixels_and_not_normalised_units(network):
    """A network with the normalisation inside, attacked without any, gives the same images.

    Unclipped pixels move by epsilon.
    """
    x, y = batch(1)
    x = 0.1 + 0.8 * x
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))

    def inside(z: torch.Tensor) -> torch.Tensor:
        return network((z - mean) / std)

    moved = fgsm(network, x, y, 2 / 255, MEAN, STD)
    assert torch.equal(moved, fgsm(inside, x, y, 2 / 255, (0, 0, 0), (1, 1, 1)))
    size = (moved - x).abs()
    assert size.max() == pytest.approx(2 / 255, rel=1e-4) and (size > 1.9 / 255).float().mean() > 0.9


def test_a_pixel_without_gradient_stays(network):
    x, y = batch(2)

    def blind(z: torch.Tensor) -> torch.Tensor:
        "The network does not see the third channel."
        return network(torch.cat([z[:, :2], torch.zeros_like(z[:, 2:])], 1))

    for moved in (fgsm(blind, x, y, 8 / 255, MEAN, STD), pgd(blind, x, y, 8 / 255, MEAN, STD)):
        assert torch.equal(moved[:, 2], x[:, 2]) and (moved[:, :2] != x[:, :2]).float().mean() > 0.8


def test_more_steps_find_more_loss(network):
    x, y = batch(3, 64)

    def loss(z: torch.Tensor) -> float:
        return torch.nn.functional.cross_entropy(network(to_input(z, MEAN, STD)), y).item()

    quick, slow = fgsm(network, x, y, 8 / 255, MEAN, STD), pgd(network, x, y, 8 / 255, MEAN, STD)
    assert loss(x) < loss(quick) < loss(slow)


def test_the_size_of_the_batch_plays_no_part(network):
    x, y = batch(4)
    together = pgd(network, x, y, 4 / 255, MEAN, STD)
    alone = torch.cat([pgd(network, x[i:i + 1], y[i:i + 1], 4 / 255, MEAN, STD) for i in range(len(x))])
    assert (together != alone).float().mean() < 1e-3  # the last bit of a convolution may turn a sign


def test_torchattacks_agrees(network):
    "An independent implementation; not a dependency, because it pins an old version of requests."
    torchattacks = pytest.importorskip('torchattacks')
    x, y = batch(5)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))

    def pixels_of(theirs) -> torch.Tensor:
        "Attacked pixels; their normalisation is taken back."
        theirs.set_normalization_used(MEAN, STD)
        return theirs(to_input(x, MEAN, STD), y) * std + mean

    for levels in (1, 4):
        epsilon = levels / 255
        theirs = pixels_of(torchattacks.FGSM(network, eps=epsilon))
        far = (theirs - fgsm(network, x, y, epsilon, MEAN, STD)).abs() > 1e-5
        assert far.float().mean() < 1e-3

        pgd_5 = torchattacks.PGD(network, eps=epsilon, alpha=epsilon / 4, steps=5, random_start=False)
        theirs = pixels_of(pgd_5)
        far = (theirs - pgd(network, x, y, epsilon, MEAN, STD, 5, epsilon / 4)).abs() > 1e-5
        assert far.float().mean() < 5e-3


def test_what_would_flatter_is_refused(network):
    x, y = batch(6)
    with pytest.raises(ValueError, match='training mode'):
        fgsm(torch.nn.Linear(3, 3).train(), x, y, 0.1, MEAN, STD)
    with pytest.raises(ValueError, match='without a graph'):
        fgsm(lambda z: network(z).detach(), x, y, 0.1, MEAN, STD)
    with pytest.raises(ValueError, match=r'\[0, 1\]'): fgsm(network, 255 * x, y, 0.1, MEAN, STD)
    with pytest.raises(ValueError, match='at least 0'): fgsm(network, x, y, -0.1, MEAN, STD)
    with pytest.raises(ValueError, match='at least 0 and 1'): pgd(network, x, y, 0.1, MEAN, STD, steps=0)


def test_parameters_get_no_gradient(network):
    pgd(network, *batch(7), 2 / 255, MEAN, STD, steps=2)
    assert all(p.grad is None for p in network.parameters())


# ---- through the deployed network

@pytest.mark.parametrize('act_bits', [32, 4, 2])
def test_gradients_pass_through_the_deployed_network(data, act_bits):
    "The folded network's gradient is that of the plain network in eval mode."
    pool = pool_of(data, 1, act_bits)
    state = states_of(pool, data)['deployed']
    x, y = data.test_x[:8].float() / 255, data.test_y[:8]
    ours = input_gradient(live(pool, state), x, y, data.mean, data.std)
    pool.replica.load(state)
    plain = input_gradient(pool.replica.model.eval(), x, y, data.mean, data.std)
    pool.close()
    assert (ours != 0).float().mean() > 0.5
    cosine = torch.nn.functional.cosine_similarity(ours.flatten(), plain.flatten(), 0)
    assert cosine > (0.999 if act_bits == 32 else 0.9)  # a rounded activation may fall to the other side


def test_attacks_hurt_in_order(data):
    "A network that has learned: a larger epsilon leaves fewer images, and ten steps no more than one."
    pool = pool_of(data, 1)
    states = states_of(pool, data)
    found = attack(pool, states, data.test_x.float() / 255, data.test_y, seed=0)['fp']
    pool.close()
    assert found['fgsm 1/255'] >= found['fgsm 2/255'] >= found['fgsm 8/255']
    assert found['pgd-10 2/255'] <= found['fgsm 2/255'] < 80


def test_the_transferred_attack_comes_from_the_full_precision_model(data):
    "Two networks with different first weights: an attack on one is not the attack on the other."
    pool, other = pool_of(data, 1), pool_of(data, 1, seed=1)
    states = dict(deployed=states_of(other, data)['fp'])
    states['fp'] = states_of(pool, data)['fp']
    x, y = data.test_x.float() / 255, data.test_y
    moved = fgsm(live(pool, states['fp']), x, y, 2 / 255, data.mean, data.std)
    expected = count_right(live(pool, states['deployed']), moved, y, data)
    found = attack(pool, states, x, y, seed=0)
    pool.close()
    other.close()
    assert found['deployed']['transfer fgsm 2/255'] == expected != found['deployed']['fgsm 2/255']
