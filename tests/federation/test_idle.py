"Fields that a run does not use: derived from the messages that it sends, and compared with the table."
import dataclasses
import functools
import hashlib
import json

import pytest
import torch
from conftest import ROOT
from samples import dataset
from tape import Tape

from fedmpqkd.core.config import RunConfig, config_from
from fedmpqkd.federation.methods import _IDLE, idle_fields, make_config, without_idle
from fedmpqkd.federation.rounds import noise, open_run
from fedmpqkd.federation.run import protocol_of
from fedmpqkd.federation.selection import select
from fedmpqkd.federation.warmstart import starting_point
from fedmpqkd.models.vision import register_model


def speck(classes: int, act=torch.nn.ReLU) -> torch.nn.Module:
    "As small as a network with quantised, plain and running entries can be."
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, 8, bias=False), torch.nn.BatchNorm2d(8), act(),
        torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(32, classes))


register_model('speck', speck)
BASE = dict(model='speck', clients=3, rounds=2, local_epochs=2, batch_size=8, lr=0.2, dirichlet=2.0,
            pq_centroids=8, public_images=0)
PLANES = dict(update='signed-planes', assignment='prune-grow', bits=(2.6,), lambda_b=0.1,
              prune_threshold=45.0)
KD = dict(alpha=0.5, kd_warmup_rounds=0)
CONTEXTS = {
    'fp32': {}, 'planes': PLANES, 'plain planes': PLANES | dict(bit_lr='plain', scale_update='sgd'),
    'latent': dict(update='latent'), 'int-sr': dict(update='int-sr', assignment='random'),
    'official': dict(update='official', assignment='prune-grow', compat='official'),
    'adamw': dict(update='latent', optimizer='adamw', lr=0.01), 'iid': dict(partition='iid'),
    'quantity': dict(partition='quantity'), 'noisy': dict(label_noise=0.3),
    'dropout': dict(dropout=0.4), 'qsgd': dict(uplink='qsgd'), 'dither': dict(uplink='dither'),
    'mixed': dict(uplink='mixed', error_feedback=True),
    'percentiles': dict(uplink='mixed', update_share=0.0),
    'magnitude': dict(uplink='mixed', importance='magnitude'), 'low rank': dict(uplink='low-rank'),
    'latent updates': dict(uplink='mixed', update='latent'),
    'pq': dict(uplink='pq'), 'pq of clients': dict(uplink='pq', codebook='client'),
    'fp32 kd': KD, 'planes kd': PLANES | KD, 'mse': PLANES | KD | dict(kd_loss='mse'),
    'co-teacher': PLANES | KD | dict(teacher_frozen=False),
    'learning with adamw': KD | dict(update='latent', optimizer='adamw', lr=0.01, teacher_frozen=False),
    'cooling': KD | dict(temperature_schedule='linear', alpha_schedule='cosine', alpha_end=0.1),
    'choosing': dict(augment='auto', augment_every=1, augment_choices='none/erasing/augmix'),
    'moshpit': dict(aggregate='moshpit'), 'moshpit planes': PLANES | dict(aggregate='moshpit'),
    'moshpit kd': PLANES | KD | dict(aggregate='moshpit', teacher='delivered'),
    'logits': dict(exchange='logits-only', public_images=20, train_images=0),
    'logits and model': PLANES | dict(exchange='logits+model', public_images=20),
    'server distils': dict(exchange='server-distill', public_images=20),
    'server momentum': dict(server_rule='momentum'), 'server adam': dict(server_rule='adam'),
    'scaffold': dict(client_term='scaffold', momentum=0), 'local norm': dict(client_term='local-norm'),
    'warm': dict(warm_start='fedavg:1', optimizer='adamw', lr=0.01),
}
RECORD_ONLY = {
    'method', 'extension', 'eval_images', 'stress', 'train_images', 'test_images', 'dataset', 'model',
    'precision', 'seed', 'clients', 'rounds', 'min_batch', 'warm_start', 'update', 'exchange', 'aggregate',
    'uplink', 'partition', 'tokenizer', 'server_rule', 'client_term', 'task_loss'}
OTHER = dict(
    dirichlet=0.7, label_noise=0.5, noise_clients=0.5, noise_from=1, validation=0.2, participation=0.6,
    dropout=0.7, dropout_mode='bernoulli', dropout_stage='before_download', bn_pool='moments', local_epochs=1,
    batch_size=6, optimizer='adamw', lr=0.05, momentum=0.5, weight_decay=0.01, prox=0.5, label_smoothing=0.1,
    augment='erasing', augment_every=2, augment_choices='none/erasing',
    bit_lr='plain', scale_update='fixed', bits=(5.0,), assignment='random', lambda_b=0.5, prune_threshold=5.0,
    prune_lsb=True, overshoot=True, rounding_up='stochastic', rounding_down='stochastic', act_bits=2,
    compat='official', alpha=0.2, temperature=3.0, kd_loss='reverse', teacher='ema', alpha_schedule='linear',
    alpha_end=0.7, temperature_schedule='cosine', temperature_end=0.5, kd_warmup_rounds=2, kd_gate='agree',
    teacher_refresh=2, teacher_frozen=False, teacher_norm='batch', update_bits=3, update_norm='max',
    error_feedback=True, pq_dim=3, pq_centroids=4, codebook='multi', public_images=10, public_epochs=2,
    update_share=0.2, importance='random', fisher_decay=0.5, update_classes='16', update_scale='class',
    update_ternary=True, update_rank=2,
    min_bits=2, server_lr=0.5, server_momentum=0.5, server_beta2=0.5, server_tau=0.1,
    logits='fp16', logits_topk=2, grid_axes=1, moshpit_iterations=1, peer_failure=0.5, hop='q8',
    text_kind='class', text_groups='en', context=64, chat=True, option_score='sum', lm_layers=2,
    lora_rank=2, lora_alpha=8.0, lora_dropout=0.1, lora_targets='k_proj', lora_heads='lm_head',
    lora_train='B', token_select='random', token_mode='input_drop', token_share=0.3, token_refresh=3)


@functools.cache
def messages(config: RunConfig) -> str:
    "A digest of everything that crosses in all rounds, and of the final model."
    data = dataset()
    run = open_run(config, data, workers=1, start=starting_point(config, data, workers=1))
    run.meter, digest = Tape(), hashlib.sha256()
    try:
        for round in range(config.rounds):
            noise(run, round)
            select(run, round)
            protocol_of(config).play(run, round)
    finally: run.pool.close()
    for way, client, message in run.meter.tape: digest.update(f'{way}{client}'.encode() + message)
    for t in run.server.state.values(): digest.update(t.numpy().tobytes())
    return digest.hexdigest()


# act only on some networks, not on every small one
RARE = {'min_bits', 'prune_lsb', 'overshoot', 'compat', 'assignment'}
BUDGET = {'bits'}  # of full precision: the budget of the comparison that a run belongs to
SEEN = ('fp32', 'planes', 'latent', 'adamw', 'qsgd', 'mixed', 'pq', 'planes kd', 'moshpit planes',
        'server adam')


def context(name: str) -> RunConfig: return RunConfig(**BASE | CONTEXTS[name])


def changed(config: RunConfig, field: str) -> RunConfig | None:
    "The run with another value in one field; None where that is refused, or no other value."
    try: other = dataclasses.replace(config, **{field: OTHER[field]})
    except ValueError: return None
    return None if other == config else other


@pytest.mark.parametrize('name', CONTEXTS)
def test_fields_that_the_table_calls_idle_change_no_byte(name):
    "All of them at once, as long as they stay idle together (a schedule and its end do not)."
    config = other = context(name)
    for field in sorted(idle_fields(config) & OTHER.keys()):
        assert (one := changed(config, field)) is None or without_idle(one) == without_idle(config)
        if (more := changed(other, field)) and without_idle(more) == without_idle(config): other = more
    assert other != config, 'no idle field could be changed'
    assert messages(other) == messages(config)


@pytest.mark.parametrize('name', SEEN)
def test_fields_that_change_no_byte_are_in_the_table(name):
    "And those that the table leaves alone change what is sent."
    config, silent = context(name), set()
    for field in OTHER.keys() - idle_fields(config) - RARE:
        other = changed(config, field)
        if other and messages(other) == messages(config): silent.add(field)
    assert silent - (BUDGET if config.update == 'fp32' else set()) == set()


def test_every_field_is_accounted_for():
    names = {f.name for f in dataclasses.fields(RunConfig)}
    assert names == OTHER.keys() | RECORD_ONLY
    assert set().union(*(names for _, names in _IDLE)) <= names


def test_a_method_is_one_run_whatever_its_idle_fields_say():
    one = make_config('qat-uniform', partition='iid')
    for more in (dict(dirichlet=0.1), dict(bit_lr='plain'), dict(scale_update='fixed'),
                 dict(prune_threshold=5.0), dict(prune_lsb=True), dict(compat='official'),
                 dict(dropout_mode='bernoulli'), dict(dropout_stage='after_train'), dict(noise_clients=0.5),
                 dict(noise_from=3)):
        assert make_config('qat-uniform', partition='iid', **more) == one
    adamw = dict(optimizer='adamw', lr=0.001)
    assert make_config('fedavg', **adamw, momentum=0.5) == make_config('fedavg', **adamw)
    assert make_config('fedavg', momentum=0.5) != make_config('fedavg')
    assert make_config('fedmpq', bit_lr='plain') != make_config('fedmpq')


def test_committed_records_say_nothing_in_idle_fields():
    "So they are found under their ids, and say what was done. Pieces of exp4 and exp6 are no runs."
    paths = (p for p in (ROOT / 'results').glob('**/*.json') if p.parent.name != 'pieces')
    found = [json.loads(p.read_text()) for p in paths]
    records = [r for r in found if isinstance(r, dict) and 'data' in r and 'config' in r]
    configs = [config_from(r['config']) for r in records]
    assert len(configs) >= 137
    for config in configs: assert without_idle(config) == config
