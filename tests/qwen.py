"""Qwen4Exp models for tests: transformers' own code, small and random, whose tables matter."""

import copy

import torch
from transformers import Qwen4ExpConfig, Qwen4ExpForCausalLM, Qwen4ExpForConditionalGeneration, Qwen4ExpTextConfig

from tiercache.adapters.transformers import offload, write_tables

EOS = 1
_TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,  # three of linear attention, then one with an indexer
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "hc_count": 2,
    "hc_lowrank": 8,
    "ple_layer_ids": [2],
    "ple_embed_dim": 32,
    "ngram_vocab_size_base": 500,
    "heads_per_ngram": 4,
    "split_ngram_parts": 4,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    "max_position_embeddings": 256,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
    },
}
_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}


def text_config(**changes):
    return Qwen4ExpTextConfig(**_TEXT | changes)


def model_of(config=None, *, dtype=torch.float32, seed=0):
    """A model for text whose every weight is random, none zero as after its own initialisation."""
    return _shaken(Qwen4ExpForCausalLM(text_config() if config is None else config), dtype, seed)


def multimodal_model(*, seed=0):
    config = Qwen4ExpConfig(text_config=_TEXT, vision_config=_VISION)
    return _shaken(Qwen4ExpForConditionalGeneration(config), torch.float32, seed)


def _shaken(model, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.to(dtype).eval()


def twins(**how):
    """Two equal models: one to stay as it is, one to be offloaded."""
    resident = model_of(**how)
    return resident, copy.deepcopy(resident)


def tables_of(model):
    """Modules that hold, or held, a table: by layer."""
    text = getattr(model.model, "language_model", model.model)
    return {index: layer.ple.ple_embedding for index, layer in enumerate(text.layers) if layer.ple is not None}


def batch(length=11, *, seed=0):
    """(tokens int64[2, length], mask): the first sequence is padded on the left, the second has EOS inside."""
    tokens = torch.randint(2, 64, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    tokens[0, :4], mask[0, :4] = 0, 0
    tokens[1, length // 2] = tokens[1, length // 2 + 1] = EOS
    return tokens, mask


def config_for(sections, model, share=0.05):
    """A config of these tables, with that share of their bytes in the host tier."""
    tables = [parent.ngram_embedding.weight for parent in tables_of(model).values()]
    return {
        "table": sections,
        "host": {"capacity": int(sum(table.nbytes for table in tables) * share)},
        "storage": {"engine": "threads", "queue_depth": 8},
    }


def offloaded(model, directory):
    return offload(model, config_for(write_tables(model, directory), model))


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
