"""Lanes: rows read with the weights of another edit, a model that is not what it was, blocks that are read again."""

import pytest
import torch
from torch import nn
from uke.methods.finetune import adapt, adapter
from uke.methods.lanes import Lanes, LowRank, constant_below, grouping
from uke.methods.recipes import RECIPES
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
    "biases": (
        "qwen2",
        lambda model: {
            n: p for n, p in select(model, (1, 2), ["attention"]).items() if n.endswith(".bias")
        },
    ),
    "weights and biases": ("qwen2", lambda model: select(model, 2, ["attention"])),
    "norms": (
        "llama",
        lambda model: {n: p for n, p in select(model, (0, 3), ["all"]).items() if "norm" in n},
    ),
    "norms of heads": (
        "qwen3",
        lambda model: {
            n: p for n, p in select(model, 2, ["all"]).items() if "q_norm" in n or "k_norm" in n
        },
    ),
    "a whole block": ("qwen3", lambda model: select(model, 2, ["all"])),
    "a whole block behind norms": ("gemma3_text", lambda model: select(model, 2, ["all"])),
    "embeddings aside, all": ("llama", lambda model: select(model, "all", ["all"])),
}


def stacks(own: dict[str, nn.Parameter], seed: int = 5) -> dict[str, torch.Tensor]:
    """Weights of three lanes, each moved its own way."""
    torch.manual_seed(seed)
    return {
        name: weight.detach() + 0.3 * torch.randn(len(IDS), *weight.shape)
        for name, weight in own.items()
    }


def low_ranks(model, seed: int = 6) -> dict[str, LowRank]:
    torch.manual_seed(seed)
    projections = {
        f"model.layers.{block}.self_attn.{name}": getattr(model.model.layers[block].self_attn, name)
        for block in (1, 3)
        for name in ("q_proj", "v_proj")
    }
    return {
        name: LowRank(
            torch.randn(len(IDS), 4, one.in_features),
            0.1 * torch.randn(len(IDS), one.out_features, 4),
            0.7,
        )
        for name, one in projections.items()
    }


def tokens(count: int, length: int = 9) -> torch.Tensor:
    torch.manual_seed(count)
    return torch.randint(5, 300, (count, length))


@torch.no_grad()
def read(model, ids) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def alone(build, lane: int, weights, low_rank=()) -> nn.Module:
    """A model of its own with the weights of one lane."""
    model = build()
    parameters = dict(model.named_parameters())
    for name, stack in weights.items():
        parameters[name].data.copy_(stack[lane])
    for name, added in dict(low_rank).items():
        parameters[f"{name}.weight"].data.add_(added.scale * added.up[lane] @ added.down[lane])
    return model


def replaced(model) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def untouched(model, before) -> bool:
    now = model.state_dict()
    return (
        not replaced(model)
        and not hasattr(model, "lanes")
        and now.keys() == before.keys()
        and all(torch.equal(now[n], t) for n, t in before.items())
    )


# --- which row is read with which weights ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_come_back_in_another_order_or_with_another_lane(rows):
    found = grouping(rows, len(IDS), torch.device("cpu"))
    values = torch.arange(2 * len(rows)).reshape(len(rows), 2)
    lanes = torch.tensor(rows)
    by_lane = found.split(lanes[:, None].expand(-1, 2))
    active = found.active.tolist() if found.active is not None else list(range(len(IDS)))
    assert active == sorted(set(rows)) and len(by_lane) == found.lanes == len(active)
    assert torch.equal(found.join(found.split(values)), values)
    # Where each row's slot is, its own lane stands.
    owners = torch.tensor(active)[:, None].expand(found.lanes, by_lane.shape[1])[..., None]
    assert found.join(owners).squeeze(-1).tolist() == list(rows)


@pytest.mark.parametrize("held", HELD)
def test_a_row_is_read_with_the_weights_of_another_lane(tiny, held):
    family, choose = HELD[held]
    model = tiny(family)
    weights = stacks(choose(model))
    assert weights
    lanes, own = (
        Lanes(model, IDS, weights),
        [alone(lambda: tiny(family), lane, weights) for lane in range(len(IDS))],
    )
    with lanes.laid() as m:
        for rows in (
            ROWS.values()
        ):  # one after another: what was chosen for the last is not kept for the next
            ids = tokens(len(rows))
            lanes.read([IDS[lane] for lane in rows])
            expected = torch.stack(
                [read(own[lane], one[None])[0] for lane, one in zip(rows, ids, strict=True)]
            )
            assert torch.allclose(read(m, ids), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_an_adapter_adds_what_another_lane_has(tiny, rows):
    model = tiny()
    low_rank, ids = low_ranks(model), tokens(len(rows))
    weights = stacks(
        {name: weight for name, weight in select(model, 1, ["q_proj", "down_proj"]).items()}
    )
    for own in ({}, weights):  # the adapter alone, and beside weights of the lane's own
        lanes = Lanes(model, IDS, own, low_rank)
        lanes.read([IDS[lane] for lane in rows])
        expected = torch.stack(
            [
                read(alone(tiny, lane, own, low_rank), one[None])[0]
                for lane, one in zip(rows, ids, strict=True)
            ]
        )
        with lanes.laid() as m:
            assert torch.allclose(read(m, ids), expected, atol=2e-4, rtol=1e-4)


def test_an_adapter_is_read_otherwise_than_peft_reads_it(tiny):
    """As `adapt` makes it, with an upper matrix that is not zero."""
    recipe, ids = RECIPES["LoRA"].model_copy(update={"rank": 3}), tokens(2)
    wrapped = adapt(tiny(), recipe, 1)
    torch.manual_seed(1)
    for name, weight in wrapped.named_parameters():
        if ".lora_B." in name:
            weight.data.normal_(std=0.1)
    expected, low_rank, model = read(wrapped, ids), adapter(wrapped), tiny()
    assert not torch.allclose(read(model, ids), expected, atol=1e-2)
    lanes = Lanes(model, ["ada"], {}, low_rank)
    lanes.read(["ada", "ada"])
    with lanes.laid() as m:
        assert torch.allclose(read(m, ids), expected, atol=2e-4, rtol=1e-4)


def test_a_row_moves_the_weights_of_another_lane(tiny):
    """Slots that no row needs are read with another lane's weights: nothing of that may reach them."""
    model = tiny().requires_grad_(False)
    weights = {
        name: nn.Parameter(stack) for name, stack in stacks(select(model, 2, ["all"])).items()
    }
    low_rank = {
        name: LowRank(nn.Parameter(one.down), nn.Parameter(one.up), one.scale)
        for name, one in low_ranks(model).items()
    }
    lanes, ids = Lanes(model, IDS, weights, low_rank), tokens(4)
    lanes.read([IDS[lane] for lane in (2, 0, 1, 2)])
    with lanes.laid() as m:
        m(input_ids=ids, use_cache=False).logits[
            1
        ].square().sum().backward()  # of the row of lane 0
    trained = [
        *weights.values(),
        *(part for one in low_rank.values() for part in (one.down, one.up)),
    ]
    for weight in trained:
        assert weight.grad[0].abs().sum() > 0 and not weight.grad[1:].any()


def test_half_precision_is_read_in_that_of_the_lanes(tiny):
    """Lanes hold float32; what goes through the model stays as precise as the model is."""
    model = tiny().bfloat16()
    lanes = Lanes(
        model,
        IDS,
        stacks({name: weight.float() for name, weight in select(model, 2, ["all"]).items()}),
        low_ranks(model),
    )
    with lanes.laid() as m:
        assert read(m, tokens(3)).dtype == torch.bfloat16


# --- what is left behind ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_a_trace_is_left_in_the_model(tiny, error):
    model, ids = tiny("qwen3"), tokens(3)
    before, plain, modules = state(model), read(model, ids), list(model.modules())
    lanes = Lanes(model, IDS, stacks(select(model, (1, 2), ["all"])))
    with pytest.raises(error or ZeroDivisionError), lanes.laid() as m:
        assert m is model and m.lanes is lanes and replaced(m)
        assert not torch.allclose(read(m, ids), plain, atol=1e-2)
        raise error or ZeroDivisionError
    assert untouched(model, before) and torch.equal(read(model, ids), plain)
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))


def test_a_module_is_laid_over_twice_and_the_first_is_lost(tiny):
    model, ids = tiny(), tokens(3)
    before, weights = state(model), stacks(select(model, 2, ["down_proj"]))
    outer, inner = (
        Lanes(model, IDS, weights),
        Lanes(
            model,
            IDS,
            {},
            {
                "model.layers.2.mlp.down_proj": LowRank(
                    torch.ones(3, 1, 48), torch.ones(3, 32, 1), 1.0
                )
            },
        ),
    )
    with outer.laid() as m:
        read_before = read(m, ids)
        with (
            pytest.raises(
                RuntimeError, match="model.layers.2.mlp.down_proj: another call has replaced"
            ),
            inner.laid(),
        ):
            pytest.fail("laid over lanes")
        assert m.lanes is outer and torch.equal(read(m, ids), read_before)
    assert untouched(model, before)


def test_an_edit_that_has_no_lane_is_read_with_any(tiny):
    lanes = Lanes(tiny(), IDS, {})
    with pytest.raises(KeyError, match="nobody"):
        lanes.read(["ada", "nobody"])


# --- blocks below the lowest that changes ----------------------------------------------------------------------------


def counted(model, block: int) -> list:
    """Grows by one each time the block is really read."""
    calls = []
    model.model.layers[block].mlp.register_forward_hook(lambda *_: calls.append(block))
    return calls


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_blocks_read_once_give_other_logits_than_the_whole_model(tiny, family):
    model, ids = tiny(family), tokens(3, 20)
    weight, expected = model.model.layers[2].mlp.down_proj.weight, []
    below, there = counted(model, 1), counted(model, 2)
    moves = [torch.zeros_like(weight), torch.randn(weight.shape), torch.randn(weight.shape)]
    for move in moves:
        weight.data.add_(move)
        expected.append(read(model, ids))
    weight.data.sub_(sum(moves))
    below.clear(), there.clear()
    with constant_below(
        model, ["model.layers.2.mlp.down_proj.weight", "model.layers.3.mlp.up_proj.weight"]
    ):
        for move, wanted in zip(moves, expected, strict=True):
            weight.data.add_(move)
            assert torch.allclose(read(model, ids), wanted, atol=1e-3, rtol=1e-4)
    assert (len(below), len(there)) == (1, 3)


def test_rows_that_have_left_are_still_read_below(tiny):
    model, ids = tiny(), tokens(5)
    expected = read(model, ids)
    with constant_below(model, ["model.layers.3.mlp.down_proj"]) as below:
        below.keep([0, 1, 2, 3, 4])  # before anything was read there is nothing to keep
        read(model, ids)
        below.keep([0, 2, 4])
        assert torch.allclose(read(model, ids[[0, 2, 4]]), expected[[0, 2, 4]], atol=1e-4)
        below.keep(torch.tensor([2, 1]))
        assert torch.allclose(read(model, ids[[4, 2]]), expected[[4, 2]], atol=1e-4)


def test_a_batch_cut_on_its_right_is_read_in_its_old_length(tiny):
    model, ids = tiny("mistral"), tokens(4, 24)
    wanted = read(model, ids[[1, 3], :15])
    with constant_below(model, ["model.layers.2.mlp.down_proj"]) as below:
        read(model, ids)
        below.keep([1, 3])
        found = read(model, ids[[1, 3], :15])
        assert found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-4)


def test_block_1_is_taken_for_block_10(tiny):
    model = tiny(num_hidden_layers=11)
    calls = {block: counted(model, block) for block in (0, 9, 10)}
    with constant_below(model, ["model.layers.10.mlp.down_proj.weight"]):
        read(model, tokens(2)), read(model, tokens(2))
    assert {block: len(found) for block, found in calls.items()} == {0: 1, 9: 1, 10: 2}


def test_the_first_block_has_none_below(tiny):
    model, ids = tiny(), tokens(2)
    with constant_below(model, ["model.layers.3.mlp.down_proj", "model.layers.0.mlp.down_proj"]):
        assert not replaced(model) and read(model, ids).shape[:2] == ids.shape


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_blocks_stay_as_they_were_first_read(tiny, error):
    model, ids = tiny(), tokens(3)
    before, other = state(model), tokens(7)
    plain = read(model, other)
    with pytest.raises(error), constant_below(model, ["model.layers.2.mlp.down_proj"]):
        read(model, ids)
        raise error
    assert untouched(model, before) and torch.equal(read(model, other), plain)
