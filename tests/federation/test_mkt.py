"FedMKT end to end: its control, its selection, its bytes, and a client that lies."
import copy
import dataclasses

import numpy as np
import pytest
import torch

from fedmpqkd.data.text import IGNORED, Item, TextData, load_text

pytest.importorskip("transformers")
pytest.importorskip("peft")

from fedmpqkd.federation import mkt  # noqa: E402
from fedmpqkd.federation.mkt import (  # noqa: E402
    MktConfig,
    connect,
    dealt,
    learned_from,
    lesson,
    moved,
    parties,
    party_message,
    play_mkt,
    whole_losses,
)
from fedmpqkd.learn.dualmince import message_size  # noqa: E402
from fedmpqkd.models.language import trained_coder  # noqa: E402
from fedmpqkd.study.mkt import plan_mkt, run_mkt  # noqa: E402

FEW = dict(public=8, private=4, test=8, rounds=1)


@pytest.fixture(scope="module")
def facts(): return load_text(kind="class")


def trained(party, c, rounds=15):
    "A model that knows the public texts."
    for round in range(rounds): learned_from(party, c, None, np.zeros(len(party.public), dtype=bool), round)
    return party


def ends(facts, c):
    "The record of a run, and the weights that everybody has at its end."
    kept = []
    record = play_mkt(facts, c, keep=lambda state, _: kept.append(state["weights"]))
    return record, kept[-1]


def alike(one, other): return all(torch.equal(t, other[name]) for name, t in one.items())


def test_without_weight_on_logits_fedmkt_is_its_control(facts):
    "lambda = 1: the same steps on the same labels, so the same models, whatever was exchanged."
    (one, taught), (other, alone), (_, less) = (
        ends(facts, MktConfig(method=m, weight=w, **FEW | dict(rounds=2)))
        for m, w in (("fedmkt", 1.0), ("public-ce", 1.0), ("fedmkt", 0.5)))
    assert all(map(alike, taught, alone)) and not alike(taught[0], less[0]) and not alike(taught[1], less[1])
    assert one["curve"][-1]["loss_private"] == other["curve"][-1]["loss_private"]
    assert one["summary"]["bytes_up"] > 0 == other["summary"]["bytes_up"]


def test_equal_tokenizers_move_logits_unchanged(facts):
    c = MktConfig(**FEW)
    (server, one, _), _ = parties(facts, c)
    said = party_message(one, c, 0)
    target = moved(said, connect(one, server, c))  # both learned byte-bpe:300 from the public texts
    assert torch.equal(target.index, said.index) and torch.equal(target.values, said.values)
    assert torch.equal(target.rest, said.rest)


def test_losses_and_logits_are_those_of_the_whole_forward_pass(facts):
    c = MktConfig(**FEW)
    (_, one, _), _ = parties(facts, c)
    said = party_message(one, c, 0, portion=3)
    logits = one.model.causal(input_ids=one.public.ids).logits.detach()
    rows = logits[one.public.labels != -100]
    torch.testing.assert_close(said.values, rows.topk(16).values)
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), one.public.labels, reduction="none")
    torch.testing.assert_close(said.losses, nll.sum(1) / one.positions)
    inside = torch.arange(one.public.ids.shape[1] - 1) < one.public.lengths[:, None] - 1
    every = -logits.log_softmax(-1)[:, :-1].gather(-1, one.public.ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(whole_losses(one), (every * inside).sum(1) / inside.sum(1))


def test_a_random_client_never_teaches_a_trained_server_and_a_liar_always_does(facts):
    c = MktConfig(lr=0.01, **FEW)
    (server, one, two), _ = parties(facts, c)
    trained(server, c)
    own, lines = party_message(server, c, 0), [connect(p, server, c) for p in (one, two)]
    honest = [party_message(p, c, 0) for p in (one, two)]
    assert (lesson(server, own, honest, (one, two), lines, c).teacher == -1).all()
    lies = [honest[0], dataclasses.replace(honest[1], losses=torch.full_like(honest[1].losses, 1e-4))]
    assert (lesson(server, own, lies, (one, two), lines, c).teacher == 2).all()
    check = dataclasses.replace(c, check=True)
    assert (lesson(server, own, lies, (one, two), lines, check).teacher == -1).all()
    kept = lesson(server, own, honest, (one, two), lines, check)
    assert (kept.teacher == -1).all() and np.isfinite(honest[0].losses.numpy()).all()


def test_honest_reports_are_believed_in_16_bits_too(facts):
    c = MktConfig(value_bits=16, index_bits=16, check=True, **FEW)
    (server, one, two), _ = parties(facts, c)
    from fedmpqkd.federation.mkt import believed, sent
    for p in (one, two):
        message, _ = sent(party_message(p, c, 0), p, c)
        assert np.isfinite(believed(message, p)).all()


@pytest.mark.parametrize("level", [-80, 0, 40, 500])
def test_honest_losses_fit_logits_of_16_bits_at_every_level(facts, level):
    "Softmax does not see a constant; half precision at 80 has steps of .06, at zero of less than .001."
    from fedmpqkd.federation.mkt import believed, for_half, sent
    c = MktConfig(value_bits=16, index_bits=16, check=True, **FEW)
    (_, one, _), _ = parties(facts, c)
    message = party_message(one, c, 0)
    moved_up = dataclasses.replace(message, values=4 * message.values + level,
                                   rest=None if message.rest is None else 4 * message.rest + level)
    exact = for_half(moved_up)
    there, size = sent(moved_up, one, c)
    assert (there.values - exact.values).abs().max() < 2**-11 * exact.values.abs().max() + 1e-6
    assert there.values[:, 0].eq(0).all() and size == sent(message, one, c)[1]
    labels = one.public.labels[one.public.labels != IGNORED]
    from fedmpqkd.learn.alignment import TopK
    from fedmpqkd.learn.dualmince import logit_losses
    _, bound = logit_losses(TopK(exact.values, exact.index, exact.rest), labels, one.vocabulary)
    owner = torch.arange(len(one.public)).repeat_interleave(one.positions)
    honest = torch.zeros(len(one.public)).index_add_(0, owner, bound) / one.positions
    told = dataclasses.replace(there, losses=honest)
    assert np.isfinite(believed(told, one)).all()
    assert np.isinf(believed(dataclasses.replace(there, losses=0.9 * honest - 0.1), one)).all()


def test_the_official_code_learns_from_itself(facts):
    c = MktConfig(lr=0.01, compat="official", **FEW)
    (server, one, two), _ = parties(facts, c)
    lines, own = [connect(p, server, c) for p in (one, two)], party_message(server, c, 0)
    own = dataclasses.replace(own, losses=torch.full_like(own.losses, 1e-4))
    got = lesson(server, own, [party_message(p, c, 0) for p in (one, two)], (one, two), lines, c)
    assert got.chosen.all() and (got.teacher == 0).all() and torch.equal(got.target.values, own.values)
    assert got.target.rest is None


def test_bytes_are_those_of_the_messages(facts):
    c = MktConfig(value_bits=16, index_bits=16, **FEW)
    record = play_mkt(facts, c)
    everybody, _ = parties(facts, c)
    short = dict(value="fp16", index_bits=16, tail=True)
    sizes = [message_size(p.positions.tolist(), 16, p.vocabulary, **short).total + 34 for p in everybody]
    assert record["summary"]["bytes_down"] == 2 * sizes[0]
    assert record["summary"]["bytes_up"] == sizes[1] + sizes[2]


def test_equal_clients_are_averaged(facts):
    c = MktConfig(method="fedavg", clients=("gpt-tiny/byte-bpe:300",) * 2, **FEW)
    record, (_, one, two) = ends(facts, c)
    _, (_, first, second) = ends(facts, dataclasses.replace(c, method="standalone", average=False))
    assert record["config"]["average"] and alike(one, two) and not alike(first, second)
    mean = {n: (t + second[n]) / 2 for n, t in first.items()}  # both had the same start and as many texts
    assert all(torch.allclose(t, mean[n], atol=1e-6) for n, t in one.items())


def test_nobody_holds_anybody_elses_items(facts):
    from fedmpqkd.federation.mkt import dealt
    public, private, _ = dealt(facts, MktConfig(**FEW))
    held = [i.prompt for part in (public, *private) for i in part]
    assert len(held) == len(set(held)) == 16


@pytest.mark.parametrize("fields, message", [
    (dict(top_k=300), "top_k=300: the smallest vocabulary has"),
    (dict(clients="gpt-tiny"), "MODEL/TOKENIZER/LAYERS"),
    (dict(public=30), "need 38 items"), (dict(context=8), "no public item is short enough"),
    (dict(clients="gpt-tiny/byte-bpe:300/1"), "has the layers that it has"),
    (dict(clients="gpt-tiny/own"), "a tokenizer that is trained here"),
    (dict(compat="official", check=True), "cannot be checked"),
    (dict(compat="official", metric="byte"), "no other metric"),
])
def test_what_cannot_work_is_refused(facts, fields, message):
    with pytest.raises(ValueError, match=message): play_mkt(facts, MktConfig(**FEW | fields))


def test_runs_are_found_again(tmp_path):
    fields = dict(results_dir=str(tmp_path), public=8, private=4, test=8, rounds=1)
    first = run_mkt("smoke", "standalone", "0", **fields).records
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")}
    assert run_mkt("smoke", "standalone", "0", **fields).records == first and len(before) == 1
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.json")} == before
    assert len({c.identity for c in plan_mkt("study-a")}) == 25


def test_a_run_of_fedavg_is_found_under_its_own_name(tmp_path):
    "Its weights are averaged whether or not the field says so, and the record says so, too."
    from fedmpqkd.study.mkt import read_mkt
    fields = dict(clients="gpt-tiny/bytes;gpt-tiny/bytes", public=8, private=4, test=8, rounds=1)
    record, = run_mkt("smoke", "fedavg", 0, results_dir=str(tmp_path), **fields).records
    planned, = plan_mkt("smoke", "fedavg", 0, **fields)
    assert record["id"] == planned.identity and record["config"]["average"] and planned.average
    assert [read_mkt(path) for path in tmp_path.rglob("*.json")] == [record]
    with pytest.raises(ValueError, match="method=fedavg.*only equal clients"):
        MktConfig(method="fedavg", clients=("gpt-tiny/bytes", "gpt-mini/bytes"))


def test_private_items_that_are_too_long_are_counted_and_a_client_without_any_is_an_error():
    items = tuple(Item(f"text {n} " + "x" * 60 * (n % 3 == 0), (" a", " b"), n % 2) for n in range(24))
    text = TextData("t", "choice", items, items[1:3])
    c = MktConfig(method="standalone", server="gpt-tiny/bytes", clients=("gpt-tiny/bytes",) * 2, public=6,
                  private=4, context=40, rounds=1)
    record = play_mkt(text, c)
    _, private, _ = dealt(text, c)
    assert record["private"] == [sum("xx" not in item.prompt for item in own) for own in private] != [4, 4]
    only_long = TextData("t", "choice", (*items[1:3], *items[4:6], *items[::3]), items[1:3])
    for seed in range(20):
        own = dataclasses.replace(c, public=2, private=2, seed=seed)
        if any(all("xx" in i.prompt for i in part) for part in dealt(only_long, own)[1]): break
    with pytest.raises(ValueError, match="context=40: no private item of client"): play_mkt(only_long, own)


def test_one_batch_without_a_teacher_is_the_labels_alone(facts):
    c = MktConfig(batch_size=8, **FEW)
    (server, one, two), _ = parties(facts, c)
    target = moved(party_message(one, c, 0), connect(one, server, c))
    nobody = np.zeros(len(server.public), dtype=bool)
    twins = [dataclasses.replace(server, model=copy.deepcopy(server.model)) for _ in range(2)]
    plain = learned_from(twins[0], c, None, nobody, 0)
    empty = learned_from(twins[1], c, target, nobody, 0)
    assert empty == pytest.approx(0.9 * plain, rel=1e-6)


def test_two_processes_share_a_study(tmp_path, monkeypatch):
    "A run that somebody holds is passed over; the other one is computed first."
    import fedmpqkd.study.mkt as study
    from fedmpqkd.core.journal import WorkingFolder
    fields, done = dict(results_dir=str(tmp_path), public=8, private=4, test=8, rounds=1, wait=0.01), []
    held, other = plan_mkt("smoke", "standalone,zero-shot", "0", public=8, private=4, test=8, rounds=1)
    real = study.play_mkt
    monkeypatch.setattr(study, "play_mkt", lambda t, c, *a: done.append(c.method) or real(t, c, *a))
    folder = tmp_path / "exp6" / "smoke" / "pieces"
    claim = WorkingFolder(folder / "_work" / f"standalone_seed=0_{held.identity}").claim()
    claim.__enter__()
    monkeypatch.setattr(study, "wait_for", lambda *a: claim.__exit__(None, None, None))
    records = run_mkt("smoke", "standalone,zero-shot", "0", **fields).records
    assert done == ["zero-shot", "standalone"]
    assert [r["config"]["method"] for r in records] == ["standalone", "zero-shot"]
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".json"]


def stopped(at):
    "What stops a run when it keeps something for the nth time."
    import fedmpqkd.study.mkt as study
    real, seen = study.Journal.save, []

    def save(self, state, curve):
        real(self, state, curve)
        seen.append(len(curve))
        if len(seen) == at: raise KeyboardInterrupt
    return save


@pytest.mark.parametrize("at", [1, 2, 5, 6])  # after training, within tests, after round 2
def test_a_stopped_run_goes_on_to_the_same_record(tmp_path, monkeypatch, at):
    import fedmpqkd.study.mkt as study
    fields = dict(public=8, private=4, test=8, rounds=2)
    whole, = run_mkt("smoke", "fedmkt", "0", results_dir=str(tmp_path / "whole"), **fields).records
    with monkeypatch.context() as patch:
        patch.setattr(study.Journal, "save", stopped(at))
        with pytest.raises(KeyboardInterrupt):
            run_mkt("smoke", "fedmkt", "0", results_dir=str(tmp_path / "rest"), **fields)
    assert [p.name for p in (tmp_path / "rest").rglob("*.pt")] == ["checkpoint.pt"]
    trained = []
    real = study.play_mkt
    monkeypatch.setattr(study, "play_mkt", lambda t, c, d, saved, keep: trained.append(len(saved[1])) or real(
        t, c, d, saved, keep))
    rest, = run_mkt("smoke", "fedmkt", "0", results_dir=str(tmp_path / "rest"), **fields).records
    assert trained == [1 if at < 5 else 2]
    assert rest["curve"] == whole["curve"]
    assert {k: v for k, v in rest["summary"].items() if k != "memory"} == {
        k: v for k, v in whole["summary"].items() if k != "memory"}
    assert not list((tmp_path / "rest").rglob("_work"))


def test_a_damaged_checkpoint_of_fedmkt_is_put_aside_and_said(tmp_path, monkeypatch, capsys):
    import fedmpqkd.study.mkt as study
    fields = dict(results_dir=str(tmp_path), public=8, private=4, test=8, rounds=1)
    with monkeypatch.context() as patch:
        patch.setattr(study.Journal, "save", stopped(1))
        with pytest.raises(KeyboardInterrupt): run_mkt("smoke", "standalone", "0", **fields)
    path, = tmp_path.rglob("checkpoint.pt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    record, = run_mkt("smoke", "standalone", "0", **fields).records
    assert "the run starts again from its beginning" in capsys.readouterr().out
    assert record["summary"]["clients"] and len(list(tmp_path.rglob("*.json"))) == 1


def test_a_run_that_fails_before_its_first_round_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="top_k"):
        run_mkt("smoke", "fedmkt", "0", results_dir=str(tmp_path), top_k=60000)
    assert not list(tmp_path.rglob("_work"))


def stopped_once(tmp_path, monkeypatch, method="standalone", at=1, **fields):
    "The settings of a run that was stopped, and its checkpoint."
    import fedmpqkd.study.mkt as study
    settings = dict(public=8, private=4, test=8, rounds=2) | fields
    with monkeypatch.context() as patch:
        patch.setattr(study.Journal, "save", stopped(at))
        with pytest.raises(KeyboardInterrupt):
            run_mkt("smoke", method, "0", results_dir=str(tmp_path), **settings)
    path, = tmp_path.rglob("checkpoint.pt")
    return settings, path


def altered(path, **state):
    "A checkpoint with something else in its state, sealed as it was."
    from fedmpqkd.core.journal import sealed, unseal
    owner = path.parent.name.rsplit("_", 1)[-1]
    content = unseal(path, owner)
    content["state"] |= state
    path.write_bytes(sealed(content, owner))


def test_a_checkpoint_of_other_texts_is_not_used(tmp_path, monkeypatch, capsys):
    settings, path = stopped_once(tmp_path, monkeypatch)
    altered(path, data="another", accuracy=[12.0, 12.0, 12.0])
    record, = run_mkt("smoke", "standalone", "0", results_dir=str(tmp_path), **settings).records
    fresh, = run_mkt("smoke", "standalone", "0", results_dir=str(tmp_path / "fresh"), **settings).records
    assert "its checkpoint is of other texts" in capsys.readouterr().out and record["curve"] == fresh["curve"]


def test_the_machines_of_a_resumed_run_are_named(tmp_path, monkeypatch, capsys):
    settings, path = stopped_once(tmp_path, monkeypatch)
    altered(path, machines=["a larger machine"])
    record, = run_mkt("smoke", "standalone", "0", results_dir=str(tmp_path), **settings).records
    assert record["environment"]["earlier"] == ["a larger machine"]
    assert "standalone, seed 0: it goes on behind round 1 of 2" in capsys.readouterr().out


def test_a_checkpoint_of_a_gpu_is_read_without_one(tmp_path, monkeypatch):
    "Its tensors are on the host; one that says otherwise is brought there."
    from fedmpqkd.core.journal import sealed, unseal
    tag = torch.serialization.location_tag
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda s: "cuda:0" if tag(s) == "cpu" else tag(s))
        (tmp_path / "far").write_bytes(sealed(dict(w=torch.arange(3.0)), "me"))
    assert b"cuda:0" in (tmp_path / "far").read_bytes()
    assert torch.equal(unseal(tmp_path / "far", "me")["w"], torch.arange(3.0))


def test_a_healed_client_is_not_healed_twice(tmp_path, monkeypatch):
    "The first checkpoint is that of the healing."
    import fedmpqkd.federation.mkt as federation
    settings, path = stopped_once(tmp_path, monkeypatch, "llm2slm", heal=1)
    whole, = run_mkt("smoke", "llm2slm", "0", results_dir=str(tmp_path / "whole"), **settings).records
    monkeypatch.setattr(federation, "healed", lambda *a: pytest.fail("healed again"))
    rest, = run_mkt("smoke", "llm2slm", "0", results_dir=str(tmp_path), **settings).records
    assert rest["curve"] == whole["curve"]


def test_a_resumed_run_is_tested_as_it_began(tmp_path, monkeypatch):
    settings, path = stopped_once(tmp_path, monkeypatch, at=1, test_every=2)
    settings |= dict(test_every=1, results_dir=str(tmp_path))
    record, = run_mkt("smoke", "standalone", "0", **settings).records
    assert record["config"]["test_every"] == 2 and ["accuracy" in x for x in record["curve"]] == [False, True]


def test_what_is_kept_is_nobodys_but_the_keepers(facts):
    c, kept = MktConfig(**FEW | dict(rounds=2)), []
    record = play_mkt(facts, c, keep=lambda *both: kept.append(both))
    assert [len(curve) for _, curve in kept] == [1, 1, 1, 1, 2, 2, 2, 2]
    again = [play_mkt(facts, c, saved=kept[1]) for _ in range(2)]  # the same state twice
    assert again[0]["curve"] == again[1]["curve"] == record["curve"] and len(kept[1][1]) == 1
    assert not torch.equal(kept[0][0]["weights"][1]["causal.lm_head.weight"],
                           kept[4][0]["weights"][1]["causal.lm_head.weight"])


def saved_gpt2(folder, facts):
    "A small GPT-2, which has dropout of its own, and its tokenizer; as the name of a model."
    import transformers

    from fedmpqkd.models.language import trained_coder
    coder = trained_coder("byte-bpe:300", [i.prompt + i.target for i in facts.train])
    own = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(coder.vocabulary), n_positions=128, n_embd=32, n_layer=2, n_head=2))
    assert own.config.resid_pdrop > 0
    own.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=coder.inner).save_pretrained(folder)
    return f"{folder}/own"


def test_a_network_that_draws_draws_the_same_after_a_stop(facts, tmp_path):
    clients = (saved_gpt2(tmp_path / "gpt2", facts),)
    c, kept = MktConfig(method="standalone", clients=clients, **FEW | dict(rounds=2)), []
    torch.manual_seed(1)
    record = play_mkt(facts, c, keep=lambda *both: kept.append(both))
    torch.manual_seed(2)
    assert play_mkt(facts, c, saved=kept[0])["curve"] == record["curve"]


def test_what_nothing_has_trained_is_tested_once_for_all_runs(facts, tmp_path, monkeypatch):
    "A pretrained server that takes no part; what is trained, or drawn for a seed, is tested in each run."
    import fedmpqkd.federation.mkt as federation
    monkeypatch.setattr(federation, "_untrained", {})
    tested, right = [], federation._right
    monkeypatch.setattr(federation, "_right", lambda p, *a: tested.append(p.number) or right(p, *a))
    c = MktConfig(method="standalone", server=saved_gpt2(tmp_path / "gpt2", facts), **FEW)
    server = [play_mkt(facts, dataclasses.replace(c, seed=s))["summary"]["server"] for s in (0, 1)]
    assert tested == [0, 1, 2, 1, 2] and server[0] == server[1]
    play_mkt(facts, dataclasses.replace(c, seed=2, test=4))  # other questions
    play_mkt(facts, dataclasses.replace(c, method="public-ce"))  # trained
    assert tested[5:] == [0, 1, 2, 0, 1, 2]


def test_numbers_that_json_does_not_know_lose_no_run(tmp_path, monkeypatch):
    import fedmpqkd.federation.mkt as federation
    monkeypatch.setattr(federation, "mean_of", lambda losses: float("nan"))
    record, = run_mkt("smoke", "standalone", "0", results_dir=str(tmp_path), **FEW).records
    assert record["curve"][0]["loss_private"] == [None, None] and record["summary"]["mean_client"] >= 0


def test_a_client_that_has_diverged_is_silent_and_its_accuracy_is_chance(facts, monkeypatch, capsys):
    "The others go on, and the record says who it was."
    import fedmpqkd.federation.mkt as federation
    real = federation.trained_privately

    def lost(party, *a):
        found = real(party, *a)
        if party.number == 2: next(party.model.parameters()).data.fill_(torch.nan)
        return found
    monkeypatch.setattr(federation, "trained_privately", lost)
    record = play_mkt(facts, MktConfig(**FEW))
    assert record["summary"]["diverged"] == [2] and record["summary"]["clients"][1] == 25.0
    assert record["curve"][-1]["chosen_up"][3] == 0
    assert "participants [2] have diverged" in capsys.readouterr().out
    (_, one, _), _ = parties(facts, MktConfig(**FEW))
    size = message_size(one.positions.tolist(), 16, one.vocabulary, tail=True).total
    assert record["summary"]["bytes_up"] == size + 34


def test_a_run_in_which_everybody_diverges_has_a_record(tmp_path):
    record, = run_mkt("smoke", "fedmkt", "0", results_dir=str(tmp_path), lr=1e30, **FEW).records
    assert record["summary"]["diverged"] == [0, 1, 2] and record["summary"]["bytes_down"] == 0
    assert record["summary"]["clients"] == [25.0, 25.0]


def test_runs_are_planned_once_and_named_by_lists():
    assert len(plan_mkt("smoke", "fedmkt,fedmkt,public-ce", "0,0,1")) == 4
    for wrong, message in ((dict(seeds="1.5"), "seeds='1.5'"), (dict(seeds="x"), "seeds='x'"),
                           (dict(seed=5), "say seeds="), (dict(method="fedavg"), "say methods=")):
        with pytest.raises(ValueError, match=message): plan_mkt("smoke", **wrong)


def test_what_changes_nothing_in_a_method_is_no_part_of_its_run():
    idle = dict(weight=0.5, top_k=4, check=True, lie="low-loss", value_bits=16)
    assert MktConfig(method="public-ce", **idle) == MktConfig(method="public-ce")
    assert MktConfig(method="llm2slm", lie="low-loss") == MktConfig(method="llm2slm")
    assert MktConfig(method="llm2slm", weight=0.5).identity != MktConfig(method="llm2slm").identity


def test_equal_clients_begin_alike_in_every_method(facts):
    same = dict(clients=("gpt-tiny/byte-bpe:300",) * 2) | FEW
    starts = [play_mkt(facts, MktConfig(method=m, seed=1, **same))["curve"][0]["loss_private"]
              for m in ("standalone", "fedavg", "fedmkt")]
    assert starts[0] == starts[1] == starts[2]
    alone = dict(clients="gpt-tiny/byte-bpe:300")
    assert [MktConfig(**alone).revision, MktConfig(method="fedavg", **alone).revision] == [1, 2]


def test_the_commits_of_a_resumed_run_are_named(tmp_path, monkeypatch):
    settings, path = stopped_once(tmp_path, monkeypatch)
    altered(path, commits=["0ld"])
    record, = run_mkt("smoke", "standalone", "0", results_dir=str(tmp_path), **settings).records
    assert record["earlier_commits"] == ["0ld"]


def test_what_a_killed_process_leaves_beside_its_record_is_swept(tmp_path):
    from fedmpqkd.core.journal import WorkingFolder
    fields = dict(results_dir=str(tmp_path), **FEW)
    record, = run_mkt("smoke", "standalone", "0", **fields).records
    name = f"standalone_seed=0_{record['id']}"
    left = WorkingFolder(tmp_path / "exp6" / "smoke" / "pieces" / "_work" / name)
    with left.claim(): (left.folder / "checkpoint.pt").write_bytes(b"weights")
    assert run_mkt("smoke", "standalone", "0", **fields).records == [record] and not left.folder.exists()


def test_what_changes_nothing_is_said(tmp_path, capsys):
    run_mkt("smoke", "zero-shot", "0", results_dir=str(tmp_path), weight=0.5)
    assert "weight changes nothing in zero-shot" in capsys.readouterr().out


class Turns:
    "A chat template."

    def apply_chat_template(self, turn, **_): return f"<user>{turn[0]['content']}<assistant>"


def test_one_participant_chats_and_the_others_do_not(facts, monkeypatch):
    "Its prompts are in its template, in training and in tests; rows and lines are as without."
    made = mkt._coder

    def polite(tokenizer, texts):
        coder = made(tokenizer, texts)
        return dataclasses.replace(coder, chat=Turns()) if tokenizer.startswith("unigram") else coder
    bare, _ = parties(facts, MktConfig(**FEW))
    monkeypatch.setattr(mkt, "_coder", polite)
    c = MktConfig(**FEW, chat=True)
    everybody, _ = parties(facts, c)
    for texts in (lambda p: p.public.ids, lambda p: p.private.ids, lambda p: p.test):
        before, now = ([texts(p).shape[-1] for p in some[1:]] for some in (bare, everybody))
        assert now[0] == before[0] and now[1] > before[1]
    for p, q in zip(everybody, bare, strict=True):
        assert p.positions.tolist() == q.positions.tolist()
    for a, b in ((2, 0), (0, 2)):
        one, other = connect(everybody[a], everybody[b], c), connect(bare[a], bare[b], MktConfig(**FEW))
        assert one.source.tolist() == other.source.tolist() and one.labels.tolist() == other.labels.tolist()
    record, plain = play_mkt(facts, c), play_mkt(facts, MktConfig(**FEW))
    assert record["summary"]["bytes_up"] == plain["summary"]["bytes_up"] and record["id"] != plain["id"]
    assert record["curve"][0]["loss_private"][1] != plain["curve"][0]["loss_private"][1]


def test_a_text_whose_answer_a_template_changes_is_nobodys(facts, monkeypatch):
    made = mkt.in_turns

    def some(items, coder):
        found = made(items, dataclasses.replace(coder, chat=Turns()))
        return tuple(dataclasses.replace(i, options=(*i.options[:-1], "?"), label=len(i.options) - 1)
                     if n == 0 else i for n, i in enumerate(found))
    monkeypatch.setattr(mkt, "in_turns", some)
    monkeypatch.setattr(mkt, "_coder", lambda t, x: dataclasses.replace(trained_coder(t, x), chat=Turns()))
    everybody, _ = parties(facts, MktConfig(**FEW, chat=True))
    assert {len(p.public) for p in everybody} == {FEW["public"] - 1}


def test_chat_without_a_template_or_with_losses_over_prompts_is_refused(facts):
    with pytest.raises(ValueError, match="none of the tokenizers has a chat template"):
        parties(facts, MktConfig(**FEW, chat=True))
    with pytest.raises(ValueError, match="losses over prompts"):
        MktConfig(chat=True, compat="official")


def test_participants_with_one_base_share_it_on_their_device_too():
    "On a device without data, since there may be no other one here."
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedmpqkd.models.lora import adapted
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes))
    two = [adapted(base, 2, targets="", seed=n) for n in range(2)]
    mkt.move_together(two, torch.device("meta"))

    def places(model, trained):
        return [p.untyped_storage()._cdata for p in model.held.parameters() if p.requires_grad == trained]
    assert all(p.is_meta for m in two for p in m.held.parameters())
    assert len(places(two[0], False)) > 5 and places(two[0], False) == places(two[1], False)
    assert not set(places(two[0], True)) & set(places(two[1], True))
    assert not any(p.is_meta for p in base.parameters())
