"""Anchors and target vectors: windows off by one, deltas that leak or vanish, hooks left behind."""

import itertools

import pytest
import small
import torch
from small import by_window, hooks, of_window
from uke.methods.locate_edit.anchors import Located, locate, look, sites, states
from uke.methods.locate_edit.targets import _Chunk, find_targets
from uke.methods.recipes import BASELINES, LocateRecipe
from uke.models import prompts
from uke.models.generate import surprisals
from uke.models.prompts import Example

GRACE = "Grace Hopper studied at Cambridge and wrote a few short sentences."
GRACE = small.EDITS[2].model_copy(update={"question": "Grace?", "answer": GRACE})
EDITS = (*small.EDITS[:2], GRACE)


def recipe(name: str = "anyedit_memit", **changes) -> LocateRecipe:
    choices = {"layers": (1, 2), "window": 6, "stop_loss": 0.0, **changes}
    return BASELINES[name].model_copy(update=choices)


def located(model, tokenizer, choices: LocateRecipe, edits=EDITS) -> list[Located]:
    return locate(model, choices.examples(model, tokenizer, edits), choices)


def nll_by_hand(model, site, one: Example, at: dict[int, torch.Tensor]) -> torch.Tensor:
    """-log p of every target token in one plain forward pass, deltas added to the site's output."""

    def add(module, args, output):
        output = output.clone()
        for position, delta in at.items():
            output[0, position] += delta
        return output

    handle = site.projection.register_forward_hook(add)
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([one.ids])).logits[0].log_softmax(-1)
    handle.remove()
    places = torch.arange(one.prompt_length, len(one.ids))
    return -log_p[places - 1, torch.tensor(one.ids)[places]]


def test_windows_cover_the_answer_and_each_anchor_stands_just_before_its_own(tiny, tokenizer):
    model = tiny()
    for name in ("memit", "anyedit_memit", "anyedit_pp", "muke"):
        choices = BASELINES[name]
        found = located(model, tokenizer, choices.model_copy(update={"window": 6}))
        for _, one, windows in found:
            assert windows[0].start == one.prompt_length and windows[-1].stop == len(one.ids)
            assert all(window.anchor == window.start - 1 for window in windows)
            assert all(one.stop == other.start for one, other in itertools.pairwise(windows))
            sizes = [window.stop - window.start for window in windows]
            assert min(sizes) > 0
            if choices.anchors == "last":
                assert len(windows) == 1
            elif choices.anchors != "surprisal":
                assert set(sizes[:-1]) <= {6} and sizes[-1] <= 6
            else:
                assert all(3 <= size <= 9 for size in sizes[:-1]) and sizes[-1] <= 6


def test_a_window_begins_where_surprisal_peaks(tiny, tokenizer):
    model, choices = tiny(), recipe("anyedit_pp")
    found = located(model, tokenizer, choices)
    values = surprisals(model, [one.example for one in found], [one.edit for one in found])
    (site,) = sites(model, (0,))
    for (_, one, windows), nll in zip(found, values, strict=True):
        plain = nll_by_hand(model, site, one, {})
        assert nll.tolist() == pytest.approx(plain.tolist(), rel=1e-4)
        starts = [window.start - one.prompt_length for window in windows]
        for before, after in itertools.pairwise(starts):
            assert float(nll[after]) == float(nll[before + 3 : before + 10].max())


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_hidden_states_are_those_of_a_plain_forward_pass(tiny, tokenizer, family):
    model = tiny(family)
    lower, upper = sites(model, (1, 2))
    found = located(model, tokenizer, recipe())
    read = states(model, found, lower, upper)
    assert len(read.keys) == sum(len(one.windows) for one in found)
    place, others = 0, 0
    for _, one, windows in found:
        inner, outer = look(model, torch.tensor([one.ids]), (lower.projection, upper.block))
        for window in windows:
            assert torch.allclose(read.keys[place], inner.args[0][0, window.anchor], atol=1e-5)
            assert torch.allclose(read.outputs[place], inner.output[0, window.anchor], atol=1e-4)
            assert torch.allclose(read.hidden[place], outer.output[0, window.anchor], atol=1e-4)
            place += 1
        others += len(one.ids) - len(windows)
    assert len(read.others) == others and hooks(model) == 0
    hidden = model(input_ids=torch.tensor([one.ids]), output_hidden_states=True).hidden_states[3]
    assert torch.allclose(outer.output, hidden, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("turn", [0, 1])
def test_reading_from_the_anchors_gives_the_losses_of_a_plain_pass(tiny, tokenizer, family, turn):
    model = tiny(family).double()
    (site,) = sites(model, (1,))
    every = located(model, tokenizer, recipe("muke"))
    found = [one for one in every if len(one.windows) > turn]
    earlier = [torch.randn(turn, 32).double() for _ in found]
    chunk = _Chunk(model, found, site, earlier, recipe("muke"))
    delta = torch.randn(len(found), 32).double()
    losses = chunk.losses(delta)
    again = chunk.losses(delta)
    assert torch.equal(losses, again) and hooks(model) == 0
    for one, own, before, values in zip(found, delta, earlier, losses, strict=True):
        windows = one.windows
        at = {window.anchor: value for window, value in zip(windows, [*before, own], strict=False)}
        nll = nll_by_hand(model, site, one.example, at)
        means = [float(of_window(nll, one, window).mean()) for window in windows[turn:]]
        # A window counts as often as a prefix of windows holds it.
        counts = range(len(means), 0, -1)
        wanted = sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)
        assert float(values) == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("name", ["anyedit_pp", "muke"])
def test_find_targets_of_a_batch_are_those_found_one_by_one(tiny, tokenizer, name):
    """In float64: Adam divides by the gradient's own size, so rounding decides its first steps."""
    choices = recipe(name, steps=6, learning_rate=0.05)
    model = tiny().double()
    site = sites(model, choices.layers)[-1]
    together, _ = find_targets(model, located(model, tokenizer, choices), site, choices)
    alone, start = [], []
    for edit in EDITS:
        single = located(model, tokenizer, choices, (edit,))
        alone.append(find_targets(model, single, site, choices)[0])
        start.append(states(model, single, site, site).hidden)
    alone, start = torch.cat(alone), torch.cat(start)
    assert float((together - alone).norm() / (alone - start).norm()) < 1e-6
    assert float((alone - start).norm(dim=-1).min()) > 0.1


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_find_targets_make_the_text_likely_window_by_window(tiny, tokenizer, family):
    model, choices = tiny(family), recipe(steps=15, learning_rate=0.3)
    (site,) = sites(model, (2,))
    found = located(model, tokenizer, choices)
    hidden, trainings = find_targets(model, found, site, choices)
    before = states(model, found, site, site)
    added = hidden - before.hidden
    if family == "gemma3_text":
        # The norm behind the projection stands in the way: the target lies within its reach.
        reached = site.through(before.outputs + site.back(before.outputs, added))
        now = reached - site.through(before.outputs)
        assert torch.allclose(now.double(), added, atol=1e-4)
    else:
        shares = added.norm(dim=-1) / before.hidden.norm(dim=-1)
        assert float(shares.max()) <= choices.clamp * 1.001
    old = by_window(model, found)
    deltas = site.back(before.outputs, added).float().split([len(one.windows) for one in found])
    for one, own, likely, training in zip(found, deltas, old, trainings, strict=True):
        at = {window.anchor: delta for window, delta in zip(one.windows, own, strict=True)}
        nll = nll_by_hand(model, site, one.example, at)
        # As published 15 losses and 14 updates a window; the last loss is that of what is returned.
        assert (training.steps, len(training.losses)) == tuple(n * len(own) for n in (14, 15))
        for window, was, last in zip(one.windows, likely, training.losses[14::15], strict=True):
            mean = float(of_window(nll, one, window).mean())
            assert -mean > was + 0.3
            assert last == pytest.approx(mean, rel=1e-2, abs=choices.decay * choices.clamp)
    assert hooks(model) == 0


def test_an_edit_that_is_done_stays_while_the_others_go_on(tiny, tokenizer):
    model, choices = tiny(), recipe("memit", steps=6, learning_rate=0.1)
    (site,) = sites(model, (2,))
    found = located(model, tokenizer, choices)
    first = -torch.tensor([float(sum(row) / len(row)) for row in by_window(model, found)])
    done = choices.model_copy(update={"stop_loss": float(first.sort().values[1]) - 1e-3})
    hidden, _ = find_targets(model, found, site, done)
    moved = (hidden - states(model, found, site, site).hidden).norm(dim=-1)
    assert [bool(one > 0) for one in moved] == [bool(one >= done.stop_loss) for one in first]
    easy = choices.model_copy(update={"stop_loss": 99.0})
    for training in find_targets(model, found, site, easy)[1]:
        assert (training.steps, len(training.losses)) == (0, 1)


def test_a_delta_is_held_to_the_clamp(tiny, tokenizer):
    model, choices = tiny(), recipe(steps=5, learning_rate=9.0, clamp=0.25)
    (site,) = sites(model, (2,))
    found = located(model, tokenizer, choices)
    before = states(model, found, site, site).hidden.double()
    added = find_targets(model, found, site, choices)[0] - before
    share = added.norm(dim=-1) / before.norm(dim=-1)
    assert share.tolist() == pytest.approx([0.25] * len(share), rel=1e-3)


def test_a_target_that_diverges_names_its_edit_and_leaves_no_hook(tiny, tokenizer, monkeypatch):
    model, choices = tiny(), recipe("memit", steps=3)
    (site,) = sites(model, (2,))
    ada, alan, grace = (one.example.ids for one in located(model, tokenizer, choices))
    own = next(token for token in grace if token not in ada + alan)
    model.model.embed_tokens.weight.data[own] = float("nan")
    with pytest.raises(FloatingPointError, match="the target vector of edit 'grace' diverges"):
        find_targets(model, located(model, tokenizer, choices), site, choices)
    monkeypatch.setattr(prompts, "PADDING", 1.0)
    with pytest.raises(FloatingPointError, match="'ada', 'alan'.*learning_rate below 1e"):
        wild = choices.model_copy(update={"learning_rate": 1e38, "clamp": 1e38})
        model = tiny()
        both = located(model, tokenizer, wild, EDITS[:2])
        find_targets(model, both, sites(model, (2,))[0], wild)
    assert hooks(model) == 0
