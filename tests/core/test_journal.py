"Files that are whole or refused, claims, and runs whose files were damaged."
import errno
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tape import digits, timeless

from fedmpqkd.core import journal as journal_module
from fedmpqkd.core.config import RunConfig, plain, run_id
from fedmpqkd.core.journal import (
    Claimed,
    Damaged,
    Journal,
    WorkingFolder,
    quarantine,
    read_record,
    sealed,
    sweep,
    unseal,
    write_atomic,
)
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.run import run

CONFIG = RunConfig(method="fedavg")
ID = run_id(CONFIG, "digits")


def record(**more) -> dict:
    return dict(id=ID, config=plain(CONFIG), data=dict(fingerprint="digits"), **more)


def journal_in(folder: Path, id: str = ID) -> Journal:
    return Journal(folder, "group", "fedavg_seed=0", id)


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


# --- sealed files -----------------------------------------------------------------------------------------

def test_any_flipped_bit_is_refused(tmp_path):
    "200 places, drawn over the whole file: mark, digest, owner, tensors. The file is put aside each time."
    path, g = tmp_path / "state.pt", random.Random(0)
    whole = sealed(dict(w=torch.arange(50), names=["a", "b"]), "run a")
    for _ in range(200):
        place, bit = g.randrange(len(whole)), g.randrange(8)
        bad = bytearray(whole)
        bad[place] ^= 1 << bit
        path.write_bytes(bytes(bad))
        with pytest.raises(Damaged, match="state.pt: .*put aside as state.pt.damaged"): unseal(path, "run a")
        assert not path.exists()
    assert len(everything(tmp_path)) == 200
    path.write_bytes(whole)
    assert unseal(path, "run a")["w"].tolist() == list(range(50))


def test_every_cut_is_refused_and_so_is_what_is_added(tmp_path):
    path, whole = tmp_path / "state.pt", sealed([torch.ones(3)], "run a")
    for bad in (*(whole[:n] for n in range(0, len(whole), 37)), whole + b"\0", whole[1:], whole * 2):
        path.write_bytes(bad)
        with pytest.raises(Damaged): unseal(path, "run a")


@pytest.mark.parametrize("owner", ["run", "run ab", "run a\nb", "", "RUN A"])
def test_a_seal_belongs_to_one_owner(tmp_path, owner):
    path = write_atomic(tmp_path / "state.pt", sealed([1], "run a"))
    with pytest.raises(Damaged, match="belongs to 'run a'"): unseal(path, owner)


def test_two_readers_of_one_damaged_file(tmp_path, monkeypatch):
    "The slower one finds it moved away; that is no other error."
    path = tmp_path / "state.pt"
    path.write_bytes(b"nonsense")
    real = journal_module._broken_seal
    def while_another_reads(data, owner):
        if path.exists(): quarantine(path)
        return real(data, owner)
    monkeypatch.setattr(journal_module, "_broken_seal", while_another_reads)
    with pytest.raises(Damaged, match="no seal"): unseal(path, "run a")
    with pytest.raises(Damaged, match="vanished"): unseal(path, "run a")
    assert len(everything(tmp_path)) == 1


def test_a_checkpoint_of_another_run_is_refused_and_put_aside(tmp_path):
    mine, other = journal_in(tmp_path), journal_in(tmp_path, "0123456789ab")
    other.save(dict(w=torch.ones(2)), [dict(round=1)])
    mine.folder.mkdir(parents=True)
    os.replace(other.folder / "checkpoint.pt", mine.folder / "checkpoint.pt")
    with pytest.raises(Damaged, match=f"belongs to '0123456789ab', not to '{ID}'"): mine.load()
    assert mine.load() is None
    aside, = [n for n in os.listdir(mine.folder) if n.startswith("checkpoint")]
    assert aside.startswith("checkpoint.pt.damaged-")


def test_memories_without_a_checkpoint_are_forgotten_and_damaged_ones_kept_aside(tmp_path):
    "A run that begins at its beginning must not find what its clients will know later."
    journal = journal_in(tmp_path)
    memory = journal.folder / "clients" / "0_5.pt"
    write_atomic(memory, b"of round 5")
    assert journal.load() is None and not memory.exists()
    write_atomic(memory, b"of round 5")
    journal.save({}, [dict(round=6)])
    assert journal.load()[1] == [dict(round=6)] and memory.exists()
    journal.start_over()
    kept = [n.split(".damaged-")[0] for n in os.listdir(journal.folder) if "damaged" in n]
    assert sorted(kept) == ["checkpoint.pt", "clients"] and not memory.exists()


# --- litter -----------------------------------------------------------------------------------------------

KILLED = """
import os, sys
from pathlib import Path
from fedmpqkd.core import journal
def die(*args): os._exit(9)
setattr(os, sys.argv[2], die)
journal.write_atomic(Path(sys.argv[1]) / 'state.pt', b'x' * 1000)
"""


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_half_written_files_are_swept(tmp_path, step):
    "A process dies in the middle of a write; its file goes once it is old, a living process keeps its own."
    for folder in ("a", "b"):
        done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / folder), step],
                              env=os.environ | dict(PYTHONPATH=str(ROOT)))
        assert done.returncode == 9
        left, = (tmp_path / folder).iterdir()
        assert left.name.startswith(".state.pt.") and left.suffix == ".tmp"
    left, = (tmp_path / "a").iterdir()
    (tmp_path / "a" / ".hidden").write_bytes(b"mine")
    (tmp_path / "a" / "notes.tmp").write_bytes(b"mine")
    os.utime(left, (time.time() - 7200,) * 2)
    assert sweep(tmp_path / "a") == [left.name] and sweep(tmp_path / "b") == []
    assert everything(tmp_path / "a") == [".hidden", "notes.tmp"] and len(everything(tmp_path / "b")) == 1
    assert sweep(tmp_path / "nowhere") == []


def test_who_writes_a_file_next_removes_what_was_left_of_it(tmp_path):
    "Also of a name with signs that mean something in patterns; not another's, nor what may be in the making."
    old = (time.time() - 7200,) * 2
    for name in ("state[1].pt", "state1.pt"):
        for number in (1, 2):
            left = tmp_path / f".{name}.{number}.5.tmp"
            left.write_bytes(b"half")
            if number == 1: os.utime(left, old)
    write_atomic(tmp_path / "state[1].pt", b"all")
    assert everything(tmp_path) == sorted([
        "state[1].pt", ".state[1].pt.2.5.tmp", ".state1.pt.1.5.tmp", ".state1.pt.2.5.tmp"])


def test_a_job_of_a_study_clears_up_behind_a_killed_one(tmp_path):
    "Its record is there, so nothing is computed; the folder beside it goes all the same."
    from fedmpqkd.study.experiments import Job, open_job, run_job
    config = make_config("fedavg", dataset="digits", train_images=40, test_images=20, model="resnet8")
    job = Job(config, str(tmp_path), "group", quiet=True)
    data, journal = open_job(job)
    rest = dict(algorithm=1, summary={}, curve=[dict(round=1)], environment={})
    journal.finish(dict(id=journal.id, config=plain(config), data=dict(fingerprint=data.fingerprint)) | rest)
    with journal.claim(): pass
    assert journal.folder.exists() and run_job(job)["id"] == journal.id and not journal.folder.exists()


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(handle): raise OSError(errno.ENOSPC, "no space left")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"): write_atomic(tmp_path / "state.pt", b"x")
    assert everything(tmp_path) == []


def test_a_kill_between_record_and_clean_up_leaves_nothing_after_tidy(tmp_path, monkeypatch):
    "Everywhere a run writes: the group, its models, the working folder, the clients' memories."
    journal = journal_in(tmp_path)
    with journal.claim():
        journal.save(dict(w=torch.ones(2)), [dict(round=1)])
        write_atomic(journal.folder / "clients" / "3_0.pt", b"memory")
        monkeypatch.setattr(Journal, "discard", lambda self: None)  # killed before it
        journal.finish(record(), dict(w=torch.ones(2)))
        monkeypatch.undo()
    old = (time.time() - 7200,) * 2
    for folder in (journal.record_path.parent, journal.model_path.parent, journal.folder / "clients"):
        os.utime(write_atomic(folder / ".x.1.2.tmp", b"half"), old)
    journal.tidy()
    kept = {journal.record_path, journal.model_path}
    assert {p for p in tmp_path.rglob("*") if p.is_file()} == kept and not journal.folder.exists()
    journal.tidy()  # twice is once


def test_tidy_leaves_a_run_that_is_being_computed_alone(tmp_path):
    journal = journal_in(tmp_path)
    journal.finish(record())
    with journal.claim():
        journal_in(tmp_path).tidy()
        assert (journal.folder / "claim").exists()
    unfinished = journal_in(tmp_path / "other")
    unfinished.save(dict(w=torch.ones(2)), [dict(round=1)])
    unfinished.tidy()
    assert unfinished.load()[1] == [dict(round=1)]


# --- two processes ----------------------------------------------------------------------------------------

TOGETHER = """
import sys, time
from pathlib import Path
from fedmpqkd.core.config import RunConfig, plain, run_id
from fedmpqkd.core.journal import Claimed, Journal
config = RunConfig(method='fedavg')
id, folder, start = run_id(config, 'digits'), Path(sys.argv[1]), float(sys.argv[2])
computed = waited = 0
for i in range(100):
    while time.time() < start + i * 0.02: pass
    journal = Journal(folder / f'{i // 2}', 'group', f'run{i % 2}', id)
    for _ in range(2000):  # what `run` does, and the loop of a study that waits for others
        journal.tidy()
        if journal.record(): break
        try:
            with journal.claim():
                if journal.record():
                    journal.discard()
                    break
                journal.save({}, [dict(round=1)])
                journal.finish(dict(id=id, config=plain(config), data=dict(fingerprint='digits')))
                computed += 1
        except Claimed: waited += 1
    assert journal.record()
print(computed, waited)
"""


def test_two_processes_that_start_together_never_collide(tmp_path):
    "100 runs, begun by both at the same moment: no error, and each is computed once."
    start = str(time.time() + 4)
    args = [sys.executable, "-c", TOGETHER, str(tmp_path), start]
    both = [subprocess.Popen(args, env=os.environ | dict(PYTHONPATH=str(ROOT)), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    said = [p.communicate(timeout=120) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    counts = [int(out.split()[0]) for out, _ in said]
    assert sum(counts) == 100, said
    assert not [n for n in everything(tmp_path) if "claim" in n or ".tmp" in n]


def test_a_folder_that_vanishes_while_it_is_swept(tmp_path, monkeypatch):
    def gone(*args): raise FileNotFoundError(errno.ENOENT, "gone")
    monkeypatch.setattr(Path, "glob", gone)
    assert sweep(tmp_path) == []


# --- claims -----------------------------------------------------------------------------------------------

def test_a_claim_says_who_holds_it_since_when_and_what_to_do(tmp_path):
    one, other = (WorkingFolder(tmp_path / "run") for _ in range(2))
    with one.claim():
        for _ in range(2):  # asking does not change the answer
            with pytest.raises(Claimed) as told, other.claim(): raise AssertionError("two holders")
            year = time.strftime("%Y")
            assert f"process {os.getpid()} on " in str(told.value) and f" since {year}-" in str(told.value)
            assert "end it" in str(told.value)
    with other.claim(): assert (tmp_path / "run" / "claim").read_text().count("process") == 1


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, capsys, code):
    def refuse(*args): raise OSError(code, "no locks available")
    monkeypatch.setattr(journal_module.fcntl, "flock", refuse)
    journal = journal_in(tmp_path)
    with journal.claim():
        assert "no locks on this file system" in capsys.readouterr().out
        journal.finish(record())
    journal.tidy()
    assert journal.record()["id"] == ID and not journal.folder.exists()


def test_so_is_a_system_without_fcntl(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(journal_module, "fcntl", None)
    with journal_in(tmp_path).claim(): assert "no locks" in capsys.readouterr().out


# --- records ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change", [
    dict(id="0123456789ab"), dict(config=plain(RunConfig(method="fedavg", seed=1))),
    dict(config=dict(colour=1)), dict(data=dict(fingerprint="others")), dict(data={}), dict(config=None)])
def test_a_record_of_another_run_is_refused(tmp_path, change):
    journal = journal_in(tmp_path)
    journal.record_path.parent.mkdir(parents=True)
    journal.record_path.write_text(json.dumps(record() | change))
    with pytest.raises(Damaged, match="fedavg_seed=0_"): journal.record()
    assert journal.record_path.exists()  # evidence is not put aside unasked
    journal.record_path.write_text(json.dumps(record()))
    assert journal.record() == record()


@pytest.mark.parametrize("text", ["", "{", '{"a": NaN}', '{"a": -Infinity}', "[]", "null", "\udcff"])
def test_what_is_no_record_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(Damaged, match=r"x\.json"): read_record(path)


# --- runs whose files were damaged ------------------------------------------------------------------------

FIELDS = dict(model="resnet8", clients=3, rounds=4, dirichlet=1.0, batch_size=16, eval_images=0, alpha=0.5,
              kd_warmup_rounds=0, participation=0.67)


def outcome(record: dict) -> tuple:
    "What a record says, without times."
    summary = record["summary"]
    return timeless(record["curve"]), summary["accuracy"], summary["bytes_up"], record["id"]


class Undisturbed:
    config = make_config("fedmpq-kd-ema", **FIELDS)
    data = staticmethod(lambda: digits(80, 40))

    @classmethod
    def journal(cls, folder: Path) -> Journal:
        return Journal(folder, "g", "n", run_id(cls.config, cls.data().fingerprint))


@pytest.fixture(scope="module")
def undisturbed() -> tuple:
    return outcome(run(Undisturbed.config, Undisturbed.data(), workers=1))


@pytest.fixture
def stopped(tmp_path) -> Journal:
    "A run that was stopped after two rounds of four."
    journal = Undisturbed.journal(tmp_path)

    class Stop(Exception): pass
    def stop(line):
        if line["round"] == 2: raise Stop
    stop.resume = lambda done: None
    with pytest.raises(Stop): run(Undisturbed.config, Undisturbed.data(), journal, workers=1, progress=stop)
    assert len(list((journal.folder / "clients").iterdir())) >= 2
    return journal


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 16
    path.write_bytes(bytes(data))


def memories(journal: Journal) -> list[Path]:
    return list((journal.folder / "clients").glob("*.pt"))


DISASTERS = dict(
    none=lambda j: None,
    checkpoint_flipped=lambda j: flip(j.folder / "checkpoint.pt", 0.7),
    checkpoint_cut=lambda j: os.truncate(j.folder / "checkpoint.pt", 999),
    checkpoint_empty=lambda j: (j.folder / "checkpoint.pt").write_bytes(b""),
    checkpoint_gone=lambda j: (j.folder / "checkpoint.pt").unlink(),
    memory_gone=lambda j: [p.unlink() for p in memories(j)],
    memory_flipped=lambda j: [flip(p, 0.6) for p in memories(j)],
    memory_of_another=lambda j: [p.write_bytes(sealed({}, "another run")) for p in memories(j)],
)


@pytest.mark.parametrize("disaster", DISASTERS)
def test_a_damaged_run_starts_again_and_ends_alike(stopped, undisturbed, disaster, capsys):
    DISASTERS[disaster](stopped)
    capsys.readouterr()
    assert outcome(run(Undisturbed.config, Undisturbed.data(), stopped, workers=1)) == undisturbed
    said = capsys.readouterr().out
    if disaster in ("none", "checkpoint_gone"): assert said == ""
    else: assert said.count("the run starts again from its beginning") == 1 and str(stopped.folder) in said
    assert not stopped.folder.exists()


@pytest.mark.parametrize("harm", [lambda p: flip(p, 0.8), lambda p: p.write_bytes(b""),
                                  lambda p: p.write_bytes(sealed(dict(state={}, cost={}), "another")),
                                  lambda p: p.unlink()], ids=["flipped", "empty", "another", "gone"])
def test_a_damaged_warm_start_is_computed_again(tmp_path, monkeypatch, capsys, harm):
    from fedmpqkd.federation import warmstart
    monkeypatch.setattr(warmstart, "cache_folder", lambda: tmp_path)
    config = make_config("fedmpq", **FIELDS | dict(warm_start="fedavg:1", rounds=1, alpha=0))
    first = outcome(run(config, digits(80, 40), workers=1))
    path, = (tmp_path / "starts").glob("*.pt")
    harm(path)
    vanished = not path.exists()
    capsys.readouterr()
    assert outcome(run(config, digits(80, 40), workers=1)) == first
    said = capsys.readouterr().out
    assert not said if vanished else ("computed again" in said and path.name in said)
    assert unseal(path, path.stem)["state"]
