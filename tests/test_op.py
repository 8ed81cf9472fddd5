"""`fetch` as an operator of torch: traced, compiled and exported it serves the same rows, with the same errors."""

import errno
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from stores import ENGRAM, config_of, write_engram
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode

from tiercache.errors import ClosedError, StorageError
from tiercache.op import as_operator
from tiercache.store import Store
from tiercache.testing import FaultySource, OracleSource, oracle

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32, "fp8": torch.bfloat16}
DIMS = {"bf16": 16, "f32": 8, "fp8": 256}
ROWS = [[0, 99, 5], [5, 42, 7]]


class Rows(torch.nn.Module):
    """What a model does with a store: rows, and something learned on top."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, indices):
        return self.operator(indices + 0) * 2


class Learned(Rows):
    def __init__(self, operator, dim):
        super().__init__(operator)
        self.linear = torch.nn.Linear(dim, 4)

    def forward(self, indices):
        return self.linear(super().forward(indices).float())


def compiled(module, **options):
    return torch.compile(module, fullgraph=True, backend="aot_eager", **options)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def paths(tmp_path) -> dict[str, Path]:
    """Tables on disk of 100 rows: plain ones, and fp8 values with scales, which decode to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    for name in ("bf16", "f32"):
        rows = torch.randn(100, DIMS[name], generator=generator).to(DTYPES[name])
        save_file({"rows": rows}, tmp_path / f"{name}.safetensors")
    records = torch.randint(0, 120, (100, 264), dtype=torch.uint8, generator=generator)
    records[:, 256:] += 60
    write_engram(tmp_path / "fp8.safetensors", records.numpy())
    return {name: tmp_path / f"{name}.safetensors" for name in DTYPES}


@pytest.fixture
def store(paths):
    config = config_of(capacity=272 * 50)
    config["table"] = [{"name": name, "path": path} for name, path in paths.items()]
    config["table"][2]["fields"] = ["weight", "scale"]
    with Store.open(config) as store:
        yield store


@pytest.fixture
def indices():
    return torch.tensor(ROWS)


@pytest.mark.parametrize("table", DTYPES)
@pytest.mark.parametrize("rows", [ROWS, [], 7])
def test_opcheck(store, table, rows):
    as_operator(store, table, name="checked")
    indices = torch.tensor(rows, dtype=torch.int64)
    result = torch.library.opcheck(torch.ops.tiercache.fetch.default, (indices, "checked", table))
    assert set(result.values()) == {"SUCCESS"}
    assert len(result) == 4


@pytest.mark.parametrize("table", DTYPES)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_called_as_it_is(store, table, dtype):
    indices = torch.tensor(ROWS, dtype=dtype)
    rows = as_operator(store, table)(indices)
    assert (rows.shape, rows.dtype, rows.device.type) == ((2, 3, DIMS[table]), DTYPES[table], "cpu")
    assert torch.equal(rows, store.fetch(indices, table=table))
    assert not rows.requires_grad


@pytest.mark.parametrize("table", DTYPES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fake_and_meta_tensors(store, table, device):
    operator = as_operator(store, table)
    with FakeTensorMode():
        rows = operator(torch.empty(3, 0, 2, dtype=torch.int32, device=device))
    assert (rows.shape, rows.dtype, rows.device.type) == ((3, 0, 2, DIMS[table]), DTYPES[table], device)
    if device == "meta":
        rows = operator(torch.empty(5, dtype=torch.int64, device="meta"))
        assert (rows.shape, rows.dtype, rows.device.type) == ((5, DIMS[table]), DTYPES[table], "meta")


def test_what_cannot_be_is_refused_while_tracing(store):
    operator = as_operator(store, "f32")
    with FakeTensorMode():
        with pytest.raises(TypeError, match="indices are on cuda:0"):
            operator(torch.empty(3, dtype=torch.int64, device="cuda"))
        with pytest.raises(TypeError, match=r"indices are torch\.float32"):
            operator(torch.empty(3))


@pytest.mark.parametrize("table", DTYPES)
def test_compiled_equals_eager(store, table, indices):
    module = Rows(as_operator(store, table))
    run = compiled(module)
    for batch in (indices, indices.T, indices[:, :0], indices.flatten()):
        assert torch.equal(run(batch), store.fetch(batch, table=table) * 2)


@pytest.mark.parametrize("table", DTYPES)
def test_compiled_with_symbolic_shapes(store, table):
    run = compiled(Rows(as_operator(store, table)), dynamic=True)
    for size in (2, 5, 17):
        batch = torch.arange(size * 3).view(size, 3)
        assert torch.equal(run(batch), store.fetch(batch, table=table) * 2)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("table", DTYPES)
def test_exported_equals_eager(store, table, indices, strict):
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Rows(as_operator(store, table)), (indices,), dynamic_shapes=shapes, strict=strict)
    run = program.module()
    for batch in (indices, torch.arange(99).view(33, 3)):
        assert torch.equal(run(batch), store.fetch(batch, table=table) * 2)


def test_an_exported_program_in_another_process(store, paths, tmp_path, indices):
    for name in ("weights", None):
        program = torch.export.export(Rows(as_operator(store, "f32", name=name)), (indices,))
        torch.export.save(program, tmp_path / f"{name}.pt2")
    code = """
import sys
import torch
from tiercache import ClosedError, Store, as_operator
with Store.open({"table": [{"name": "f32", "path": sys.argv[1]}]}) as store:
    as_operator(store, name="weights")
    indices = torch.tensor([[1, 2, 3], [4, 4, 4]])
    rows = torch.export.load(sys.argv[2]).module()(indices)
    assert torch.equal(rows, store.fetch(indices) * 2)
    try:
        torch.export.load(sys.argv[3]).module()(indices)
    except ClosedError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, paths["f32"], tmp_path / "weights.pt2", tmp_path / "None.pt2"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "gone or belongs to another process" in done.stdout


def test_gradients_pass_by(store, indices):
    module = Learned(as_operator(store, "bf16"), 16)
    grads = []
    for run in (module, compiled(module)):
        module.zero_grad()
        run(indices).sum().backward()
        grads.append(module.linear.weight.grad)
    assert torch.equal(*grads)


def test_called_from_code_that_is_not_compiled(store, indices):
    operator = as_operator(store, "fp8")

    @torch.compiler.disable(recursive=False)
    def given_up(indices):
        return torch.ops.tiercache.fetch.default(indices, *arguments)

    arguments = [cell.cell_contents for cell in operator.__closure__]
    run = torch.compile(lambda indices: given_up(indices) + 1, backend="aot_eager")
    assert torch.equal(run(indices), store.fetch(indices, table="fp8") + 1)


# errors


@pytest.mark.parametrize("wrap", [lambda module: module, compiled], ids=["eager", "compiled"])
def test_errors_arrive_unchanged(wrap):
    source = FaultySource(OracleSource(100, ENGRAM))
    with Store.open(config_of(), tables={"t": source}) as store:
        run = wrap(Rows(as_operator(store)))
        run(torch.tensor([1, 2]))
        with pytest.raises(IndexError, match=r"^row 100 at position \(1,\) is out of range: table 't' has rows 0 to 99$"):
            run(torch.tensor([0, 100]))
        source.errors[51] = errno.EIO
        with pytest.raises(StorageError, match="the source failed"):
            run(torch.tensor([50, 51]))
        source.errors.clear()
        assert run(torch.tensor([50, 51])).shape == (2, 256)
    with pytest.raises(ClosedError, match=r"^the store is closed$"):
        run(torch.tensor([1, 2]))


def test_an_unknown_table_and_a_name_that_is_taken(store):
    with pytest.raises(KeyError, match="required"):
        as_operator(store)
    with pytest.raises(KeyError, match="'no'"):
        as_operator(store, "no")
    for table in DTYPES:
        as_operator(store, table, name="mine")
    with Store.open(config_of(), tables={"t": torch.ones(3, 4)}) as other:
        with pytest.raises(ValueError, match="'mine': another open store"):
            as_operator(other, name="mine")
        store.close()
        assert torch.equal(as_operator(other, name="mine")(torch.tensor([2])), torch.ones(1, 4))


# several stores


def test_stores_do_not_mix(indices):
    tables = [torch.full((100, 4), float(number)) for number in range(3)]
    stores = [Store.open(config_of(), tables={"t": table}) for table in tables]
    operators = [as_operator(store) for store in stores]
    for operator, table in zip(operators, tables, strict=True):
        assert torch.equal(compiled(Rows(operator))(indices), table[indices] * 2)
    both = compiled(lambda indices: (operators[1](indices), operators[2](indices)))
    for rows, table in zip(both(indices), tables[1:], strict=True):
        assert torch.equal(rows, table[indices])
    stores[1].close()
    with pytest.raises(ClosedError):
        both(indices)
    assert torch.equal(operators[2](indices), tables[2][indices])
    for store in stores:
        store.close()


def test_an_operator_keeps_no_store_alive(indices):
    store = Store.open(config_of(), tables={"t": torch.ones(100, 4)})
    operator = as_operator(store)
    run = compiled(Rows(operator))
    assert torch.equal(run(indices), torch.full((2, 3, 4), 2.0))
    gone = weakref.ref(store)
    del store
    gc.collect()
    assert gone() is None
    for call in (operator, run):
        with pytest.raises(ClosedError, match="gone or belongs to another process"):
            call(indices)


# `fetch` itself


@pytest.mark.parametrize("call", [Store.fetch, Store.prefetch])
def test_fetch_refuses_tensors_without_values(store, call):
    with FakeTensorMode() as mode:
        fake = torch.zeros(3, dtype=torch.int64)
    meta = torch.zeros(3, dtype=torch.int64, device="meta")
    for indices in (fake, meta, mode.from_tensor(meta)):
        with pytest.raises(TypeError, match=r"indices have no values.*tiercache\.as_operator"):
            call(store, indices, table="f32")
    with pytest.raises(TypeError, match=r"functionalize.*tiercache\.as_operator"):
        torch.func.functionalize(lambda indices: call(store, indices, table="f32"))(torch.zeros(3, dtype=torch.int64))
    with FunctionalTensorMode(), pytest.raises(TypeError, match=r"FunctionalTensor.*tiercache\.as_operator"):
        call(store, torch.zeros(3, dtype=torch.int64), table="f32")
    assert store.stats().rows == 0


@pytest.mark.parametrize("table", ["f32", "fp8"])
def test_fetch_refuses_outputs_without_memory(store, table):
    ticket = store.prefetch([1, 2], table=table)
    real = torch.empty(2, DIMS[table], dtype=DTYPES[table])
    with FakeTensorMode():
        fake = torch.empty(2, DIMS[table], dtype=DTYPES[table])
        for call in (ticket.take, lambda: store.fetch([1, 2], table=table)):
            with pytest.raises(TypeError, match=r"rows have no values: a FakeTensor.*tiercache\.as_operator"):
                call()
        if table == "fp8":
            for call in (lambda: ticket.take(out=real), lambda: store.fetch([1, 2], table=table, out=real)):
                with pytest.raises(TypeError, match=r"rows have no values"):
                    call()
    for call in (lambda: ticket.take(out=fake), lambda: store.fetch([1, 2], table=table, out=fake)):
        with pytest.raises(TypeError, match=r"rows of out have no values.*tiercache\.as_operator"):
            call()
    assert torch.equal(ticket.take(), store.fetch([1, 2], table=table))


def test_fetch_under_another_default_device():
    table = oracle(range(9), 264)
    with Store.open(config_of(), tables={"t": table}) as store, torch.device("meta"):
        rows = store.fetch([3, 4])
    assert rows.numpy().tobytes() == table[3:5].tobytes()


@pytest.mark.skipif(not hasattr(torch.Tag, "cudagraph_unsafe"), reason="this torch has no such tag")
def test_graphs_are_split_around_it():
    assert torch.Tag.cudagraph_unsafe in torch.ops.tiercache.fetch.default.tags
