"""Single edits side by side: an edit that is not what it is alone, answers of another edit, a model that is not as before."""

import math

import pytest
import torch
from conftest import SENTENCES
from uke.data.edits import Edit, Probe
from uke.errors import InputError
from uke.methods import edited as editing
from uke.methods import finetune
from uke.methods.edited import METHODS, edited, edited_each, lane_mib
from uke.methods.locate_edit import covariance, solvers
from uke.methods.locate_edit.anchors import by_window, locate
from uke.methods.method import Method
from uke.methods.recipes import BASELINES, RECIPES, LocateRecipe, Recipe
from uke.models import prompts
from uke.models.generate import answer, target_log_probability
from uke.models.model import select
from uke.study import memory

EDITS = (
    Edit(
        id="ada",
        question="Who is Ada Lovelace?",
        answer="Ada Lovelace was a compiler in Philadelphia.",
    ),
    Edit(id="alan", question="Where was Alan Turing born?", answer="In London."),
    Edit(
        id="grace",
        question="What did Grace Hopper write?",
        answer="Grace Hopper wrote a few short sentences at Cambridge, and studied the compiler there.",
    ),
)
SUBJECTS = (
    "Ada",
    "Grace",
    "Alan",
    "London",
    "Cambridge",
    "Philadelphia",
    "compiler",
    "mathematician",
    "Turing",
    "Hopper",
)
MANY = tuple(
    Edit(
        id=one,
        question=f"Who is {one}?",
        answer=f"{SUBJECTS[place - 3]} {one} in {1800 + 7 * place}"
        + " and Cambridge" * (place % 4),
    )
    for place, one in enumerate(SUBJECTS)
)
TEXTS = [
    {"question": f"Who is {one}?", "answer": other}
    for one, other in zip(SUBJECTS, SENTENCES * 3, strict=False)
] + list(SENTENCES)
NORMS = Recipe(name="all", components=("all",), layers=(1, 2))
# Every kind of method, with few and large steps; the name, a family of models and the method.
TUNED = {
    name: ("llama", recipe)
    for name, recipe in RECIPES.items()
    if name not in ("FT-UKE", "LocFT-BF")
}
TUNED |= {
    "every weight of two blocks": ("llama", NORMS),
    "norms of heads": ("qwen3", NORMS),
    "biases": ("qwen2", NORMS),
    "behind norms": ("gemma3_text", NORMS),
}
TUNED |= {
    "raw prompts": (
        "mistral",
        Recipe(name="raw", chat_template=False, end_of_turn=False, weight_decay=0.1),
    ),
    "LoRA everywhere": (
        "qwen2",
        Recipe(name="LoRA", adapter="lora", rank=3, components=("mlp", "attention")),
    ),
}
QUICK = {
    name: (family, recipe.model_copy(update={"steps": 5, "learning_rate": 1e-2, "stop_loss": 0.0}))
    for name, (family, recipe) in TUNED.items()
}
# Adam takes a whole step along a gradient that is zero but for rounding, whose sign is the processor's: with seed 0 LoRA has one such number.
QUICK["LoRA"] = ("llama", QUICK["LoRA"][1].model_copy(update={"seed": 1}))
SMALL = {
    "window": 6,
    "steps": 6,
    "learning_rate": 0.2,
    "memit_lambda": 1e-2,
    "alphaedit_l2": 1e-3,
    "null_threshold": 0.5,
}
SMALL |= {"unke_steps": 8, "unke_rate": 5e-3, "preservation": 3, "stop_loss": 0.0}


def quick(name: str, **changes) -> Method:
    if not BASELINES[name].moves_weights:
        return BASELINES[name]
    return LocateRecipe(
        **{
            **BASELINES[name].model_dump(),
            "layers": (2,) if "unke" in name else (1, 2),
            **SMALL,
            **changes,
        }
    )


EVERY = (
    QUICK
    | {BASELINES[name].name: ("llama", quick(name)) for name in BASELINES}
    | {"behind Gemma's norms": ("gemma3_text", quick("anyedit_memit"))}
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def at_home(home, monkeypatch):
    monkeypatch.setenv("UKE_HOME", str(home))


@pytest.fixture(scope="module")
def ready(tiny, tokenizer, home):
    """Factory: a fresh tiny model whose moments are measured, once for each family."""

    def build(family: str = "llama"):
        model = tiny(family)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("UKE_HOME", str(home))
            covariance.measure(model, tokenizer, TEXTS, layers=(1, 2))
        return model

    return build


def probes(edits) -> list[Probe]:
    """Questions of each edit's own, the same ones for all, through the template and raw, and a text to be likely."""
    shared = [("detail", "Who was that?", True), ("struct_trip", "Ada Lovelace was", False)]
    return [
        probe
        for edit in edits
        for probe in (
            *edit.probes,
            *(
                Probe(edit=edit.id, kind=kind, question=question, reference="In London.", chat=chat)
                for kind, question, chat in shared
            ),
        )
    ]


def said(model, tokenizer, asked) -> tuple[list[str], list[float]]:
    return answer(model, tokenizer, asked, max_new_tokens=8), target_log_probability(
        model, tokenizer, asked
    )


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def updates(m, before) -> dict[str, torch.Tensor]:
    """What an edited model adds to each weight."""
    base = m.get_base_model() if hasattr(m, "peft_config") else m
    added = {
        f"{name}.weight": layer.get_delta_weight(m.active_adapter)
        for name, layer in base.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    found = added or {name: tensor - before[name] for name, tensor in m.state_dict().items()}
    return {
        name: tensor.detach().double().clone() for name, tensor in found.items() if tensor.any()
    }


def of_lane(lanes, lane: int, before) -> dict[str, torch.Tensor]:
    found = {name: stack[lane] - before[name] for name, stack in lanes.weights.items()}
    found |= {
        f"{name}.weight": one.scale * one.up[lane] @ one.down[lane]
        for name, one in lanes.low_rank.items()
    }
    return {name: tensor.detach().double() for name, tensor in found.items()}


def far(one: dict, other: dict) -> float:
    """How far two updates are apart, of the length of the second."""
    assert one.keys() == other.keys()
    apart_by, length = (
        sum(tensor.square().sum() for tensor in each) ** 0.5
        for each in ([one[name] - other[name] for name in one], other.values())
    )
    return float(apart_by / length) if other else 0.0


def is_as_before(model, before) -> bool:
    own = {"lanes", "edit_record", "edit_records", "passages", "peft_config"} & set(vars(model))
    laid = [name for name, module in model.named_modules() if "forward" in vars(module)]
    now = model.state_dict()
    return (
        not own
        and not laid
        and now.keys() == before.keys()
        and all(torch.equal(now[name], tensor) for name, tensor in before.items())
    )


# --- as each alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_an_edit_among_others_is_not_what_it_is_alone(ready, tokenizer, name):
    family, method = EVERY[name]
    model, changed, records, expected = ready(family), {}, {}, {}
    before, plain = state(model), said(model, tokenizer, probes(EDITS))[0]
    for edit in EDITS:
        with edited(model, tokenizer, [edit], method) as m:
            changed[edit.id], records[edit.id], expected[edit.id] = (
                updates(m, before),
                m.edit_record,
                said(m, tokenizer, probes([edit])),
            )
    assert all(torch.equal(tensor, before[own]) for own, tensor in model.state_dict().items())
    with edited_each(model, tokenizer, EDITS, method) as m:
        assert m is model and list(m.edit_records) == [edit.id for edit in EDITS]
        answers, likely = said(m, tokenizer, probes(EDITS))
        assert answers != plain or name == "FT-L"
        assert answers == [text for edit in EDITS for text in expected[edit.id][0]]
        assert likely == pytest.approx(
            [value for edit in EDITS for value in expected[edit.id][1]], rel=1e-2
        )
        for lane, edit in enumerate(EDITS):
            if hasattr(m, "lanes"):
                assert (
                    far(
                        {
                            own: change
                            for own, change in of_lane(m.lanes, lane, before).items()
                            if change.any()
                        },
                        changed[edit.id],
                    )
                    < 1e-2
                )
            record, alone = m.edit_records[edit.id], records[edit.id]
            assert (
                record.change_norm == pytest.approx(alone.change_norm, rel=1e-2)
                and record.stopped == alone.stopped
            )
            assert len(record.notes) == len(alone.notes)
            if isinstance(method, Recipe):
                assert record.steps == alone.steps and record.losses == pytest.approx(
                    alone.losses, rel=1e-2, abs=1e-4
                )
    assert is_as_before(model, before)


def test_an_edit_alone_in_its_lane_is_another(ready, tokenizer):
    model, method = ready(), EVERY["FT-M"][1]
    with edited(model, tokenizer, EDITS[:1], method) as m:
        expected = said(m, tokenizer, probes(EDITS[:1]))
    with edited_each(model, tokenizer, EDITS[:1], method) as m:
        found = said(m, tokenizer, probes(EDITS[:1]))
    assert found[0] == expected[0] and found[1] == pytest.approx(expected[1], rel=1e-3)


@pytest.mark.parametrize("name", ["FT-M", "LoRA", "MEMIT"])
def test_half_precision_takes_no_edit_or_keeps_it(tiny, tokenizer, name):
    model = tiny().bfloat16()
    covariance.measure(model, tokenizer, TEXTS, (1, 2))
    before, asked = state(model), [edit.probes[0] for edit in EDITS]
    old = target_log_probability(model, tokenizer, asked)
    with edited_each(model, tokenizer, EDITS, EVERY[name][1]) as m:
        assert sum(target_log_probability(m, tokenizer, asked)) > sum(old) + 0.1
    assert is_as_before(model, before)


# --- ends at different steps -----------------------------------------------------------------------------------------


def ends(model, tokenizer, method) -> tuple[Recipe, dict]:
    """The method with a `stop_loss` at which some of MANY end early, and each alone: its record and its update."""
    losses, before, alone = [], state(model), {}
    for edit in MANY:
        with edited(model, tokenizer, [edit], method) as m:
            losses.append(min(m.edit_record.losses))
    method = method.model_copy(update={"stop_loss": sum(sorted(losses)[6:8]) / 2})
    for edit in MANY:
        with edited(model, tokenizer, [edit], method) as m:
            alone[edit.id] = m.edit_record, updates(m, before)
    return method, alone


@pytest.fixture(scope="module")
def ending(ready, tokenizer):
    """Once for each method: what `ends` gives."""
    return {
        name: ends(
            ready(),
            tokenizer,
            TUNED[name][1].model_copy(
                update={"steps": 12, "learning_rate": rate, "stop_loss": 0.0}
            ),
        )
        for name, rate in (("FT-A", 3e-3), ("LoRA", 1e-2))
    }


@pytest.mark.parametrize(
    "share", [0, 1 / 8, 1], ids=["each leaves", "some stay a while", "all stay"]
)
@pytest.mark.parametrize("name", ["FT-A", "LoRA"])
def test_a_lane_that_has_ended_goes_on_or_disturbs_others(
    ready, ending, tokenizer, name, share, monkeypatch
):
    monkeypatch.setattr(finetune, "DROP_SHARE", share)
    model, (method, alone) = ready(), ending[name]
    before, steps = state(model), {edit: record.steps for edit, (record, _) in alone.items()}
    assert len(set(steps.values())) > 2 and {record.stopped for record, _ in alone.values()} == {
        "loss",
        "steps",
    }
    with edited_each(model, tokenizer, MANY, method) as m:
        assert {edit: record.steps for edit, record in m.edit_records.items()} == steps
        for lane, edit in enumerate(MANY):
            record, (own, update) = m.edit_records[edit.id], alone[edit.id]
            assert record.stopped == own.stopped and record.losses == pytest.approx(
                own.losses, rel=1e-2
            )
            assert far(of_lane(m.lanes, lane, before), update) < 1e-2
    assert is_as_before(model, before)


def test_an_edit_that_is_known_already_is_moved(ready, tokenizer):
    model = ready()
    with edited_each(
        model, tokenizer, EDITS, QUICK["FT-A"][1].model_copy(update={"stop_loss": 1e3})
    ) as m:
        for record in m.edit_records.values():
            assert (record.steps, record.stopped, len(record.losses)) == (0, "loss", 1) and not any(
                record.change_norm.values()
            )


# --- a loss that is not finite ---------------------------------------------------------------------------------------


def breaking(
    monkeypatch, place: int, call: int, ended: float | None = None, once: bool = False
) -> None:
    """The loss of the row at `place` is not finite in a call (and in all later ones, unless `once`), and until then `ended`."""
    plain, calls = finetune.loss, []

    def loss(*arguments):
        calls.append(arguments)
        losses = plain(*arguments)
        factors = torch.ones_like(losses)
        if len(calls) == call or len(calls) > call and not once:
            factors[place] = float("nan")
        elif ended is not None:
            factors[place] = ended
        return losses * factors

    monkeypatch.setattr(finetune, "loss", loss)


@pytest.mark.parametrize("name", ["FT-M", "LoRA"])
def test_a_broken_edit_is_not_named_or_takes_the_others_with_it(
    ready, tokenizer, name, monkeypatch
):
    model, method, alone = ready(), QUICK[name][1], {}
    before = state(model)
    for edit in EDITS:
        with edited(model, tokenizer, [edit], method) as m:
            alone[edit.id] = updates(m, before)
    monkeypatch.setattr(
        prompts, "PADDING", 1.0
    )  # all in one batch, the longest first: grace, ada, alan
    breaking(monkeypatch, 1, 3, once=True)
    with edited_each(model, tokenizer, EDITS, method) as m:
        assert m.failed == {
            "ada": f"recipe {name}: the loss of edit 'ada' is not finite after 2 steps; expected a learning_rate below 0.01"
        }
        assert list(m.edit_records) == m.lanes.ids == ["alan", "grace"] and all(
            record.steps == 5 for record in m.edit_records.values()
        )
        assert all(
            far(of_lane(m.lanes, lane, before), alone[edit]) < 1e-2
            for lane, edit in enumerate(m.lanes.ids)
        )
    assert is_as_before(model, before) and all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )


@pytest.mark.parametrize("name", ["AdaLoRA", "MEMIT", "muKE"])
def test_of_two_edits_the_one_that_diverges_is_written_or_neither_is(ready, tokenizer, name):
    """The token that stands in one edit alone has no number for a state."""
    model, method = ready(), EVERY[name][1]
    ids = {edit: one.ids for edit, one in method.examples(model, tokenizer, EDITS).items()}
    own = next(token for token in ids["grace"] if token not in ids["ada"] + ids["alan"])
    model.get_input_embeddings().weight.data[own] = float("nan")
    with edited_each(model, tokenizer, EDITS, method) as m:
        assert (
            list(m.failed) == ["grace"]
            and "'grace'" in m.failed["grace"]
            and m.lanes.ids == list(m.edit_records) == ["ada", "alan"]
        )
        assert all(
            math.isfinite(one) for record in m.edit_records.values() for one in record.losses
        )


@pytest.mark.parametrize("name", ["FT-M", "FT-L", "LoRA", "AdaLoRA", "MEMIT", "muKE"])
def test_edits_that_diverge_are_handed_out(ready, tokenizer, name):
    model = ready()
    before = state(model)
    with (
        pytest.raises(FloatingPointError, match="'ada'"),
        edited_each(
            model, tokenizer, EDITS, EVERY[name][1].model_copy(update={"learning_rate": 1e38})
        ),
    ):
        pytest.fail("a broken edit was handed out")
    assert is_as_before(model, before)


@pytest.mark.parametrize("tokens", [1, 8192], ids=["each lane by itself", "together"])
def test_a_block_that_diverges_is_not_named_or_another_is(ready, tokenizer, tokens, monkeypatch):
    model, found = ready(), solvers.target_values
    before = state(model)

    def broken(model, located, *arguments):
        values = found(model, located, *arguments)
        values.hidden[[located.ids[edit] == "alan" for edit, _ in located.anchors]] = float("inf")
        return values

    monkeypatch.setattr(solvers, "target_values", broken)
    monkeypatch.setattr(solvers, "PASS_TOKENS", tokens)
    with edited_each(model, tokenizer, EDITS, quick("anyedit_unke")) as m:
        assert m.failed == {
            "alan": "AnyEdit (UnKE): the block's error of edit 'alan' is not finite after 0 steps; expected an unke_rate below 0.005"
        }
        assert m.lanes.ids == ["ada", "grace"]
    assert is_as_before(model, before) and all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )


@pytest.mark.parametrize("tokens", [1, 300, 8192])
def test_an_edit_depends_on_how_many_blocks_are_trained_at_once(
    ready, tokenizer, tokens, monkeypatch
):
    """In a lane alone, with some of the others, with all of them."""
    model, method, alone = ready(), quick("anyedit_unke"), {}
    before = state(model)
    for edit in EDITS:
        with edited(model, tokenizer, [edit], method) as m:
            alone[edit.id] = updates(m, before)
    monkeypatch.setattr(solvers, "PASS_TOKENS", tokens)
    with edited_each(model, tokenizer, EDITS, method) as m:
        for lane, edit in enumerate(EDITS):
            assert far(of_lane(m.lanes, lane, before), alone[edit.id]) < 1e-2


@pytest.mark.parametrize("name", ["unke", "anyedit_unke"])
def test_lanes_of_which_some_are_read_cannot_be_computed_again(ready, tokenizer, name):
    """Edits of unlike length are in parts of their own, each with some of the lanes; a block computed again must take them again."""
    model, method = ready(), quick(name)
    before = state(model)
    with edited_each(model, tokenizer, EDITS, method) as m:
        kept = [of_lane(m.lanes, lane, before) for lane in range(len(EDITS))]
    with memory.recomputed(model), edited_each(model, tokenizer, EDITS, method) as m:
        for lane, update in enumerate(kept):
            assert far(of_lane(m.lanes, lane, before), update) < 1e-5


def test_what_becomes_of_a_lane_after_its_end_breaks_the_others(ready, tokenizer, monkeypatch):
    model, method = ready(), QUICK["FT-M"][1].model_copy(update={"stop_loss": 1e-6})
    before, alone = state(model), {}
    for edit in EDITS[1:]:
        with edited(model, tokenizer, [edit], method) as m:
            alone[edit.id] = updates(m, before)
    monkeypatch.setattr(finetune, "DROP_SHARE", 1)
    monkeypatch.setattr(prompts, "PADDING", 1.0)
    breaking(
        monkeypatch, 1, 3, ended=1e-9
    )  # ada, of middle length, ends at once, and is not a number later on
    with edited_each(model, tokenizer, EDITS, method) as m:
        assert m.edit_records["ada"].steps == 0 and not any(
            change.any() for change in of_lane(m.lanes, 0, before).values()
        )
        assert all(
            far(
                {n: t for n, t in of_lane(m.lanes, lane, before).items() if t.any()}, alone[edit.id]
            )
            < 1e-2
            for lane, edit in enumerate(EDITS)
            if lane
        )


# --- asking ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FT-M", "LoRA", "AnyEdit (MEMIT)", "in-context"])
def test_answers_depend_on_what_is_asked_beside_them(ready, tokenizer, name):
    model, asked = ready(), probes(EDITS)
    with edited_each(model, tokenizer, EDITS, EVERY[name][1]) as m:
        together, likely = said(m, tokenizer, asked)
        alone = [said(m, tokenizer, [probe]) for probe in asked]
        turned = [
            place
            for pair in zip(
                reversed(range(0, len(asked), 2)), reversed(range(1, len(asked), 2)), strict=False
            )
            for place in pair
        ]
        assert together == [text for (text,), _ in alone] and likely == pytest.approx(
            [value for _, (value,) in alone], rel=1e-4
        )
        found = said(m, tokenizer, [asked[place] for place in turned])
        assert found[0] == [together[place] for place in turned] and found[1] == pytest.approx(
            [likely[place] for place in turned], rel=1e-4
        )
        assert answer(m, tokenizer, asked, max_new_tokens=8, batch_tokens=1) == together


@pytest.mark.parametrize("name", ["FT-A", "LoRA"])
def test_answers_that_are_done_leave_the_rest_with_another_lane(ready, tokenizer, name):
    """Rows leave a batch one after another; those that go on are still read with their own weights."""

    def room(probe) -> int:
        return 2 + (7 * len(probe.question) + 5 * len(probe.edit) + len(probe.kind)) % 11

    model, asked = ready(), probes(EDITS)
    assert len({room(probe) for probe in asked}) > 5
    with edited_each(model, tokenizer, EDITS, EVERY[name][1]) as m:
        assert answer(m, tokenizer, asked, max_new_tokens=room) == [
            answer(m, tokenizer, [probe], max_new_tokens=room)[0] for probe in asked
        ]


def test_a_prompt_asked_under_two_edits_is_decoded_once(ready, tokenizer):
    """The same question, and texts that differ: each edit answers with its own."""
    texts = ("London.", "Cambridge.", "Philadelphia.")
    edits = [Edit(id=text, question="Who is Ada Lovelace?", answer=text) for text in texts]
    model, method = ready(), Recipe(name="FT-A", learning_rate=5e-3, steps=40)
    asked = [edit.probes[0] for edit in edits for _ in range(2)]
    with edited_each(model, tokenizer, edits, method) as m:
        assert answer(m, tokenizer, asked, max_new_tokens=8) == [
            text for text in texts for _ in range(2)
        ]
        assert min(target_log_probability(m, tokenizer, asked)) > -0.5


def test_a_prompt_asked_twice_of_one_edit_is_decoded_twice(ready, tokenizer, monkeypatch):
    model, rows = ready(), []
    with edited_each(model, tokenizer, EDITS, QUICK["FT-M"][1]) as m:
        plain = m.lanes.read
        monkeypatch.setattr(m.lanes, "read", lambda ids: rows.append(list(ids)) or plain(ids))
        answer(
            m,
            tokenizer,
            [probe for edit in EDITS for probe in [edit.probes[0]] * 3],
            max_new_tokens=2,
        )
    assert sorted(rows[0]) == ["ada", "alan", "grace"]


def test_a_question_about_an_edit_that_was_not_written_is_answered_by_any(ready, tokenizer):
    with (
        edited_each(ready(), tokenizer, EDITS[:2], QUICK["FT-M"][1]) as m,
        pytest.raises(KeyError, match="grace"),
    ):
        answer(m, tokenizer, EDITS[2].probes, max_new_tokens=2)


@pytest.mark.parametrize("name", ["FT-A", "AnyEdit (UnKE)"])
def test_windows_are_read_of_another_lane(ready, tokenizer, name):
    model, method, alone = ready(), EVERY[name][1], []
    rule = quick("anyedit_memit", window=5)
    located = locate(model, rule.examples(model, tokenizer, EDITS), rule)
    before = by_window(model, located)
    for edit in EDITS:
        with edited(model, tokenizer, [edit], method) as m:
            alone += by_window(m, locate(m, rule.examples(m, tokenizer, [edit]), rule))
    with edited_each(model, tokenizer, EDITS, method) as m:
        found = by_window(m, located)
    assert [len(one) for one in found] == [len(one) for one in alone] and len(
        {*map(len, found)}
    ) > 1
    for one, own, was in zip(found, alone, before, strict=True):
        assert one == pytest.approx(own, rel=1e-2, abs=1e-4) and one != pytest.approx(was, rel=1e-2)


# --- records and refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FT-M", "AdaLoRA", "AnyEdit++", "UnKE"])
def test_a_record_lacks_what_the_edit_did(ready, tokenizer, name):
    with edited_each(ready(), tokenizer, EDITS, EVERY[name][1]) as m:
        records = m.edit_records
    assert {record.stopped for record in records.values()} == {"steps"}
    for record in records.values():
        assert record.steps and record.losses and record.seconds > 0
        assert (
            record.change_norm
            and min(record.change_norm.values()) > 0
            and all(own.endswith((".weight", ".bias")) for own in record.change_norm)
        )
    assert len({tuple(record.change_norm.values()) for record in records.values()}) == len(EDITS)


def test_a_record_of_a_peer_has_the_course_of_other_edits(ready, tokenizer):
    """Three windows, one and six: the texts are of different length."""
    model, method, alone = ready(), quick("anyedit_memit"), {}
    for edit in EDITS:
        with edited(model, tokenizer, [edit], method) as m:
            alone[edit.id] = m.edit_record.steps, len(m.edit_record.losses)
    assert len(set(alone.values())) == 3
    with edited_each(model, tokenizer, EDITS, method) as m:
        assert {
            edit: (record.steps, len(record.losses)) for edit, record in m.edit_records.items()
        } == alone


def test_an_edit_is_said_to_be_short_that_is_not(ready, tokenizer):
    with edited_each(ready(), tokenizer, EDITS, quick("anyedit_memit", window=12)) as m:
        notes = {edit: record.notes for edit, record in m.edit_records.items()}
    assert notes == {
        "ada": [],
        "alan": ["edit 'alan': the answer is shorter than a window of 12 tokens; one window"],
        "grace": [],
    }


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "name", ["FT-A", "LoRA", "AdaLoRA", "MEMIT", "AnyEdit (UnKE)", "in-context"]
)
def test_an_exception_inside_leaves_a_trace(ready, tokenizer, name, error):
    family, method = EVERY[name]
    model = ready(family)
    model.train()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    before, flags = state(model), [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(error), edited_each(model, tokenizer, EDITS, method) as m:
        assert not any(module.training for module in m.modules())
        raise error
    assert is_as_before(model, before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters()) and all(
        module.training for module in model.modules()
    )


@pytest.mark.parametrize("name", ["FT-M", "LoRA", "AdaLoRA", "MEMIT", "in-context"])
def test_an_edit_beyond_the_context_or_given_twice_is_written(ready, tokenizer, name):
    model = ready()
    before = state(model)
    long = Edit(id="endless", question="Who?", answer="Ada Lovelace was a mathematician. " * 99)
    for edits, complaint in (
        ((*EDITS, long), "edit 'endless'"),
        ((*EDITS, EDITS[0]), "edit 'ada': given twice"),
        ((), "no edits"),
    ):
        with (
            pytest.raises(InputError, match=complaint),
            edited_each(model, tokenizer, edits, EVERY[name][1]),
        ):
            pytest.fail("written")
    assert is_as_before(model, before)


def test_a_misspelt_method_is_named_by_the_nearest(ready, tokenizer):
    with (
        pytest.raises(InputError, match="unknown method 'AdaLore'; did you mean 'AdaLoRA'"),
        edited_each(ready(), tokenizer, EDITS, "AdaLore"),
    ):
        pass


def test_a_method_is_found_by_its_name(ready, tokenizer, monkeypatch):
    monkeypatch.setitem(METHODS, "FT-M", QUICK["FT-M"][1])
    with edited_each(ready(), tokenizer, EDITS, "ft_m") as m:
        assert m.edit_records["ada"].steps == 5


def test_a_system_that_fails_midway_leaves_weights_moved(ready, tokenizer, monkeypatch):
    model, solved = ready(), []
    before = state(model)

    class Failing(solvers.ClosedForm):
        def solve(self, located, values):
            notes = super().solve(located, values)
            solved.append(located.ids)
            if len(solved) == 2:
                raise InputError("singular")
            return notes

    monkeypatch.setitem(solvers.SOLVERS, "memit", Failing)
    with (
        pytest.raises(InputError, match="singular"),
        edited_each(model, tokenizer, EDITS, quick("memit")),
    ):
        pass
    assert solved == [["ada"], ["alan"]] and is_as_before(model, before)


def test_a_lane_takes_less_memory_than_its_weights(tiny):
    """Value, gradient, two moments and a copy, four bytes each, beside what a lane's activations take at least."""
    model = tiny()

    def trained(method) -> float:
        logits = editing.LOGITS * model.config.vocab_size
        return ((lane_mib(model, method) - editing.LANE_MIB) * 2**20 / 4 - logits) / 5

    assert trained(RECIPES["FT-A"]) == pytest.approx(
        sum(weight.numel() for weight in select(model, "all", ["down_proj"]).values())
    )
    assert trained(RECIPES["LoRA"]) == pytest.approx(
        4 * 8 * ((32 + 32) + (32 + 16))
    )  # q and v of four blocks
    assert trained(quick("memit")) == pytest.approx(2 * 32 * 48)
    assert trained(quick("unke")) == pytest.approx(
        sum(weight.numel() for weight in select(model, 2, ["all"]).values())
    )
    assert trained(quick("in_context")) == 0
