"""A Qwen4Exp model gives the same bits with its tables in a store as with its tables in memory."""

import copy
import errno
import gc
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from qwen import EOS, batch, config_for, model_of, multimodal_model, tables_of, text_config, twins
from safetensors.torch import save_file
from stores import in_process
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import Qwen4ExpForCausalLM

from tiercache import ClosedError, FormatError, StorageError, Store
from tiercache.adapters.transformers import (
    StoredEmbedding,
    checkpoint_tables,
    offload,
    without_tables,
    write_tables,
)
from tiercache.storage.memory import MemoryTable
from tiercache.testing import FaultySource, broken

pytestmark = pytest.mark.usefixtures("one_thread")


def offloaded(model, directory):
    return offload(model, config_for(write_tables(model, directory), model))


def is_idle(store):
    """Whether nothing is in flight, once reads that were begun for tickets given up have landed."""
    deadline = time.monotonic() + 10
    while store.stats().flights and time.monotonic() < deadline:
        time.sleep(0.001)
        store.check()
    return store.stats().flights == 0


def logits_of(model, tokens, mask, **more):
    with torch.no_grad():
        return model(tokens, attention_mask=mask, **more).logits


def decoded(model, tokens, mask, *, steps=6):
    """Logits of a prefill in two pieces and of some steps of decoding, all with one cache."""
    outputs, cache = [], None
    more = torch.randint(2, 64, (len(tokens), steps), generator=torch.Generator().manual_seed(9))
    more[0, 2] = EOS
    pieces = [tokens[:, :7], tokens[:, 7:], *more.split(1, dim=1)]
    mask = torch.cat([mask, torch.ones_like(more)], dim=1)
    end = 0
    with torch.no_grad():
        for piece in pieces:
            end += piece.shape[1]
            output = model(piece, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            outputs.append(output.logits)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(("dtype", "layers"), [(torch.float32, [2]), (torch.bfloat16, [1, 3])])
def test_logits_and_generation_are_the_same_to_the_bit(tmp_path, dtype, layers):
    resident, model = twins(config=text_config(ple_layer_ids=layers), dtype=dtype)
    tokens, mask = batch()
    ways = {"max_new_tokens": 6, "attention_mask": mask}
    with offloaded(model, tmp_path) as served:
        assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))
        assert torch.equal(decoded(model, tokens, mask), decoded(resident, tokens, mask))
        for more in ({"do_sample": False}, {"num_beams": 2}, {"do_sample": True}, {"cache_implementation": "static"}):
            torch.manual_seed(3)
            expected = resident.generate(tokens, **ways, **more)
            torch.manual_seed(3)
            assert torch.equal(model.generate(tokens, **ways, **more), expected)
        assert is_idle(served.store)
        assert served.store.stats().storage.reads > 0


def test_a_device_tier_serves_as_well(tmp_path):
    resident, model = twins()
    tokens, mask = batch()
    config = config_for(write_tables(model, tmp_path), model) | {"device": {"device": "cpu", "capacity": "2KB"}}
    with offload(model, config) as served:
        assert torch.equal(decoded(model, tokens, mask), decoded(resident, tokens, mask))
        assert torch.equal(decoded(model, tokens, mask), decoded(resident, tokens, mask))
        assert served.store.stats().device.hits > 0


def test_the_rows_matter(tmp_path):
    resident, model = twins()
    tokens, mask = batch()
    with offloaded(model, tmp_path):
        with torch.no_grad():
            tables_of(resident)[1].ngram_embedding.weight[:] = 0
        assert not torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))


def test_a_model_with_pictures_is_served_as_well(tmp_path):
    resident = multimodal_model()
    model = copy.deepcopy(resident)
    tokens, mask = batch()
    with offloaded(model, tmp_path) as served:
        assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))
        assert served.store.stats().fetches == 1


def test_embeddings_instead_of_tokens_are_served_as_well(tmp_path):
    resident, model = twins()
    tokens, mask = batch()
    embedded = resident.model.embed_tokens(tokens).detach()
    with offloaded(model, tmp_path):
        results = [logits_of(each, None, mask, inputs_embeds=embedded) for each in (model, resident)]
    assert torch.equal(*results)


def test_every_row_comes_by_a_prefetch_that_begins_in_front_of_the_first_layer(tmp_path, monkeypatch):
    _, model = twins(config=text_config(ple_layer_ids=[1, 3]))
    tokens, mask = batch()
    order = []
    with offloaded(model, tmp_path) as served:
        prefetch = served.store.prefetch

        def spied(indices, **more):
            order.append(("prefetch", more["table"], tuple(indices.shape)))
            return prefetch(indices, **more)

        monkeypatch.setattr(served.store, "prefetch", spied)
        monkeypatch.setattr(served.store, "fetch", None)
        for index, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_hook(lambda *_, index=index: order.append(index))
        logits_of(model, tokens, mask)
    assert order == [("prefetch", "layers.0", (2, 11, 8)), ("prefetch", "layers.2", (2, 11, 8)), 0, 1, 2, 3]


def test_stale_prefetches_are_given_up_and_never_taken(tmp_path):
    resident, model = twins()
    tokens, mask = batch()
    with offloaded(model, tmp_path) as served:
        stored = tables_of(model)[1].ngram_embedding
        wrong = [torch.zeros(2, 11, 8, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)]

        def disturb(*_):
            stored.ahead.drop()
            stored.plan(lambda: stored(wrong[0]))

        hook = model.model.layers[0].register_forward_hook(disturb)
        for _ in range(2):
            assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))
            wrong.reverse()
        hook.remove()
        assert is_idle(served.store)
        stored.plan(lambda: stored(torch.arange(5)))  # as an interrupt would leave it
        assert served.store.stats().flights == 1
        assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))
        assert is_idle(served.store)


def test_a_forward_that_fails_between_prefetch_and_layer_leaves_nothing_behind(tmp_path):
    resident, model = twins()
    tokens, mask = batch()
    with offloaded(model, tmp_path) as served:

        def fail(*_):
            raise ZeroDivisionError

        hook = model.model.layers[0].register_forward_hook(fail)
        with pytest.raises(ZeroDivisionError):
            logits_of(model, tokens, mask)
        hook.remove()
        assert is_idle(served.store)
        assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))


def test_a_failed_read_raises_and_the_next_forward_works(tmp_path):
    resident, model = twins()
    tokens, mask = batch()
    sections = write_tables(model, tmp_path)
    with offload(model, config_for(sections, model)) as served:
        with broken(sections[0]["path"]), pytest.raises(StorageError) as failure:
            logits_of(model, tokens, mask)
        assert failure.value.errno == errno.EIO
        assert is_idle(served.store)
        assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))


def test_one_of_two_tables_fails(tmp_path):
    resident, model = twins(config=text_config(ple_layer_ids=[1, 3]))
    tokens, mask = batch()
    sources = {
        f"layers.{layer}": FaultySource(MemoryTable(parent.ngram_embedding.weight.detach().clone().numpy()))
        for layer, parent in tables_of(model).items()
    }
    with Store.open({"host": {"capacity": "1KB"}}, tables=sources) as store:
        offload(model, store)
        faulty = sources["layers.0"]
        faulty.errors = dict.fromkeys(range(faulty.num_rows), errno.EIO)
        with pytest.raises(StorageError):
            logits_of(model, tokens, mask)
        faulty.errors = {}
        assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))
        assert is_idle(store)


def test_threads_run_forwards_of_one_model_at_once(tmp_path):
    resident, model = twins()
    batches = [batch(9 + 2 * i, seed=i) for i in range(4)]
    expected = [decoded(resident, *each) for each in batches]
    equal = []

    def run(number):
        equal.extend(torch.equal(decoded(model, *batches[number]), expected[number]) for _ in range(2))

    with offloaded(model, tmp_path) as served:
        threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert is_idle(served.store)
    assert equal == [True] * 8


def unwrapped(model):
    """Parameters by their names, whatever was wrapped."""
    return [(name.replace("_checkpoint_wrapped_module.", ""), parameter) for name, parameter in model.named_parameters()]


@pytest.mark.parametrize("checkpointing", ["none", "transformers", "torch"])
def test_gradients_of_everything_else_are_the_same_to_the_bit(tmp_path, checkpointing):
    resident, model = twins()
    tokens, mask = batch()
    with offloaded(model, tmp_path) as served:
        for each in (resident, model):
            each.train()
            if checkpointing == "transformers":
                each.activation_checkpointing_enable()
            if checkpointing == "torch":  # whose recomputation runs the layers' hooks
                each.model.layers = nn.ModuleList(map(checkpoint_wrapper, each.model.layers))
            each(tokens, attention_mask=mask, labels=tokens, use_cache=False).loss.backward()
        assert is_idle(served.store)
    gradients = {name: parameter.grad for name, parameter in unwrapped(resident)}
    del gradients["model.layers.1.ple.ple_embedding.ngram_embedding.weight"]
    others = dict(unwrapped(model))
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        other = others[name].grad
        assert (gradient is None and other is None) or torch.equal(other, gradient), name


def test_a_model_that_changes_its_dtype_afterwards_is_as_if_its_table_did(tmp_path):
    resident, model = twins()
    tokens, mask = batch()
    with offloaded(model, tmp_path) as served:
        assert torch.equal(logits_of(model.bfloat16(), tokens, mask), logits_of(resident.bfloat16(), tokens, mask))
        served.undo()
        assert tables_of(model)[1].ngram_embedding.weight.dtype == torch.bfloat16
        assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))


def test_the_table_leaves_memory_and_the_state_dict_and_nothing_else_does(tmp_path):
    resident, model = twins()
    memory = weakref.ref(tables_of(model)[1].ngram_embedding.weight)
    key = "model.layers.1.ple.ple_embedding.ngram_embedding.weight"
    with offloaded(model, tmp_path):
        gc.collect()
        assert memory() is None
        expected = resident.state_dict()
        del expected[key]
        found = model.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        model.load_state_dict(expected)
        with pytest.raises(RuntimeError, match=r"Unexpected key.*ngram_embedding\.weight"):
            model.load_state_dict(resident.state_dict())
        model.save_pretrained(tmp_path / "saved")
        with pytest.raises(ValueError, match="no tensor that is named like"):
            checkpoint_tables(tmp_path / "saved")


def test_undo_brings_everything_back(tmp_path):
    resident, model = twins(config=text_config(ple_layer_ids=[1, 3]))
    tokens, mask = batch()
    before = dict(model.named_modules())
    for parent in tables_of(model).values():
        parent.ngram_embedding.weight.requires_grad_(False)
    served = offloaded(model, tmp_path)
    logits_of(model, tokens, mask)
    with broken(tmp_path / "layers.2.safetensors"), pytest.raises(StorageError):
        served.undo()
    assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))
    served.undo()
    assert dict(model.named_modules()) == before
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in resident.state_dict().items())
    assert not any(parent.ngram_embedding.weight.requires_grad for parent in tables_of(model).values())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with pytest.raises(ClosedError):
        served.store.stats()
    assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))
    served.undo()


def test_a_store_of_the_callers_stays_open(tmp_path):
    resident, model = twins()
    tokens, mask = batch()
    (section,) = write_tables(model, tmp_path)
    with Store.open(config_for([section | {"name": "any"}], model)) as store:
        with offload(model, store) as served:
            assert served.store is store
        assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))
    with pytest.raises(ClosedError):
        logits_of(model, tokens, mask)


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


def test_the_module_compiles_without_a_break(tmp_path):
    resident, model = twins()
    tokens, _ = batch()
    with offloaded(model, tmp_path), torch.no_grad():
        compiled = torch.compile(tables_of(model)[1], backend="eager", fullgraph=True)
        assert torch.equal(compiled(tokens, None), tables_of(resident)[1](tokens, None))


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


def test_the_module_gives_rows_as_an_embedding_does(tmp_path):
    model = model_of()
    table = tables_of(model)[1].ngram_embedding.weight.detach().clone()
    with offloaded(model, tmp_path):
        module = tables_of(model)[1].ngram_embedding
        rows = np.random.default_rng(0).integers(0, 4352, (3, 2, 8))
        assert torch.equal(module(torch.from_numpy(rows)), table[rows])
        assert str(module) == "StoredEmbedding(4352, 4, table='layers.1')"
        with pytest.raises(TypeError, match="not copied or pickled"):
            copy.deepcopy(model)
