"""The language model example, at sizes at which it takes a second: costs, caches, training, serving, pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

_EXAMPLES = Path(__file__).parent.parent / "examples"
SIZES = {
    "vocabulary": 256, "hidden": 32, "blocks": 3, "heads": 2, "feed_forward": 64, "engram_block": 1, "experts": 24,
    "expert_blocks": (2,), "row_dim": 8,
}  # fmt: skip
SCHEDULE = {"steps": 6, "batch": 4, "length": 16, "looks": 3, "windows": 8}
TRAFFIC = {"sequences": 4, "prompt": 6, "chunk": 3, "steps": 5, "rounds": 2}


@pytest.fixture(autouse=True)
def _examples_are_importable(monkeypatch):
    monkeypatch.syspath_prepend(str(_EXAMPLES))


@pytest.fixture
def lm():
    import engram_lm

    return engram_lm


def run(lm, out, **options):
    return lm.main(out, sizes=lm.Sizes(**SIZES), schedule=lm.Schedule(**SCHEDULE), traffic=lm.Traffic(**TRAFFIC), **options)


@pytest.mark.parametrize("defaults", [False, True])
def test_both_forms_cost_the_same_and_what_is_counted_is_computed(lm, defaults):
    sizes = lm.Sizes() if defaults else lm.Sizes(**SIZES)
    costs = {}
    for form, make in lm.FORMS.items():
        model = make(sizes)
        costs[form] = lm.cost_of(model, sizes)
        tokens = torch.randint(0, sizes.vocabulary, (2, 24))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens)
        counts = counter.get_flop_counts()["Global"]
        flops = sum(count for operator, count in counts.items() if "attention" not in str(operator))
        assert flops == 2 * tokens.numel() * costs[form].multiply_adds
        assert sum(parameter.numel() for parameter in model.parameters()) == costs[form].parameters
    for ours, theirs in zip(costs["engram"], costs["baseline"], strict=True):
        assert 0.99 < ours / theirs <= 1


@pytest.mark.parametrize("form", ["baseline", "engram"])
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_text(lm, form):
    from lm.model import Cache

    torch.manual_seed(0)
    model = lm.FORMS[form](lm.Sizes(**SIZES))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(0, 256, (3, 12))
    cache = Cache(model, 3, 12)
    with torch.no_grad():
        parts = [model(tokens[:, :7], cache), *(model(tokens[:, t : t + 1], cache) for t in range(7, 12))]
        torch.testing.assert_close(torch.cat(parts, 1), model(tokens), rtol=1e-4, atol=1e-5)


def test_training_is_decided_by_its_seed(lm):
    from lm.text import load_text
    from lm.training import train

    text, found = load_text(256), []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        model = lm.with_engram(lm.Sizes(**SIZES))
        found.append(train(model, text, lm.Schedule(**SCHEDULE), seed, lambda: None))
    assert found[0] == found[1]
    assert found[0] != found[2]
    losses, seen = found[0]
    assert [step for step, _ in seen] == [2, 4, 6]
    assert seen[-1][1] < seen[0][1]
    assert len(losses) == 6


def test_held_out_documents_are_none_of_those_trained_on(lm):
    from lm.text import load_text

    from tiercache.lab.tokens import load_tokens

    text = load_text(256)
    stream = load_tokens()
    documents = [*text.train, *text.held_out]
    assert [len(document) for document in documents] == stream.documents.tolist()
    assert np.array_equal(np.concatenate(text.originals), stream.tokens[-sum(map(len, text.held_out)) :])
    known = np.concatenate(documents) != 0
    pairs = np.stack([np.concatenate(documents)[known], stream.tokens[known]], 1)
    assert len(np.unique(pairs, axis=0)) == len(np.unique(pairs[:, 0])) == 255


def test_the_example_trains_serves_and_draws(lm, tmp_path):
    results = run(lm, tmp_path, seeds=2)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(results))
    losses = results["training"]["held_out_loss"]
    assert {form: len(runs) for form, runs in losses.items()} == {"baseline": 2, "engram": 2}
    served = results["serving"]["kinds"]
    assert [kinds["rows_a_step"] for kinds in served.values()] == [0, 16, 16]
    assert results["serving"]["bytes"]["host"] * 10 <= results["serving"]["bytes"]["table"]
    again = lm.main(tmp_path, traffic=lm.Traffic(**TRAFFIC), serve_only=True)
    assert again["training"] == json.loads(json.dumps(results["training"]))
    report = (tmp_path / "results.md").read_text()
    assert "| difference |" in report
    import gate_heatmap

    panels = gate_heatmap.main(tmp_path, lambda token: f" {token}", length=30)
    assert [len(values) for values in panels.values()] == [30, 30]
    assert ((panels["gate of branch 0"] > 0) & (panels["gate of branch 0"] < 1)).all()
    for picture in ("loss.png", "serving.png", "gates.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "table.safetensors").exists()


def test_quick_is_the_same_with_few_steps(lm, tmp_path):
    few, all_of_it = lm.options(["--quick", "--seeds", "2"]), lm.options([])
    assert set(few) - set(all_of_it) == {"schedule", "traffic"}
    assert (few["seeds"], all_of_it["seeds"]) == (2, 1)
    assert few["schedule"].steps * few["schedule"].batch * few["schedule"].length < 30_000
    assert lm.main(**few | {"sizes": lm.Sizes(**SIZES), "seeds": 1, "out": tmp_path})["serving"]


def test_what_a_heatmap_cannot_draw_is_named(lm, tmp_path):
    import gate_heatmap

    with pytest.raises(FileNotFoundError, match=rf"model\.safetensors does not exist: `engram_lm\.py --out {tmp_path}`"):
        gate_heatmap.main(tmp_path, str)
    from lm.model import save_model

    save_model(lm.with_engram(lm.Sizes(**SIZES)), tmp_path / "model.safetensors")
    for options, message in (
        ({"document": 10**6}, r"document = 1000000: allowed is 0\.\.\d+"),
        ({"document": -1}, r"document = -1: allowed is 0\.\.\d+"),
        ({"start": 10**6}, r"start = 1000000: document 0 has the tokens 0\.\.\d+"),
        ({"start": -1}, "start = -1: document 0 has"),
        ({"length": 0}, "length = 0: allowed is 1 and more"),
    ):
        with pytest.raises(ValueError, match=message):
            gate_heatmap.main(tmp_path, str, **options)
    assert not (tmp_path / "gates.png").exists()


def test_logits_that_differ_are_noticed(lm, tmp_path, monkeypatch):
    from lm import serving
    from lm.text import load_text

    model = lm.with_engram(lm.Sizes(**SIZES))
    torch.nn.init.normal_(model.engram.table.weight)
    forward = serving.Clocked.forward
    monkeypatch.setattr(serving.Clocked, "forward", lambda self, indices: forward(self, indices) * 1.001)
    with pytest.raises(serving.DifferentLogits, match="tiers, prefetch on: other logits at position 0"):
        serving.serve(model, load_text(256), lm.Traffic(**TRAFFIC), tmp_path, lambda: None)
