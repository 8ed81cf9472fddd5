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
from qwen import batch, config_for, decoded, logits_of, model_of, multimodal_model, offloaded, tables_of, text_config, twins
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from tiercache import ClosedError, StorageError, Store
from tiercache.adapters.ahead import Ahead
from tiercache.adapters.transformers import (
    checkpoint_tables,
    offload,
    write_tables,
)
from tiercache.storage.memory import MemoryTable
from tiercache.testing import FaultySource, broken

pytestmark = pytest.mark.usefixtures("one_thread")


def is_idle(store):
    """Whether nothing is in flight, once reads that were begun for tickets given up have landed."""
    deadline = time.monotonic() + 10
    while store.stats().flights and time.monotonic() < deadline:
        time.sleep(0.001)
        store.check()
    return store.stats().flights == 0


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


@pytest.mark.parametrize(("row", "dtype"), [(0, torch.float32), (-1, torch.bfloat16)])
def test_a_table_with_other_rows_than_the_models_is_refused_and_keeps_its_memory(tmp_path, row, dtype):
    resident, model = twins(config=text_config(ple_layer_ids=[1, 3]), dtype=dtype)
    config = config_for(write_tables(model, tmp_path), model)
    weight = tables_of(model)[2].ngram_embedding.weight
    saved = weight.detach().clone()
    with torch.no_grad():
        weight[row, -1] *= -1
    number = row % len(weight)
    with pytest.raises(ValueError, match=rf"layer 2: row {number} of its table differs from that of table 'layers\.2'"):
        offload(model, config)
    with torch.no_grad():
        weight.copy_(saved)
    tokens, mask = batch()
    assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))
    offload(model, config).close()


def test_rows_that_begin_may_be_changed(tmp_path):
    table = torch.arange(40.0).reshape(10, 4)
    with Store.open({"host": {"capacity": "80B"}}, tables={"table": table}) as store:
        ahead, rows = Ahead(store, "table"), torch.tensor([[1, 2], [3, 4]])
        wanted = rows.clone()
        ahead.begin(rows)
        rows.fill_(7)
        assert torch.equal(ahead.take(rows), table[rows])
        ahead.begin(rows)
        rows.copy_(wanted)
        assert torch.equal(ahead.take(rows), table[wanted])


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
        before = served.store.stats().fetches
        assert torch.equal(logits_of(model, tokens, mask), logits_of(resident, tokens, mask))
        assert served.store.stats().fetches == before + 1


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


def test_the_module_compiles_without_a_break(tmp_path):
    resident, model = twins()
    tokens, _ = batch()
    with offloaded(model, tmp_path), torch.no_grad():
        compiled = torch.compile(tables_of(model)[1], backend="eager", fullgraph=True)
        assert torch.equal(compiled(tokens, None), tables_of(resident)[1](tokens, None))


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
