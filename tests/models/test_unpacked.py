"Processes that meet a model for the first time at the same moment: all get it, nothing is left lying about."
from pathlib import Path
from threading import Barrier, Thread
from types import SimpleNamespace

import pytest

from fedmpqkd.models import language


class Config:
    def to_dict(self): return dict(quantization_config=1, width=2)

    @classmethod
    def from_dict(cls, values):
        assert "quantization_config" not in values
        return cls()


class Model:
    together: Barrier | None = None  # where all have to arrive before one goes on
    fails = False

    def __init__(self, config=None): self.config = config or Config()
    def state_dict(self): return {}
    def load_state_dict(self, state): pass

    def save_pretrained(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "config.json").write_text("{}")
        if self.fails: raise OSError("no space left")
        if self.together: self.together.wait(timeout=20)


class Tokenizer:
    def save_pretrained(self, folder): (Path(folder) / "tokenizer.json").write_text("{}")


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    made = SimpleNamespace(AutoModelForCausalLM=SimpleNamespace(from_pretrained=lambda *a, **k: Model()),
                           AutoTokenizer=SimpleNamespace(from_pretrained=lambda *a, **k: Tokenizer()))
    monkeypatch.setattr(language, "hub", lambda *a: made)
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF")
    return tmp_path / "tiny.gguf"


def test_both_get_it(gguf, monkeypatch):
    monkeypatch.setattr(Model, "together", Barrier(3))
    found, folder = [], gguf.parent / "models"

    def get():
        try: found.append(language.unpacked(gguf, folder))
        except Exception as why: found.append(why)
    threads = [Thread(target=get) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert found == [folder / "tiny-4"] * 3
    assert [p.name for p in folder.iterdir()] == ["tiny-4"]
    assert sorted(p.name for p in found[0].iterdir()) == ["config.json", "tokenizer.json"]
    assert language.unpacked(gguf, folder) == found[0]


def test_what_failed_leaves_nothing_behind(gguf, monkeypatch):
    folder = gguf.parent / "models"
    monkeypatch.setattr(Model, "fails", True)
    with pytest.raises(OSError, match="no space left"): language.unpacked(gguf, folder)
    assert not list(folder.iterdir())
    monkeypatch.setattr(Model, "fails", False)
    (folder / "tiny-4").mkdir()
    (folder / "tiny-4" / "something else").write_text("")
    with pytest.raises(OSError): language.unpacked(gguf, folder)
