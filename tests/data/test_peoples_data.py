"Data that people bring, and files that mean harm."

import hashlib
import io
import os
import pickle
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import CIFAR10, FakeData, ImageFolder
from torchvision.transforms import Compose, Normalize, RandomCrop, ToTensor

import fedmpqkd.data.images as data
from fedmpqkd.core.streams import rng
from fedmpqkd.data.images import CIFAR, DamagedData, decode_image, from_any, from_tensors, read_shard
from fedmpqkd.data.partition import KINDS, Partition, iid_split, split

X = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
BYTES, HWC = torch.from_numpy(X), X.transpose(0, 2, 3, 1)
Y = [0, 1, 2] * 4


@pytest.mark.parametrize(
    'images',
    [
        X,
        HWC,
        list(X),
        [Image.fromarray(i) for i in HWC],
        [ToTensor()(i) for i in HWC],
        X.astype(np.int64),
        X / 255,
        HWC.tolist(),
    ],
)
def test_images_of_any_kind_are_the_same_bytes(images):
    found = from_tensors('mine', images, Y, BYTES, torch.tensor(Y))
    assert torch.equal(found.train_x, BYTES)
    assert (
        found.fingerprint == from_tensors('mine', BYTES, torch.tensor(Y), BYTES, torch.tensor(Y)).fingerprint
    )


@pytest.mark.parametrize(
    'images, shape, kind',
    [
        (X.astype(np.float32), (12, 3, 32, 32), torch.float32),
        (X - 300.0, (12, 3, 32, 32), torch.float32),
        (X[:, :1], (12, 1, 32, 32), torch.uint8),
        (X[:, 0], (12, 1, 32, 32), torch.uint8),
        (X[:, :, :28], (12, 3, 28, 32), torch.uint8),
        (X.astype(np.int32) + 1, (12, 3, 32, 32), torch.float32),
        ([Image.fromarray(i).convert('RGBA') for i in HWC], (12, 4, 32, 32), torch.uint8),
        ([Image.fromarray(i).convert('L') for i in HWC], (12, 1, 32, 32), torch.uint8),
        ([Image.fromarray(i).convert('P') for i in HWC], (12, 3, 32, 32), torch.uint8),
        ([Image.fromarray(HWC[0]).convert('L'), *(Image.fromarray(i) for i in HWC[1:])], (12, 3, 32, 32),
         torch.uint8),
        (X / 255 - 0.001, (12, 3, 32, 32), torch.float32),
        ([np.zeros((5, 7, 2)), *np.full((11, 5, 7, 2), 0.3)], (12, 2, 5, 7), torch.float32),
        (torch.from_numpy(X / 255).float(), (12, 3, 32, 32), torch.float32),
    ],
)
def test_images_of_any_size_and_depth_stay_what_they_are(images, shape, kind):
    found = from_tensors('mine', images, Y, images, Y)
    assert (tuple(found.train_x.shape), found.train_x.dtype, found.image) == (shape, kind, shape[1:])
    raw = np.stack([np.asarray(i, dtype=np.float64) for i in images]) if kind == torch.float32 else None
    if raw is None: return
    axes = (0, 1, 2) if shape[1] == 2 else (0, 2, 3)  # an independent mean: the channels are last in one case
    np.testing.assert_allclose(found.mean, raw.mean(axes), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(found.std, raw.std(axes), rtol=1e-5)


@pytest.mark.parametrize(
    'images, why',
    [
        ([X[0], X[1][:, :8]], r'image 1: \[3, 8, 32\] where image 0 is \[3, 32, 32\].*Resize'),
        (['a.png'], 'image 0: needs pixels'),
        (X[:, :, None], 'image 0: needs pixels'),
        (np.zeros((2, 5, 32, 32)), 'one to four channels'),
        (np.full((2, 3, 8, 8), np.nan), 'finite'),
        ([Image.fromarray(HWC[0][:16])], 'training and test images differ'),
        (X / 255 - 0.001, 'training and test images differ'),
    ],
)
def test_what_are_no_images_of_one_kind_is_refused(images, why):
    with pytest.raises(ValueError, match=why): from_tensors('mine', images, Y[: len(images)], BYTES, Y)


@pytest.mark.parametrize(
    'labels, names, numbers',
    [
        (['dog', 'cat', 'dog'], ('cat', 'dog'), [1, 0, 1]),
        ([1, 2, 3], ('1', '2', '3'), [0, 1, 2]),
        (torch.tensor([0, 100, 200]), ('0', '100', '200'), [0, 1, 2]),
        (np.array([7, 10**12, 7]), ('7', '1000000000000'), [0, 1, 0]),
        ([1.0, 2.0, 1.0], ('1', '2'), [0, 1, 0]),
        ([False, True, True], (), [0, 1, 1]),
        (np.array([2, 1, 0], dtype=np.uint8), (), [2, 1, 0]),
    ],
)
def test_labels_are_numbered_aloud(labels, names, numbers, capsys):
    found = from_tensors('mine', X[:3], labels, X[:3], labels)
    assert (found.label_names, found.train_y.tolist(), found.train_y.dtype) == (names, numbers, torch.int64)
    assert found.classes == len(names or set(numbers)) and (
        'mine: the labels' in capsys.readouterr().out
    ) == bool(names)
    assert found.subset(2, 2).label_names == names


@pytest.mark.parametrize(
    'labels, why',
    [
        ([0.5, 1.0, 2.0], 'whole numbers or words'),
        (np.eye(3), 'one an image'),
        ([0, -1, 1], 'must lie in'),
        ([None, 1, 2], 'whole numbers or words'),
    ],
)
def test_labels_without_a_meaning_are_refused(labels, why):
    with pytest.raises(ValueError, match=why):
        from_tensors('mine', X[:3], labels, X[:3], labels)


def test_a_stated_number_of_classes_leaves_labels_alone(capsys):
    found = from_tensors('mine', X[:2], [1, 3], X[:2], [1, 3], classes=5)
    assert (found.classes, found.train_y.tolist(), found.label_names, capsys.readouterr().out) == (
        5,
        [1, 3],
        (),
        '',
    )


def folder_of(root, size=32):
    for split_, names in (('train', 'ant bee cow'), ('test', 'ant bee cow')):
        for c, name in enumerate(names.split()):
            (root / split_ / name).mkdir(parents=True)
            for i in range(2):
                Image.fromarray(HWC[2 * c + i]).resize((size, size), 0).save(
                    root / split_ / name / f'{i}.png'
                )
    return ImageFolder(root / 'train'), ImageFolder(root / 'test')


def test_image_folders_keep_the_names_of_their_classes(tmp_path):
    found = from_any('animals', folder_of(tmp_path))
    assert found.label_names == ('ant', 'bee', 'cow') and torch.equal(found.train_x, BYTES[:6])
    assert found.train_y.tolist() == [0, 0, 1, 1, 2, 2]
    whole = ImageFolder(tmp_path / 'train')
    halves = from_any('halves', (Subset(whole, [0, 2]), Subset(whole, [1, 3])))
    assert (halves.classes, halves.train_y.tolist()) == (3, [0, 1])  # a class without images stays a class


def test_image_folders_that_do_not_fit_are_refused(tmp_path):
    assert from_any('large', folder_of(tmp_path / 'a', 48)).image == (3, 48, 48)
    Image.new('RGB', (7, 9)).save(tmp_path / 'a' / 'train' / 'bee' / '1.png')
    sets = ImageFolder(tmp_path / 'a' / 'train'), ImageFolder(tmp_path / 'a' / 'test')
    with pytest.raises(ValueError, match=r'train image 3: \[3, 9, 7\] where .*Resize'):
        from_any('mixed', sets)
    train, test = folder_of(tmp_path / 'b')
    test.classes = ['ant', 'cow', 'bee']
    with pytest.raises(ValueError, match='other classes'):
        from_any('mixed', (train, test))


def test_other_data_sets():
    pair = TensorDataset(BYTES, torch.tensor(Y)), list(zip(HWC, Y, strict=True))
    assert torch.equal(from_any('pair', pair).test_x, BYTES)
    assert from_any('four', (X, Y, X, Y)).classes == 3
    fake = FakeData(8, (3, 32, 32), 2, transform=ToTensor())
    assert from_any('fake', (fake, fake)).train_x.dtype == torch.uint8
    whitened = FakeData(8, (3, 32, 32), 2, transform=Compose([ToTensor(), Normalize([0.5] * 3, [0.2] * 3)]))
    assert from_any('whitened', (whitened, whitened)).train_x.dtype == torch.float32
    own = type('Own', (), dict(subset=lambda self: self))()
    assert from_any('own', own) is own


@pytest.mark.parametrize(
    'made, why',
    [
        (FakeData(4), 'random_split makes two'),
        (None, 'not NoneType'),
        ((X, Y, X), 'is needed'),
        (X, 'is needed'),
    ],
)
def test_what_is_no_data_set_is_named(made, why):
    with pytest.raises(TypeError, match=why):
        from_any('it', made)


@pytest.mark.parametrize(
    'rows, why',
    [
        ([dict(img=1, label=2)], 'not dict'),
        ([HWC[0]], 'not ndarray'),
        ([], 'empty'),
        (FakeData(4, (3, 32, 32), transform=RandomCrop(32, 8)), 'random transforms'),
    ],
)
def test_rows_that_are_no_samples_are_named(rows, why):
    with pytest.raises(ValueError, match=why):
        from_any('it', (rows, rows))


@pytest.mark.parametrize('name', ['../x', 'a/b', '', '/etc', '.hidden'])
def test_names_stay_in_their_folder(name):
    with pytest.raises(ValueError, match='file names'):
        data.register_dataset(name, lambda: None)


# --- files that mean harm -----------------------------------------------------------------------------------


def png(width, height):
    "A PNG of zeros, as small as it can be for its size."

    def chunk(kind, body):
        return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

    rows = zlib.compress(b'\0' * (3 * width + 1) * height, 9)
    head = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', rows) + chunk(b'IEND', b'')


def test_a_png_that_grows_is_refused_before_it_does(monkeypatch):
    bomb = png(3000, 3000)
    monkeypatch.setattr(data.Image, 'open', lambda *a, **k: pytest.fail('opened'))
    with pytest.raises(DamagedData, match='needs 32x32 RGB, not PNG 3000x3000'):
        decode_image(bomb, 'row 0')
    buffer = io.BytesIO()
    Image.new('RGB', (500, 400)).save(buffer, 'WEBP', lossless=True)
    with pytest.raises(DamagedData, match='not WEBP 500x400'):
        decode_image(buffer.getvalue(), 'row 0')
    assert len(bomb) < 40_000


def parquet(path, images, labels):
    pq.write_table(pa.table({'img': [{'bytes': i, 'path': ''} for i in images], 'label': labels}), path)


def test_a_parquet_file_that_grows_is_refused_before_it_does(tmp_path):
    path = tmp_path / 'train-00000-of-00001.parquet'
    parquet(path, [b'\0' * 10_000_000] * 60, [0] * 60)
    assert path.stat().st_size < 1_000_000
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    with pytest.raises(DamagedData, match='declares 60 rows and 6..,...,... bytes|no 32x32 image'):
        read_shard(path, 'label')
    assert (
        tracemalloc.get_traced_memory()[1] < 50_000_000 and pa.total_allocated_bytes() - before < 50_000_000
    )
    tracemalloc.stop()


def test_many_rows_and_large_images_are_refused(tmp_path):
    path = tmp_path / 'train-00000-of-00001.parquet'
    parquet(path, [b''] * 70_000, [0] * 70_000)
    with pytest.raises(DamagedData, match='declares 70,000 rows'):
        read_shard(path, 'label')
    parquet(path, [b'\0' * 20_000], [0])
    with pytest.raises(DamagedData, match='row 0: 20,000 bytes are no 32x32 image'):
        read_shard(path, 'label')


class Harm:
    def __reduce__(self):
        return os.system, ('exit 7',)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    "A small 'CIFAR-10' in torchvision's form."
    folder = tmp_path / 'cifar-10-batches-py'
    folder.mkdir()

    def write(name, content):
        (folder / name).write_bytes(content)
        return [name, hashlib.md5(content).hexdigest()]

    x = BYTES.reshape(12, -1).numpy()
    parts = [write(f'batch {i}', pickle.dumps(dict(data=x[6 * i : 6 * i + 6], labels=Y[:6]))) for i in (0, 1)]
    monkeypatch.setattr(CIFAR10, 'train_list', parts)
    monkeypatch.setattr(CIFAR10, 'test_list', parts[1:])
    mean, std = data.channel_stats(BYTES)
    monkeypatch.setitem(
        CIFAR, 'cifar10', data.replace(CIFAR['cifar10'], train=12, test=6, mean=mean, std=std)
    )
    return folder, write


def test_an_archive_is_read_in_order(archive):
    found = data.read_torchvision(CIFAR['cifar10'], archive[0].parent)
    assert torch.equal(found.train_x, BYTES) and found.train_y.tolist() == [0, 1, 2, 0, 1, 2] * 2


def test_what_was_verified_is_what_is_read(archive, monkeypatch):
    "The file is exchanged right after the checksum was taken."
    folder, real = archive[0], hashlib.md5
    evil = pickle.dumps(Harm())

    def exchanged(content, **k):
        (folder / 'batch 0').write_bytes(evil)
        return real(content, **k)

    monkeypatch.setattr(data.hashlib, 'md5', exchanged)
    monkeypatch.setattr(os, 'system', lambda command: pytest.fail('executed'))
    assert torch.equal(data.read_torchvision(CIFAR['cifar10'], folder.parent).train_x, BYTES)


@pytest.mark.parametrize(
    'content',
    [
        pickle.dumps(Harm()),
        pickle.dumps(dict(data=Harm(), labels=[])),
        pickle.dumps([1]),
        b'no pickle',
        pickle.dumps(dict(data=np.zeros((6, 7), np.uint8), labels=[0] * 6)),
        pickle.dumps(dict(labels=[0] * 6)),
        pickle.dumps(dict(data=sys.exit, labels=[0])),
    ],
)
def test_an_archive_cannot_run_a_program(archive, monkeypatch, content):
    folder, write = archive
    monkeypatch.setattr(os, 'system', lambda command: pytest.fail('executed'))
    monkeypatch.setattr(CIFAR10, 'train_list', [write('batch 0', content)])
    with pytest.raises(DamagedData):
        data.read_torchvision(CIFAR['cifar10'], folder.parent)


# --- partitions: numbers obtained otherwise -

LABELS = np.tile(np.arange(10), 50)


def stream(seed):
    "The stream of a partition, from its definition: purpose 0, round 0, client 0."
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0, 0, 0])))


@pytest.mark.parametrize('seed', [0, 3])
def test_equal_shares_are_cuts_of_one_shuffle(seed):
    cards = stream(seed).permutation(500)
    expected = [sorted(cards[i : i + 100].tolist()) for i in range(0, 500, 100)]
    assert [p.tolist() for p in split(LABELS, 5, 'iid', seed).parts] == expected
    assert [p.tolist() for p in split(LABELS, 5, 'dirichlet', seed, np.inf).parts] == expected


@pytest.mark.parametrize('seed', [0, 3])
def test_sizes_are_one_draw_and_the_images_are_shuffled(seed):
    g = stream(seed)
    edges = np.floor(np.cumsum(g.dirichlet(np.full(4, 5.0))) * 500 + 1e-9).astype(int)
    cards, cuts = g.permutation(500), [0, *edges[:3], 500]
    expected = [sorted(cards[a:b].tolist()) for a, b in zip(cuts, cuts[1:], strict=False)]
    assert [p.tolist() for p in split(LABELS, 4, 'quantity', seed, skew=5.0).parts] == expected


@pytest.mark.parametrize('kind', KINDS)
def test_every_kind_shuffles(kind):
    "Unshuffled, the images of a class go to its holders in the order of the data set."
    holder = np.empty(500, dtype=int)
    for k, part in enumerate(split(LABELS, 10, kind, 0).parts):
        holder[part] = k
    assert any((np.diff(holder[LABELS == c]) < 0).any() for c in range(10))


def test_skew_reaches_the_sizes():
    "The spread of a symmetric Dirichlet's shares is sqrt((K-1)/(K^2 (K skew + 1)))."
    many, clients = np.zeros(20_000, dtype=int), 10
    for skew in (0.5, 5.0, 50.0):
        sizes = [
            split(many, clients, 'quantity', s, skew=skew, min_fraction=0).sizes / 20_000 for s in range(200)
        ]
        expected = np.sqrt((clients - 1) / (clients**2 * (clients * skew + 1)))
        assert abs(np.std(sizes) / expected - 1) < 0.1


@pytest.mark.parametrize('clients, each', [(1, 10), (2, 5), (3, 4), (4, 3), (5, 2), (20, 2)])
def test_shards_below_five_clients_take_as_many_classes_as_they_must(clients, each):
    found = split(LABELS, clients, 'shards')
    table = found.table(LABELS, 10).to_numpy()
    assert ((table > 0).sum(1) == each).all() and (table.sum(0) == 50).all()
    assert found.how == f'shards({each} classes per client)'


def test_shards_of_a_single_class_and_an_explicit_wish():
    assert split(np.zeros(20, dtype=int), 3, 'shards').how == 'shards(1 classes per client)'
    with pytest.raises(ValueError, match='cannot hold all 10'):
        split(LABELS, 4, 'shards', classes_per_client=2)


def test_without_takes_away():
    parts = iid_split(LABELS, 5, rng(1, 'partition'))
    gone = np.arange(0, 500, 7)
    left = parts.without(gone)
    for before, after in zip(parts.parts, left.parts, strict=True):
        assert after.tolist() == [i for i in before.tolist() if i % 7]
    assert left.spare.tolist() == gone.tolist() and left.sizes.sum() == 500 - len(gone)
    assert left.without(np.array([1])).spare.tolist() == sorted([*gone.tolist(), 1])
    assert Partition(left.parts, left.how, left.spare).how == 'iid'
