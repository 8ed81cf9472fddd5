"""Tables in files and in memory: every byte where the source has it, and an error that says what is wrong."""

import errno
import json
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tiercache.errors import ConfigError, FormatError, StorageError
from tiercache.records import Field, Record, plain
from tiercache.storage import open_table
from tiercache.storage.memory import MemoryTable
from tiercache.storage.table import FileTable, open_file, open_readonly

ENGRAM = ("layers.1.engram.embed.weight", "layers.1.engram.embed.scale")


def random_bytes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def read_all(table: FileTable) -> np.ndarray:
    """Every record, by the description alone."""
    records = np.zeros((table.num_rows, table.record_bytes), np.uint8)
    written = np.zeros_like(records)
    for extent in table.extents:
        content = table.files[extent.file].path.read_bytes()
        for place in range(extent.num_rows):
            begin = extent.offset + place * extent.stride
            target = extent.first_row + place, slice(extent.record_offset, extent.record_offset + extent.nbytes)
            records[target] = np.frombuffer(content[begin : begin + extent.nbytes], np.uint8)
            written[target] += 1
    for offset, held in table.resident:
        records[:, offset : offset + held.shape[1]] = held
        written[:, offset : offset + held.shape[1]] += 1
    assert (written == 1).all()
    return records


def engram_tensors(num_rows: int = 37, seed: int = 0) -> dict[str, torch.Tensor]:
    weight, scale = random_bytes(num_rows, 256, seed=seed), random_bytes(num_rows, 8, seed=seed + 1)
    return {
        ENGRAM[0]: torch.from_numpy(weight).view(torch.float8_e4m3fn),
        ENGRAM[1]: torch.from_numpy(scale).view(torch.float8_e8m0fnu),
        "other": torch.arange(7),
    }


def records_of(tensors: dict[str, torch.Tensor], fields: Sequence[str]) -> np.ndarray:
    return np.hstack([tensors[field].contiguous().view(torch.uint8).numpy() for field in fields])


def write_raw(path: Path, header: object, data: bytes = b"") -> Path:
    """A file by hand: any header, any bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def write_index(path: Path, weight_map: object) -> Path:
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def cases(*rows: tuple[object, ...]) -> list[object]:
    """Parameters with distinct names."""
    return [pytest.param(*row, id=f"{place}-{row[-1]}"[:30]) for place, row in enumerate(rows)]


# safetensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.uint8, torch.int8])
def test_the_only_table_of_a_file_needs_no_name(tmp_path, dtype):
    rows = torch.from_numpy(random_bytes(11, 12)).view(dtype)
    save_file({"w": rows, "bias": torch.zeros(4)}, tmp_path / "t.safetensors")
    table = open_table("t", tmp_path / "t.safetensors")
    assert (table.name, table.num_rows, table.record_bytes, table.resident) == ("t", 11, 12, ())
    assert table.record.default_dtype == dtype
    assert np.array_equal(read_all(table), rows.view(torch.uint8).numpy())


def test_fields_of_a_row_join_in_the_order_asked(tmp_path):
    tensors = engram_tensors()
    save_file(tensors, tmp_path / "t.safetensors")
    for fields in (ENGRAM, ENGRAM[::-1]):
        table = open_table("t", tmp_path / "t.safetensors", fields=fields)
        assert table.record_bytes == 264
        assert [field.name for field in table.record.fields] == list(fields)
        assert np.array_equal(read_all(table), records_of(tensors, fields))


def test_a_resident_field_is_in_memory_and_in_no_extent(tmp_path):
    tensors = engram_tensors()
    save_file(tensors, tmp_path / "t.safetensors")
    table = open_table("t", tmp_path / "t.safetensors", fields=ENGRAM, resident=ENGRAM[1:])
    assert [(offset, held.shape) for offset, held in table.resident] == [(256, (37, 8))]
    assert {extent.record_offset for extent in table.extents} == {0}
    assert np.array_equal(read_all(table), records_of(tensors, ENGRAM))


def test_an_index_opens_only_the_files_that_it_needs(tmp_path):
    tensors = engram_tensors()
    save_file({ENGRAM[0]: tensors[ENGRAM[0]]}, tmp_path / "a.safetensors")
    save_file({ENGRAM[1]: tensors[ENGRAM[1]]}, tmp_path / "b.safetensors")
    files = {ENGRAM[0]: "a.safetensors", ENGRAM[1]: "b.safetensors", "other": "not-downloaded.safetensors"}
    table = open_table("t", write_index(tmp_path, files), fields=ENGRAM)
    assert [file.path.name for file in table.files] == ["a.safetensors", "b.safetensors"]
    assert np.array_equal(read_all(table), records_of(tensors, ENGRAM))


def test_pieces_of_a_tensor_follow_their_numbers(tmp_path):
    counts = {8: 3, 9: 0, 10: 5, 11: 1}
    weights = {number: random_bytes(count, 256, seed=number) for number, count in counts.items()}
    scales = random_bytes(9, 8)
    files = {"scale": "s.safetensors"}
    save_file({"scale": torch.from_numpy(scales).view(torch.float8_e8m0fnu)}, tmp_path / "s.safetensors")
    for number in weights:
        files[f"w.shard_{number}.x"] = f"{number % 2}.safetensors"
    for parity in (0, 1):
        mine = {
            f"w.shard_{number}.x": torch.from_numpy(weight).view(torch.float8_e4m3fn)
            for number, weight in weights.items()
            if number % 2 == parity
        }
        save_file(mine, tmp_path / f"{parity}.safetensors")
    index = write_index(tmp_path, files)
    expected = np.hstack([np.concatenate(list(weights.values())), scales])
    for resident in ((), ("w.shard_{shard}.x",), ("scale",)):
        table = open_table("t", index, fields=("w.shard_{shard}.x", "scale"), resident=resident)
        assert np.array_equal(read_all(table), expected)
        assert all(extent.num_rows for extent in table.extents)


@pytest.mark.parametrize(("dtype", "shape"), [(torch.float32, ()), (torch.bfloat16, (1,)), (torch.float16, (1, 1))])
def test_a_single_number_among_the_fields_is_the_scale_of_the_table(tmp_path, dtype, shape):
    weight = torch.from_numpy(random_bytes(5, 16)).view(torch.float8_e4m3fn)
    save_file({"w": weight, "s": torch.full(shape, 0.3125, dtype=dtype)}, tmp_path / "t.safetensors")
    table = open_table("t", tmp_path / "t.safetensors", fields=("w", "s"))
    assert table.record == Record((Field("w", "F8_E4M3", 16),), 0.3125)
    assert np.array_equal(read_all(table), weight.view(torch.uint8).numpy())


def test_a_path_that_is_not_there_is_named_with_its_table(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "none.safetensors", tmp_path / "none", tmp_path / "file" / "below"):
        with pytest.raises(StorageError, match=r"no such file or directory, the path of table 'words': '.*'") as caught:
            open_table("words", path)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(path))


def test_a_directory_of_files_points_at_the_file(tmp_path):
    for number in range(6):
        save_file({"w": torch.zeros(3, 4)}, tmp_path / f"{number}.safetensors")
    with pytest.raises(FormatError, match=r"not a packed table; a path names the file: .*/0\.safetensors, .* or 2 more"):
        open_table("t", tmp_path)
    index = write_index(tmp_path, {"w": "0.safetensors"})
    with pytest.raises(FormatError, match=rf"a path names the file: {index}$"):
        open_table("t", tmp_path, fields=["w"])


@pytest.mark.parametrize(
    ("weight", "scale", "told"),
    [
        (ENGRAM[0], ENGRAM[1], True),
        ("embed.weight", "embed.weight_scale_inv", True),
        ("embed.weight", "embed.weight.scale", True),
        ("embed", "embed.scale", True),
        ("weight", "scale", True),
        ("embed.weight", "norm.weight", False),
        ("layers.1.weight", "layers.2.scale", False),
        ("embed.weight", "scale", False),
    ],
)
def test_fp8_values_without_their_scale_are_told_of(tmp_path, weight, scale, told):
    values, scales = list(engram_tensors().values())[:2]
    save_file({weight: values, scale: scales}, tmp_path / "t.safetensors")
    (tmp_path / "shards").mkdir()
    save_file({weight: values}, tmp_path / "shards" / "a.safetensors")
    index = write_index(tmp_path / "shards", {weight: "a.safetensors", scale: "not-downloaded.safetensors"})
    for path in (tmp_path / "t.safetensors", index):
        notes = open_table("t", path, fields=[weight]).notes
        assert len(notes) == told
        assert all(str(path) in note and repr(weight) in note and repr(scale) in note for note in notes)
    assert open_table("t", tmp_path / "t.safetensors", fields=[weight, scale]).notes == ()


def test_a_scale_of_the_pieces_of_a_weight_is_found(tmp_path):
    values, scales = list(engram_tensors().values())[:2]
    tensors = {"e.weight.3": values[:10].clone(), "e.weight.4": values[10:].clone(), "e.scale.3": scales[:10].clone()}
    save_file(tensors, tmp_path / "t.safetensors")
    (note,) = open_table("t", tmp_path / "t.safetensors", fields=["e.weight.{shard}"]).notes
    assert "'e.scale.3'" in note
    save_file({"w": torch.zeros(3, 4), "w_scale": torch.ones(1)}, tmp_path / "plain.safetensors")
    assert open_table("t", tmp_path / "plain.safetensors").notes == ()


def test_the_identity_is_of_the_data_not_of_the_files(tmp_path):
    tensors = engram_tensors(300)
    save_file(tensors, tmp_path / "one.safetensors")
    save_file(
        {"w.0": tensors[ENGRAM[0]][:100].clone(), "s": tensors[ENGRAM[1]], "more": torch.zeros(3)},
        tmp_path / "a.safetensors",
    )
    save_file({"w.1": tensors[ENGRAM[0]][100:].clone()}, tmp_path / "b.safetensors")
    index = write_index(tmp_path, {"w.0": "a.safetensors", "w.1": "b.safetensors", "s": "a.safetensors"})
    one = open_table("one", tmp_path / "one.safetensors", fields=ENGRAM)
    assert one.identity == open_table("two", index, fields=("w.{shard}", "s")).identity
    save_file(engram_tensors(300, seed=9), tmp_path / "changed.safetensors")
    assert one.identity != open_table("one", tmp_path / "changed.safetensors", fields=ENGRAM).identity


@pytest.mark.parametrize(
    ("fields", "resident", "message"),
    cases(
        ((), (), r"name the fields.*'layers.1.engram.embed.scale' F8_E8M0\[37, 8\], .*weight' F8_E4M3\[37, 256\]"),
        (("nope",), (), r"field = 'nope': .*t\.safetensors does not have it; it has 'layers"),
        (("nope_{shard}",), (), r"field = 'nope_\{shard\}'"),
        ((ENGRAM[0], ENGRAM[0]), (), "occurs twice"),
        (ENGRAM, ("other",), r"resident = \['other'\]: not among"),
        (ENGRAM, ENGRAM, "at least one field has to stay on disk"),
    ),
)
def test_fields_that_a_file_does_not_have_are_refused(tmp_path, fields, resident, message):
    save_file(engram_tensors(), tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match=message):
        open_table("t", tmp_path / "t.safetensors", fields=fields, resident=resident)


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    cases(
        ({"w": torch.zeros(3, 4, dtype=torch.int64)}, ("w",), r"t\.safetensors: tensor 'w' is I64; supported are BF16"),
        ({"w": torch.zeros(3)}, ("w",), r"'w' F32\[3\] is not \[rows, width\]"),
        ({"w": torch.zeros(0, 4)}, ("w",), r"at least 1"),
        ({"w": torch.zeros(3, 0)}, ("w",), r"t\.safetensors: .*0 elements"),
        ({"w": torch.zeros(3, 4), "v": torch.zeros(2, 4)}, ("w", "v"), r"t\.safetensors: 'w' F32, 'v' F32"),
        (
            {"w": torch.zeros(3, 4, dtype=torch.float8_e4m3fn), "v": torch.zeros(2, 4, dtype=torch.float8_e8m0fnu)},
            ("w", "v"),
            r"one number of rows.*'w': 3, 'v': 2",
        ),
        ({"w0": torch.zeros(3, 4), "w2": torch.zeros(3, 4)}, ("w{shard}",), r"number 1 is missing between 0 and 2"),
        ({"w0": torch.zeros(3, 4), "w00": torch.zeros(3, 4)}, ("w{shard}",), r"the same number"),
        ({"w0": torch.zeros(3, 4), "w1": torch.zeros(3, 5)}, ("w{shard}",), r"differ in dtype or width"),
        ({"w": torch.zeros(3, 4), "s": torch.ones(1)}, ("w", "s"), r"global scale belongs to one F8_E4M3"),
        ({"w": torch.zeros(3, 4).to(torch.float8_e4m3fn), "s": torch.tensor(torch.inf)}, ("w", "s"), r"'s' is inf"),
    ),
)
def test_tensors_that_make_no_table_are_refused(tmp_path, tensors, fields, message):
    save_file(tensors, tmp_path / "t.safetensors")
    with pytest.raises(FormatError, match=message):
        open_table("t", tmp_path / "t.safetensors", fields=fields)


@pytest.mark.parametrize(
    ("header", "num_data", "message"),
    cases(
        (b"[1]", 0, "no object"),
        (b'{"w": ', 0, "not a JSON header"),
        (b"\xff\xfe", 0, "not a JSON header"),
        (b"[" * 100_000, 0, "not a JSON header"),
        (b'{"w": 1, "w": 2}', 0, "occurs twice"),
        ({"w": 1}, 0, "'w' has no dtype"),
        ({"w": {"dtype": 1, "shape": [], "data_offsets": [0, 0]}}, 0, "'w' has no dtype"),
        ({"w": {"dtype": "U8", "data_offsets": [0, 4]}}, 4, "needs a shape"),
        ({"w": entry("U8", [1, True], 0, 1)}, 1, "needs a shape"),
        ({"w": entry("U8", [-2, -2], 0, 4)}, 4, "needs a shape"),
        ({"w": entry("U8", [2.0, 2], 0, 4)}, 4, "needs a shape"),
        ({"w": entry("U8", [1] * 33, 0, 1)}, 1, "needs a shape"),
        ({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4, 8]}}, 4, "two data_offsets"),
        ({"w": entry("U8", [2, 2], 4, 0)}, 4, "truncated or damaged"),
        ({"w": entry("U8", [2, 4], 0, 8)}, 7, "lies at 0:8 of 7 data bytes; truncated"),
        ({"w": entry("BF16", [2, 2], 0, 4)}, 4, "does not have 4 bytes"),
        ({"w": entry("F32", [1 << 40, 1 << 40], 0, 4)}, 4, "does not have 4 bytes"),
        ({"w": entry("U8", [2, 2], 0, 4), "v": entry("U8", [4], 2, 6)}, 6, "'v' overlaps 'w'"),
        ({"w": entry("U8", [2, 2], 1, 5)}, 5, "'w' leaves a hole after the header"),
        ({"w": entry("U8", [2, 2], 0, 4)}, 9, "5 bytes behind the last tensor"),
    ),
)
def test_a_damaged_header_is_named(tmp_path, header, num_data, message):
    path = write_raw(tmp_path / "t.safetensors", header, bytes(num_data))
    with pytest.raises(FormatError, match=message) as caught:
        open_table("t", path, fields=("w",))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"1234567", bytes(8), b"\x7fELF" + bytes(100), b"PK\x03\x04zipzip" * 9])
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"t\.safetensors: .*safetensors"):
        open_table("t", path)


def test_a_truncated_file_is_refused_at_every_length(tmp_path):
    save_file({"w": torch.zeros(5, 4)}, tmp_path / "t.safetensors")
    content = (tmp_path / "t.safetensors").read_bytes()
    path = tmp_path / "cut.safetensors"
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(FormatError, match=r"cut\.safetensors"):
            open_table("t", path)


def test_tensors_of_dtypes_that_nobody_knows_do_not_disturb(tmp_path):
    header = {"new": entry("F2_E1M0", [3, 8], 0, 6), "w": entry("U8", [2, 2], 6, 10), "four": entry("F4", [2], 10, 11)}
    table = open_table("t", write_raw(tmp_path / "t.safetensors", header, bytes(range(11))), fields=("w",))
    assert read_all(table).tolist() == [[6, 7], [8, 9]]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=400, deadline=None)
@given(data=st.data())
def test_a_corrupted_header_is_refused_or_means_the_same_bytes(tmp_path, data):
    save_file({"w": torch.from_numpy(random_bytes(6, 16)).view(torch.bfloat16)}, tmp_path / "t.safetensors")
    content = bytearray((tmp_path / "t.safetensors").read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, end - 1))
        junk = data.draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b"9", b"[", b"null", b'"', b"-", b"\\u"]))
        content[begin : begin + len(junk)] = junk
    path = tmp_path / "corrupted.safetensors"
    path.write_bytes(content)
    try:
        table = open_table("t", path)
    except (FormatError, ConfigError):  # ConfigError: "w" is no longer 2-D, so there is no table to choose
        return
    assert read_all(table).tobytes() == random_bytes(6, 16).tobytes()


@pytest.mark.parametrize(
    ("content", "message"),
    cases(
        ("{", "not a JSON header"),
        ("{}", "no weight_map"),
        ('{"weight_map": {"w": 1}}', "no weight_map"),
        ('{"weight_map": {"w": "../w.safetensors"}}', "does not lie beside"),
        ('{"weight_map": {"w": "/etc/passwd"}}', "does not lie beside"),
        ('{"weight_map": {"w": "\\u0000"}}', "does not lie beside"),
        ('{"weight_map": {"w": "\\ud800"}}', "does not lie beside"),
        ('{"weight_map": {"w": "t.safetensors"}}', "the index says that tensor 'w' is here"),
    ),
)
def test_a_damaged_index_is_named(tmp_path, content, message):
    save_file({"v": torch.zeros(2, 2)}, tmp_path / "t.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(content)
    with pytest.raises(FormatError, match=message):
        open_table("t", path, fields=("w",))


# files


def test_what_cannot_be_read_is_a_storage_error_with_its_path(tmp_path):
    for name in ("none.safetensors", "none.safetensors.index.json", "none"):
        with pytest.raises(StorageError) as caught:
            open_table("t", tmp_path / name)
        assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(tmp_path / name))
    index = write_index(tmp_path, {"w": "gone.safetensors"})
    with pytest.raises(StorageError, match=r"gone\.safetensors"):
        open_table("t", index, fields=("w",))


def test_only_regular_files_are_tables(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "text.txt").write_text("rows")
    for name, message in (("pipe.safetensors", "not a regular file"), ("text.txt", r"neither \.safetensors nor")):
        with pytest.raises(FormatError, match=message):
            open_table("t", tmp_path / name)
    with pytest.raises(FormatError, match="not a regular file"):
        open_file(tmp_path)


def test_a_file_that_was_replaced_or_cut_is_not_opened_again(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(b"1234")
    file = open_file(path)
    os.close(open_readonly(file))
    os.truncate(path, 3)
    with pytest.raises(StorageError, match="changed since") as caught:
        open_readonly(file)
    assert caught.value.errno == errno.ESTALE
    other = tmp_path / "g"
    other.write_bytes(b"1234")
    other.replace(path)
    with pytest.raises(StorageError, match="changed since"):
        open_readonly(file)


# memory


@pytest.mark.parametrize(
    ("array", "dtype"),
    cases(
        (random_bytes(4, 6), "U8"),
        (random_bytes(4, 6).view(np.float16), "F16"),
        (random_bytes(4, 8).view(np.float32), "F32"),
        (random_bytes(4, 6).view(ml_dtypes.bfloat16), "BF16"),
        (torch.from_numpy(random_bytes(4, 6)).view(torch.bfloat16), "BF16"),
        (torch.from_numpy(random_bytes(4, 6)).view(torch.float8_e4m3fn), "F8_E4M3"),
        (torch.from_numpy(random_bytes(6, 8)).view(torch.float32).T, "F32"),
    ),
)
def test_a_memory_table_gives_the_bytes_of_its_array(array, dtype):
    table = MemoryTable(array)
    assert table.record == plain(dtype, array.shape[1])
    assert (table.num_rows, table.record_bytes) == (array.shape[0], array.shape[1] * array.dtype.itemsize)
    out = np.zeros((3, table.record_bytes), np.uint8)
    rows = np.array([table.num_rows - 1, 0, 1])
    table.read(rows, out)
    contiguous = (
        array.contiguous().view(torch.uint8).numpy() if isinstance(array, torch.Tensor) else array.view(np.uint8)
    )
    assert np.array_equal(out, contiguous[rows])
    table.close()


def test_a_memory_table_of_bytes_may_have_any_record():
    record = Record((Field("weight", "F8_E4M3", 32), Field("scale", "F8_E8M0", 1)))
    assert MemoryTable(random_bytes(4, 33), record).record is record
    with pytest.raises(ValueError, match="rows of 32 bytes for a record of 33"):
        MemoryTable(random_bytes(4, 32), record)


def test_arrays_that_are_no_table_are_refused():
    with pytest.raises(ValueError, match=r"\[num_rows, width\]"):
        MemoryTable(np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match=r"\[num_rows, width\]"):
        MemoryTable(np.zeros((0, 4), np.uint8))
    with pytest.raises(TypeError, match="float64 needs a record"):
        MemoryTable(np.zeros((4, 4)))
