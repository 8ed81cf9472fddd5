"""A Qwen4Exp model whose n-gram table lies on disk, behind a tier of a twentieth of its size.

The model is small, random and made on the spot: transformers' own code, `pip install tiercache[transformers]`. For one that was
released, replace `write_tables` by `checkpoint_tables(directory)`, and load it inside `without_tables()`.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen4ExpForCausalLM, Qwen4ExpTextConfig

from tiercache import StoreStats
from tiercache.adapters.transformers import offload, write_tables


def tiny_model() -> Any:
    """Four layers; the second one looks 16 rows of 10 values up for each token, of a table of 320,000."""
    config = Qwen4ExpTextConfig(
        vocab_size=1000,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        hc_lowrank=16,
        ple_layer_ids=[2],
        ple_embed_dim=160,
        ngram_vocab_size_base=20_000,
        eos_token_id=0,
        indexer_n_heads=2,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=64,
        indexer_compress_ratio=4,
        rope_parameters={
            "rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen4ExpForCausalLM(config).to(torch.bfloat16).eval()


def table_of(stats: StoreStats) -> Table:
    """What the store did, to be printed."""
    table = Table("tier", "rows asked for", "hits", "read from disk", "in memory now")
    host, storage = stats.host, stats.storage
    assert storage is not None
    memory = f"{host.used_slots} of {host.capacity_slots} rows"
    table.add_row(f"host, {host.policy}", str(stats.rows), str(host.hits), f"{storage.bytes_read / 1e6:.1f} MB", memory)
    return table


@torch.no_grad()
def main(directory: Path, console: Console) -> torch.Tensor:
    """Compare logits with the table in memory and on disk, and generate; int64[2, 28], the tokens."""
    model = tiny_model()
    prompts = torch.randint(1, 1000, (2, 12))
    resident = model(prompts).logits

    sections = write_tables(model, directory)
    num_bytes = sections[0]["path"].stat().st_size
    with offload(model, {"table": sections, "host": {"capacity": num_bytes // 20}}) as offloaded:
        equal = torch.equal(model(prompts).logits, resident)
        how = {"attention_mask": torch.ones_like(prompts), "pad_token_id": 0}
        tokens: torch.Tensor = model.generate(prompts, do_sample=True, max_new_tokens=16, min_new_tokens=16, **how)
        console.print(f"Table of {num_bytes / 1e6:.1f} MB, 5 % of it in memory; logits are equal to the bit: {equal}")
        console.print(table_of(offloaded.store.stats()))
    assert equal
    return tokens


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder), Console())
