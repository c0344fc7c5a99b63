"""Lanes: rows read with the weights of another edit, a model left changed."""

import pytest
import torch
from small import moved, state
from torch import nn
from uke.methods.lanes import Lanes, LowRank, grouping, lower_blocks_once
from uke.models.model import select

IDS = ("ada", "alan", "grace")
ROWS = {
    "one row for each lane": (0, 1, 2),
    "sorted, as many for each": (0, 0, 1, 1, 2, 2),
    "sorted, more for some": (0, 1, 1, 1, 2),
    "unsorted": (2, 0, 1),
    "unsorted, more for some": (1, 0, 1, 2, 1, 0),
    "some lanes": (1, 1),
    "the last lane alone": (2,),
    "some lanes, unsorted, more for some": (2, 0, 2, 2, 0),
}
# What the lanes hold of their own, and a family that has it.
HELD = {
    "weights": ("llama", lambda model: select(model, (1, 2), ["down_proj", "q_proj"])),
    "biases": ("qwen2", lambda model: named(select(model, (1, 2), ["attention"]), ".bias")),
    "weights and biases": ("qwen2", lambda model: select(model, 2, ["attention"])),
    "norms": ("llama", lambda model: named(select(model, (0, 3), ["all"]), "norm")),
    "norms of heads": ("qwen3", lambda model: named(select(model, 2, ["all"]), "q_norm")),
    "a whole block": ("qwen3", lambda model: select(model, 2, ["all"])),
    "a whole block behind norms": ("gemma3_text", lambda model: select(model, 2, ["all"])),
    "embeddings aside, all": ("llama", lambda model: select(model, "all", ["all"])),
}


def named(weights: dict, part: str) -> dict:
    return {name: weight for name, weight in weights.items() if part in name}


def stacks(own: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    """Weights of three lanes, each moved its own way."""
    torch.manual_seed(5)
    moves = {name: 0.3 * torch.randn(len(IDS), *weight.shape) for name, weight in own.items()}
    return {name: weight.detach() + moves[name] for name, weight in own.items()}


def low_ranks(model) -> dict[str, LowRank]:
    torch.manual_seed(6)
    found = {}
    for block in (1, 3):
        for name in ("q_proj", "v_proj"):
            full = f"model.layers.{block}.self_attn.{name}"
            one = model.get_submodule(full)
            down = torch.randn(len(IDS), 4, one.in_features)
            up = 0.1 * torch.randn(len(IDS), one.out_features, 4)
            found[full] = LowRank(down, up, 0.7)
    return found


def tokens(count: int, length: int = 9) -> torch.Tensor:
    torch.manual_seed(count)
    return torch.randint(5, 300, (count, length))


@torch.no_grad()
def read(model, ids) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def alone(model, lane: int, weights, low_rank=()) -> nn.Module:
    """The model with the weights of one lane for good."""
    for name, stack in weights.items():
        model.get_parameter(name).data.copy_(stack[lane])
    for name, added in dict(low_rank).items():
        delta = added.scale * added.up[lane] @ added.down[lane]
        model.get_submodule(name).weight.data.add_(delta)
    return model


def replaced(model) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def untouched(model, before) -> bool:
    return not replaced(model) and not hasattr(model, "lanes") and not moved(model, before)


# --- which row is read with which weights ---


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_are_split_by_lane_and_joined_in_their_order(rows):
    found, lanes = grouping(rows, len(IDS), torch.device("cpu")), torch.tensor(rows)
    values = torch.arange(2 * len(rows)).reshape(len(rows), 2)
    by_lane = found.split(lanes[:, None].expand(-1, 2))
    active = list(range(len(IDS))) if found.active is None else found.active.tolist()
    assert active == sorted(set(rows)) and len(by_lane) == found.lanes == len(active)
    assert torch.equal(found.join(found.split(values)), values)
    # Where each row's slot is, its own lane stands.
    owners = torch.tensor(active)[:, None].expand(found.lanes, by_lane.shape[1])[..., None]
    assert found.join(owners).squeeze(-1).tolist() == list(rows)


@pytest.mark.parametrize("held", [*HELD, "an adapter", "an adapter beside weights"])
def test_a_row_is_read_with_the_weights_of_its_own_lane(tiny, held):
    family, choose = HELD.get(held, HELD["weights"])
    model = tiny(family)
    weights = {} if held == "an adapter" else stacks(choose(model))
    low_rank = low_ranks(model) if "adapter" in held else {}
    assert weights or low_rank
    own = [alone(tiny(family), lane, weights, low_rank) for lane in range(len(IDS))]
    lanes = Lanes(model, IDS, weights, low_rank)
    with lanes.laid() as m:
        # One after another: what was chosen for the last rows is not kept for the next.
        for rows in ROWS.values():
            ids = tokens(len(rows))
            lanes.read([IDS[lane] for lane in rows])
            expected = [read(own[lane], one[None])[0] for lane, one in zip(rows, ids, strict=True)]
            assert torch.allclose(read(m, ids), torch.stack(expected), atol=2e-4, rtol=1e-4)


def test_a_share_of_each_change_is_applied_and_then_the_whole_again(tiny):
    model, ids = tiny(), tokens(len(IDS))
    weights, low_rank = stacks(select(model, 2, ["mlp"])), low_ranks(model)
    own = dict(model.named_parameters())
    half = {name: (stack + own[name].detach()) / 2 for name, stack in weights.items()}
    less = {name: one._replace(scale=one.scale / 2) for name, one in low_rank.items()}
    expected = [read(alone(tiny(), n, half, less), one[None])[0] for n, one in enumerate(ids)]
    lanes = Lanes(model, IDS, weights, low_rank)
    with lanes.laid() as m:
        whole = read(m, ids)
        with lanes.at(0.5):
            assert torch.allclose(read(m, ids), torch.stack(expected), atol=2e-4, rtol=1e-4)
        assert torch.equal(read(m, ids), whole) and not torch.allclose(whole[0], expected[0])


def test_a_row_moves_the_weights_of_its_own_lane_alone(tiny):
    """Slots that no row needs are read with another lane's weights: that must not reach them."""
    model = tiny().requires_grad_(False)
    weights = {n: nn.Parameter(stack) for n, stack in stacks(select(model, 2, ["all"])).items()}
    low_rank = {
        name: LowRank(nn.Parameter(one.down), nn.Parameter(one.up), one.scale)
        for name, one in low_ranks(model).items()
    }
    lanes, ids = Lanes(model, IDS, weights, low_rank), tokens(4)
    lanes.read([IDS[lane] for lane in (2, 0, 1, 2)])
    with lanes.laid() as m:
        m(input_ids=ids, use_cache=False).logits[1].square().sum().backward()  # the row of lane 0
    for weight in lanes.stacks:
        assert weight.grad[0].abs().sum() > 0 and not weight.grad[1:].any()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_no_trace_is_left_in_the_model(tiny, error):
    model, ids = tiny("qwen3"), tokens(3)
    before, plain, modules = state(model), read(model, ids), list(model.modules())
    lanes = Lanes(model, IDS, stacks(select(model, (1, 2), ["all"])))
    with pytest.raises(error), lanes.laid() as m:
        assert m is model and m.lanes is lanes and replaced(m)
        assert not torch.allclose(read(m, ids), plain, atol=1e-2)
        raise error
    assert untouched(model, before) and torch.equal(read(model, ids), plain)
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))


def test_lanes_over_lanes_and_an_unknown_edit_are_refused(tiny):
    model, ids, name = tiny(), tokens(3), "model.layers.2.mlp.down_proj"
    before, outer = state(model), Lanes(model, IDS, stacks(select(model, 2, ["down_proj"])))
    inner = {name: LowRank(torch.ones(3, 1, 48), torch.ones(3, 32, 1), 1.0)}
    with outer.laid() as m:
        expected = read(m, ids)
        with pytest.raises(RuntimeError, match="has lanes already"):
            with Lanes(model, IDS, {}, inner).laid():
                pytest.fail("laid over lanes")
        assert m.lanes is outer and torch.equal(read(m, ids), expected)
    assert untouched(model, before)
    with pytest.raises(KeyError, match="nobody"):
        outer.read(["ada", "nobody"])


# --- blocks below the lowest that changes ---


def counted(model, block: int) -> list:
    """Grows by one each time the block is really computed."""
    calls = []
    model.model.layers[block].mlp.register_forward_hook(lambda *_: calls.append(block))
    return calls


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_blocks_computed_once_give_the_logits_of_the_whole_model(tiny, family):
    model, ids = tiny(family), tokens(3, 20)
    weight, expected = model.model.layers[2].mlp.down_proj.weight, []
    below, there = counted(model, 1), counted(model, 2)
    moves = [torch.zeros_like(weight), torch.randn(weight.shape), torch.randn(weight.shape)]
    for move in moves:
        weight.data.add_(move)
        expected.append(read(model, ids))
    weight.data.sub_(sum(moves))
    below.clear(), there.clear()
    names = ["model.layers.2.mlp.down_proj.weight", "model.layers.3.mlp.up_proj.weight"]
    with lower_blocks_once(model, names):
        for move, wanted in zip(moves, expected, strict=True):
            weight.data.add_(move)
            assert torch.allclose(read(model, ids), wanted, atol=1e-3, rtol=1e-4)
    assert (len(below), len(there)) == (1, 3)


def test_rows_that_have_left_and_columns_that_were_cut_are_not_read_below(tiny):
    model, ids = tiny("mistral"), tokens(5, 24)
    with lower_blocks_once(model, ["model.layers.3.mlp.down_proj"]) as lower:
        lower.keep([0, 1, 2, 3, 4])  # before anything was read there is nothing to keep
        read(model, ids)
        lower.keep([0, 2, 4])
        kept = [read(model, ids[[0, 2, 4]])]
        lower.keep(torch.tensor([2, 1]))
        kept.append(read(model, ids[[4, 2], :15]))
    for found, rows in zip(kept, (ids[[0, 2, 4]], ids[[4, 2], :15]), strict=True):
        assert torch.allclose(found, read(model, rows), atol=1e-4)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_blocks_are_computed_again_afterwards(tiny, error):
    model, other = tiny(), tokens(7)
    before, plain = state(model), read(model, other)
    with pytest.raises(error), lower_blocks_once(model, ["model.layers.2.mlp.down_proj"]):
        read(model, tokens(3))
        raise error
    assert untouched(model, before) and torch.equal(read(model, other), plain)
