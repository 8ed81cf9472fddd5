"""The examples and the README's code run as they stand."""

import importlib.util
import inspect
import re
import tomllib
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from tiercache.config import HostConfig, StorageConfig, StoreConfig
from tiercache.policies import POLICIES
from tiercache.records import plain
from tiercache.storage.pack import pack_rows
from tiercache.store import Store
from tiercache.testing import OracleSource

_ROOT = Path(__file__).parent.parent


def load_example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, _ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_embedding_example_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_example("embedding").main(tmp_path).shape == (2, 3, 64)
    assert capsys.readouterr().out == "3 rows read from disk\n"


def test_the_qwen_example_runs(tmp_path: Path, one_thread: None) -> None:
    console = Console(file=StringIO(), width=120)
    assert load_example("qwen_offload").main(tmp_path, console).shape == (2, 28)
    printed = console.file.getvalue()
    assert "5 % of it in memory; logits are equal to the bit: True" in printed
    assert "host, gittins" in printed


def test_the_example_config_has_every_setting_and_only_those() -> None:
    config = StoreConfig.load(_ROOT / "examples" / "store.toml")
    given = config.model_dump(exclude_unset=True)
    assert set(given) | {"restore", "trace"} == set(StoreConfig.model_fields)
    assert config.device is not None
    for section, tier in (("device", config.device), ("host", config.host)):
        assert set(given[section]) | {"hot_set"} == set(type(tier).model_fields)
    assert set(given["storage"]) == set(type(config.storage).model_fields)
    assert set(given["tables"][0]) == set(type(config.tables[0]).model_fields)
    assert config.tables[0].path == _ROOT / "examples" / "model.safetensors.index.json"


def test_the_example_config_shows_the_defaults() -> None:
    text = (_ROOT / "examples" / "store.toml").read_text(encoding="utf-8")
    host = StoreConfig.load(_ROOT / "examples" / "store.toml").host
    parameters = inspect.signature(POLICIES[host.policy].init).parameters
    assert host.policy_options == {name: parameters[name].default for name in POLICIES[host.policy].parameters}
    given = StoreConfig.load(tomllib.loads(text))
    assert (given.storage, given.host.policy, given.dtype) == (StorageConfig(), HostConfig().policy, StoreConfig().dtype)


def test_the_example_config_serves_a_packed_table_as_its_comment_says(tmp_path: Path) -> None:
    pack_rows(OracleSource(9, plain("U8", 16)), tmp_path / "packed")
    text = (_ROOT / "examples" / "store.toml").read_text(encoding="utf-8")
    assert "leave out the next two" in text
    config = tomllib.loads("\n".join(line for line in text.splitlines() if not line.startswith(("fields =", "resident ="))))
    config["table"][0]["path"] = str(tmp_path / "packed")
    config["host"]["capacity"] = "1MiB"
    del config["device"]
    with Store.open(config) as store:
        assert store.fetch(range(9)).shape == (9, 16)


def test_the_readme_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (_ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    weight = torch.randn(100, 8)
    save_file({"embed.weight": weight}, tmp_path / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    assert len(blocks) == 1
    names: dict[str, torch.Tensor] = {}
    exec(blocks[0], names)
    assert torch.equal(names["rows"], weight[[5, 7, 5]])
    assert torch.equal(names["more"], weight[torch.tensor([[1, 2], [3, 4]])])
