"""Tables of Qwen4Exp models on their way to a store: checkpoints, models without tables, and what is refused."""

import pytest
import torch
from qwen import batch, config_for, decoded, logits_of, model_of, offloaded, tables_of, text_config, twins
from safetensors.torch import save_file
from stores import in_process
from torch import nn
from transformers import Qwen4ExpForCausalLM

from tiercache import ClosedError, FormatError, StorageError, Store
from tiercache.adapters.transformers import (
    StoredEmbedding,
    checkpoint_tables,
    offload,
    without_tables,
    write_tables,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_tables_of_a_checkpoint_are_served_where_they_lie(tmp_path):
    resident = model_of(text_config(ple_layer_ids=[1, 3]))
    tokens, mask = batch()
    resident.save_pretrained(tmp_path, max_shard_size="64KB")
    sections = checkpoint_tables(tmp_path)
    assert [section["name"] for section in sections] == ["layers.0", "layers.2"]
    with without_tables():
        model = Qwen4ExpForCausalLM.from_pretrained(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == sum(
        parameter.numel() for name, parameter in resident.named_parameters() if "ngram_embedding" not in name
    )
    with pytest.raises(RuntimeError, match="loaded without its n-gram tables"):
        logits_of(model, tokens, mask)
    with offload(model, config_for(sections, resident)) as served:
        assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))
        assert torch.equal(decoded(model, tokens, mask), decoded(resident, tokens, mask))
        served.undo()
    with pytest.raises(RuntimeError, match="loaded without its n-gram tables"):
        logits_of(model, tokens, mask)
    assert type(tables_of(model_of())[1].ngram_embedding) is nn.Embedding


def test_a_table_on_meta_is_served_and_stays_there(tmp_path):
    resident, model = twins()
    tokens, mask = batch()
    sections = write_tables(model, tmp_path)
    table = tables_of(model)[1].ngram_embedding
    config = config_for(sections, model)
    table.weight = nn.Parameter(table.weight.to("meta"))
    with offload(model, config) as served:
        assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))
        served.undo()
    assert tables_of(model)[1].ngram_embedding is table
    assert table.weight.is_meta


def test_a_released_checkpoint_of_fp8_is_found_with_its_shards_and_its_scale(tmp_path):
    prefix = "model.language_model.layers.1.ple.ple_embedding.ngram_embedding"
    values = torch.randn(24, 4).to(torch.float8_e4m3fn)
    tensors = {f"{prefix}.shard_{number}.weight": part.clone() for number, part in enumerate(values.split(2))}
    scale = torch.tensor(0.25, dtype=torch.bfloat16)
    others = {"model.language_model.layers.1.ple.key_proj.weight": torch.zeros(4, 4)}
    save_file(tensors | others | {f"{prefix}.weight_scale": scale}, tmp_path / "model.safetensors")
    sections = checkpoint_tables(tmp_path)
    assert sections == [
        {
            "name": "layers.1",
            "path": tmp_path / "model.safetensors",
            "fields": [f"{prefix}.shard_{{shard}}.weight", f"{prefix}.weight_scale"],
        }
    ]
    with Store.open({"table": sections, "host": {"capacity": "1KB"}}) as store:
        assert torch.equal(store.fetch(range(24)), (values.float() * 0.25).bfloat16())


def refusals(directory):
    """(model, source, error, words) of what cannot be served."""
    good = model_of()
    sections = write_tables(good, directory)
    config = config_for(sections, good)
    table = tables_of(good)[1].ngram_embedding.weight.detach()
    other = directory / "other.safetensors"

    def with_table(tensor):
        save_file({"weight": tensor}, other)
        return config | {"table": [sections[0] | {"path": other}]}

    closed = Store.open(config)
    closed.close()
    with torch.device("meta"):
        meta = model_of_meta()
    sharded = model_of()
    tables_of(sharded)[1].ngram_embedding.weight = nn.Parameter(Subclass(table.clone()))
    two = Store.open({"host": {"capacity": "1KB"}}, tables={"a": table, "b": table})
    yield good, with_table(table[:-1].clone()), ValueError, "4351 rows of 4 values of .*; layer 1 needs 4352 rows"
    yield good, with_table(table[:, :3].clone()), ValueError, "4352 rows of 3 values"
    yield good, with_table(table.bfloat16()), ValueError, "of torch.bfloat16; layer 1 needs .* of torch.float32"
    yield good, closed, ClosedError, "closed"
    yield good, two, KeyError, "layers.1"
    yield good, config | {"table": [sections[0] | {"path": directory / "none.safetensors"}]}, OSError, "none.safetensors"
    yield model_of(text_config(ple_layer_ids=[])), config, ValueError, r"ple_layer_ids = \[\]: this model has no n-gram table"
    yield nn.Linear(2, 2), config, ValueError, "a Linear with 0 parts of type Qwen4ExpTextModel"
    yield nn.ModuleList([good, model_of()]), config, ValueError, "with 2 parts"
    yield meta, config, ValueError, "on meta"
    yield sharded, config, TypeError, "nn.Embedding of Tensor"
    two.close()


class Subclass(torch.Tensor):
    """Stands for tensors that are quantized or sharded."""


def model_of_meta():
    return Qwen4ExpForCausalLM(text_config())


def test_what_cannot_be_served_is_refused_before_anything_changes(tmp_path):
    tokens, mask = batch()
    for model, source, error, words in refusals(tmp_path):
        modules = dict(model.named_modules())
        weights = [parameter.data_ptr() for parameter in model.parameters()]
        with pytest.raises(error, match=words):
            offload(model, source)
        assert dict(model.named_modules()) == modules
        assert [parameter.data_ptr() for parameter in model.parameters()] == weights
        assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    model = model_of()
    with offloaded(model, tmp_path) as served:
        with pytest.raises(ValueError, match="table of layer 1: was offloaded before"):
            offload(model, served.store)
        with pytest.raises(ValueError, match="table of layer 1: was offloaded before"):
            write_tables(model, tmp_path)
        logits_of(model, tokens, mask)
        assert isinstance(tables_of(model)[1].ngram_embedding, StoredEmbedding)


def test_tables_that_are_not_in_memory_cannot_be_written(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    table = tables_of(model)[1].ngram_embedding
    table.weight = nn.Parameter(table.weight.to("meta"))
    with without_tables():
        other = Qwen4ExpForCausalLM.from_pretrained(tmp_path)
    for each in (model, other):
        with pytest.raises(ValueError, match="table of layer 1: is not in memory"):
            write_tables(each, tmp_path)


def test_checkpoints_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(StorageError, match=r"model\.safetensors"):
        checkpoint_tables(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no safetensors at all")
    with pytest.raises(FormatError):
        checkpoint_tables(tmp_path)


def test_the_library_imports_without_the_engines():
    without = "import sys; sys.modules.update(transformers=None, vllm=None, sglang=None)"
    assert in_process(f"{without}; import tiercache.cli, tiercache.adapters.vllm, tiercache.adapters.sglang") == ""
