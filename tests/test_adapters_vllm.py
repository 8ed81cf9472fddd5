"""Tables in a store answer as vLLM's own modules ask: against its sources, where vllm is installed."""

import logging
from types import SimpleNamespace

import pytest
import torch
from engines import Ids, attributes_of, define, install_modules, module_of, node_of, parameters, parameters_of
from safetensors.torch import save_file
from torch import nn
from transformers import Qwen4ExpTextConfig

from tiercache import Store
from tiercache.adapters.vllm import EngramTable, PLETable, install

ENGRAM = "models/deepseek_v41/common/engram.py"
QWEN, QWEN_COMMON = "models/qwen4_exp/nvidia/ngram_embedding.py", "models/qwen4_exp/common/ngram_embedding.py"
HEADS, DIM = 6, 32


def write(directory, weight, name="layers.1"):
    """A table as a store's config has it."""
    save_file({"weight": weight}, directory / f"{name}.safetensors")
    return {"table": [{"name": name, "path": directory / f"{name}.safetensors"}], "host": {"capacity": "4KB"}}


def table(num_rows=300, dim=DIM):
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(0)).bfloat16()


def test_a_table_of_engram_looks_rows_up():
    weight = table()
    with Store.open({"host": {"capacity": "4KB"}}, tables={"layers.1": weight}) as store:
        module = EngramTable(store, "layers.1", 300, DIM, HEADS)
        ids = torch.randint(0, 300, (5, HEADS))
        out = torch.empty(5, HEADS, DIM, dtype=torch.bfloat16)
        module.lookup(ids, out, background=True)
        assert torch.equal(out, weight[ids])
        assert torch.equal(module(ids), weight[ids])
        module.weight.weight_loader(module.weight, weight)
        module.collapse_huge_pages()
        assert sum(parameter.numel() for parameter in module.parameters()) == 0


def test_a_table_of_qwen_gives_what_was_prefetched():
    weight, around = table(), []

    def eager(function):
        around.append(function.__name__)
        return function

    with Store.open({"host": {"capacity": "4KB"}}, tables={"layers.1": weight}) as store:
        module = PLETable(store, "layers.1", 300, DIM, HEADS, eager)
        ids = torch.randint(0, 300, (5, HEADS))
        buffer = ids.clone()
        module.start_prefetch(buffer)
        buffer.zero_()  # vLLM uses it again
        assert torch.equal(module.finalize_prefetch(5), weight[ids].flatten(-2))
        module.start_prefetch(ids)
        module.start_prefetch(ids[:2])
        with pytest.raises(RuntimeError, match="rows of 5 tokens are wanted, those of 2 were prefetched"):
            module.finalize_prefetch(5)
        assert torch.equal(module.finalize_prefetch(2), weight[ids[:2]].flatten(-2))
    assert around == ["_start", "_finish"]


@pytest.mark.parametrize(("num_rows", "dim"), [(299, DIM), (300, DIM + 1)])
def test_tables_of_another_shape_are_refused(num_rows, dim):
    with Store.open({"host": {"capacity": "4KB"}}, tables={"layers.1": table()}) as store:
        for build in (
            lambda: EngramTable(store, "layers.1", num_rows, dim, HEADS),
            lambda: PLETable(store, "layers.1", num_rows, dim, HEADS, lambda function: function),
        ):
            with pytest.raises(ValueError, match=f"300 rows of 32 values; needed are {num_rows} of {dim}"):
                build()


def test_the_interface_is_that_of_the_released_package():
    tree = module_of("vllm", ENGRAM)
    for name in ("lookup", "forward", "collapse_huge_pages"):
        upstream = node_of(tree, "ParallelEngramEmbedding", name)
        assert parameters_of(upstream) == parameters(getattr(EngramTable, name)), name
    assert parameters_of(node_of(tree, "Engram", "_create_embedding")) == (["layout", "layer_hash_index"], [])
    read = attributes_of(node_of(tree, "Engram"), "embed_tokens")
    assert read == {"dp_size", "tp_size", "part_n_hash_cols", "n_hash_cols", "cpu_offload", "lookup"}
    assert attributes_of(node_of(tree, "EngramBatch", "create"), "table") == {"dp_size", "tp_size", "dim"}
    model = attributes_of(module_of("vllm", "models/deepseek_v41/nvidia/model.py"), "embed_tokens")
    with Store.open({"host": {"capacity": "4KB"}}, tables={"layers.1": table()}) as store:
        assert all(hasattr(EngramTable(store, "layers.1", 300, DIM, HEADS), name) for name in read | model)

    tree = module_of("vllm", QWEN_COMMON)
    pinned = node_of(tree, "Qwen4ExpPLEPinnedHostEmbedding")
    assert parameters_of(node_of(pinned, "finalize_prefetch")) == parameters(PLETable.finalize_prefetch)
    assert parameters_of(node_of(pinned, "start_prefetch")) == parameters(PLETable._start)
    dequantize = node_of(tree, "Qwen4ExpPLEEmbedding", "dequantize")
    assert parameters_of(dequantize) == parameters(PLETable.dequantize)
    positional, keywords = parameters_of(node_of(pinned, "__init__"))
    assert positional == ["num_embeddings", "embedding_dim"]
    assert {"prefix", "num_ngram_heads"} <= set(keywords)
    read = attributes_of(module_of("vllm", QWEN), "ngram_embedding") | attributes_of(module_of("vllm", QWEN), "embedding")
    assert read == {
        "finalize_prefetch", "org_vocab_size", "start_prefetch", "supports_prefetch", "weight",
    }  # fmt: skip


def engines(monkeypatch, *, ranks=1):
    """vLLM's classes, defined over a CPU, and the modules that `install` finds them in."""
    eager = {"eager_break_during_capture": lambda function: function}
    config = SimpleNamespace(
        engram_config=SimpleNamespace(cpu_offload=True),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=16),
    )
    wkv = nn.Identity()
    engram = define(
        module_of("vllm", ENGRAM),
        "Engram",
        **eager,
        get_current_vllm_config=lambda: config,
        ColumnParallelLinear=lambda *args, **kwargs: wkv,
        is_forward_context_available=lambda: False,
        _engram_lookup_thresholds=lambda device: (None, None),
        EngramBatch=None,
    )
    group = SimpleNamespace(world_size=ranks)
    made = install_modules(
        monkeypatch,
        {
            "vllm.compilation.breakable_cudagraph": eager,
            "vllm.distributed": {"get_etp_group": lambda: group, "get_tensor_model_parallel_world_size": lambda: ranks},
            "vllm.models.deepseek_v41.common.engram": {"Engram": engram},
            "vllm.models.qwen4_exp.nvidia.ngram_embedding": {},
        },
    )
    return config, group, made["vllm.models.qwen4_exp.nvidia.ngram_embedding"], engram


def build_engram(engram):
    layout = SimpleNamespace(
        layer_ids=(1, 14), num_embeddings=(300, 300), head_dim=DIM, max_ngram_size=4, n_heads=2, n_hash_cols=HEADS
    )
    config = SimpleNamespace(hidden_size=8, hc_mult=2, rms_norm_eps=1e-6)
    return engram(config, None, layout, 0, use_sequence_parallel=False, prefix="layers.1.engram")


def test_engram_stages_the_rows_of_a_store(tmp_path, monkeypatch):
    weight = table()
    _, _, _, engram = engines(monkeypatch)
    install(write(tmp_path, weight))
    module = build_engram(engram)
    ids = torch.randint(0, 300, (5, HEADS)).as_subclass(Ids)
    module.prepare_embeddings(ids)
    assert torch.equal(module.embed(ids), weight[ids.as_subclass(torch.Tensor)])
    assert isinstance(module.embed_tokens, EngramTable)
    module.embed_tokens.store.close()


def test_qwen_reads_the_rows_of_a_store(tmp_path, monkeypatch):
    config, group, module, _ = engines(monkeypatch)
    shape = {"ngram_vocab_size_base": 50, "heads_per_ngram": 3, "make_ngram_vocab_size_divisible_by": 8}
    text = Qwen4ExpTextConfig(
        vocab_size=64, eos_token_id=1, split_ngram_parts=4, num_hidden_layers=4, ple_layer_ids=[2], ple_embed_dim=48, **shape
    )
    embedding = define(
        module_of("vllm", QWEN),
        "Qwen4ExpNGramEmbedding",
        Iterable=None,
        get_current_vllm_config=lambda: config,
        get_etp_group=lambda: group,
        get_tp_group=lambda: group,
        round_up=lambda value, unit: -(-value // unit) * unit,
        Qwen4ExpPLEEmbeddingMethod=SimpleNamespace(from_quant_config=lambda *_: None),
        Qwen4ExpPLENvFp4EmbeddingMethod=type("NvFp4", (), {}),
        Qwen4ExpPLEDeviceEmbedding=None,
        Qwen4ExpPLEPinnedHostEmbedding=lambda *args, **kwargs: module.Qwen4ExpPLEPinnedHostEmbedding(*args, **kwargs),
        AutoWeightsLoader=None,
        logger=logging.getLogger(),
    )
    num_rows = 53 + 59 + 61 + 67 + 71 + 73
    weight = table(num_rows, 8)
    install(write(tmp_path, weight))
    built = embedding(text, 48, 0, 16, data_parallel_rank=0, prefix="model.layers.1.ple.ple_embedding")
    tokens, starts = torch.tensor([5, 1, 7, 8, 9]), torch.tensor([0, 3, 5])
    context = torch.tensor([[1, 1], [4, 6]])
    ids = built.compute_ngram_ids(tokens, starts, context)
    built.start_prefetch(tokens, starts, context)
    expected = weight[ids].flatten(-2)
    assert torch.equal(built(None, tokens, starts, context), expected)
    shards = [(f"ngram_embedding.shard_{i}.weight", part) for i, part in enumerate(weight.split(num_rows // 4))]
    assert built.load_weights(shards) == {"ngram_embedding.weight"}
    assert built.ngram_embedding.weight.numel() == 0
    built.ngram_embedding._ahead.store.close()


def test_sharded_models_are_refused(tmp_path, monkeypatch):
    _, _, module, engram = engines(monkeypatch, ranks=2)
    install(write(tmp_path, table()))
    with pytest.raises(ValueError, match="tensor_parallel_size = 2"):
        build_engram(engram)
    with pytest.raises(ValueError, match="tensor_parallel_size = 2"):
        module.Qwen4ExpPLEPinnedHostEmbedding(300, DIM, prefix="model.layers.1.ple", num_ngram_heads=HEADS)
