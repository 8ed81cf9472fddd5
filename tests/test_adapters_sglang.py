"""Tables in a store answer as SGLang's own modules ask: against its sources, where sglang is installed."""

from types import SimpleNamespace
from typing import Any, Optional

import pytest
import torch
from engines import Ids, Stream, attributes_of, define, install_modules, module_of, node_of, parameters, parameters_of
from safetensors.torch import save_file
from torch import nn

from tiercache import Store
from tiercache.adapters.sglang import EngramTable, PLETable, install

ENGRAM, QWEN = "srt/layers/engram.py", "srt/models/qwen4_exp.py"
ROWS, DIM, COLUMNS = 300, 32, 6


def table(layer=1):
    return torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(layer)).bfloat16()


def write(directory, *layers):
    """Tables as a store's config has them."""
    sections = []
    for layer in layers:
        path = directory / f"layers.{layer}.safetensors"
        save_file({"weight": table(layer)}, path)
        sections.append({"name": f"layers.{layer}", "path": path})
    return {"table": sections, "host": {"capacity": "4KB"}}


def placeholder(num_rows=ROWS, *, tp_size=1):
    """SGLang's embedding on meta, as far as a table of its place looks at it."""
    return SimpleNamespace(
        num_embeddings=num_rows,
        org_vocab_size=num_rows,
        embedding_dim=DIM,
        tp_size=tp_size,
        weight=torch.empty(num_rows, DIM, dtype=torch.float8_e4m3fn, device="meta"),
        weight_scale=torch.full((1,), 0.5, dtype=torch.bfloat16),
    )


def test_a_table_of_engram_gives_what_was_begun_and_what_was_not():
    with Store.open({"host": {"capacity": "4KB"}}, tables={"layers.1": table()}) as store:
        module = EngramTable(store, "layers.1", ROWS, DIM)
        ids = torch.randint(0, ROWS, (5, COLUMNS))
        for begun in (ids, ids[:2], ids + 0, None):
            if begun is not None:
                module.ahead.begin(begun)
            assert torch.equal(module(ids, None, cp_all_tokens=True), table()[ids])
        assert module.new_rows(ids).shape == (5, COLUMNS, DIM)
        module.scale.weight_loader(module.scale, torch.zeros(ROWS, 1))
        module.finish_load("layer 1")
        assert sum(parameter.numel() for parameter in module.parameters()) == 0


def test_a_table_of_qwen_gathers():
    with Store.open({"host": {"capacity": "4KB"}}, tables={"ple": table()}) as store:
        module = PLETable(store, placeholder())
        ids = torch.randint(0, ROWS, (5, COLUMNS), dtype=torch.int32)
        out = module.allocate_output((5, COLUMNS, DIM), ids.device)
        assert module.gather(ids, out=out) is out
        assert torch.equal(out, table()[ids.long()])
        assert torch.equal(module.reduce(module(ids)), out)
        assert module.weight.numel() == 0
        assert dict(module.named_buffers()).keys() == {"weight_scale"}


def test_tables_of_another_shape_are_refused():
    with Store.open({"host": {"capacity": "4KB"}}, tables={"layers.1": table()}) as store:
        with pytest.raises(ValueError, match="300 rows of 32 values; needed are 300 of 33"):
            EngramTable(store, "layers.1", ROWS, DIM + 1)
        with pytest.raises(ValueError, match="300 rows of 32 values; needed are 301 of 32"):
            PLETable(store, placeholder(ROWS + 1))
        with pytest.raises(KeyError, match=r"layers\.2"):
            EngramTable(store, "layers.2", ROWS, DIM)
    with (
        Store.open({"host": {"capacity": "4KB"}}, tables={"a": table(), "b": table()}) as store,
        pytest.raises(KeyError, match="several"),
    ):
        PLETable(store, placeholder())


def test_the_interface_is_that_of_the_released_package():
    tree = module_of("sglang", ENGRAM)
    for name in ("forward", "new_rows", "finish_load"):
        upstream = node_of(tree, "EngramEmbedding", name)
        assert parameters_of(upstream) == parameters(getattr(EngramTable, name)), name
    positional = ["num_embeddings", "dim", "layer_id", "column_bounds"]
    assert parameters_of(node_of(tree, "EngramEmbedding", "__init__")) == (positional, [])
    assert parameters_of(node_of(tree, "EngramHasher", "__init__"))[0][0] == "layout"
    assert parameters_of(node_of(tree, "EngramHasher", "forward")) == (["input_ids", "forward_batch"], [])
    read = attributes_of(node_of(tree, "Engram"), "embed")
    assert read == {"staged_by_scheduler", "new_rows", "dequant_staged"}  # the last where the scheduler stages
    read |= attributes_of(node_of(module_of("sglang", "srt/layers/engram_staging.py"), "EngramRowStager", "from_model"), "e")
    assert read - {"dequant_staged", "enable_scheduler_staging"} <= vars(EngramTable).keys()
    assert attributes_of(module_of("sglang", "srt/models/deepseek_v4.py"), "embed") == {"finish_load"}

    tree = module_of("sglang", QWEN)
    for name in ("allocate_output", "gather", "reduce", "forward"):
        upstream = node_of(tree, "Qwen4ExpPinnedHostEmbedding", name)
        assert parameters_of(upstream) == parameters(getattr(PLETable, name)), name
    assert parameters_of(node_of(tree, "Qwen4ExpPinnedHostEmbedding", "__init__")) == (["embedding"], ["backend", "table_dir"])
    read = attributes_of(tree, "ngram_embedding") | attributes_of(tree, "offloaded_embedding") | attributes_of(tree, "emb")
    with Store.open({"host": {"capacity": "4KB"}}, tables={"ple": table()}) as store:
        module = PLETable(store, placeholder())
        assert {name for name in read if not hasattr(module, name)} == set()


class Linear(nn.Module):
    """A projection that leaves what it is given, as SGLang's returns it."""

    def __init__(self, *args, **kwargs):
        super().__init__()

    def forward(self, rows):
        return rows, None


def engines(monkeypatch, *, ranks=1):
    """SGLang's classes, defined over a CPU, in the modules where `install` finds them."""
    scope = {
        "add_prefix": lambda name, prefix: f"{prefix}.{name}",
        "engram_gate": lambda x, kv, *_: kv,
        "ReplicatedLinear": Linear,
        "is_in_breakable_cuda_graph": lambda: False,
    }
    made = install_modules(
        monkeypatch,
        {
            "sglang.srt.layers.engram": {},
            "sglang.srt.models.qwen4_exp": {"Qwen4ExpPinnedHostEmbedding": None},
            "sglang.srt.runtime_context": {"get_parallel": lambda: SimpleNamespace(tp_size=ranks)},
        },
    )
    layers, models = made["sglang.srt.layers.engram"], made["sglang.srt.models.qwen4_exp"]
    layers.EngramHasher = type("EngramHasher", (Hasher,), {"__init__": Hasher.__init__})  # `install` changes it
    scope["EngramEmbedding"] = lambda *args, **kwargs: layers.EngramEmbedding(*args, **kwargs)
    layers.Engram = define(module_of("sglang", ENGRAM), "Engram", **scope)
    return layers, models


class Hasher(nn.Module):
    """SGLang's hasher as far as it is seen from outside: ids int64[T, layers, columns]."""

    def __init__(self, layout, tokenizer):
        super().__init__()

    def forward(self, input_ids, forward_batch):
        generator = torch.Generator().manual_seed(int(input_ids.sum()))
        return torch.randint(0, ROWS, (len(input_ids), 2, COLUMNS), generator=generator)


def test_engram_takes_what_begins_after_the_hash(tmp_path, monkeypatch):
    layers, _ = engines(monkeypatch)
    install(write(tmp_path, 1, 14))
    layout = SimpleNamespace(
        layer_ids=(1, 14), num_embeddings=(ROWS, ROWS), head_dim=DIM, max_ngram_size=4, n_heads=2,
        column_bounds=lambda hash_index: (0, ROWS),
    )  # fmt: skip
    config = SimpleNamespace(hidden_size=8, hc_mult=2, rms_norm_eps=1e-6)
    hasher = layers.EngramHasher(layout, None)
    modules = [layers.Engram(config, layer, layout) for layer in layout.layer_ids]
    store = modules[0].embed.ahead.store
    x = torch.zeros(5, 2, 8)
    for step in range(3):
        tokens = torch.arange(5) + step
        ids = hasher(tokens, None)
        assert store.stats().fetches == 2 * (step + 1)
        for index, (layer, module) in enumerate(zip(layout.layer_ids, modules, strict=True)):
            rows = module(x, ids[:, index], None, input_ids=tokens)
            assert torch.equal(rows, table(layer)[ids[:, index]].flatten(-2))
        assert store.stats().fetches == 2 * (step + 1)
    store.close()


def test_qwen_reads_the_rows_of_a_store(tmp_path, monkeypatch):
    _, models = engines(monkeypatch)
    install(write(tmp_path, 1))
    tree = module_of("sglang", QWEN)
    scope = {"Optional": Optional, "Any": Any, "get_is_capture_mode": lambda: False}
    embedding_of = define(tree, "Qwen4ExpNGramEmbedding", **scope)
    layer_of = define(tree, "Qwen4ExpPLELayer", **scope)
    embedding, layer = embedding_of.__new__(embedding_of), layer_of.__new__(layer_of)
    nn.Module.__init__(embedding)
    nn.Module.__init__(layer)
    embedding.gather_dp_tokens, embedding.ngram_heads = False, COLUMNS
    embedding.ngram_embedding = models.Qwen4ExpPinnedHostEmbedding(placeholder(), backend="pinned", table_dir=None)
    ids = torch.randint(0, ROWS, (5, COLUMNS)).as_subclass(Ids)
    expected = table()[ids.as_subclass(torch.Tensor)] * 0.5
    assert torch.equal(embedding._embed_ngram_ids(ids, None, 5), expected)

    embedding.compute_ngram_ids = lambda batch: ids
    layer.ple_embedding, layer.ple_embed_dim = embedding, COLUMNS * DIM
    layer._prefetch_stream, layer._prefetch_state, layer._eager_prefetch_buffer = Stream(), None, None
    layer.start_prefetch(SimpleNamespace(physical_tokens=5), None)
    assert torch.equal(layer._consume_prefetched_embeddings(None), expected.flatten(-2))
    embedding.ngram_embedding.store.close()


def test_sharded_models_are_refused(tmp_path, monkeypatch):
    layers, models = engines(monkeypatch, ranks=2)
    install(write(tmp_path, 1))
    with pytest.raises(ValueError, match="tp_size = 2"):
        layers.EngramEmbedding(ROWS, DIM, 1, column_bounds=(0, ROWS))
    with pytest.raises(ValueError, match="tp_size = 2"):
        models.Qwen4ExpPinnedHostEmbedding(placeholder(tp_size=2), backend="pinned", table_dir=None)
