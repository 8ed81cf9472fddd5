"""TieredEmbedding: what nn.Embedding gives, from a store; prefetched or not, traced or not; and what it does to state dicts."""

import copy
import pickle
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from stores import ENGRAM, write_engram
from torch.fx.experimental.proxy_tensor import make_fx

from tiercache.engram.embedding import TieredEmbedding
from tiercache.errors import ClosedError
from tiercache.store import Store
from tiercache.testing import oracle

WEIGHT = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
SHAPES = [(), (3,), (2, 3), (2, 0, 3), (2, 1, 2, 2)]


@pytest.fixture
def store():
    with Store.open({"host": {"capacity": "320B"}}, tables={"embed": WEIGHT}) as opened:
        yield opened


@pytest.fixture
def embedding(store):
    return TieredEmbedding(store)


def settled_flights(store):
    """Flights that somebody holds: those that were dropped are over once their rows have arrived and a call looks."""
    for _ in range(200):
        before = store.stats().flights
        store.fetch([0])
        if store.stats().flights == before:
            time.sleep(0.001)
    return store.stats().flights


def some_rows(shape, seed=1):
    return torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prefetched", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_gives_what_an_embedding_gives(embedding, shape, prefetched):
    resident = torch.nn.Embedding.from_pretrained(WEIGHT)
    indices = some_rows(shape)
    if prefetched:
        embedding.prefetch(indices)
    rows = embedding(indices)
    assert rows.shape == (*shape, 4)
    assert torch.equal(rows, resident(indices))
    assert not rows.requires_grad
    assert (embedding.num_embeddings, embedding.embedding_dim) == (resident.num_embeddings, resident.embedding_dim)


def test_a_forward_takes_the_prefetch_of_its_indices_in_any_order_and_reads_nothing_again(embedding, store):
    batches = [some_rows((2, 2), seed) for seed in range(4)]
    for batch in batches:
        embedding.prefetch(batch)
    planned = store.stats().rows
    for batch in reversed(batches):
        assert torch.equal(embedding(batch), WEIGHT[batch])
    assert store.stats().rows == planned
    assert store.stats().flights == 0
    assert torch.equal(embedding(batches[0]), WEIGHT[batches[0]])
    assert store.stats().rows == planned + 4


@given(st.lists(st.tuples(st.sampled_from(["prefetch", "forward", "cancel", "change"]), st.integers(0, 5)), max_size=40))
def test_whatever_was_prefetched_the_rows_are_those_asked_for(steps):
    with Store.open({"host": {"capacity": "320B"}}, tables={"embed": WEIGHT}) as store:
        embedding = TieredEmbedding(store)
        batches = [some_rows((3,), seed) for seed in range(6)]
        tickets = {}
        for step, number in steps:
            if step == "prefetch":
                tickets[number] = embedding.prefetch(batches[number])
            elif step == "cancel" and number in tickets:
                tickets[number].cancel()
            elif step == "change":
                batches[number].fill_(number)
            elif step == "forward":
                assert torch.equal(embedding(batches[number]), WEIGHT[batches[number]])
        assert len(embedding._pending) <= 8


def test_no_more_than_eight_prefetches_wait(embedding, store):
    for seed in range(20):
        embedding.prefetch(some_rows((3,), seed))
    assert settled_flights(store) == 8
    assert torch.equal(embedding(some_rows((3,), 19)), WEIGHT[some_rows((3,), 19)])


def test_prefetches_that_are_dropped_hold_nothing(embedding, store):
    tickets = [embedding.prefetch(some_rows((3,), seed)) for seed in range(3)]
    embedding.drop()
    embedding.drop()
    assert not any(ticket.open for ticket in tickets)
    assert settled_flights(store) == 0
    assert torch.equal(embedding(some_rows((3,), 0)), WEIGHT[some_rows((3,), 0)])


def test_the_rows_begun_are_those_that_the_prefetch_is_known_by(embedding, store, monkeypatch):
    begin, indices = store.prefetch, some_rows((3,))

    def changed(given, **more):
        indices.fill_(0)  # as another thread may do
        return begin(given, **more)

    monkeypatch.setattr(store, "prefetch", changed)
    wanted = indices.clone()
    embedding.prefetch(indices)
    assert torch.equal(embedding(wanted), WEIGHT[wanted])
    assert torch.equal(embedding(indices), WEIGHT[indices])
    for wrong in ([1, 2], np.array([1, 2])):
        with pytest.raises(TypeError, match=rf"indices are a {type(wrong).__name__}; allowed is a torch\.Tensor"):
            embedding.prefetch(wrong)
    assert settled_flights(store) == 0


def test_indices_of_another_dtype_or_shape_are_other_indices(embedding):
    for shape, dtype in (((4,), torch.int32), ((2, 2), torch.int64), ((4, 1), torch.uint8), ((4,), torch.int64)):
        embedding.prefetch(torch.tensor([1, 2, 3, 4]))
        indices = torch.tensor([1, 2, 3, 4], dtype=dtype).view(shape)
        assert torch.equal(embedding(indices), WEIGHT[indices.long()])


def test_a_ticket_that_its_holder_took_is_no_matter(embedding):
    indices = some_rows((3,))
    assert torch.equal(embedding.prefetch(indices).take(), WEIGHT[indices])
    assert torch.equal(embedding(indices), WEIGHT[indices])


def test_a_ticket_is_open_until_it_is_taken_or_cancelled(store):
    taken, cancelled = store.prefetch([1]), store.prefetch([2])
    assert taken.open
    assert cancelled.open
    taken.take()
    cancelled.cancel()
    assert not taken.open
    assert not cancelled.open


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_ticket_knows_the_indices_that_it_was_asked_for_by(dtype):
    with Store.open({}, tables={"first": WEIGHT, "second": WEIGHT[:9]}) as store:
        asked = torch.tensor([[3, 1], [4, 1]])
        ticket = store.prefetch(asked, table="second")
        for same in (asked.to(dtype), asked.t().contiguous().t()):
            assert ticket.asks_for(same)
        for other in (asked.view(-1), asked + 1, asked.flip(0), asked[:1], asked.double(), asked.to("meta")):
            assert not ticket.asks_for(other)
        asked.fill_(0)
        assert not ticket.asks_for(asked)
        ticket.cancel()
        assert not ticket.asks_for(torch.tensor([[3, 1], [4, 1]]))


@pytest.mark.parametrize(
    "trace",
    [
        lambda module, given: torch.jit.trace(module, (given,), check_trace=False),
        lambda module, given: make_fx(module)(given),
        lambda module, given: make_fx(module, tracing_mode="symbolic")(given),
        lambda module, given: torch.vmap(module),
    ],
    ids=["jit", "fx", "symbolic fx", "vmap"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_is_traced_while_a_prefetch_waits_takes_nothing_of_it(embedding, trace):
    first, second = some_rows((3,), 1), some_rows((3,), 2)
    ticket = embedding.prefetch(first)
    traced = trace(embedding, first)
    assert torch.equal(traced(second), WEIGHT[second])
    assert torch.equal(traced(first), WEIGHT[first])
    assert ticket.open


def test_errors_are_those_of_the_store(embedding, store):
    for call in (embedding, embedding.prefetch):
        with pytest.raises(IndexError, match="row 50 at position"):
            call(torch.tensor([1, 50]))
        with pytest.raises(TypeError, match="row numbers are integers"):
            call(torch.tensor([1.0]))
    with pytest.raises(KeyError, match="this store has embed"):
        TieredEmbedding(store, "other")
    store.close()
    with pytest.raises(ClosedError):
        embedding(torch.tensor([1]))


def test_a_compiled_module_uses_what_was_prefetched(store):
    embedding = TieredEmbedding(store)
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    for seed in range(20):
        indices = some_rows((3,), seed)
        embedding.prefetch(indices)
        assert torch.equal(compiled(indices), WEIGHT[indices])
    assert settled_flights(store) == 8
    torch.compiler.reset()


def test_it_opens_a_store_of_its_own_over_a_checkpoint(tmp_path):
    save_file({"layers.1.embed.weight": WEIGHT.bfloat16()}, tmp_path / "model.safetensors")
    config = {"table": [{"path": tmp_path / "model.safetensors"}], "host": {"capacity": "1KB"}}
    embedding = TieredEmbedding.open(config)
    assert embedding(torch.tensor(7)).dtype == torch.bfloat16
    assert torch.equal(embedding(torch.arange(50)), WEIGHT.bfloat16())
    assert embedding.half().to("cpu", torch.float64)(torch.tensor(7)).dtype == torch.bfloat16
    embedding.store.close()


def test_it_has_no_parameters_and_a_copy_shares_its_store(embedding, store):
    assert list(embedding.parameters()) == []
    assert not hasattr(embedding, "weight")
    assert not embedding.requires_grad_()(torch.tensor([1])).requires_grad
    copied = copy.deepcopy(torch.nn.Sequential(embedding))[0]
    assert copied is not embedding
    assert copied.store is store
    assert torch.equal(copied(torch.tensor([3])), WEIGHT[[3]])
    with pytest.raises(TypeError, match="save the model's state dict"):
        pickle.dumps(embedding)
    assert "50, 4, table='embed'" in repr(embedding)


class Model(torch.nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed = embed
        self.head = torch.nn.Linear(4, 2)


@pytest.mark.parametrize("assign", [False, True])
def test_a_checkpoint_with_the_table_loads_strictly_and_leaves_it_where_it_is(store, assign):
    resident, tiered = Model(torch.nn.Embedding.from_pretrained(WEIGHT)), Model(TieredEmbedding(store))
    checkpoint = resident.state_dict()
    tiered.load_state_dict(checkpoint, assign=assign)
    assert torch.equal(tiered.head.weight, resident.head.weight)
    assert set(tiered.state_dict()) == {"head.weight", "head.bias"}
    assert list(tiered.embed.buffers()) == []
    tiered.load_state_dict(tiered.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*embed\.weight"):
        resident.load_state_dict(tiered.state_dict())


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (WEIGHT[:49], r"weight has shape \(49, 4\); the store's table 'embed' has \(50, 4\)"),
        (WEIGHT[:, :3], r"weight has shape \(50, 3\)"),
        (WEIGHT.T, r"weight has shape \(4, 50\)"),
        (torch.empty(51, 4, device="meta"), r"weight has shape \(51, 4\)"),
        (WEIGHT + 1, r"weight: row 0 differs from the store's table 'embed'"),
        (torch.cat([WEIGHT[:-1], -WEIGHT[-1:]]), "row 49 differs"),
    ],
)
def test_a_checkpoint_with_another_table_is_refused(embedding, weight, message, strict):
    with pytest.raises(RuntimeError, match=message):
        torch.nn.Sequential(embedding).load_state_dict({"0.weight": weight}, strict=strict)


def test_a_checkpoint_of_another_floating_dtype_is_compared_after_the_cast():
    rounded = WEIGHT.bfloat16()
    with Store.open({}, tables={"embed": rounded}) as store, Store.open({}, tables={"embed": WEIGHT}) as precise:
        for opened, fits in ((store, WEIGHT), (store, rounded.double()), (precise, rounded), (precise, WEIGHT.double())):
            embedding = TieredEmbedding(opened)
            embedding.load_state_dict({"weight": fits})
            for other in (torch.zeros_like(fits), torch.cat([fits[:-1], fits[-1:] * 1.02])):
                with pytest.raises(RuntimeError, match=r"weight: row \d+ differs"):
                    embedding.load_state_dict({"weight": other})
        with pytest.warns(RuntimeWarning, match=r"weight is torch\.int64: its rows were not compared"):
            embedding.load_state_dict({"weight": torch.zeros(50, 4, dtype=torch.int64)})


def test_tensors_that_are_no_part_of_the_table_are_unexpected(embedding):
    with pytest.raises(RuntimeError, match=r"Unexpected key.*scale"):
        embedding.load_state_dict({"weight": WEIGHT, "scale": torch.ones(50, 1)})
    assert embedding.load_state_dict({"scale": torch.ones(50, 1)}, strict=False).unexpected_keys == ["scale"]


def test_a_table_of_fp8_values_and_scales_loads_by_the_names_of_its_fields(tmp_path):
    records = oracle(np.arange(9), ENGRAM.record_bytes)
    path = write_engram(tmp_path / "model.safetensors", records)
    config = {"table": [{"path": path, "fields": ["weight", "scale"]}]}
    embedding = TieredEmbedding.open(config)
    weight, scale = load_file(path)["weight"], load_file(path)["scale"]
    embedding.load_state_dict({"weight": weight, "scale": scale})
    decoded = ENGRAM.decode(torch.from_numpy(records), torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        embedding.load_state_dict({"weight": decoded.to(dtype)})
    embedding.load_state_dict({"weight": decoded.bfloat16().float(), "scale": scale.float()})
    with pytest.warns(RuntimeWarning, match="weight is on meta: its rows were not compared with the store's table 'table'"):
        embedding.load_state_dict({"weight": torch.empty(9, 256, device="meta")})
    with pytest.warns(RuntimeWarning, match=r"scale is torch\.uint8: its rows were not compared"):
        embedding.load_state_dict({"scale": scale.view(torch.uint8)})
    for row in (0, 8):
        other = weight.view(torch.uint8).clone()
        other[row, 255] ^= 1
        with pytest.raises(RuntimeError, match=f"weight: row {row} differs"):
            embedding.load_state_dict({"weight": other.view(torch.float8_e4m3fn), "scale": scale})
        other = scale.view(torch.uint8).clone()
        other[row, 7] ^= 1
        for wrong in (other.view(torch.float8_e8m0fnu), other.view(torch.float8_e8m0fnu).float()):
            with pytest.raises(RuntimeError, match=f"scale: row {row} differs"):
                embedding.load_state_dict({"weight": weight, "scale": wrong})
    with pytest.raises(RuntimeError, match="weight: row 0 differs"):
        embedding.load_state_dict({"weight": torch.zeros(9, 256)})
    with pytest.raises(RuntimeError, match=r"scale has shape \(9, 4\); the store's table 'table' has \(9, 8\)"):
        embedding.load_state_dict({"weight": weight, "scale": scale[:, :4]})
    embedding.store.close()
