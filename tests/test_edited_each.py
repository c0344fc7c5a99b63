"""Edits side by side: not what each is alone, answers of another edit, a model left changed."""

import math

import pytest
import torch
from small import EDITS, NORMS, QUICK, SUBJECTS, TEXTS, Snapshot, baseline, moved, state
from uke.data.edits import Edit, Probe
from uke.errors import InputError
from uke.methods import finetune
from uke.methods.edited import LANE_MIB, LOGITS, edited, edited_each, lane_mib
from uke.methods.locate_edit import solvers
from uke.methods.recipes import BASELINES, RECIPES, Recipe
from uke.models import divergence, prompts
from uke.models.generate import answer, target_log_probability
from uke.models.model import select

MANY = tuple(
    Edit(
        id=one,
        question=f"Who is {one}?",
        answer=f"{SUBJECTS[place - 3]} {one} in {1800 + 7 * place}" + " and Ada" * (place % 4),
    )
    for place, one in enumerate(SUBJECTS)
)
RAW = {"chat_template": False, "end_of_turn": False}
# A family of models and a method: every kind of each.
EVERY = {
    **{name: ("llama", QUICK[name]) for name in ("FT-L", "FT-M", "FT-A", "LoRA", "AdaLoRA")},
    "norms of heads": ("qwen3", NORMS),
    "biases": ("qwen2", NORMS),
    "behind norms": ("gemma3_text", NORMS),
    "raw prompts": (
        "mistral",
        QUICK["FT-A"].model_copy(update=RAW | {"weight_decay": 0.1, "learning_rate": 1e-2}),
    ),
    "LoRA everywhere": (
        "qwen2",
        QUICK["LoRA"].model_copy(update={"rank": 3, "components": ("mlp", "attention")}),
    ),
    "lessons": (
        "qwen2",
        QUICK["LoRA"].model_copy(update={"near": 2, "paraphrases": 3, "turns": 2}),
    ),
    **{BASELINES[name].name: ("llama", baseline(name)) for name in BASELINES},
    "behind Gemma's norms": ("gemma3_text", baseline("anyedit_memit")),
}


def probes(edits) -> list[Probe]:
    """Questions of each edit's own, the same ones for all, through the template and raw."""
    shared = [("detail", "Who was that?", True), ("struct_trip", "Ada Lovelace was", False)]
    found = []
    for edit in edits:
        fields = {"edit": edit.id, "reference": "In London."}
        found += edit.probes
        found += [Probe(kind=kind, question=one, chat=chat, **fields) for kind, one, chat in shared]
    return found


def answers(model, tokenizer, asked) -> tuple[list[str], list[float]]:
    """Greedy answers, and how likely the references are."""
    texts = answer(model, tokenizer, asked, max_new_tokens=8)
    return texts, target_log_probability(model, tokenizer, asked)


def updates(m, before) -> dict[str, torch.Tensor]:
    """What an edited model adds to each weight."""
    if not hasattr(m, "peft_config"):
        return nonzero({name: tensor - before[name] for name, tensor in m.state_dict().items()})
    layers = m.get_base_model().named_modules()
    adapted = {name: layer for name, layer in layers if hasattr(layer, "get_delta_weight")}
    deltas = ((name, one.get_delta_weight(m.active_adapter)) for name, one in adapted.items())
    return nonzero({f"{name}.weight": delta for name, delta in deltas})


def nonzero(found: dict) -> dict[str, torch.Tensor]:
    return {name: one.detach().double().clone() for name, one in found.items() if one.any()}


def of_lane(lanes, lane: int, before) -> dict[str, torch.Tensor]:
    """What one lane adds to each weight."""
    found = {name: stack[lane] - before[name] for name, stack in lanes.weights.items()}
    for name, one in lanes.low_rank.items():
        found[f"{name}.weight"] = one.scale * one.up[lane] @ one.down[lane]
    return nonzero(found)


def far(one: dict, other: dict) -> float:
    """How far two updates are apart, relative to the length of the second."""
    assert one.keys() == other.keys()
    difference = sum((one[name] - other[name]).square().sum() for name in one)
    return float((difference / sum(tensor.square().sum() for tensor in other.values())) ** 0.5)


def each_alone(model, tokenizer, edits, method) -> dict[str, tuple]:
    """By edit, the record and the update of one edit after another."""
    before, alone = state(model), {}
    for edit in edits:
        with edited(model, tokenizer, [edit], method) as m:
            alone[edit.id] = m.edit_record, updates(m, before)
    return alone


ALIKE = ("MEMIT", "AlphaEdit", "UnKE")  # differ from others in no step here


@pytest.mark.parametrize("name", [name for name in EVERY if name not in ALIKE])
def test_an_edit_among_others_is_what_it_is_alone(measured, tokenizer, name):
    family, method = EVERY[name]
    model, changed, records, expected, apart = measured(family), {}, {}, {}, []
    before, plain = state(model), answers(model, tokenizer, probes(EDITS))[0]
    along = {one.id: divergence.expected(model, tokenizer, probes([one])) for one in EDITS}
    for edit in EDITS:
        with edited(model, tokenizer, [edit], method) as m:
            changed[edit.id], records[edit.id] = updates(m, before), m.edit_record
            expected[edit.id] = answers(m, tokenizer, probes([edit]))
            apart += divergence.divergences(m, tokenizer, probes([edit]), along[edit.id])
    snapshot = Snapshot(model)
    with edited_each(model, tokenizer, EDITS, method) as m:
        assert m is model and list(m.edit_records) == [edit.id for edit in EDITS]
        texts, likely = answers(m, tokenizer, probes(EDITS))
        assert texts != plain or name == "FT-L"
        assert texts == [text for edit in EDITS for text in expected[edit.id][0]]
        values = [value for edit in EDITS for value in expected[edit.id][1]]
        assert likely == pytest.approx(values, rel=1e-2)
        found = divergence.divergences(m, tokenizer, probes(EDITS), sum(along.values(), []))
        assert found == pytest.approx(apart, rel=2e-2, abs=1e-4) and max(found) > 1e-3
        for lane, edit in enumerate(EDITS):
            if method.moves_weights:
                assert far(of_lane(m.lanes, lane, before), changed[edit.id]) < 1e-2
            record, alone = m.edit_records[edit.id], records[edit.id]
            assert record.change_norm == pytest.approx(alone.change_norm, rel=1e-2)
            assert record.steps == alone.steps
            assert record.losses == pytest.approx(alone.losses, rel=1e-2, abs=1e-4)
        # Of each edit the answers do not depend on what else is asked beside it.
        turned = probes(EDITS)[::-1]
        assert answers(m, tokenizer, turned)[0] == texts[::-1]
        assert answer(m, tokenizer, turned, max_new_tokens=8, batch_tokens=1) == texts[::-1]
    snapshot.check()


@pytest.mark.parametrize("name", ["FT-M", "LoRA", "MEMIT", "UnKE"])
def test_half_precision_takes_an_edit_and_does_not_keep_it(measured, tokenizer, name):
    model = measured().bfloat16()
    if name in ("MEMIT", "UnKE"):
        solvers.covariance.measure(model, tokenizer, TEXTS, layers=(1, 2))
    before, asked = state(model), [edit.probes[0] for edit in EDITS]
    old = sum(target_log_probability(model, tokenizer, asked))
    with edited_each(model, tokenizer, EDITS, EVERY[name][1]) as m:
        assert sum(target_log_probability(m, tokenizer, asked)) > old + 0.1
    assert not moved(model, before)


@pytest.fixture(scope="module")
def ending(tiny, tokenizer):
    """By method: a `stop_loss` at which some of MANY end early, and what each is alone."""
    found = {}
    for name, rate in (("FT-A", 3e-3), ("LoRA", 1e-2)):
        changes = {"steps": 12, "learning_rate": rate, "stop_loss": 0.0}
        method = QUICK[name].model_copy(update=changes)
        records = [record for record, _ in each_alone(tiny(), tokenizer, MANY, method).values()]
        lowest = sorted(min(record.losses) for record in records)
        method = method.model_copy(update={"stop_loss": sum(lowest[3:5]) / 2})
        found[name] = method, each_alone(tiny(), tokenizer, MANY, method)
    return found


@pytest.mark.parametrize("share", [0, 1 / 8, 1], ids=["each leaves", "some stay", "all stay"])
@pytest.mark.parametrize("name", ["FT-A", "LoRA"])
def test_a_lane_that_has_ended_disturbs_no_other(tiny, ending, tokenizer, name, share, monkeypatch):
    monkeypatch.setattr(finetune, "DROP_SHARE", share)
    model, (method, alone) = tiny(), ending[name]
    before, steps = state(model), {edit: record.steps for edit, (record, _) in alone.items()}
    assert len(set(steps.values())) > 2
    with edited_each(model, tokenizer, MANY, method) as m:
        assert {edit: record.steps for edit, record in m.edit_records.items()} == steps
        for lane, edit in enumerate(MANY):
            record, (own, update) = m.edit_records[edit.id], alone[edit.id]
            assert record.losses == pytest.approx(own.losses, rel=1e-2)
            assert far(of_lane(m.lanes, lane, before), update) < 1e-2
    assert not moved(model, before)


def breaking(monkeypatch, row: int, call: int) -> None:
    """The loss of a row is not finite in one call."""
    plain, calls = finetune.LOSSES["target_tokens"], []

    def loss(*arguments):
        calls.append(arguments)
        losses = plain(*arguments)
        factors = torch.ones_like(losses)
        factors[row] = float("nan") if len(calls) == call else 1.0
        return losses * factors

    monkeypatch.setitem(finetune.LOSSES, "target_tokens", loss)


@pytest.mark.parametrize("name", ["FT-M", "LoRA"])
def test_a_broken_edit_is_named_and_leaves_the_others_alone(tiny, tokenizer, name, monkeypatch):
    model, method = tiny(), QUICK[name]
    before, alone = state(model), each_alone(model, tokenizer, EDITS, method)
    snapshot = Snapshot(model)
    monkeypatch.setattr(prompts, "PADDING", 1.0)  # one batch, the longest first: grace, ada, alan
    breaking(monkeypatch, 1, 3)
    with edited_each(model, tokenizer, EDITS, method) as m:
        assert m.failed == {
            "ada": f"recipe {name}: the loss of edit 'ada' is not finite after 2 steps; "
            "expected a learning_rate below 0.02"
        }
        assert list(m.edit_records) == m.lanes.ids == ["alan", "grace"]
        for lane, edit in enumerate(m.lanes.ids):
            assert m.edit_records[edit].steps == 4
            assert far(of_lane(m.lanes, lane, before), alone[edit][1]) < 1e-2
    snapshot.check()


@pytest.mark.parametrize("name", ["AdaLoRA", "MEMIT", "muKE"])
def test_of_several_edits_the_one_that_diverges_alone_is_left_out(measured, tokenizer, name):
    """A token that only one edit has stands for no number."""
    model, method = measured(), EVERY[name][1]
    ids = {edit: one.ids for edit, one in method.examples(model, tokenizer, EDITS).items()}
    own = next(token for token in ids["grace"] if token not in ids["ada"] + ids["alan"])
    model.get_input_embeddings().weight.data[own] = float("nan")
    with edited_each(model, tokenizer, EDITS, method) as m:
        assert list(m.failed) == ["grace"] and "'grace'" in m.failed["grace"]
        assert m.lanes.ids == list(m.edit_records) == ["ada", "alan"]
        losses = [loss for record in m.edit_records.values() for loss in record.losses]
        assert all(map(math.isfinite, losses))


def test_a_block_that_breaks_is_left_out(measured, tokenizer, monkeypatch):
    find_targets = solvers.find_targets

    def broken(model, located, *arguments):
        hidden, trainings = find_targets(model, located, *arguments)
        edits = [one.edit for one in located for _ in one.windows]
        hidden[[edit == "alan" for edit in edits]] = float("inf")
        return hidden, trainings

    monkeypatch.setattr(solvers, "find_targets", broken)
    with edited_each(measured(), tokenizer, EDITS, baseline("anyedit_unke")) as m:
        assert m.lanes.ids == ["ada", "grace"]
        assert "the block's error of edit 'alan' is not finite after 0 steps" in m.failed["alan"]


@pytest.mark.parametrize("name", ["FT-A", "LoRA"])
def test_answers_that_are_done_leave_the_rest_with_their_own_lane(tiny, tokenizer, name):
    def limit(probe) -> int:
        return 2 + (7 * len(probe.question) + 5 * len(probe.edit) + len(probe.kind)) % 11

    asked = probes(EDITS)
    assert len({limit(probe) for probe in asked}) > 5
    with edited_each(tiny(), tokenizer, EDITS, QUICK[name]) as m:
        alone = [answer(m, tokenizer, [probe], max_new_tokens=limit)[0] for probe in asked]
        assert answer(m, tokenizer, asked, max_new_tokens=limit) == alone


def test_the_same_question_is_answered_once_by_each_edit_with_its_own(tiny, tokenizer, monkeypatch):
    texts, rows = ("London.", "Cambridge.", "Philadelphia."), []
    edits = [Edit(id=text, question="Who is Ada Lovelace?", answer=text) for text in texts]
    method = Recipe(name="FT-A", learning_rate=5e-3, steps=40)
    asked = [edit.probes[0] for edit in edits for _ in range(2)]
    with edited_each(tiny(), tokenizer, edits, method) as m:
        read = m.lanes.read
        monkeypatch.setattr(m.lanes, "read", lambda ids: rows.append(list(ids)) or read(ids))
        found = answer(m, tokenizer, asked, max_new_tokens=8)
        assert found == [text for text in texts for _ in range(2)]
        assert sorted(rows[0]) == sorted(texts)
        assert min(target_log_probability(m, tokenizer, asked)) > -0.5
        with pytest.raises(KeyError, match="grace"):
            answer(m, tokenizer, EDITS[2].probes, max_new_tokens=2)


def test_a_system_that_fails_midway_leaves_the_weights_alone(measured, tokenizer, monkeypatch):
    model, solved = measured(), []
    snapshot = Snapshot(model)

    class Failing(solvers.ClosedForm):
        def solve(self, located, hidden):
            solved.append([one.edit for one in located])
            if len(solved) == 2:
                raise InputError("singular")
            return super().solve(located, hidden)

    monkeypatch.setitem(solvers.SOLVERS, "memit", Failing)
    with pytest.raises(InputError, match="singular"):
        with edited_each(model, tokenizer, EDITS, baseline("memit")):
            pytest.fail("written")
    assert solved == [["ada"], ["alan"]]
    snapshot.check()


def test_a_lane_takes_at_least_the_memory_of_its_weights(tiny):
    """Value, gradient, two moments and a copy, four bytes each, beside the least of activations."""
    model = tiny()

    def trained(method) -> float:
        logits = LOGITS * model.config.vocab_size
        return ((lane_mib(model, method) - LANE_MIB) * 2**20 / 4 - logits) / 5

    blocks = select(model, "all", ["down_proj"]), select(model, 2, ["all"])
    down, block = (sum(weight.numel() for weight in part.values()) for part in blocks)
    assert trained(RECIPES["FT-A"]) == pytest.approx(down)
    # q and v of four blocks
    assert trained(RECIPES["LoRA"]) == pytest.approx(4 * 8 * ((32 + 32) + (32 + 16)))
    assert trained(baseline("memit")) == pytest.approx(2 * 32 * 48)
    assert trained(baseline("unke")) == pytest.approx(block)
    assert trained(baseline("in_context")) == 0
