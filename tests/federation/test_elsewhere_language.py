"Language models on the pretended device of `test_elsewhere`: texts stay with the host, models do not."
from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from test_elsewhere import Elsewhere  # noqa: E402

import fedmpqkd.federation.mkt as mkt  # noqa: E402
from fedmpqkd.data.text import load_text  # noqa: E402
from fedmpqkd.federation import pool  # noqa: E402
from fedmpqkd.federation.run import run  # noqa: E402
from fedmpqkd.learn.language import load_language  # noqa: E402
from fedmpqkd.models.language import marked, small_gpt  # noqa: E402
from fedmpqkd.models.lora import adapted  # noqa: E402
from fedmpqkd.study.experiments import EXPERIMENTS, plan  # noqa: E402
from fedmpqkd.wire import logits as wire_logits  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*no-op")


@pytest.fixture
def device(monkeypatch):
    "Zeros come back where logits are fetched, which no sound message holds."
    import torch.fx.experimental._config as shapes
    monkeypatch.setattr(wire_logits, "_check_content", lambda message: None)
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: nullcontext())  # `meta` has none
    monkeypatch.setattr(pool.WorkerPool, "map", lambda self, function, items: map(function, items))
    with shapes.patch(meta_nonzero_assume_all_nonzero=True): yield Elsewhere()


def waits(device, method, **fields):
    "How often a run of FedMKT on the device waits for a number."
    before, alike = device.waits, dict(clients=("gpt-tiny/byte-bpe:300",) * 2) if method == "fedavg" else {}
    c = mkt.MktConfig(method=method, **dict(public=8, private=4, test=4, rounds=1) | alike | fields)
    with device: record = mkt.play_mkt(load_text(kind="class"), c, "meta")
    assert len(record["curve"]) == 1
    return device.waits - before


@pytest.mark.parametrize("method", ["fedavg", "fedmkt"])
def test_fedmkt_keeps_texts_and_models_apart(device, method): assert waits(device, method)


def test_adapters_too_and_nobody_waits_for_single_items(device, monkeypatch):
    real = mkt.build_party_model

    def with_adapters(spec, c, texts, number):
        coder, model = real(spec, c, texts, number)
        return coder, adapted(model.causal, 2, targets="", seed=number)
    monkeypatch.setattr(mkt, "build_party_model", with_adapters)
    assert waits(device, "fedmkt", check=True) == waits(device, "fedmkt", check=True, test=8)


def test_a_federation_of_adapters_runs_there(device):
    c, = plan(EXPERIMENTS["exp5-arc"], "smoke", "fedmpq-kd", "0", rounds=2)
    with device: record = run(c, load_language(c), device="meta")
    assert len(record["curve"]) == 2


def test_the_base_stays_where_it_was_for_whoever_shares_it(monkeypatch):
    "A GPU's tensors can take the place of a host's within one parameter; `meta` ones cannot, and say so."
    base = small_gpt("gpt-tiny", 50).requires_grad_(False)
    monkeypatch.setattr(torch, "_has_compatible_shallow_copy_type", lambda a, b: True)
    gone = adapted(base, 2).to("meta")
    held = gone.held.get_base_model()
    assert all(t.is_meta for part in (gone.state_dict(), held.state_dict()) for t in part.values())
    assert not any(t.is_meta for t in base.state_dict().values())
    x = torch.arange(6)[None]
    assert torch.isfinite(adapted(base, 2)(marked(x, x))).all()
    assert not torch.__future__.get_overwrite_module_params_on_conversion()
