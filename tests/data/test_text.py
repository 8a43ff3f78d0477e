"Text sets: the schemas of the hub, what is counted, labels that are shifted once, groups as partitions."
import json
from collections import Counter
from pathlib import Path
from unittest.mock import create_autospec

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpqkd.data.images import DamagedData, DataMissing
from fedmpqkd.data.text import (
    IGNORED,
    KINDS,
    Item,
    Letters,
    almanac_rows,
    articles,
    hub_folder,
    items_hash,
    load_text,
    natural_labels,
    natural_split,
    next_token_labels,
    option_pairs,
    speeches,
    target_pairs,
    text_folder,
    texts_at_hand,
    tokenise,
)


def write(folder: Path, part: str, rows: list[dict], names: list[str] | None = None) -> None:
    "A part of a set, with class names where the hub's card has them."
    table = pa.Table.from_pylist(rows)
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / f"{part}.parquet")


TWO = {"text": ["ice", "tea"], "label": ["1", "2"]}
ARC = {"question": "Which is warm?", "choices": TWO, "answerKey": "2"}
ROWS = {
    "arc": ([ARC], "choice", " tea"),
    "openbookqa": ([{"question_stem": "Warm?", "choices": TWO, "answerKey": "1"}], "choice", " ice"),
    "medmcqa": ([{"question": "q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 3}],
                "choice", " d"),
    "medqa": ([{"question": "q", "options": {"A": "x", "B": "y"}, "answer_idx": "B", "answer": "y"}],
              "choice", " y"),
    "pubmedqa": ([{"question": "q?", "context": {"contexts": ["c1", "c2"]}, "final_decision": "maybe"}],
                 "class", " maybe"),
    "boolq": ([{"question": "is it", "answer": True}], "class", " yes"),
    "polarity": ([{"text": "dull", "label": 0}], "class", " negative"),
    "gsm8k": ([{"question": "1 + 1?", "answer": "2"}], "answer", " 2"),
    "squad": ([{"question": "who?", "context": "Ann did.",
                "answers": {"text": ["Ann"], "answer_start": [0]}}], "answer", " Ann"),
    "plain": ([{"text": "It rains."}], "text", "It rains."),
}


LONG = {"question": "q?", "context": {"contexts": ["c1", "c2"], "meshes": ["Humans", "Lung Neoplasms"]},
        "final_decision": "maybe", "long_answer": "It may."}


def test_an_article_has_two_readings_and_a_topic(tmp_path: Path):
    rows = [LONG, LONG | dict(context=LONG["context"] | dict(meshes=["Humans"]))]
    for part in ("train", "test"): write(tmp_path / "pubmedqa", part, rows)
    short, long = (load_text(name, tmp_path) for name in ("pubmedqa", "pubmedqa-long"))
    assert (short.kind, long.kind) == ("class", "answer")
    assert short.train[0].prompt == "c1\nc2\nq?\nLabel:" and short.train[0].target == " maybe"
    assert long.train[0].prompt == "c1\nc2\nQuestion: q?\nAnswer:" and long.train[0].target == " It may."
    for data in (short, long): assert [i.group for i in data.train] == ["cancer", "other"]
    assert texts_at_hand(tmp_path) == ["pubmedqa", "pubmedqa-long"]


def test_long_answers_that_are_not_there_are_told(tmp_path: Path):
    rows, _, _ = ROWS["pubmedqa"]
    for part in ("train", "test"): write(tmp_path / "pubmedqa", part, rows)
    with pytest.raises(DamagedData, match="train.parquet: pubmedqa-long needs a column long_answer"):
        load_text("pubmedqa-long", tmp_path)
    for part in ("train", "test"): write(tmp_path / "pubmedqa", part, [LONG | dict(long_answer=None)])
    with pytest.raises(DamagedData, match="train.parquet row 0: an answer is None"):
        load_text("pubmedqa-long", tmp_path)


@pytest.mark.parametrize("name", ROWS)
def test_every_schema_of_the_hub(tmp_path: Path, name: str):
    rows, kind, target = ROWS[name]
    names = ["neg", "pos"] if name == "polarity" else None
    for part in ("train", "test"): write(tmp_path / name, part, rows, names)
    data = load_text(name, tmp_path)
    assert (data.kind, data.train[0].target, len(data.test)) == (kind, target, 1)
    assert not data.skipped


def test_context_stands_in_front_of_the_question(tmp_path: Path):
    rows, _, _ = ROWS["squad"]
    for part in ("train", "test"): write(tmp_path / "squad", part, rows)
    assert load_text("squad", tmp_path).train[0].prompt == "Ann did.\nQuestion: who?\nAnswer:"
    assert load_text("squad", tmp_path, template="{question} ").train[0].prompt == "Ann did.\nwho? "


def test_empty_items_are_counted(tmp_path: Path):
    rows = [{"text": t, "label": 0} for t in ("a", "", " \n", "b")]
    for part in ("train", "test"): write(tmp_path / "s", part, rows, ["no", "yes"])
    data = load_text("s", tmp_path)
    assert (len(data.train), len(data.test), data.skipped) == (2, 2, {"empty": 4})


@pytest.mark.parametrize("row, message", [
    ({"text": "a", "label": 2}, "outside the classes"), ({"text": "a", "label": -1}, "outside the classes"),
    (ARC | {"answerKey": "C"}, "none of the choices"),
    ({"question": "q", "context": {"contexts": ["c"]}, "final_decision": "perhaps"}, "outside the classes")])
def test_a_bad_label_names_file_and_row(tmp_path: Path, row: dict, message: str):
    good = dict(row, **{"label": 0} if "label" in row else {"answerKey": "1"} if "choices" in row else
                {"final_decision": "no"})
    for part in ("train", "test"): write(tmp_path / "s", part, [good, row], ["no", "yes"])
    with pytest.raises(DamagedData, match=f"train.parquet row 1: .*{message}"): load_text("s", tmp_path)


SQUAD = {"question": "who?", "context": "Ann did.", "answers": {"text": ["Ann"], "answer_start": [0]}}
OPA = {"question": "q", "opa": "a", "opb": "b", "opc": "c", "opd": "d", "cop": 3}


@pytest.mark.parametrize("good, bad, message", [
    (SQUAD, {"answers": {"text": [None], "answer_start": [0]}}, "an answer is None"),
    (SQUAD, {"answers": {"text": ["Ann", None], "answer_start": [0, 0]}}, "an answer is None"),
    (SQUAD, {"answers": {"text": None, "answer_start": None}}, "an answer is None"),
    (SQUAD, {"answers": None}, "an answer is None"), (SQUAD, {"answers": {"text": []}}, "without an answer"),
    ({"question": "1 + 1?", "answer": "2"}, {"answer": None}, "an answer is None"),
    ({"question": "is it", "answer": True}, {"answer": None}, "without a label"),
    (ARC, {"choices": {"text": ["a", None], "label": ["1", "2"]}}, "a choice is None"),
    (ARC, {"choices": {"text": None, "label": ["1", "2"]}}, "a choice is None"),
    (ARC, {"choices": None}, "none of the choices"), (OPA, {"opb": None}, "a choice is None"),
    ({"question": "q", "options": {"A": "x", "B": "y"}, "answer_idx": "B"}, {"options": None},
     "none of the choices"),
    ({"text": "a", "label": 0}, {"label": None}, "without a label"),
    ({"question": "q", "context": {"contexts": ["c"]}, "final_decision": "no"},
     {"context": {"contexts": [None]}}, "a context is None")])
def test_what_is_null_names_file_and_row(tmp_path: Path, good: dict, bad: dict, message: str):
    "In the second shard, whose rows are counted from its own beginning."
    shards = {"train-00000-of-00002": [good] * 3, "train-00001-of-00002": [good, good | bad], "test": [good]}
    for part, rows in shards.items():
        table = pa.Table.from_pylist(rows, pa.Table.from_pylist([good]).schema)
        info = {"info": {"features": {"label": {"names": ["no", "yes"]}}}}
        (tmp_path / "s").mkdir(exist_ok=True)
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}),
                       tmp_path / "s" / f"{part}.parquet")
    with pytest.raises(DamagedData, match=f"train-00001-of-00002.parquet row 1: .*{message}"):
        load_text("s", tmp_path)


def test_files_that_do_not_say_their_part_are_refused_unless_there_is_one(tmp_path: Path):
    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(60)]
    write(tmp_path / "s", "a", rows)
    assert len(load_text("s", tmp_path).train) + len(load_text("s", tmp_path).test) == 60
    write(tmp_path / "s", "b", rows)
    with pytest.raises(DamagedData, match="2 files, a.parquet, b.parquet, do not say which part"):
        load_text("s", tmp_path)
    write(tmp_path / "s", "train", rows)
    assert len(load_text("s", tmp_path).train) + len(load_text("s", tmp_path).test) == 60
    (tmp_path / "none").mkdir()
    with pytest.raises(DataMissing, match="no Parquet files"): load_text("none", tmp_path)


def test_a_set_with_one_part_keeps_paragraphs_together(tmp_path: Path):
    for lang in ("de", "en"):
        rows = [{"question": f"{lang} {p}.{q}?", "context": f"{lang} {p}",
                 "answers": {"text": ["x"], "answer_start": [0]}} for p in range(40) for q in range(3)]
        write(tmp_path / "quad" / lang, "validation", rows)
    data = load_text("quad", tmp_path)
    train, test = ({i.key for i in part} for part in (data.train, data.test))
    assert not train & test and len(data.train) + len(data.test) == 240 and 2 <= len(test) <= 16
    assert {i.group for i in data.test} == {"de", "en"}
    assert {i.group for i in load_text("quad", tmp_path, groups=["de"]).train} == {"de"}
    with pytest.raises(ValueError, match="quad has no fr; it has de, en"):
        load_text("quad", tmp_path, groups=["fr"])


def test_where_sets_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "text" / "s", "train", [{"text": "a"}])
    write(tmp_path / "t", "train", [{"text": "a"}])
    monkeypatch.setenv("FEDMPQKD_DATA", str(tmp_path))
    assert text_folder("s") == tmp_path / "text" / "s" and text_folder("t") == tmp_path / "t"
    with pytest.raises(DataMissing, match="none of: .*'almanac' needs no files"):
        text_folder("s", tmp_path / "t")


def test_a_name_with_a_slash_is_one_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    "What is asked of `huggingface_hub` has its own signature; a folder of that name here comes first."
    hub = pytest.importorskip("huggingface_hub")
    write(tmp_path / "snapshot" / "Easy", "train", [{"text": "on the hub"}] * 2)
    write(tmp_path / "snapshot" / "Easy", "test", [{"text": "on the hub, too"}])
    write(tmp_path / "here" / "us" / "own", "train", [{"text": "here"}] * 20)
    asked = create_autospec(hub.snapshot_download, return_value=str(tmp_path / "snapshot"))
    monkeypatch.setattr(hub, "snapshot_download", asked)
    monkeypatch.setenv("FEDMPQKD_DATA", str(tmp_path / "here"))
    data = load_text("them/arc/Easy")
    assert (len(data.train), len(data.test), data.name) == (2, 1, "them/arc/Easy")
    assert asked.call_args.args == ("them/arc",)
    assert asked.call_args.kwargs == dict(repo_type="dataset", allow_patterns="Easy/*.parquet")
    assert load_text("us/own").train[0].target == "here" and asked.call_count == 1
    with pytest.raises(DataMissing, match="them/arc is in none of"): load_text("them/arc", tmp_path)
    with pytest.raises(DataMissing, match="them/arc/Hard: the hub has no Parquet files of it"):
        load_text("them/arc/Hard")


@pytest.mark.parametrize("name", ["no--body/no.thing", "nobody/nothing"])
def test_what_the_hub_does_not_give_is_said_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    said = f"{name} is in none of: .*the hub did not give it: .+ needs no files"
    with pytest.raises(DataMissing, match=said): load_text(name)


@pytest.mark.parametrize("name", ["a/b c", "them/arc/../../..", "them/arc//etc", "them/.."])
def test_names_that_lead_elsewhere_are_no_names(name: str, monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: pytest.fail("the hub was asked"))
    with pytest.raises(DataMissing, match="is no name on the hub"): hub_folder(name)
    with pytest.raises(DataMissing, match=r"^\./own/set is in none of"): load_text("./own/set")


@pytest.mark.parametrize("error", [OSError(), KeyError("x"), RuntimeError("no network\nand more")])
def test_whatever_the_hub_says_the_set_is_missing(error: Exception, monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub")

    def fails(*a, **k): raise error
    monkeypatch.setattr(hub, "snapshot_download", fails)
    with pytest.raises(DataMissing, match="them/arc: the hub did not give it: .+$"): hub_folder("them/arc")


def test_a_hub_folder_called_data_is_no_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub")
    write(tmp_path / "data", "train", [{"text": "a"}] * 20)
    monkeypatch.setattr(hub, "snapshot_download", lambda *a, **k: str(tmp_path))
    here, there = load_text("data", tmp_path), load_text("them/set")
    assert {i.group for i in there.train} == {i.group for i in here.train}


@pytest.mark.parametrize("kind", KINDS)
def test_the_embedded_set(kind: str):
    data = load_text(kind=kind)
    assert (len(data.train), len(data.test)) == (32, 8)
    assert len({i.prompt + i.target for i in data.train + data.test}) == 40
    labels, names = natural_labels(data.train)
    assert names == ("garden", "harbour", "kitchen", "sky") and np.bincount(labels).tolist() == [8] * 4
    if kind == "choice":
        places = Counter(i.label for i in data.train + data.test)
        assert set(places) == {0, 1, 2, 3} and max(places.values()) <= 16
        for item, row in zip(load_text().train[:8], almanac_rows(), strict=False):
            assert item.target == " " + row["options"][0]
            assert sorted(item.options) == sorted(" " + o for o in row["options"])


def test_fingerprint():
    a = Item("p", (" a", " b"), 0)
    changed = [Item("q", (" a", " b"), 0), Item("p", (" a", " b"), 1), Item("p", (" a", " c"), 0),
               Item("p", (" a", " b"), 0, group="g"), Item("p", references=(" a", " b"))]
    assert len({items_hash([i]) for i in [a, *changed]}) == 6
    assert items_hash([a], [a]) != items_hash([a, a], [])
    assert load_text().fingerprint == load_text().fingerprint == "b39244fd5f95d996"


@pytest.mark.parametrize("make", [lambda: Item("p"), lambda: Item("p", (" a",), references=("b",)),
                                  lambda: Item("p", (" a",), 1), lambda: Item("p", (" a",), -1)])
def test_impossible_items(make):
    with pytest.raises(ValueError): make()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.text("ab \n", max_size=6), st.text("cdé ", max_size=6)), max_size=6),
       st.booleans(), st.booleans(), st.integers(1, 14))
def test_tokenise_against_a_walk_in_plain_python(pairs, bos, eos, longest):
    "Ids, labels and counts, written out one text at a time."
    batch = tokenise(pairs, Letters(), longest, 1 if bos else None, 2 if eos else None, pad=7)
    rows, empty, long = [], 0, 0
    for n, (prompt, target) in enumerate(pairs):
        ids = [1] * bos + [ord(c) for c in prompt + target] + [2] * eos
        first = bos + len(prompt)
        labels = [ids[j + 1] if j + 1 < len(ids) and j + 1 >= first else IGNORED for j in range(len(ids))]
        if not target.strip() or set(labels) == {IGNORED}: empty += 1
        elif len(ids) > longest: long += 1
        else: rows.append((n, ids, labels, len(target.encode())))
    assert batch.skipped == {"empty": empty, "long": long}
    assert batch.index.tolist() == [r[0] for r in rows]
    assert batch.target_bytes.tolist() == [r[3] for r in rows]
    for b, (_, ids, labels, _) in enumerate(rows):
        assert batch.ids[b][batch.mask[b]].tolist() == ids and batch.labels[b, :len(ids)].tolist() == labels
        assert (batch.labels[b, len(ids):] == IGNORED).all() and (batch.ids[b, len(ids):] == 7).all()
    assert batch.spans.shape == (*batch.ids.shape, 2)


def test_loss_is_the_sum_over_target_tokens_alone():
    "Log-likelihood written out by hand from the probabilities."
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 6, 128, generator=g)
    batch = tokenise([("at", " 5.")], Letters(), 9, bos=1)
    p = logits.softmax(-1)[0]
    by_hand = -(p[2, ord(" ")].log() + p[3, ord("5")].log() + p[4, ord(".")].log())
    loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
    assert torch.allclose(loss, by_hand)
    assert batch.ids.shape == (1, 6)


def test_a_token_across_the_border_belongs_to_the_target():
    class Pairs:
        "Two characters a token."
        def encode_batch(self, input, *, add_special_tokens):
            from types import SimpleNamespace as S
            return [S(ids=[3 + n for n in range(0, len(t), 2)], offsets=[(n, min(n + 2, len(t))) for n in
                      range(0, len(t), 2)]) for t in input]

    batch = tokenise([("abc", " d")], Pairs(), 9)  # ab|c_|d: the second token reaches beyond the prompt
    assert batch.labels.tolist() == [[5, 7, IGNORED]]


def test_labels_of_an_empty_batch():
    batch = tokenise([("a", "")], Letters(), 9)
    assert len(batch) == 0 and batch.skipped == {"empty": 1, "long": 0} and batch.ids.dtype == torch.int64
    labels = next_token_labels(torch.tensor([[4, 5]]), torch.tensor([0]), torch.tensor([2]))
    assert labels.tolist() == [[5, IGNORED]]


def test_speeches_and_articles():
    play = "A:\nx\ny\n\nB of C:\nz\n\nno name here"
    assert list(speeches(play)) == [("A", "x\ny"), ("B of C", "z"), ("", "no name here")]
    wiki = ["", " = T = \n", "", " p one \n", " = = U = = \n", " p two \n", " = V = \n", " p = q \n"]
    assert list(articles(wiki)) == [("T", "p one"), ("T", "p two"), ("V", "p = q")]


def test_natural_split_keeps_groups_whole():
    g = np.random.default_rng(0)
    labels = g.integers(0, 12, 200)
    split = natural_split(labels, 5)
    owners = [{k for k, p in enumerate(split.parts) if (labels[p] == c).any()} for c in range(12)]
    assert all(len(o) == 1 for o in owners)
    assert split.sizes.max() - split.sizes.min() <= np.bincount(labels).max()
    assert natural_split([3, 3, 7], 2).sizes.tolist() == [2, 1]


def test_options_of_items():
    items = load_text(kind="choice").test
    pairs, owner = option_pairs(items)
    assert len(pairs) == 32 and owner.tolist() == [n for n in range(8) for _ in range(4)]
    assert [p for n in range(8) for p in [pairs[4 * n + items[n].label]]] == target_pairs(items)
    with pytest.raises(ValueError, match="with options"): option_pairs(load_text(kind="text").test)


SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "text"
SIZES = {"arc_easy": ("choice", 2251, 2376), "rotten_tomatoes": ("class", 8530, 1066),
         "gsm8k": ("answer", 7473, 1319)}


@pytest.mark.parametrize("name", SIZES)
def test_real_sets_where_they_are(name: str):
    if not (SHARED / name).is_dir(): pytest.skip("the text sets are not on this machine")
    data = load_text(name, SHARED)
    assert (data.kind, len(data.train), len(data.test)) == SIZES[name] and not data.skipped
