"Tokenizers: what tokens stand for, in every convention; the five kinds; the missing extra."
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmpqkd.data.text import load_text
from fedmpqkd.data.tokenizers import (
    TOKENIZERS,
    Vocabulary,
    byte_letters,
    byte_of,
    byte_text,
    piece_text,
    style_of,
    train_tokenizer,
    vocabulary_of,
    wordpiece_text,
)

TEXTS = [i.target for i in load_text(kind="text").train]
STYLES = {"bytes": "byte", "byte-bpe": "byte", "bpe": "piece", "unigram": "piece", "wordpiece": "wordpiece"}


@pytest.fixture(scope="module")
def trained():
    return {kind: train_tokenizer(kind, TEXTS, 384) for kind in TOKENIZERS}


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=8))
def test_byte_letters_are_those_of_the_package(text: str):
    from tokenizers import pre_tokenizers

    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert byte_text("".join(p for p, _ in pieces)) == text
    assert set(pre_tokenizers.ByteLevel.alphabet()) == set(byte_letters())


@pytest.mark.parametrize("token, byte", [("<0x00>", 0), ("<0xFF>", 255), ("<0xG0>", -1), ("0x41", -1)])
def test_byte_fall_back(token: str, byte: int):
    assert byte_of(token) == byte


def test_parts_of_a_character_are_the_same_in_both_conventions():
    "The two bytes of é."
    assert [piece_text(t) for t in ("<0xC3>", "<0xA9>")] == [byte_text(t) for t in ("Ã", "©")]
    assert [wordpiece_text(t) for t in ("the", "##ed", ".", "##", "5")] == [" the", "ed", ".", "##", " 5"]


def test_the_five_kinds(trained):
    import json

    for kind, one in trained.items():
        v = vocabulary_of(one)
        assert style_of(json.loads(one.to_str())) == STYLES[kind]
        assert len(v) == one.get_vocab_size() and set(v.special) == set(one.get_added_tokens_decoder())
        assert v.fingerprint == vocabulary_of(train_tokenizer(kind, TEXTS, 384)).fingerprint
        assert all(text for n, text in enumerate(v.texts) if n not in v.special)
    assert len({vocabulary_of(one).fingerprint for one in trained.values()}) == 5
    assert trained["bytes"].get_vocab_size() == 257


@pytest.mark.parametrize("kind", ["bytes", "byte-bpe", "bpe"])
def test_nothing_is_unknown_where_bytes_are_tokens(trained, kind: str):
    ids = trained[kind].encode("ที่ 5 € ü", add_special_tokens=False).ids
    v = vocabulary_of(trained[kind])
    text = "".join(v.texts[n] for n in ids).encode("utf-8", "surrogateescape").decode()
    assert text.strip() == "ที่ 5 € ü" and not set(ids) & set(v.special)


def test_training_gives_the_same_in_another_process():
    "Counts decide, not the order of a hash table."
    program = ("from fedmpqkd.data.tokenizers import *; from fedmpqkd.data.text import load_text\n"
               "texts = [i.target for i in load_text(kind='text').train]\n"
               "print([vocabulary_of(train_tokenizer(k, texts, 384)).fingerprint for k in TOKENIZERS])")
    runs = [subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
            for _ in range(2)]
    assert runs[0] == runs[1] and len(eval(runs[0])) == 5


def test_roles_can_be_given_and_ids_may_have_holes():
    v = Vocabulary.of(["a", "", "<end>"], "plain", {2: ("eos", "pad")})
    assert (v.role("eos"), v.role("pad"), v.role("bos"), v.texts) == (2, 2, None, ("a", "", ""))


def test_without_the_extra_one_line_names_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"^tokenizers is needed here: .*'fedmpqkd\[lm\]'$"):
        train_tokenizer("bpe", TEXTS)
