"Language through the loop: what is learned, scored and sent, against Hugging Face and a bare peft loop."
import copy
import itertools
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from fedmpqkd.core.streams import torch_rng
from fedmpqkd.data.text import Item, TextData, load_text
from fedmpqkd.federation.methods import make_config
from fedmpqkd.federation.rounds import open_run
from fedmpqkd.federation.run import run

transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")

from fedmpqkd.learn.language import (  # noqa: E402
    LanguageTask,
    answer_scores,
    language_data,
    load_language,
    option_scores,
    rouge_l,
    written,
)
from fedmpqkd.models.language import GPTS, shortened, small_gpt  # noqa: E402
from fedmpqkd.models.lora import adapted, causal_of  # noqa: E402

FIELDS = dict(dataset="almanac", model="gpt-tiny", tokenizer="byte-bpe:300", clients=2, rounds=2,
              batch_size=4, partition="natural", eval_images=0, lr=0.3)


def plain(x):
    "Token ids and labels in Hugging Face's convention: not shifted, -100 where nothing is predicted."
    ids, counts = torch.where(x < 0, -1 - x, x), x >= 0
    labels = torch.full_like(ids, -100)
    labels[:, 1:] = torch.where(counts[:, :-1], ids[:, 1:], labels[:, 1:])
    return ids, labels


@pytest.mark.parametrize("kind", ["choice", "class", "answer", "text"])
def test_the_loss_is_that_of_hugging_face(kind):
    c = make_config("fedavg", **FIELDS, text_kind=kind)
    task = LanguageTask(load_language(c))
    model = task.network(c)
    x, y = task.batch(torch.arange(6))
    ids, labels = plain(x)
    theirs = model.causal(input_ids=ids, labels=labels).loss
    assert task.loss(model(x), y).item() == pytest.approx(theirs.item(), rel=1e-5)
    targets = [item.target for item in task.data.train_items[:6]]
    said = [task.data.coder.inner.decode(row[row >= 0].tolist(), skip_special_tokens=True) for row in y]
    assert said == targets


def test_options_are_scored_as_one_by_one():
    c = make_config("fedavg", **FIELDS, text_kind="choice")
    task = LanguageTask(load_language(c))
    model, inner = task.network(c).eval(), task.data.coder.inner
    with torch.no_grad():
        found = task.outputs(model, task.test_samples, task.test_targets)
        for item, row in zip(task.data.test_items, found, strict=True):
            for option, (nll, tokens, _, size) in zip(item.options, row, strict=True):
                whole = inner.encode(item.prompt + option).ids
                start = len(inner.encode(item.prompt).ids)  # a space begins a token
                logp = model.causal(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
                byhand = -sum(float(logp[j - 1, whole[j]]) for j in range(start, len(whole)))
                assert (int(tokens), int(size)) == (len(whole) - start, len(option.encode()))
                assert nll.item() == pytest.approx(byhand, rel=1e-4)
    line = task.score(found, task.test_targets)
    labels = [item.label for item in task.data.test_items]
    right = [int((r[:, 0] / r[:, 3]).argmin()) == n for r, n in zip(found, labels, strict=True)]
    assert line["accuracy"] == line["accuracy_byte"] == pytest.approx(100 * sum(right) / len(right))


@pytest.mark.parametrize("options", [
    [("abc def", "hij klm"), ("abc", "def", "ghi")],  # nothing is shared; the longest item has fewer options
    [("abc", "def", "ghi"), ("abc def", "abd"), ("xyz", "xy")], [("ab", "cd"), ("ef", "gh", "ij", "kl")]])
def test_options_without_a_prompt_are_scored_as_one_by_one(options):
    "Bytes are tokens; nothing stands in front of the first one, so it is not predicted."
    items = tuple(Item("", o, key=str(n)) for n, o in enumerate(options))
    train = (Item("say", (" yes", " no"), key="t"),)
    c = make_config("fedavg", **FIELDS | dict(tokenizer="bytes"), text_kind="choice")
    task = LanguageTask(language_data(TextData("own", "choice", train, items), c))
    model, inner = task.network(c).eval(), task.data.coder.inner
    with torch.no_grad():
        found = task.outputs(model, task.test_samples, task.test_targets)
        for item, row in zip(items, found, strict=True):
            assert not row[len(item.options):].any()
            for option, (nll, tokens, _, size) in zip(item.options, row, strict=False):
                whole = inner.encode(option, add_special_tokens=False).ids
                logp = model.causal(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
                byhand = -sum(float(logp[j - 1, whole[j]]) for j in range(1, len(whole)))
                assert (int(tokens), int(size)) == (len(whole) - 1, len(option))
                assert nll.item() == pytest.approx(byhand, rel=1e-4)


def test_missing_options_never_win():
    nll, tokens, size = torch.tensor([[5.0, 0.0]]), torch.tensor([[2.0, 0.0]]), torch.tensor([[9.0, 0.0]])
    assert all(int(option_scores(nll, tokens, size, s).argmax(1)) == 0 for s in ("token", "byte", "sum"))


def test_rouge_against_all_subsequences():
    "The longest common subsequence by trying all of them."
    def brute(a, b):
        subs = [set(itertools.combinations(s, n)) for n in range(len(a) + 1) for s in (a, b)]
        longest = max(n for n in range(len(a) + 1) if n == 0 or subs[2 * n] & subs[2 * n + 1])
        return 2 * longest / (len(a) + len(b))
    words = ["a b c d", "b d a c", "d c b a", "a a b", "c", "x y"]
    for a, b in itertools.product(words, words):
        assert rouge_l(a, [b]) == pytest.approx(brute(a.split(), b.split()))


def one_token_at_a_time(model, ids, end, most):
    "Greedy decoding without a cache, a padding or a library."
    said = []
    while len(said) < most and (not said or said[-1] != end):
        said.append(int(model(torch.tensor([ids + said])).argmax(-1)[0, -1]))
    return said


@pytest.mark.parametrize("rank", [0, 2])
def test_what_a_model_writes_is_its_likeliest_token_again_and_again(rank):
    "Short and long prompts of one portion, which are padded, and the same one by one."
    c = make_config("fedavg", **FIELDS, text_kind="answer", lora_rank=rank)
    task = LanguageTask(load_language(c))
    model, coder = task.network(c).eval(), task.data.coder
    with torch.no_grad():
        for p in model.parameters(): p.normal_(0, 0.2, generator=torch.Generator().manual_seed(p.numel()))
        prompts = [i.prompt[:n] for n, i in zip((9, 40, 90, 25, 60), task.data.test_items, strict=False)]
        causal, end = causal_of(model), coder.vocabulary.role("eos")
        found = written(causal, coder, prompts, most=7, portion=3, until="")
        assert found == [written(causal, coder, [p], most=7, until="")[0] for p in prompts]
        bare = [one_token_at_a_time(lambda x: causal(input_ids=x).logits, coder.inner.encode(p).ids, end, 7)
                for p in prompts]
    assert found == [coder.inner.decode(row) for row in bare] and len(set(found)) > 1
    mark = found[0][2]
    assert written(causal, coder, prompts[:1], most=7, until=mark) == [found[0].lstrip(mark).split(mark)[0]]


def test_scores_of_answers():
    items = [Item("q", references=r) for r in ((" a red kettle", " kettle"), (" the tall ships sail",))]
    assert answer_scores([" the kettle", " tall ships"], items) == dict(
        exact_match=50.0, rouge_l=pytest.approx(50 * (2 / 3 + 2 / 3)))
    for some in ([], [Item("q", (" a", " b"))]):  # options are no references
        with pytest.raises(ValueError, match="no items, or some without any"):
            answer_scores([" a"] * len(some), some)


def test_what_is_written_does_not_follow_the_models_own_habits():
    "A model's configuration may punish repetition; an answer may begin behind an empty line."
    c = make_config("fedavg", **FIELDS, text_kind="answer")
    task = LanguageTask(load_language(c))
    causal, coder = causal_of(task.network(c).eval()), task.data.coder
    asked = [i.prompt for i in task.data.test_items[:3]]
    plain_ = written(causal, coder, asked, most=8)
    causal.generation_config.repetition_penalty = 5.0
    assert written(causal, coder, asked, most=8) == plain_
    with pytest.raises(ValueError, match="an empty prompt"): written(causal, coder, [""])

    class Says:
        generation_config = None
        parameters = staticmethod(lambda: iter([torch.zeros(1)]))

        def generate(self, ids, **kw):
            said = coder.inner.encode("\n\nthe kettle\nand more", add_special_tokens=False).ids
            return torch.cat([ids, torch.tensor([said] * len(ids))], 1)
    assert written(Says(), coder, asked[:1]) == ["the kettle"]


def bare_adapter(base, c, data, batches):
    "A client's round as one writes it with peft and a loop."
    start = int(torch.randint(2**62, (), generator=torch_rng(c.seed, "init")))
    with torch.random.fork_rng():
        torch.manual_seed(start)
        lora = peft.LoraConfig(r=c.lora_rank, lora_alpha=16, target_modules=["q_proj", "v_proj"],
                               task_type="CAUSAL_LM")
        model = peft.get_peft_model(copy.deepcopy(base), lora)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], c.lr, c.momentum)
    for index in batches:
        ids, labels = plain(data.train[index])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return peft.get_peft_model_state_dict(model)


def test_one_client_is_a_bare_peft_loop():
    c = make_config("fedavg", **FIELDS | dict(clients=1, rounds=1, partition="iid"), lora_rank=2)
    data = load_language(c)
    federation = open_run(c, data, workers=1)
    from fedmpqkd.federation.run import play
    play(federation, [])
    order = torch.randperm(len(data.train), generator=torch_rng(c.seed, "loader", 0, 0))
    index = torch.from_numpy(federation.partition.parts[0])
    base = small_gpt("gpt-tiny", len(data.coder.vocabulary), c.seed)
    wanted = bare_adapter(base, c, data, [index[part] for part in order.split(c.batch_size)])
    found = federation.server.state
    federation.pool.close()
    assert set(found) == set(wanted)
    moved = max(float(t.abs().max()) for n, t in wanted.items() if "lora_B" in n)
    assert moved > 1e-4
    for name, t in wanted.items(): torch.testing.assert_close(found[name], t, rtol=1e-3, atol=1e-4 * moved)


def test_workers_and_teachers_share_one_base():
    c = make_config("fedmpq-kd", **FIELDS, alpha=0.5, lora_rank=2)
    federation = open_run(c, load_language(c), workers=2)
    federation.pool.close()
    networks = [m for r in federation.pool.replicas for m in (r.model, r.folded.model)]
    first = [m.held.get_base_model().model.embed_tokens.weight for m in networks[:2]]
    assert first[0] is first[1]  # student and teacher
    adapters = {p.data_ptr() for m in networks for p in m.parameters()}
    assert len(adapters) == 4 * len(list(networks[0].parameters()))
    sent = set(federation.server.state)
    assert all("lora_" in name for name in sent) and len(sent) == 2 * 2 * GPTS["gpt-tiny"][1]


@pytest.mark.parametrize("kind", ["choice", "text"])
@pytest.mark.parametrize("method", ["fedavg", "fedprox", "fedmpq", "fedmpq-kd"])
def test_methods_run_on_whole_models_and_on_adapters(method, kind):
    "Adapters are a small part of the bytes, and four bits a small part of these."
    sizes = {}
    for rank in (0, 2):
        c = make_config(method, **FIELDS, alpha=0.5, text_kind=kind, lora_rank=rank)
        record = run(c, load_language(c), workers=1)
        line = record["curve"][-1]
        assert not line["failed"] and math.isfinite(line["nll"]) and line["loss"] > 0
        assert (line["kd"] > 0) == (method == "fedmpq-kd")
        sizes[rank] = line["bytes_up"]
    assert sizes[2] < sizes[0] / 50 or method.startswith("fedmpq") and sizes[2] < sizes[0] / 80
    if kind == "text": assert line["perplexity"] == pytest.approx(math.exp(line["nll"]))


def test_whole_speakers_and_dirichlet_over_topics():
    c = make_config("fedavg", **FIELDS)
    data = load_language(c)
    federation = open_run(c, data, workers=1)
    federation.pool.close()
    held = [{data.groups[int(data.labels[i])] for i in part} for part in federation.partition.parts]
    assert sum(map(len, held)) == len(set.union(*held)) == 4
    mixed = open_run(replace(c, partition="dirichlet", dirichlet=0.5), data, workers=1)
    mixed.pool.close()
    assert sum(len(p) for p in mixed.partition.parts) == len(data.train)


@pytest.mark.parametrize("fields, message", [
    (dict(tokenizer="words:5"), "KIND is one of bytes"),
    (dict(tokenizer="own"), "say KIND:SIZE"),
    (dict(context=4), "context=4: no item of almanac"),
    (dict(model="gpt-huge"), "unknown model 'gpt-huge'; choose one of gpt-tiny"),
    (dict(model="./nowhere"), "no folder with a config.json"),
    (dict(lora_rank=2, lora_targets="conv"), "lora_targets='conv'"),
    (dict(clients=5), "4 groups cannot be split between 5 clients"),
])
def test_bad_wishes_are_refused_at_the_door(fields, message):
    with pytest.raises((ValueError, OSError), match=message):
        c = make_config("fedavg", **FIELDS | fields)
        open_run(c, load_language(c), workers=1).pool.close()


@pytest.mark.parametrize("fields", [
    dict(label_noise=0.5), dict(warm_start="fedavg:1"), dict(stress="attacks"), dict(act_bits=4),
    dict(exchange="server-distill", public_images=4)])
def test_what_is_for_images_is_refused(fields):
    with pytest.raises(ValueError, match="for images|fedavg"): make_config("fedavg", **FIELDS, **fields)


def test_long_items_are_counted_and_speeches_are_cut_without_loss():
    c = make_config("fedavg", **FIELDS | dict(context=26), text_kind="choice")
    short = language_data(load_text(kind="choice"), c)
    assert short.skipped["train long"] + len(short.train) == 32
    text = replace(c, text_kind="text", context=10)
    data = language_data(load_text(kind="text"), text)
    whole = "".join(i.target for i in load_text(kind="text").train)
    assert "".join(i.target for i in data.train_items) == whole and len(data.train) > 32


def test_an_adapter_of_a_cut_model_fits_the_cut_model():
    base = shortened(small_gpt("gpt-mini", 60), 2)
    assert len(adapted(base, 2).state_dict()) == 2 * 2 * 2


PROGRAM = """
import sys
class Without:
    def __init__(self, finder): self.finder = finder
    def find_spec(self, name, *rest):
        gone = ('transformers', 'peft', 'tokenizers', 'rapidfuzz', 'gguf', 'accelerate')
        return None if name.split('.')[0] in gone else self.finder.find_spec(name, *rest)
sys.meta_path[:] = [Without(f) for f in sys.meta_path]
import importlib, pathlib, fedmpqkd
root = pathlib.Path(fedmpqkd.__file__).parent
for path in sorted(root.glob('[!_]*/[!_]*.py')):
    if path.parent.name not in ('report', 'bench', 'tools'):
        importlib.import_module(f'fedmpqkd.{path.parent.name}.{path.stem}')
from fedmpqkd.models.language import small_gpt
try: small_gpt('gpt-tiny', 50)
except ModuleNotFoundError as why: print(why)
"""


def test_without_the_extra_everything_imports_and_one_line_names_it():
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True)
    said = "transformers is needed here: pip install 'fedmpqkd[lm]'"
    assert done.stdout.strip() == said, done.stderr[-2000:]


def test_half_precision_attends_to_the_same_tokens(tmp_path):
    "In bf16 the products are masked by addition: a mask of truth values would add 1 to what is to be seen."
    from fedmpqkd.models.language import (
        can_branch,
        counted_logits,
        load_causal,
        marked,
        side_by_side,
    )

    small_gpt("gpt-mini", 300).save_pretrained(tmp_path)
    half, whole = load_causal(str(tmp_path), bf16=True), load_causal(str(tmp_path))
    assert can_branch(half) and can_branch(whole)
    ids = torch.randint(300, (5, 12), generator=torch.Generator().manual_seed(0))
    sizes = torch.tensor([12, 3, 7, 5, 4])
    x = marked(ids, torch.where(torch.arange(12) < sizes[:, None] - 1, 0, -100))
    rows, positions, owner = side_by_side(x, sizes)
    assert len(rows) == 3 and sorted(owner[owner >= 0].bincount().tolist()) == sorted(sizes.tolist())
    for n in range(5):
        alone = counted_logits(whole, x[n:n + 1, :sizes[n]])[0, :sizes[n] - 1]
        for model, error in ((whole, 1e-5), (half, 0.05)):
            assert counted_logits(model, x[n:n + 1])[0, :sizes[n] - 1].float().sub(alone).abs().max() < error
            row = int((owner == n).any(1).long().argmax())
            logits = counted_logits(model, rows[row:row + 1], positions=positions[row:row + 1])[0]
            mine = logits[(owner[row] == n)[rows[row] >= 0].nonzero()[:, 0]]
            assert mine.float().sub(alone).abs().max() < error


def test_a_plain_head_is_known_as_one_in_half_precision(tmp_path):
    "Whichever attention is chosen: compared with another one's logits, it seemed not to be plain."
    from fedmpqkd.models.language import has_plain_head, load_causal

    model = small_gpt("gpt-mini", 300)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(3)  # logits of a trained model
    model.save_pretrained(tmp_path)
    assert has_plain_head(load_causal(str(tmp_path), bf16=True)) and has_plain_head(model)
    own = type(model).forward
    model.forward = lambda *a, **k: (found := own(model, *a, **k)).__class__(logits=found.logits / 8)
    assert not has_plain_head(model)


@pytest.mark.parametrize("entries", [200, 400])
def test_a_model_for_another_tokenizer_is_scored_over_all_its_tokens(entries):
    "Its head has more entries than it was made with, or fewer."
    from fedmpqkd.learn.language import row_scores
    from fedmpqkd.models.language import counted, marked, reembedded, trained_coder
    from fedmpqkd.models.lora import adapted

    texts = [i.prompt + i.target for i in load_text(kind="class").train]
    old = trained_coder("byte-bpe:300", texts)
    new = trained_coder("unigram:200" if entries < 300 else "byte-bpe:400", texts)
    causal = small_gpt("gpt-tiny", len(old.vocabulary))
    causal.lm_head.weight = causal.model.embed_tokens.weight  # tied, as in SmolLM2
    model = adapted(reembedded(causal, old, new.vocabulary), 2)
    n = len(new.vocabulary)
    ids = torch.randint(n, (3, 9), generator=torch.Generator().manual_seed(0))
    ids[:, -1] = n - 1
    x = marked(ids, ids.roll(-1, 1).index_fill(1, torch.tensor([8]), -100))
    with torch.no_grad(): logp, (_, labels) = model(x).log_softmax(-1), counted(x)
    assert logp.shape[-1] == n == causal.get_output_embeddings().out_features
    wanted = -logp.gather(-1, labels[..., None])[..., 0].sum(1)
    assert torch.allclose(row_scores(model, x[:, None])[:, 0, 0], wanted, atol=1e-4)


def test_nothing_is_recalibrated_where_there_are_no_statistics(monkeypatch):
    from fedmpqkd.federation import run as runs

    monkeypatch.setattr(runs, "fresh_statistics", lambda *_: pytest.fail("a pass over the data for nothing"))
    c = make_config("fedavg", **FIELDS, text_kind="class")
    assert "accuracy_recalibrated" not in run(c, load_language(c), workers=1)["summary"]


def test_long_texts_keep_the_fused_attention(monkeypatch):
    from fedmpqkd.models import language
    from fedmpqkd.models.language import hidden_states

    monkeypatch.setattr(language, "has_bf16", lambda: True)
    model = small_gpt("gpt-tiny", 300).to(torch.bfloat16)
    usual = model.config._attn_implementation
    with torch.no_grad():
        for length, wanted in ((512, "eager"), (513, usual), (8, "eager")):
            hidden_states(model, torch.zeros(1, length, dtype=torch.int64))
            assert model.config._attn_implementation == wanted
        hidden_states(model.float(), torch.zeros(1, 8, dtype=torch.int64))
    assert model.config._attn_implementation == usual != "eager"


def test_processors_without_bf16_multiply_in_fp32_and_round(monkeypatch):
    from fedmpqkd.models import language
    from fedmpqkd.models.language import hidden_states, widen

    monkeypatch.setattr(language, "has_bf16", lambda: False)
    exact = small_gpt("gpt-tiny", 300).to(torch.bfloat16).float()  # the same weights in both
    usual, wide = (copy.deepcopy(exact).to(torch.bfloat16) for _ in range(2))
    usual.set_attn_implementation("eager")
    ids = torch.randint(0, 300, (4, 33), generator=torch.Generator().manual_seed(0))
    gradients = []
    for model in (exact, usual, widen(wide)):
        plain = model is usual
        states = model.model(input_ids=ids).last_hidden_state if plain else hidden_states(model, ids)
        states[..., 0].float().mean().backward()
        gradient = model.model.layers[0].self_attn.q_proj.weight.grad.float()
        gradients.append((states.detach().float(), gradient))
    assert wide.config._attn_implementation == "wide"
    for truth, theirs, ours in zip(*gradients, strict=True):
        error, usual_error = ((found - truth).norm() / truth.norm() for found in (ours, theirs))
        assert 0 < error < 1.5 * usual_error < 0.1  # rounded, and not more often than usual


def test_wide_products_round_once_under_autocast():
    from fedmpqkd.models.language import WideLinear

    layer = WideLinear(3, 1)
    with torch.no_grad():
        layer.weight[:], layer.bias[:] = torch.tensor([256.0, 1.0, 1.0]), 0
    x = torch.ones(1, 3)
    assert layer(x).item() == 258
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    assert found.dtype == torch.bfloat16 and found.item() == 258  # 256 + 1 rounded first would stay 256


@pytest.mark.parametrize("plain_head", [True, False])
def test_what_stands_behind_a_gap_sees_what_stands_before_it(plain_head):
    "Positions with gaps and no mask were read as one text after each gap."
    from fedmpqkd.models.language import counted_logits

    model = small_gpt("gpt-tiny", 300).eval()
    positions = torch.tensor([[0, 1, 4, 5, 6], [0, 2, 3, 0, 0]])
    ids = torch.tensor([[5, 7, 9, 4, 6], [5, 7, 9, -1, -1]])
    before, behind = ids.clone(), ids.clone()
    before[:, 1] = 8
    behind[0, 4] = 8
    with torch.no_grad():
        usual, earlier, later = (counted_logits(model, x, plain_head, positions)
                                 for x in (ids, before, behind))
        alone = counted_logits(model, ids[1:, :3], plain_head, positions[1:, :3])
    moved = (usual - earlier).abs().amax(-1)
    assert (moved[0, 1:] > 0.01).all() and moved[0, 0] == 0 and moved[1, 2] > 0.01
    assert (usual - later)[0, :4].abs().max() == 0
    assert torch.allclose(usual[1, :3], alone[0], atol=1e-5)


def test_a_template_that_begins_with_bos_gets_no_second_one():
    "As those of Llama and Mistral do."
    from tokenizers import AddedToken

    from fedmpqkd.data.text import tokenise
    from fedmpqkd.models.language import trained_coder
    inner = trained_coder("unigram:60", ["a small text about nothing at all", "and one more"]).inner
    inner.add_special_tokens([AddedToken("<bos>", special=True)])
    bos = inner.token_to_id("<bos>")
    both = [tokenise([(prompt, " more")], inner, 40, bos=bos) for prompt in ("a text", "<bos>a text")]
    rows = [batch.ids[0].tolist() for batch in both]
    assert [row.count(bos) for row in rows] == [1, 1] and all(row[0] == bos for row in rows)


def test_classes_of_articles_are_spread_by_their_topics():
    "A label says nothing about who holds a text where there are topics; where topics are the labels it does."
    def groups(topics: str) -> tuple[str, ...]:
        items = tuple(Item(f"article {n}", (" yes", " no"), n % 2, group=topic)
                      for n, topic in enumerate(topics.split()))
        c = make_config("fedavg", dataset="almanac", text_kind="class", model="gpt-tiny",
                        tokenizer="byte-bpe:300")
        return language_data(TextData("own", "class", items, items[:1]), c).groups
    assert groups("a b c a b c") == ("a", "b", "c")
    assert groups("yes no yes no") == groups("a a a a") == (" yes", " no")
