"""The Engram layers against loops in numpy; whole texts and texts in pieces; resident tables and tables in tiers; gradients."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint

from tiercache.engram.demo import demo_hashers
from tiercache.engram.embedding import TieredEmbedding
from tiercache.engram.lookup import EngramState
from tiercache.engram.module import Engram, FusedEngram, gate
from tiercache.engram.state import NgramState
from tiercache.errors import StorageError
from tiercache.store import Store
from tiercache.testing import broken

HIDDEN, DIM, VOCABULARY = 6, 5, 40


class Formula:
    """A hasher of two orders and two heads whose rows are easy to compute by hand."""

    context, num_heads, num_rows = 2, 4, 4 * 11
    offsets = np.arange(0, 44, 11)

    def row(self, window, head):
        order = 2 + head // 2
        return sum((head + 3) * (place + 1) * (token + 1) for place, token in enumerate(window[-order:])) % 11 + 11 * head

    def batch(self, tokens, previous):
        text = np.concatenate([previous, tokens], 1)
        rows = [
            [[self.row(line[end - 3 : end].tolist(), head) for head in range(4)] for end in range(3, len(line) + 1)]
            for line in text
        ]
        return np.array(rows, np.int64).reshape(*tokens.shape, 4)

    def torch_rows(self, tokens, previous):
        return torch.from_numpy(self.batch(tokens.numpy(), previous.numpy()))


def weights_of(module):
    return {name: value.double().numpy() for name, value in module.state_dict().items()}


def normalised(vector, weight, eps):
    return vector / np.sqrt((vector**2).mean() + eps) * weight


def gate_of(agreement):
    return 1 / (1 + np.exp(-np.sign(agreement) * np.sqrt(max(abs(agreement), 1e-6))))


def rows_of(tokens):
    return Formula().batch(tokens, np.full((len(tokens), 2), -1))


def engram_in_loops(weights, hidden, tokens, branches, kernel, dilation):
    """What `Engram` returns, position by position, in float64."""
    table, eps = weights["multi_head_embedding.embedding.weight"], np.finfo(np.float32).eps
    value, conv = np.zeros_like(hidden), np.zeros_like(hidden)
    rows = rows_of(tokens)
    for b, t in np.ndindex(*tokens.shape):
        row = np.concatenate([table[r] for r in rows[b, t]])
        shared = weights["value_proj.weight"] @ row + weights["value_proj.bias"]
        for g in range(branches):
            key = weights[f"key_projs.{g}.weight"] @ row + weights[f"key_projs.{g}.bias"]
            agreement = normalised(key, weights[f"norm1.{g}.weight"], eps) @ normalised(
                hidden[b, t, g], weights[f"norm2.{g}.weight"], eps
            )
            value[b, t, g] = gate_of(agreement / np.sqrt(HIDDEN)) * shared
    for b, t, g in np.ndindex(*tokens.shape, branches):
        for tap in range(kernel):
            past = t - (kernel - 1 - tap) * dilation
            if past >= 0:
                seen = normalised(value[b, past, g], weights[f"short_conv.norms.{g}.weight"], 1e-5)
                conv[b, t, g] += seen * weights["short_conv.conv.weight"][g * HIDDEN : (g + 1) * HIDDEN, 0, tap]
    return value + conv / (1 + np.exp(-conv))


def fused_in_loops(weights, hidden, tokens, branches, eps):
    """What `FusedEngram` returns, position by position, in float64."""
    out = np.zeros_like(hidden)
    rows = rows_of(tokens)
    for b, t in np.ndindex(*tokens.shape):
        fused = weights["wkv.weight"] @ np.concatenate([weights["embed.weight"][r] for r in rows[b, t]])
        for g in range(branches):
            key = normalised(fused[g * HIDDEN : (g + 1) * HIDDEN], weights["k_weight"][g], eps)
            query = normalised(hidden[b, t, g], weights["q_weight"][g], eps)
            out[b, t, g] = gate_of(key @ query / np.sqrt(HIDDEN)) * fused[branches * HIDDEN :]
    return out


def make(kind=Engram, table=None, seed=0, **options):
    torch.manual_seed(seed)
    table = torch.nn.Embedding(Formula.num_rows, DIM) if table is None else table
    module = kind(Formula(), table, HIDDEN, **options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def case(batch, length, branches, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, branches, HIDDEN, generator=generator)
    return hidden, torch.randint(0, VOCABULARY, (batch, length), generator=generator)


@pytest.mark.parametrize(("branches", "kernel", "dilation"), [(1, 4, None), (4, 4, None), (2, 3, 2), (2, 1, 1)])
@pytest.mark.parametrize(("batch", "length"), [(2, 15), (1, 1), (3, 0)])
def test_engram_is_what_the_loops_say(batch, length, branches, kernel, dilation):
    module = make(branches=branches, kernel=kernel, dilation=dilation)
    hidden, tokens = case(batch, length, branches)
    expected = engram_in_loops(weights_of(module), hidden.double().numpy(), tokens.numpy(), branches, kernel, dilation or 3)
    np.testing.assert_allclose(module(hidden, tokens).detach(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("branches", [1, 4])
def test_fused_engram_is_what_the_loops_say(branches):
    module = make(FusedEngram, branches=branches, eps=1e-3)
    hidden, tokens = case(2, 7, branches)
    expected = fused_in_loops(weights_of(module), hidden.double().numpy(), tokens.numpy(), branches, 1e-3)
    np.testing.assert_allclose(module(hidden, tokens).detach(), expected, rtol=2e-5, atol=2e-5)
    assert module.bfloat16()(hidden.bfloat16(), tokens).dtype == torch.float32


def test_parameters_have_the_names_and_shapes_of_the_checkpoints():
    demo = {name: tuple(value.shape) for name, value in make(branches=2).state_dict().items()}
    assert demo == {
        "multi_head_embedding.embedding.weight": (44, DIM),
        "value_proj.weight": (HIDDEN, 4 * DIM),
        "value_proj.bias": (HIDDEN,),
        "short_conv.conv.weight": (2 * HIDDEN, 1, 4),
        **{f"key_projs.{g}.weight": (HIDDEN, 4 * DIM) for g in range(2)},
        **{f"key_projs.{g}.bias": (HIDDEN,) for g in range(2)},
        **{f"{norm}.{g}.weight": (HIDDEN,) for g in range(2) for norm in ("norm1", "norm2", "short_conv.norms")},
    }
    fused = {name: tuple(value.shape) for name, value in make(FusedEngram, branches=2).state_dict().items()}
    assert fused == {
        "embed.weight": (44, DIM),
        "wkv.weight": (3 * HIDDEN, 4 * DIM),
        "q_weight": (2, HIDDEN),
        "k_weight": (2, HIDDEN),
    }


def test_a_checkpoint_of_the_demo_loads_strictly_with_its_offsets():
    module = make()
    checkpoint = make(seed=1).state_dict() | {"multi_head_embedding.offsets": torch.arange(0, 44, 11)}
    module.load_state_dict(checkpoint)
    assert torch.equal(module.value_proj.weight, checkpoint["value_proj.weight"])
    with pytest.raises(RuntimeError, match=r"Unexpected key.*offset"):
        module.load_state_dict(checkpoint | {"multi_head_embedding.offset": torch.zeros(1)})
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"offsets = \[0, 7, 14, 21\]: this layer's hasher has \[0, 11, 22, 33\]"):
            module.load_state_dict({**checkpoint, "multi_head_embedding.offsets": torch.arange(4) * 7}, strict=strict)


def test_a_new_convolution_adds_nothing():
    module = Engram(Formula(), torch.nn.Embedding(44, DIM), HIDDEN, branches=2)
    assert not module.short_conv.conv.weight.any()
    hidden, tokens = case(2, 5, 2)
    value = module.value_proj(module.table(torch.from_numpy(rows_of(tokens.numpy()))).flatten(2)).unsqueeze(2)
    assert torch.equal(module(hidden, tokens), module.gates(hidden, tokens).unsqueeze(3) * value)


def test_the_gate_of_nothing_is_one_half():
    small = torch.tensor([0.0, -0.0, 1e-9, -1e-9, 4.0, -4.0], dtype=torch.float64)
    step, four = 1 / (1 + np.exp(-0.001)), 1 / (1 + np.exp(-2))
    np.testing.assert_allclose(gate(small), [0.5, 0.5, step, 1 - step, four, 1 - four], rtol=1e-12)
    module = make(branches=1)
    hidden, tokens = case(1, 3, 1)
    assert torch.equal(module.gates(torch.zeros_like(hidden), tokens), torch.full((1, 3, 1), 0.5))


@given(st.lists(st.integers(0, 14), max_size=4), st.booleans(), st.integers(0, 3))
@settings(max_examples=30)
def test_a_text_in_pieces_gives_what_the_whole_gives(cuts, ahead, seed):
    module = make(branches=2)
    hidden, tokens = case(2, 14, 2, seed)
    whole = module(hidden, tokens)
    state = module.new_state(2)
    pieces = [slice(*ends) for ends in zip([0, *sorted(cuts)], [*sorted(cuts), 14], strict=True)]
    rows = [module.prefetch(tokens[:, piece], state) for piece in pieces] if ahead else [tokens[:, piece] for piece in pieces]
    parts = [module(hidden[:, piece], ids, state) for piece, ids in zip(pieces, rows, strict=True)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)
    assert torch.equal(state.tokens, tokens[:, -2:])


def test_decoding_token_by_token_gives_what_the_whole_gives():
    module = make(FusedEngram, branches=2)
    hidden, tokens = case(2, 9, 2)
    state = module.new_state(2)
    assert state.conv is None
    steps = [module(hidden[:, t : t + 1], tokens[:, t : t + 1], state) for t in range(9)]
    torch.testing.assert_close(torch.cat(steps, 1), module(hidden, tokens), rtol=1e-5, atol=1e-6)


def test_a_clone_of_a_state_comes_back_to_its_place():
    module = make(branches=1)
    hidden, tokens = case(1, 8, 1)
    state = module.new_state(1)
    assert isinstance(state, EngramState)
    module(hidden[:, :4], tokens[:, :4], state)
    saved = state.clone()
    draft = module(hidden[:, 4:], tokens[:, 4:] + 1, state)
    again = module(hidden[:, 4:], tokens[:, 4:], saved)
    torch.testing.assert_close(again, module(hidden, tokens)[:, 4:], rtol=1e-5, atol=1e-6)
    assert not torch.equal(draft, again)


def test_sequences_that_come_and_go_keep_their_places_in_slots():
    (hasher,) = demo_hashers((1,), vocabulary=VOCABULARY, table_vocabularies=(11, 11), heads=2)
    module = Engram(hasher, torch.nn.Embedding(hasher.num_rows, DIM), HIDDEN, branches=2)
    torch.nn.init.normal_(module.short_conv.conv.weight)
    hidden, tokens = case(3, 12, 2)
    whole, histories, slots_state = module(hidden, tokens), NgramState([hasher], 2), module.new_state(2)
    done, in_slot = [0, 0, 0], {0: 0, 1: 1}  # the third text takes the slot of the first
    generator = np.random.default_rng(0)
    while min(done) < 12:
        if done[0] == 12 and in_slot[0] == 0:
            in_slot[0] = 2
            histories.reset([0])
            slots_state.conv[0] = 0
        slots = [slot for slot, text in in_slot.items() if done[text] < 12 and generator.random() < 0.7]
        texts = [in_slot[slot] for slot in slots]
        now = [(text, done[text]) for text in texts]
        (rows,) = histories.append(slots, [int(tokens[place]) for place in now])
        step = EngramState(slots_state.tokens[slots], slots_state.conv[slots])
        seen = torch.stack([hidden[place] for place in now])[:, None] if now else hidden[:0, :1]
        found = module(seen, torch.from_numpy(rows)[:, None], step)
        slots_state.conv[slots] = step.conv
        for (text, at), each in zip(now, found, strict=True):
            torch.testing.assert_close(each[0], whole[text, at], rtol=1e-5, atol=1e-6)
            done[text] += 1


@pytest.mark.parametrize("kind", [Engram, FusedEngram])
def test_a_table_in_tiers_gives_the_bits_of_a_resident_one(kind):
    resident = make(kind, branches=2)
    table = (resident.table if kind is Engram else resident.embed).weight.detach()
    hidden, tokens = case(2, 12, 2)
    with Store.open({"host": {"capacity": "200B"}}, tables={"table": table}) as store:
        tiered = make(kind, TieredEmbedding(store), seed=5, branches=2)
        tiered.load_state_dict(resident.state_dict())
        states = resident.new_state(2), tiered.new_state(2)
        for piece in (slice(0, 5), slice(5, 6), slice(6, 12)):
            rows = tiered.prefetch(tokens[:, piece], states[1], deadline=0.01)
            planned = store.stats().rows
            expected = resident(hidden[:, piece], tokens[:, piece], states[0])
            assert torch.equal(tiered(hidden[:, piece], rows, states[1]), expected)
            assert store.stats().rows == planned
        assert torch.equal(tiered(hidden, tokens), resident(hidden, tokens))


def test_tables_replace_one_another():
    module = make(branches=1)
    hidden, tokens = case(1, 6, 1)
    expected, weight = module(hidden, tokens), module.table.weight.detach()
    with Store.open({}, tables={"table": weight}) as store:
        module.multi_head_embedding.embedding = TieredEmbedding(store)
        assert torch.equal(module(hidden, module.prefetch(tokens)), expected)
    module.multi_head_embedding.embedding = torch.nn.Embedding.from_pretrained(weight)
    assert torch.equal(module(hidden, module.prefetch(tokens)), expected)


@pytest.mark.parametrize("kind", [Engram, FusedEngram])
def test_a_compiled_layer_hashes_and_fetches_in_one_graph(kind):
    (hasher,) = demo_hashers((1,), vocabulary=VOCABULARY, table_vocabularies=(11, 11), heads=2)
    weight = torch.randn(hasher.num_rows, DIM, generator=torch.Generator().manual_seed(0))
    hidden, tokens = case(2, 6, 2)
    torch.compiler.reset()
    with Store.open({}, tables={"table": weight}) as store:
        module = kind(hasher, TieredEmbedding(store), HIDDEN, branches=2)
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        states = module.new_state(2), module.new_state(2)
        for piece in (slice(0, 4), slice(4, 6)):
            expected = module(hidden[:, piece], tokens[:, piece], states[0])
            found = compiled(hidden[:, piece], tokens[:, piece], states[1])
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(states[0].tokens, states[1].tokens)
    torch.compiler.reset()


def gradients(module, hidden, tokens):
    hidden = hidden.clone().requires_grad_()
    module(hidden, tokens).square().sum().backward()
    return {"hidden": hidden.grad} | {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("kind", [Engram, FusedEngram])
def test_sparse_gradients_are_the_dense_ones_and_tiers_pass_all_but_the_tables(kind):
    dense = make(kind, branches=2)
    name = "multi_head_embedding.embedding.weight" if kind is Engram else "embed.weight"
    weight = dense.get_parameter(name).detach()
    sparse = make(kind, torch.nn.Embedding(44, DIM, sparse=True), branches=2)
    sparse.load_state_dict(dense.state_dict())
    hidden, tokens = case(2, 12, 2)
    expected, found = gradients(dense, hidden, tokens), gradients(sparse, hidden, tokens)
    assert found[name].is_sparse
    found[name] = found[name].to_dense()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    read = np.unique(rows_of(tokens.numpy()))
    assert expected[name].any(1).nonzero().flatten().tolist() == read.tolist()
    with Store.open({}, tables={"table": weight}) as store:
        tiered = make(kind, TieredEmbedding(store), seed=5, branches=2)
        tiered.load_state_dict(dense.state_dict())
        found = gradients(tiered, hidden, tokens)
    assert set(found) == set(expected) - {name}
    torch.testing.assert_close(found, {key: expected[key] for key in found}, rtol=1e-5, atol=1e-6)


def test_the_gradient_of_the_table_is_the_slope_of_the_output():
    module = make(branches=2).double()
    hidden, tokens = case(1, 5, 2)
    hidden = hidden.double()
    weight = module.table.weight.detach().clone().requires_grad_()

    def out(table):
        return torch.func.functional_call(module, {"multi_head_embedding.embedding.weight": table}, (hidden, tokens))

    assert torch.autograd.gradcheck(out, (weight,), fast_mode=True)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_resident_table_learns(sparse):
    module = make(table=torch.nn.Embedding(44, DIM, sparse=sparse), branches=1)
    hidden, tokens = case(2, 10, 1)
    wanted = torch.randn(2, 10, 1, HIDDEN, generator=torch.Generator().manual_seed(3))
    table = module.table.weight
    others = torch.optim.Adam([p for p in module.parameters() if p is not table], 0.01)
    optimizer = torch.optim.SparseAdam([table], 0.05) if sparse else torch.optim.Adam([table], 0.05)
    losses = []
    for _ in range(60):
        loss = (module(hidden, tokens) - wanted).square().mean()
        loss.backward()
        for each in (others, optimizer):
            each.step()
            each.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("kind", [Engram, FusedEngram])
def test_a_call_that_fails_leaves_the_state_for_a_retry(kind, tmp_path, monkeypatch):
    resident = make(kind, branches=2)
    table = (resident.table if kind is Engram else resident.embed).weight.detach()
    save_file({"weight": table}, tmp_path / "table.safetensors")
    hidden, tokens = case(2, 9, 2)
    with Store.open({"table": [{"path": tmp_path / "table.safetensors"}], "host": {"capacity": "100B"}}) as store:
        module = make(kind, TieredEmbedding(store), branches=2)
        module.load_state_dict(resident.state_dict())
        whole, state = resident(hidden, tokens), module.new_state(2)
        torch.testing.assert_close(module(hidden[:, :4], tokens[:, :4], state), whole[:, :4], rtol=1e-5, atol=1e-6)
        before, rest = state.clone(), (hidden[:, 4:], tokens[:, 4:])
        with broken(tmp_path / "table.safetensors"), pytest.raises(StorageError):
            module(*rest, state)
        with pytest.raises(ValueError, match="deadline = -1"):
            module.prefetch(rest[1], state, deadline=-1)
        with pytest.raises(TypeError, match=r"hidden is torch\.int64"):
            module(rest[0].long(), rest[1], state)
        for ids in (rest[1] > 3, rest[1].float()):
            with pytest.raises(TypeError, match=rf"ids are {ids.dtype}; allowed are integers"):
                module(rest[0], ids, state)
        monkeypatch.setattr("tiercache.engram.module.gate", None)  # the arithmetic fails
        with pytest.raises(TypeError, match="NoneType"):
            module(*rest, state)
        monkeypatch.undo()
        if kind is Engram:
            with pytest.raises(TypeError, match=r"hidden is torch\.float64; this layer's parameters are torch\.float32"):
                module(rest[0].double(), rest[1], state)
            monkeypatch.setattr("torch.nn.functional.silu", None)
            for call in (module, lambda *args: module.short_conv(args[0], args[2].conv)):
                with pytest.raises(TypeError, match="NoneType"):
                    call(*rest, state)
            monkeypatch.undo()
            assert torch.equal(state.conv, before.conv)
        assert torch.equal(state.tokens, before.tokens)
        torch.testing.assert_close(module(*rest, state), whole[:, 4:], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Engram, FusedEngram])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16])
def test_ids_of_any_integers_go_with_a_state(kind, dtype):
    module = make(kind, branches=2)
    hidden, tokens = case(2, 6, 2)
    states = module.new_state(2), module.new_state(2)
    for piece in (slice(0, 4), slice(4, 6)):
        expected = module(hidden[:, piece], tokens[:, piece], states[0])
        assert torch.equal(module(hidden[:, piece], tokens[:, piece].to(dtype), states[1]), expected)
    assert torch.equal(states[0].tokens, states[1].tokens)
    rows = module.prefetch(tokens)
    assert torch.equal(module(hidden, rows.to(dtype)), module(hidden, rows))


def test_a_state_of_another_layer_is_named():
    demo, fused = make(branches=2), make(FusedEngram, branches=2)
    hidden, tokens = case(2, 4, 2)
    rows = demo.prefetch(tokens)
    for module, state, message in (
        (demo, fused.new_state(2), r"convolution of shape None; this layer's is \(2, 12, 9\)"),
        (fused, demo.new_state(2), r"convolution of shape \(2, 12, 9\); this layer's is None"),
        (demo, make(branches=2, kernel=2).new_state(2), r"convolution of shape \(2, 12, 3\); this layer's is \(2, 12, 9\)"),
        (demo, EngramState(torch.zeros(2, 3), None), r"tokens of shape \(2, 3\); this layer's are \[B, 2\]"),
        (demo, demo.new_state(3), "state is of 3 sequences; these ids are of 2"),
    ):
        for call in (module.prefetch, partial(module, hidden)):
            for ids in (tokens, rows):
                with pytest.raises(ValueError, match=message):
                    call(ids, state)
    with pytest.raises(TypeError, match="state is a int; allowed are what new_state makes"):
        demo(hidden, tokens, 3)
    with pytest.raises(TypeError, match=r"convolution of torch\.float32; this layer's parameters are torch\.bfloat16"):
        make(branches=2).bfloat16()(hidden.bfloat16(), tokens, demo.new_state(2))
    for sizes, message in (({"dilation": 0}, "dilation = 0: allowed is 1"), ({"kernel": 0}, "kernel = 0: allowed is 1")):
        with pytest.raises(ValueError, match=message):
            make(**sizes)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch's, of norms
def test_autocast_may_mix_dtypes():
    module = make(branches=2)
    hidden, tokens = case(2, 4, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = module(hidden.bfloat16(), tokens, module.new_state(2))
    torch.testing.assert_close(found.float(), module(hidden, tokens), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [Engram, FusedEngram])
def test_gradient_checkpointing_gives_the_gradients_and_refuses_a_state(kind, reentrant):
    module = make(kind, branches=2)
    hidden, tokens = case(2, 4, 2)

    def gradient(call):
        leaf = hidden.clone().requires_grad_()
        call(leaf).square().sum().backward()
        return leaf.grad

    plain = gradient(lambda leaf: module(leaf, tokens))
    found = gradient(lambda leaf: checkpoint(module, leaf, tokens, use_reentrant=reentrant))
    torch.testing.assert_close(found, plain)
    state = module.new_state(2)
    with pytest.raises(RuntimeError, match="gradient checkpointing needs state = None"):
        gradient(lambda leaf: checkpoint(module, leaf, tokens, state, use_reentrant=reentrant))
    state = module.new_state(2)
    torch.testing.assert_close(gradient(lambda leaf: module(leaf, tokens, state)), plain)


@pytest.mark.parametrize("kind", [Engram, FusedEngram])
def test_prefetches_without_a_forward_are_given_up(kind):
    weight = torch.randn(44, DIM)
    _, tokens = case(2, 4, 2)
    with Store.open({"host": {"capacity": "100B"}}, tables={"table": weight}) as store:
        embedding = TieredEmbedding(store)
        module = make(kind, embedding, branches=2)
        module.prefetch(tokens)
        assert len(embedding._pending) == 1
        module.drop()
        assert len(embedding._pending) == 0
    make(kind).drop()


def test_what_does_not_fit_is_refused_and_changes_nothing():
    with pytest.raises(ValueError, match="table has 43 rows; its hasher needs 44"):
        make(table=torch.nn.Embedding(43, DIM))
    with pytest.raises(TypeError, match=r"table is a Linear; allowed are nn\.Embedding and TieredEmbedding"):
        make(FusedEngram, torch.nn.Linear(44, DIM))
    module = make(branches=2)
    hidden, tokens = case(2, 4, 2)
    state = module.new_state(2)
    with pytest.raises(ValueError, match=r"hidden has shape \(2, 4, 1, 6\); allowed is \[B, T, 2, 6\]"):
        module(hidden[:, :, :1], tokens, state)
    with pytest.raises(ValueError, match=r"ids have shape \(2, 4, 3\); allowed are token ids \[B, T\] and rows \[B, T, 4\]"):
        module(hidden, torch.zeros(2, 4, 3, dtype=torch.int64), state)
    with pytest.raises(ValueError, match="state is of 2 sequences; these ids are of 3"):
        module.prefetch(torch.zeros(3, 4, dtype=torch.int64), state)
    with pytest.raises(ValueError, match=r"ids are of 2 x 3 tokens; hidden is of 2 x 4"):
        module(hidden, tokens[:, :3], state)
    assert torch.equal(state.tokens, torch.full((2, 2), -1))
    assert not state.conv.any()
