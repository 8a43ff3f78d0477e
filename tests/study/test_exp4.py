"Experiment 4: its notebook from the command line, its pieces, and what it refuses."
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from fedmpqkd.data.images import DataMissing, load_dataset, pad_images
from fedmpqkd.models.vision import build_model
from fedmpqkd.study.lowbit_study import EXP4, pieces_of, run_study
from fedmpqkd.study.students import (
    Frozen,
    StudentRecipe,
    TeacherRecipe,
    first_images,
    half,
    piece_id,
    steps_of,
    train_student,
    train_teacher,
    training_batches,
)

TINY = dict(train_images=120, test_images=60, teacher_epochs=1, images=64, others='', kept='',
            spread_epochs=0, repeats=5, augments='none,erasing,augmix')


def test_the_notebook_from_the_command_line(tmp_path: Path):
    fields = 'train_images=120,test_images=60,teacher_epochs=1,images=64,spread_epochs=2,others=cnn,kept=1'
    words = [str(ROOT / 'nbs/exp4.ipynb'), '-p', 'preset', 'smoke', '-p', 'seeds', '0', '-p', 'augments',
             'none', '-p', 'results_dir', str(tmp_path / 'r'), '-p', 'fields', fields]
    program = str(Path(sys.executable).with_name('papermill'))
    done = subprocess.run([program, *words], cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(p.read_text()) for p in (tmp_path / 'r/exp4/smoke/pieces').glob('*.json')]
    kinds = sorted(r['kind'] for r in found)
    # after its only epoch the teacher is the teacher: its score in one pass is kept once
    assert kinds == ['score'] * 4 + ['student'] + ['teacher'] * 2
    assert len({r['id'] for r in found}) == len(found)
    assert list((tmp_path / 'r/exp4/smoke/pieces').glob('*.safetensors'))
    work = tmp_path / 'r/exp4/smoke/pieces/_work'
    assert not work.exists() or not list(work.iterdir())
    assert (ROOT / 'runs/generated/exp4_smoke.md').exists()


def test_a_whole_study_is_read_without_its_data(tmp_path: Path, monkeypatch, capsys):
    from fedmpqkd.study import lowbit_study

    given = TINY | dict(seeds='0', device='cpu', augments='none,erasing', others='cnn', kept='1',
                        teacher_epochs=2, losses='ce', score_images=100, rank_images=80)
    whole = run_study('smoke', results_dir=str(tmp_path), **given)

    def missing(*_):
        raise DataMissing('digits: nowhere')

    monkeypatch.setattr(lowbit_study, 'load_task', missing)
    capsys.readouterr()
    lowbit_study.say_missing.cache_clear()  # it is said once a process
    again = run_study('smoke', results_dir=str(tmp_path), **given)
    assert 'finished runs are taken from their records' in capsys.readouterr().out
    assert again == whole and again.others and again.alone
    score = next(tmp_path.rglob('score_none_*.json'))
    score.unlink()
    with pytest.raises(DataMissing): run_study('smoke', results_dir=str(tmp_path), **given)


def test_a_study_that_was_stopped_goes_on_and_computes_nothing_twice(tmp_path: Path):
    class Stop(Exception):
        pass

    def stop(text):
        if text.startswith('W2A2 erasing'): raise Stop

    given = TINY | dict(seeds='0', device='cpu', augments='none,erasing')
    with pytest.raises(Stop): run_study('smoke', results_dir=str(tmp_path / 'a'), say=stop, **given)
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'a').rglob('*.json')}
    rest = run_study('smoke', results_dir=str(tmp_path / 'a'), **given)
    after = {p.name: p.stat().st_mtime_ns for p in (tmp_path / 'a').rglob('*.json')}
    assert before.items() <= after.items()
    whole = run_study('smoke', results_dir=str(tmp_path / 'b'), **given)
    for one, other in zip(rest.students + rest.scores, whole.students + whole.scores, strict=True):
        assert (one['id'], one['summary']) == (other['id'], other['summary'])
    assert not rest.declared and 'runs' in rest.generated.parts


def test_identities_follow_what_matters():
    a = StudentRecipe(augment='erasing')
    same = StudentRecipe(augment='erasing', gamma=1.0)
    assert piece_id(a, 'data', 'teacher') == piece_id(same, 'data', 'teacher')
    others = [piece_id(a, 'data', 'other'), piece_id(a, 'more', 'teacher'),
              piece_id(StudentRecipe(), 'data', 'teacher'),
              piece_id(TeacherRecipe(augment='erasing'), 'data', 'teacher')]
    assert len({piece_id(a, 'data', 'teacher'), *others}) == 5


@pytest.mark.parametrize('images, n', [(0, 130), (129, 130), (64, 130), (0, 129)])
def test_steps_are_those_of_an_epoch_and_all_augmentations_see_the_same_images(images, n):
    data = load_dataset('digits').subset(train=n)
    padded = pad_images(data.train_x)
    seen = {}
    for name in ('none', 'erasing'):
        recipe = StudentRecipe(images=images, batch_size=64, augment=name)
        batches = list(training_batches(data, padded, recipe, 2))
        assert len(batches) == steps_of(recipe, n)
        seen[name] = [y.tolist() for _, y in batches]
    assert seen['none'] == seen['erasing']


def test_a_student_of_32_bits_without_training_is_its_teacher_and_the_teacher_stays():
    data = load_dataset('digits').subset(train=200, test=100)
    teacher, curve = train_teacher(TeacherRecipe(model='cnn', epochs=3, batch_size=32), data)
    state = {k: v.clone() for k, v in teacher.state_dict().items()}
    recipe = StudentRecipe(model='cnn', weight_bits=8, act_bits=8, lr=0.0, weight_decay=0.0, images=32,
                           batch_size=32)
    student, line = train_student(recipe, teacher, data)
    x = first_images(data, 50)
    student.eval()
    assert (student(x).argmax(1) == teacher(x).argmax(1)).float().mean() >= 0.9
    for k, v in teacher.state_dict().items(): assert torch.equal(v, state[k])
    assert all(t.dtype in (torch.float16, torch.int64) for t in half(teacher).values())
    assert set(line[-1]) >= {'epoch', 'loss', 'accuracy', 'nll'}


def test_folding_and_bf16_change_a_teacher_little():
    net = build_model('resnet8', 10).eval()
    x = torch.randn(16, 3, 32, 32)
    with torch.no_grad(): plain = net(x)
    assert torch.allclose(Frozen(net, 'fp32')(x), plain, atol=1e-4)
    assert (Frozen(net, 'bf16')(x) - plain).abs().max() < 0.1


@pytest.mark.parametrize('given, words', [
    (dict(augments='none,blur'), "unknown augmentation 'blur'"), (dict(bits='0'), 'must be 1 to 8'),
    (dict(bits='2,9'), 'weight_bits=9'), (dict(gama=1), "did you mean 'gamma'"),
    (dict(quantizer='pact'), 'allowed are lsq, ewgs, dorefa'), (dict(augments='none,none'), 'one twice'),
    (dict(losses='mse'), 'allowed are ce, kd'),
    (dict(temperature=0), 'above 0'),
    (dict(spread_epochs=1), '0 or at least 2'), (dict(epochs='many'), 'epochs')])
def test_what_is_wrong_is_said_before_anything_is_computed(given, words):
    with pytest.raises(ValueError, match=words): pieces_of('smoke', **given)


def test_a_teacher_must_fit_the_data(tmp_path: Path):
    path = tmp_path / 'mine.pt'
    torch.save(build_model('resnet8', 100).state_dict(), path)
    given = TINY | dict(results_dir=str(tmp_path), device='cpu', seeds='0')
    with pytest.raises(ValueError, match='no resnet8 for 10 classes: fc'):
        run_study('smoke', teacher=str(path), **given)
    with pytest.raises(ValueError, match='no such file'): run_study('smoke', teacher='nowhere', **given)
    torch.save(nn.Linear(2, 2).state_dict(), path)
    with pytest.raises(ValueError, match='no resnet8 for 10 classes'):
        run_study('smoke', teacher=str(path), **given)


def test_every_preset_has_all_widths_and_augmentations_it_names():
    for preset in EXP4.presets:
        pieces = pieces_of(preset)
        widths = {s.weight_bits for s in pieces.students}
        count = len(pieces.scores) * len(widths) * len({s.seed for s in pieces.students})
        assert len(pieces.students) == count == len(set(pieces.students))
    assert {s.weight_bits for s in pieces_of('study').students} == {2, 3, 4}
    assert np.all([s.gamma == 1 and s.alpha == 2 and s.temperature == 4 for s in pieces_of('paper').students])
