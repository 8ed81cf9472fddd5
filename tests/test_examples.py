"""The examples and the README's code run as they stand."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tiercache.config import StoreConfig

_ROOT = Path(__file__).parent.parent


def test_the_embedding_example_runs(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("embedding", _ROOT / "examples" / "embedding.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(tmp_path).shape == (2, 3, 64)


def test_the_example_config_has_every_setting_and_only_those() -> None:
    config = StoreConfig.load(_ROOT / "examples" / "store.toml")
    given = config.model_dump(exclude_unset=True)
    assert set(given) == {"dtype", "mode", "tables", "host", "storage"}
    assert set(given["host"]) | {"hot_set"} == set(type(config.host).model_fields)
    assert set(given["storage"]) == set(type(config.storage).model_fields)
    assert set(given["tables"][0]) == set(type(config.tables[0]).model_fields)
    assert config.tables[0].path == _ROOT / "examples" / "model.safetensors.index.json"


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
