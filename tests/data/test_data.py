"""Data: agreement with torchvision, files whole and damaged, the cache, and where things are looked for."""

import hashlib
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import functional as TF

from fedmpqkd.core.streams import torch_rng
from fedmpqkd.data import images as data
from fedmpqkd.data.images import (
    CIFAR,
    DamagedData,
    DataMissing,
    channel_stats,
    crop_flip,
    dataset_names,
    draw_views,
    find_shards,
    from_tensors,
    load_dataset,
    normalize,
    pad_images,
    read_shard,
    register_dataset,
    stratified_indices,
)

torch.set_num_threads(1)
PLACES = (Path(os.environ.get('FEDMPQKD_DATA') or '.'), Path(__file__).parents[3] / 'shared' / 'data')
REAL = next((p for p in PLACES if (p / 'cifar10').is_dir()), None)
FULL_STATS = {
    'cifar10': ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    'cifar100': ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def noise(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)


def encode(pixels, format='PNG', **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(buffer, format, **options)
    return buffer.getvalue()


def write(path, x, columns, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{'bytes': encode(v, **options), 'path': f'{i}.png'} for i, v in enumerate(x)]
    pq.write_table(pa.table({'img': rows, **columns}), path)
    return path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "A complete small 'CIFAR-100' (12 + 4 images, two shards) that the loader takes for the real one."
    x = noise(16)
    fine, coarse = torch.arange(16) % 100, torch.arange(16) % 20
    folder = tmp_path / 'data' / 'cifar100'
    for name, part in (
        ('train-00000-of-00002', slice(0, 7)),
        ('train-00001-of-00002', slice(7, 12)),
        ('test-00000-of-00001', slice(12, 16)),
    ):
        columns = {'fine_label': fine[part].tolist(), 'coarse_label': coarse[part].tolist()}
        write(folder / f'{name}.parquet', x[part], columns)
    mean, std = channel_stats(x[:12])
    for name in ('cifar100', 'cifar100-coarse'):
        monkeypatch.setitem(CIFAR, name, data.replace(CIFAR[name], train=12, test=4, mean=mean, std=std))
    monkeypatch.delenv('FEDMPQKD_DATA', raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'xdg'))
    return folder, x


# --- augmentation -------------------------------------------------------------------------------------------


@pytest.mark.parametrize('padding', [1, 4])
def test_views_agree_with_torchvision(padding):
    x = noise(40)
    padded = pad_images(x, padding)
    index = torch.randint(0, 40, (200,), generator=torch.Generator().manual_seed(1))
    dy, dx, flipped = draw_views(200, torch_rng(0, 'loader'), padding)
    views = crop_flip(padded, index, dy, dx, flipped)
    assert views.dtype == torch.uint8 and views.is_contiguous(memory_format=torch.channels_last)
    windows = zip(views, index, dy.tolist(), dx.tolist(), flipped.tolist(), strict=True)
    for view, i, top, left, mirror in windows:
        expected = TF.crop(TF.pad(x[i], [padding] * 4, fill=0), top, left, 32, 32)
        assert torch.equal(view, TF.hflip(expected) if mirror else expected)


def test_views_cover_all_windows_evenly():
    dy, dx, flipped = draw_views(81 * 500, torch_rng(0, 'loader'))
    counts = torch.bincount(dy * 9 + dx, minlength=81).double()
    assert len(counts) == 81
    assert ((counts - 500) ** 2 / 500).sum() < 125  # 99.9 % point of chi-squared with 80 degrees of freedom
    assert abs(flipped.double().mean() - 0.5) < 0.01


def test_the_flip_switch_changes_nothing_else():
    on, off = torch_rng(5, 'loader'), torch_rng(5, 'loader')
    a, b = draw_views(100, on), draw_views(100, off, flip=False)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2].any() and not b[2].any()
    assert torch.equal(on.get_state(), off.get_state())


def test_crop_flip_of_nothing_and_of_a_slice_of_a_larger_tensor():
    padded = pad_images(noise(6))
    none = torch.zeros(0, dtype=torch.int64)
    assert crop_flip(padded, none, none, none, none.bool()).shape == (0, 3, 32, 32)
    four, zero = torch.tensor([4]), torch.tensor([1])
    of_slice = crop_flip(padded[2:], four - 2, zero, zero, zero < 0)
    assert torch.equal(of_slice, crop_flip(padded, four, zero, zero, zero < 0))


@pytest.mark.parametrize('dy, dx', [(9, 0), (0, 9), (-1, 0), (0, -1)])
def test_windows_outside_are_refused(dy, dx):
    with pytest.raises(ValueError, match='start at 0..8'):
        view = (torch.tensor([v]) for v in (0, dy, dx, False))
        crop_flip(pad_images(noise(1)), *view)


def test_normalize_agrees_with_torchvision():
    x, (mean, std) = noise(8), FULL_STATS['cifar10']
    expected = TF.normalize(x.float() / 255, list(mean), list(std))
    assert torch.allclose(normalize(x, mean, std), expected, atol=2e-6)
    half = normalize(x.contiguous(memory_format=torch.channels_last), mean, std, torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(half, normalize(x, mean, std).bfloat16())  # rounded once


def test_normalize_is_usable_in_autograd_after_inference_mode():
    mean, std = (0.11, 0.12, 0.13), (0.9, 0.8, 0.7)  # constants no other test has put in the cache
    with torch.inference_mode():
        normalize(noise(1), mean, std)
    weight = torch.ones(1, requires_grad=True)
    (normalize(noise(1), mean, std) * weight).sum().backward()
    assert torch.isfinite(weight.grad).all()


# --- data sets and subsets ----------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    labels=st.lists(st.integers(0, 6), min_size=1, max_size=80),
    fraction=st.floats(0.01, 1),
    seed=st.integers(0, 99),
)
def test_stratified_indices_keep_proportions(labels, fraction, seed):
    y = np.array(labels)
    n = max(1, int(fraction * len(y)))
    chosen = stratified_indices(y, n, seed)
    assert len(set(chosen.tolist())) == n and chosen.dtype == np.int64
    assert chosen.tolist() == sorted(chosen.tolist())
    for c in set(labels):
        share = n * labels.count(c) / len(y)
        assert abs((y[chosen] == c).sum() - share) < 1  # the largest remainder never strays a whole image


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits = load_dataset('digits')
    grey, y = load_digits(return_X_y=True)
    x = torch.cat([digits.train_x, digits.test_x])
    assert x.shape == (1797, 3, 32, 32) and not digits.flip
    assert (len(digits.train_x), len(digits.test_x)) == (1437, 360)
    levels = x[:, 0, ::4, ::4].reshape(-1, 64).double() * 16 / 255
    labels = torch.cat([digits.train_y, digits.test_y])
    ours = zip(levels.round().long().tolist(), labels.tolist(), strict=True)
    theirs = zip(grey.astype(int).tolist(), y.tolist(), strict=True)
    assert sorted([*row, label] for row, label in ours) == sorted([*row, label] for row, label in theirs)
    pixels = digits.train_x.double() / 255
    assert np.allclose(digits.mean, pixels.mean((0, 2, 3)))
    assert np.allclose(digits.std, pixels.std((0, 2, 3), correction=0))


def test_subset_keeps_order_constants_and_mixture():
    digits = load_dataset('digits')
    part = digits.subset(train=200, test=100, seed=3)
    assert (len(part.train_x), len(part.test_x)) == (200, 100)
    assert (part.mean, part.std, part.flip, part.name) == (digits.mean, digits.std, digits.flip, digits.name)
    whole = [image.numpy().tobytes() for image in digits.train_x]
    places = [whole.index(image.numpy().tobytes()) for image in part.train_x]
    assert places == sorted(places)
    expected = torch.bincount(digits.train_y) * 200 / 1437
    assert (torch.bincount(part.train_y) - expected).abs().max() < 1
    only_train = digits.subset(train=200, seed=3)
    assert torch.equal(only_train.train_x, part.train_x) and torch.equal(only_train.test_x, digits.test_x)
    assert len({digits.fingerprint, part.fingerprint, only_train.fingerprint}) == 3
    with pytest.raises(ValueError, match='asked for 361 of 360'):
        digits.subset(test=361)


def test_fingerprint_is_the_same_in_another_process_and_kept_by_to():
    digits = load_dataset('digits')
    code = (
        'from fedmpqkd.data.images import load_dataset; d = load_dataset("digits");'
        'print(d.fingerprint, d.mean, d.std)'
    )
    other = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == f'{digits.fingerprint} {digits.mean} {digits.std}'
    assert digits.to('cpu').fingerprint == digits.fingerprint


def test_channel_stats_are_numpys():
    x = noise(1500)
    mean, std = channel_stats(x)
    flat = x.numpy().transpose(1, 0, 2, 3).reshape(3, -1) / 255
    assert np.allclose(mean, flat.mean(1), atol=1e-12) and np.allclose(std, flat.std(1), atol=1e-12)


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(train_x=noise(4).float()), 'training and test images differ'),
        (dict(test_x=noise(2)[:, :, :28, :28]), 'test images'),
        (dict(train_y=torch.arange(4).int()), 'train labels must be int64'),
        (dict(test_y=torch.arange(3)), r'int64 \[2\]'),
        (dict(train_y=torch.tensor([0, 1, 2, 9]), classes=4), r'must lie in 0..3, not 0..9'),
        (dict(train_y=torch.tensor([0, 1, 2, -1])), 'must lie in'),
        (dict(train_x=noise(4)[:0], train_y=torch.arange(0)), 'empty'),
        (dict(train_x=torch.zeros_like(noise(4))), 'show nothing'),
    ],
)
def test_wrong_tensors_are_refused(change, message):
    good = dict(
        name='own', train_x=noise(4), train_y=torch.arange(4), test_x=noise(2), test_y=torch.arange(2)
    )
    assert from_tensors(**good).classes == 4
    with pytest.raises(ValueError, match=message):
        from_tensors(**good | change)


# --- files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name, modulus', [('cifar100', 100), ('cifar100-coarse', 20)])
def test_parquet_is_read_in_order_and_cached(tiny, tmp_path, monkeypatch, name, modulus):
    folder, x = tiny
    first = load_dataset(name, folder.parent)
    assert torch.equal(first.train_x, x[:12]) and torch.equal(first.test_x, x[12:])
    assert first.train_y.tolist() == [i % modulus for i in range(12)]
    assert first.test_y.tolist() == [12, 13, 14, 15]
    cached = [p.suffix for p in (tmp_path / 'xdg' / 'fedmpqkd').iterdir()]
    assert cached == ['.pt']  # no temporary file is left
    monkeypatch.setattr(data, 'read_shard', lambda *a: pytest.fail('decoded again'))
    assert load_dataset(name, folder.parent).fingerprint == first.fingerprint
    assert load_dataset(name, folder).fingerprint == first.fingerprint  # the folder itself may be named


def test_a_changed_source_is_decoded_again(tiny):
    folder, x = tiny
    before = load_dataset('cifar100', folder.parent)
    columns = {'fine_label': [3, 2, 1, 0], 'coarse_label': [0] * 4}
    write(folder / 'test-00000-of-00001.parquet', x[12:].flip(0), columns)
    after = load_dataset('cifar100', folder.parent)
    assert torch.equal(after.test_x, before.test_x.flip(0)) and after.test_y.tolist() == [3, 2, 1, 0]


@pytest.mark.parametrize('damage', ['flip', 'truncate', 'empty', 'other'])
def test_a_damaged_cache_is_rebuilt_and_said(tiny, tmp_path, capsys, damage):
    folder, _ = tiny
    good = load_dataset('cifar100', folder.parent)
    path = next((tmp_path / 'xdg' / 'fedmpqkd').iterdir())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    damaged = {
        'flip': bytes(content),
        'truncate': content[:5000],
        'empty': b'',
        'other': pickle.dumps({'a': 1}),
    }
    path.write_bytes(damaged[damage])
    assert capsys.readouterr().out == ''
    again = load_dataset('cifar100', folder.parent)
    said = capsys.readouterr().out
    assert again.fingerprint == good.fingerprint and str(path) in said and 'cache is damaged' in said
    load_dataset('cifar100', folder.parent)
    assert capsys.readouterr().out == ''  # it was repaired


def test_a_cache_that_cannot_be_written_costs_only_time(tiny, tmp_path, capsys):
    folder, x = tiny
    (tmp_path / 'file').write_text('in the way')
    loaded = load_dataset('cifar100', folder.parent, cache_dir=tmp_path / 'file')
    assert torch.equal(loaded.train_x, x[:12]) and 'cannot be written' in capsys.readouterr().out


def break_it(folder, how):
    shard = folder / 'train-00001-of-00002.parquet'
    labels = {'fine_label': [1] * 5, 'coarse_label': [1] * 5}
    if how == 'cut short':
        shard.write_bytes(shard.read_bytes()[:-200])
    elif how == 'not parquet':
        shard.write_text('version https://git-lfs.github.com/spec/v1')
    elif how == 'empty file':
        shard.write_bytes(b'')
    elif how == 'corrupt image':
        pq.write_table(pa.table({'img': [{'bytes': b'\x89PNG no', 'path': ''}] * 5, **labels}), shard)
    elif how == 'no image':
        nothing = pa.array([{'bytes': None, 'path': ''}] * 5, pa.struct({'bytes': pa.binary()}))
        pq.write_table(pa.table({'img': nothing, **labels}), shard)
    elif how == 'jpeg':
        write(shard, noise(5), labels, format='JPEG')
    elif how == 'lossy webp':
        write(shard, noise(5), labels, format='WEBP')
    elif how == 'small images':
        write(shard, noise(5)[:, :, :28, :28], labels)
    elif how == 'wrong column':
        write(shard, noise(5), {'label': [1] * 5})
    elif how == 'text labels':
        write(shard, noise(5), {'fine_label': ['a'] * 5, 'coarse_label': ['a'] * 5})
    elif how == 'missing label':
        write(shard, noise(5), {'fine_label': [1, None, 1, 1, 1], 'coarse_label': [1] * 5})
    elif how == 'label too large':
        write(shard, noise(12)[7:], {'fine_label': [100] * 5, 'coarse_label': [1] * 5})
    elif how == 'rows missing':
        write(shard, noise(4), {'fine_label': [1] * 4, 'coarse_label': [1] * 4})
    elif how == 'other pixels':
        write(shard, noise(5) // 2, labels)
    elif how == 'shard missing':
        shard.unlink()
    elif how == 'test missing':
        (folder / 'test-00000-of-00001.parquet').unlink()
    elif how == 'two copies':
        write(folder / 'train-00000-of-00001.parquet', noise(1), {'fine_label': [1], 'coarse_label': [1]})


@pytest.mark.parametrize(
    'how, where, what',
    [
        ('cut short', 'train-00001-of-00002.parquet', 'not a readable Parquet'),
        ('not parquet', 'train-00001-of-00002.parquet', 'not a readable Parquet'),
        ('empty file', 'train-00001-of-00002.parquet', 'not a readable Parquet'),
        ('corrupt image', 'train-00001-of-00002.parquet row 0', 'not a readable image'),
        ('no image', 'train-00001-of-00002.parquet row 0', 'not a readable image'),
        ('jpeg', 'train-00001-of-00002.parquet row 0', 'not JPEG'),
        ('lossy webp', 'train-00001-of-00002.parquet row 0', 'not WEBP'),
        ('small images', 'train-00001-of-00002.parquet row 0', 'needs 32x32 RGB, not PNG 28x28'),
        ('wrong column', 'train-00001-of-00002.parquet', 'no column fine_label'),
        ('text labels', 'train-00001-of-00002.parquet', 'no column fine_label of whole numbers'),
        ('missing label', 'train-00001-of-00002.parquet', 'no column fine_label of whole numbers'),
        ('label too large', 'cifar100', 'labels must lie in 0..99'),
        ('rows missing', 'cifar100', 'has 12 \\+ 4 images, here are 11 \\+ 4'),
        ('other pixels', 'cifar100', 'mean and std are'),
        ('shard missing', 'cifar100', 'train-00001-of-00002.parquet missing'),
        ('test missing', 'cifar100', 'test-\\*-of-\\*.parquet missing'),
        ('two copies', 'cifar100', 'which copy is meant'),
    ],
)
def test_damaged_files_are_named(tiny, tmp_path, how, where, what):
    break_it(tiny[0], how)
    with pytest.raises(DamagedData, match=f'{where}.*{what}'):
        load_dataset('cifar100', tiny[0].parent)
    assert not (tmp_path / 'xdg').exists()  # nothing broken is cached


def test_lossless_webp_is_as_good_as_png(tmp_path):
    x = noise(3)
    path = write(tmp_path / 'a.parquet', x, {'label': [1, 2, 3]}, format='WEBP', lossless=True)
    assert torch.equal(torch.from_numpy(read_shard(path, 'label')[0]).permute(0, 3, 1, 2), x)


def test_shards_are_ordered_by_number(tmp_path):
    for i in (2, 0, 1):
        (tmp_path / f'train-0000{i}-of-00003.parquet').touch()
    (tmp_path / 'train-notes.parquet').touch()
    assert [int(p.stem[6:11]) for p in find_shards(tmp_path, 'train')] == [0, 1, 2]
    assert find_shards(tmp_path, 'test') == []


# --- places -------------------------------------------------------------------------------------------------


def test_missing_data_name_the_set_every_place_and_the_cure(tmp_path, monkeypatch):
    monkeypatch.setenv('FEDMPQKD_DATA', str(tmp_path / 'env'))
    monkeypatch.setattr(data, '__file__', str(tmp_path / 'lib' / 'data.py'))
    repo = tmp_path / 'work' / 'repo'
    (repo / 'nbs').mkdir(parents=True)
    (repo / 'settings.ini').touch()
    monkeypatch.chdir(repo / 'nbs')
    with pytest.raises(DataMissing) as caught:
        load_dataset('cifar10', cache_dir=tmp_path / 'cache')
    message = str(caught.value)
    places = [tmp_path / 'env', tmp_path / 'work' / 'shared' / 'data', tmp_path / 'cache' / 'torchvision']
    positions = [message.find(str(p)) for p in places]
    assert -1 not in positions and positions == sorted(positions)
    assert message.startswith('cifar10') and 'FEDMPQKD_DATA' in message
    assert '-p data_dir DIR' in message and '--data-dir DIR' in message
    assert isinstance(caught.value, FileNotFoundError)


def test_environment_variable_is_used_and_a_given_folder_is_the_only_one(tiny, tmp_path, monkeypatch):
    folder, x = tiny
    monkeypatch.setenv('FEDMPQKD_DATA', str(folder.parent))
    assert torch.equal(load_dataset('cifar100').train_x, x[:12])
    with pytest.raises(DataMissing) as caught:
        load_dataset('cifar100', tmp_path / 'elsewhere')
    assert str(folder.parent) not in str(caught.value)


@pytest.mark.parametrize('name, modulus', [('cifar100', 100), ('cifar100-coarse', 20)])
def test_torchvision_files(tiny, tmp_path, monkeypatch, name, modulus):
    folder, x = tiny
    root = tmp_path / 'tv'
    target = root / 'cifar-100-python'
    target.mkdir(parents=True)
    for split, part in (('train', range(0, 12)), ('test', range(12, 16))):
        pixels = x[list(part)].reshape(len(part), -1).numpy()
        entry = {
            'data': pixels,
            'fine_labels': [i % 100 for i in part],
            'coarse_labels': [i % 20 for i in part],
        }
        (target / split).write_bytes(pickle.dumps(entry))
    (target / 'meta').write_bytes(pickle.dumps({'fine_label_names': [str(i) for i in range(100)]}))
    # torchvision's checksums see that these are not its files
    with pytest.raises(DamagedData, match='cifar-100-python'):
        load_dataset(name, root)
    for split in ('train', 'test'):
        md5 = hashlib.md5((target / split).read_bytes()).hexdigest()
        monkeypatch.setattr(torchvision.datasets.CIFAR100, f'{split}_list', [[split, md5]])
    loaded = load_dataset(name, root)
    assert loaded.fingerprint == load_dataset(name, folder.parent).fingerprint
    assert loaded.train_y.tolist() == [i % modulus for i in range(12)]


def test_nothing_is_downloaded_unless_asked(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torchvision.datasets.CIFAR10, 'download', lambda self: asked.append(self.root))
    with pytest.raises(DataMissing):
        load_dataset('cifar10', tmp_path)
    assert asked == []
    with pytest.raises(DamagedData):  # the stand-in brings no files
        load_dataset('cifar10', tmp_path, download=True)
    assert asked == [str(tmp_path)]


@pytest.mark.parametrize('given', [False, True])
def test_the_command_in_the_message_fetches_what_is_missing(tmp_path, monkeypatch, given):
    "What it names is a call that downloads, into a folder where the next run looks."
    asked = []
    monkeypatch.setattr(torchvision.datasets.CIFAR10, 'download', lambda self: asked.append(Path(self.root)))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    monkeypatch.delenv('FEDMPQKD_DATA', raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(load_dataset.__globals__, '__file__', str(tmp_path / 'images.py'))
    where = tmp_path / 'mine' if given else None
    with pytest.raises(DataMissing) as caught:
        load_dataset('cifar10', where)
    call = str(caught.value).partition('python -c "')[2].removesuffix('"')
    with pytest.raises(DamagedData):  # the stand-in brings no files
        exec(call, {})
    assert asked == [where or data.search_places(None, tmp_path / 'cache' / 'fedmpqkd')[-1]]


def test_registered_names():
    own = from_tensors('own', noise(4), torch.arange(4), noise(2), torch.arange(2))
    register_dataset('own', lambda: own)
    try:
        assert load_dataset('own') is own and 'own' in dataset_names()
    finally:
        data._LOADERS.pop('own')
    with pytest.raises(ValueError, match='built in'):
        register_dataset('digits', lambda: own)
    with pytest.raises(ValueError, match='unknown data set .cifar-100.: did you mean cifar100 or cifar10'):
        load_dataset('cifar-100')


# --- the real ones ------------------------------------------------------------------------------------------


@pytest.mark.skipif(REAL is None, reason='CIFAR is not at hand')
@pytest.mark.parametrize('name, label, classes', [('cifar10', 'label', 10), ('cifar100', 'fine_label', 100)])
def test_the_real_test_set_is_lossless_and_balanced(name, label, classes):
    path = find_shards(REAL / name, 'test')[0]
    table = pq.read_table(path).slice(0, 500)
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    buffer.seek(0)
    x, y = read_shard(buffer, label)
    assert x.shape == (500, 32, 32, 3)
    mean, std = channel_stats(torch.from_numpy(x).permute(0, 3, 1, 2))
    assert np.allclose(mean, FULL_STATS[name][0], atol=0.03)
    assert np.allclose(std, FULL_STATS[name][1], atol=0.03)
    everything = pq.read_table(path, columns=[label])[label].to_numpy()
    assert np.bincount(everything).tolist() == [10_000 // classes] * classes


@pytest.mark.skipif(
    REAL is None or not os.environ.get('FEDMPQKD_SLOW'), reason='decodes all of CIFAR: set FEDMPQKD_SLOW=1'
)
@pytest.mark.parametrize('name', ['cifar10', 'cifar100', 'cifar100-coarse'])
def test_the_real_sets_load(name, tmp_path):
    loaded = load_dataset(name, REAL, cache_dir=tmp_path)
    mean, std = channel_stats(loaded.train_x)
    assert np.allclose((mean, std), FULL_STATS[name.removesuffix('-coarse')], atol=1e-4)
    assert torch.bincount(loaded.train_y).tolist() == [50_000 // loaded.classes] * loaded.classes
    assert load_dataset(name, REAL, cache_dir=tmp_path).fingerprint == loaded.fingerprint
