"""Packed tables: refused when damaged, verified page by page, described."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tiercache.errors import ConfigError, FormatError
from tiercache.records import Field, Record
from tiercache.storage import open_table
from tiercache.storage.memory import MemoryTable
from tiercache.storage.pack import inspect, pack, pack_rows, verify
from tiercache.storage.table import FileTable

ENGRAM = Record((Field("weight", "F8_E4M3", 256), Field("scale", "F8_E8M0", 8)))


@pytest.fixture
def small(monkeypatch):
    """Chunks of 20,000 bytes and pieces of 3,000, so that small tables have many."""
    monkeypatch.setattr("tiercache.storage.zarr._CHUNK_BYTES", 20_000)
    monkeypatch.setattr("tiercache.storage.pack._PIECE_BYTES", 3_000)
    monkeypatch.setattr("tiercache.storage.pack._PIECE_PAGES", 2)


def random_bytes(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def read_all(table: FileTable) -> np.ndarray:
    """Every record, by the place that the format gives it."""
    records = np.zeros((table.num_rows, table.record_bytes), np.uint8)
    for extent in table.extents:
        content = np.fromfile(table.files[extent.file].path, np.uint8).reshape(-1, extent.stride)
        records[extent.first_row : extent.first_row + extent.num_rows] = content[: extent.num_rows]
    return records


def engram_file(path: Path, num_rows: int = 500) -> np.ndarray:
    """A checkpoint of weights and scales; its records."""
    records = random_bytes(num_rows, 264)
    weight, scale = (torch.from_numpy(part.copy()) for part in (records[:, :256], records[:, 256:]))
    save_file({"weight": weight.view(torch.float8_e4m3fn), "scale": scale.view(torch.float8_e8m0fnu)}, path)
    return records


@pytest.fixture
def packed(tmp_path, small) -> Path:
    pack_rows(MemoryTable(random_bytes(200, 264), ENGRAM), tmp_path / "t")
    return tmp_path / "t"


def change(path: Path, **values: object) -> None:
    """Change the description of a packed table."""
    document = json.loads((path / "zarr.json").read_text())
    described = document["attributes"]["tiercache"]
    described.update(values)
    document["attributes"]["tiercache"] = {key: value for key, value in described.items() if value != "DROP"}
    (path / "zarr.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format": 2}, r"format 2; this release reads 1"),
        ({"format": "DROP"}, r"format None"),
        ({"num_rows": 0}, r"num_rows = 0"),
        ({"num_rows": 201}, r"rows/zarr\.json: shape is \[200, 264\], not \[201, 264\]"),
        ({"rows_per_chunk": 60}, r"rows/zarr\.json: chunk_grid is"),
        ({"rows_per_chunk": "67"}, r"rows_per_chunk = '67'"),
        ({"page_bytes": 512}, r"page_bytes = 512"),
        ({"identity": "x"}, r"identity = 'x'"),
        ({"identity": "DROP"}, r"identity = .*required"),
        ({"more": 1}, r"more = 1"),
        ({"scale": 2.0}, r"t: a global scale belongs to"),
        ({"fields": []}, r"t: no fields"),
        ({"fields": [{"name": "w", "dtype": "F64", "width": 33}]}, r"t: field 'w' is F64"),
    ],
    ids=str,
)
def test_a_damaged_description_is_named(packed, values, message):
    change(packed, **values)
    with pytest.raises(FormatError, match=message):
        open_table("t", packed)


CONTENTS = [None, b"", b"{", b"[]", b"\xff", b"[" * 100_000]


@pytest.mark.parametrize("name", ["zarr.json", "rows/zarr.json", "checksums/zarr.json"])
@pytest.mark.parametrize("content", CONTENTS, ids=["missing", "empty", "cut", "list", "binary", "deep"])
def test_damaged_metadata_is_named(packed, name, content):
    (packed / name).unlink()
    if content is not None:
        (packed / name).write_bytes(content)
    with pytest.raises(FormatError, match=name.replace(".", r"\.")):
        open_table("t", packed)


@pytest.mark.parametrize("name", ["rows/c/0/0", "rows/c/2/0", "checksums/c/1/0"])
def test_a_missing_or_cut_chunk_is_named(packed, name):
    num_bytes = (packed / name).stat().st_size
    os.truncate(packed / name, num_bytes - 1)
    with pytest.raises(FormatError, match=rf"{name}: {num_bytes - 1} bytes instead of {num_bytes}"):
        open_table("t", packed)
    (packed / name).unlink()
    with pytest.raises(FormatError, match=rf"{name}: missing from the table"):
        open_table("t", packed)


def test_zarr_directories_of_others_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    zarr.create_array(tmp_path / "array", shape=(4, 4), dtype="uint8")
    zarr.create_group(tmp_path / "group").create_array("rows", shape=(4, 4), dtype="uint8")
    zarr.create_group(tmp_path / "old", zarr_format=2)
    for name, message in (
        ("empty", "missing"),
        ("array", "no zarr v3 group"),
        ("group", "not a packed"),
        ("old", "missing"),
    ):
        with pytest.raises(FormatError, match=message):
            open_table("t", tmp_path / name)


def test_the_fields_of_a_packed_table_are_not_for_choosing(packed):
    for setting in ("fields", "resident"):
        with pytest.raises(ConfigError, match=rf"{setting} = \['weight'\]"):
            open_table("t", packed, **{setting: ("weight",)})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(data=st.data())
def test_corrupted_metadata_is_refused_or_means_the_same_bytes(packed, data):
    path = packed / data.draw(st.sampled_from(["zarr.json", "rows/zarr.json", "checksums/zarr.json"]))
    original = path.read_bytes()
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(0, len(content) - 1))
        junk = data.draw(st.binary(min_size=1, max_size=4) | st.sampled_from([b"9", b"[", b"null", b'"', b"-", b"\\u"]))
        content[begin : begin + len(junk)] = junk
    path.write_bytes(content)
    try:
        assert np.array_equal(read_all(open_table("t", packed)), random_bytes(200, 264))
    except FormatError:
        pass
    finally:
        path.write_bytes(original)


# verify and inspect


def test_verify_names_every_bad_page(packed):
    assert verify(packed) == (15, 3 * 67 * 264, ())
    for name, place in (("rows/c/0/0", 5000), ("rows/c/2/0", 0), ("rows/c/2/0", 17_687)):
        with open(packed / name, "r+b") as file:
            file.seek(place)
            byte = file.read(1)
            file.seek(place)
            file.write(bytes([byte[0] ^ 1]))
    told = []
    report = verify(packed, progress=lambda done, total: told.append((done, total)))
    assert [(bad.file.relative_to(packed).as_posix(), bad.page, bad.first_row) for bad in report.bad] == [
        ("rows/c/0/0", 1, 4096 // 264),
        ("rows/c/2/0", 0, 134),
        ("rows/c/2/0", 4, 134 + 4 * 4096 // 264),
    ]
    assert told[-1] == (report.num_bytes, report.num_bytes)


def test_a_damaged_checksum_is_a_bad_page(packed):
    path = packed / "checksums/c/1/0"
    sums = np.fromfile(path, np.int64)
    sums[3] += 1
    sums.tofile(path)
    assert [(bad.file.parent.name, bad.page) for bad in verify(packed).bad] == [("1", 3)]


def test_only_packed_tables_can_be_verified(tmp_path):
    engram_file(tmp_path / "m.safetensors", 2)
    with pytest.raises(FormatError, match="only packed tables have checksums"):
        verify(tmp_path / "m.safetensors")


def test_inspect_says_what_a_table_is(tmp_path):
    source, destination = tmp_path / "m.safetensors", tmp_path / "t"
    engram_file(source, 40)
    report = pack(source, destination, fields=("weight", "scale"))
    before, after = inspect(source, fields=("weight", "scale")), inspect(destination)
    assert (before.kind, before.num_rows, before.record, before.page_bytes) == ("safetensors", 40, ENGRAM, None)
    assert [file.path for file in before.files] == [source]
    assert (after.kind, after.num_rows, after.record, after.page_bytes) == ("packed", 40, ENGRAM, 4096)
    assert [file.size for file in after.files] == [40 * 264]
    assert after.identity == report.identity
    assert after.source == {"kind": "safetensors", "name": "m.safetensors", "identity": before.identity}
    with pytest.raises(ConfigError, match=r"'scale' F8_E8M0\[40, 8\]"):
        inspect(source)
