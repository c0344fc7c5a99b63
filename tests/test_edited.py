"""Editing: edits that do nothing, move the wrong weights, pile up, are saved, or leave a trace."""

import json

import pytest
import torch
from peft import PeftModel
from small import EDITS, LONG, QUICK, Snapshot, baseline, logits, moved, state
from uke import models
from uke.data.edits import Edit, Probe
from uke.errors import InputError
from uke.methods.catalog import METHODS, find
from uke.methods.edited import ADAPTER, RECORD, WEIGHTS, edited, edited_each, load, save, sequence
from uke.methods.locate_edit import covariance
from uke.methods.recipes import Recipe
from uke.models.prompts import example

PAIR = EDITS[:2]
EVERY = [("llama", name) for name in QUICK]
EVERY += [(family, "FT-M") for family in ("qwen2", "qwen3", "mistral")]
EVERY += [("gemma3_text", name) for name in ("FT-M", "LoRA")]
WRITING = QUICK | {"MEMIT": baseline("memit"), "UnKE": baseline("unke")}


def log_probability(model, tokenizer, edit, scope) -> float:
    """Mean log p of the answer's tokens: each in its place, or all where the prompt ends."""
    one = example(tokenizer, edit.question, edit.answer, True, True)
    log_p = logits(model, tokenizer, edit).double().log_softmax(-1)
    terms = [
        log_p[place - 1 if scope == "target_tokens" else one.prompt_length - 1, one.ids[place]]
        for place in range(one.prompt_length, len(one.ids))
    ]
    return torch.stack(terms).mean().item()


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_an_edit_moves_the_named_weights_alone_and_leaves_no_trace(tiny, tokenizer, family, name):
    model, recipe = tiny(family), QUICK[name]
    expected = [log_probability(model, tokenizer, edit, recipe.loss) for edit in PAIR]
    snapshot, before = Snapshot(model), state(model)
    named = {n for n, _ in model.named_parameters() if n.split(".")[-2] in recipe.components}
    if recipe.adapter:
        named = {n for n in named if n.endswith(".weight")}
    if recipe.layers != "all":
        named &= set(models.select(model, recipe.layers, recipe.components))
    assert set(recipe.weights(model)) == named
    with edited(model, tokenizer, PAIR, recipe) as m:
        for edit, old in zip(PAIR, expected, strict=True):
            assert log_probability(m, tokenizer, edit, recipe.loss) > old + 0.05
        norms = m.edit_record.change_norm
        assert set(norms) == named and min(norms.values()) > 0 and not m.training
        assert isinstance(m, PeftModel) == bool(recipe.adapter)
        if recipe.adapter:
            base = m.get_base_model().state_dict()
            base = {n.replace(".base_layer.", "."): tensor for n, tensor in base.items()}
            assert all(torch.equal(base[n], tensor) for n, tensor in before.items())
        else:
            assert m is model and moved(model, before) == named
    snapshot.check()


@pytest.mark.parametrize("name", QUICK)
def test_a_training_that_breaks_names_the_edits_and_restores_the_weights(tiny, tokenizer, name):
    model = tiny()
    snapshot = Snapshot(model)
    recipe = QUICK[name].model_copy(update={"learning_rate": 1e38})
    with pytest.raises(FloatingPointError, match="'ada'"), edited(model, tokenizer, PAIR, recipe):
        pytest.fail("a broken edit was handed out")
    snapshot.check()


@pytest.mark.parametrize("name", ["FT-M", "AdaLoRA"])
def test_an_edit_does_not_depend_on_what_was_drawn_or_written_before_it(tiny, tokenizer, name):
    model, runs = tiny(), []
    for _ in range(2):
        torch.rand(3)
        with edited(model, tokenizer, PAIR, QUICK[name]) as m:
            runs.append(logits(m, tokenizer))
    assert torch.equal(*runs)


@pytest.mark.parametrize("enter", [edited, edited_each])
def test_a_method_is_found_by_its_name_or_the_nearest_is_named(tiny, tokenizer, monkeypatch, enter):
    model = tiny()
    monkeypatch.setitem(METHODS, "FT-M", QUICK["FT-M"])
    with enter(model, tokenizer, EDITS[:1], "ft_m") as m:
        records = getattr(m, "edit_records", {}) or {"ada": m.edit_record}
        assert records["ada"].steps == 4
    with pytest.raises(InputError, match="unknown method 'AdaLore'; did you mean 'AdaLoRA'"):
        with enter(model, tokenizer, EDITS[:1], "AdaLore"):
            pass


WRONG = (None, 1.5, {"id": "a"}, [1], [None], EDITS[0], [EDITS[0], {"id": "b"}], {*EDITS})


@pytest.mark.parametrize("wrong", WRONG, ids=map(repr, range(len(WRONG))))
def test_an_argument_of_a_wrong_type_in_a_first_use_gets_one_line(tiny, tokenizer, wrong):
    given = {"model": tiny(), "tokenizer": tokenizer}
    writing = given | {"edits": PAIR, "method": "FT-M"}
    for call, right in (
        (Edit, {"id": "a", "question": "b", "answer": "c", "details": (), "extra": ()}),
        (Probe, {"edit": "a", "kind": "detail", "question": "b", "reference": "c", "number": 0}),
        (models.load, {"name": "embedded", "device": "cpu", "dtype": "auto"}),
        *((enter, writing) for enter in (edited, edited_each)),
        (models.answer, given | {"probes": EDITS[0].probes, "max_new_tokens": 4}),
        (save, {"m": given["model"], "directory": "folder"}),
        (load, {"model": given["model"], "directory": "folder"}),
    ):
        for field in right:
            with pytest.raises(InputError, match=f"^[^\\n]*field '{field}[^\\n]*$"):
                call(**right | {field: wrong})


BAD_EDITS = (
    ((), "no edits"),
    ((*EDITS, EDITS[0]), "edit 'ada': given twice"),
    ([Edit(id="b", question="A?", answer="B <|im_end|> C")], "edit 'b': .*token '<.im_end.>'"),
    ((*EDITS, LONG), "edit 'endless'.*context holds 256"),
)


@pytest.mark.parametrize("enter", [edited, edited_each])
@pytest.mark.parametrize("name", ["FT-M", "LoRA", "AdaLoRA", "MEMIT", "in-context"])
def test_bad_edits_are_refused_before_anything_changes(measured, tokenizer, enter, name):
    model = measured()
    snapshot, method = Snapshot(model), WRITING.get(name) or find(name)
    for edits, message in BAD_EDITS:
        with pytest.raises(InputError, match=message), enter(model, tokenizer, edits, method):
            pytest.fail("written")
    snapshot.check()


@pytest.mark.parametrize("enter", [edited, edited_each])
@pytest.mark.parametrize("adapter", [None, "lora", "adalora"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"layers": (9,)}, "9"), ({"components": ("down_prj",)}, "did you mean 'down_proj'")],
)
def test_a_recipe_that_fits_no_weight_is_refused(tiny, tokenizer, enter, adapter, changes, message):
    model = tiny()
    snapshot, recipe = Snapshot(model), Recipe(name="mine", adapter=adapter, **changes)
    with pytest.raises(InputError, match=message), enter(model, tokenizer, EDITS, recipe):
        pytest.fail("written")
    snapshot.check()


def test_the_norm_of_the_change_is_that_of_the_matrices(tiny, tokenizer):
    model, recipe = tiny(), QUICK["LoRA"]
    name = "model.layers.2.mlp.down_proj.weight"
    before = state(model)[name].double()
    with edited(model, tokenizer, PAIR, QUICK["FT-M"]) as m:
        ratio = (model.state_dict()[name].double() - before).norm() / before.norm()
        assert m.edit_record.change_norm[name] == pytest.approx(float(ratio), rel=1e-4)
    with edited(model, tokenizer, PAIR, recipe) as m:
        layer = model.model.layers[1].self_attn.q_proj
        low, high = (getattr(layer, f"lora_{one}")["default"].weight.data.double() for one in "AB")
        ratio = (high @ low * recipe.alpha / recipe.rank).norm() / layer.weight.double().norm()
        norm = m.edit_record.change_norm["model.layers.1.self_attn.q_proj.weight"]
        assert norm == pytest.approx(float(ratio), rel=1e-4)


@pytest.mark.parametrize("name", ["FT-M", "LoRA", "AdaLoRA", "MEMIT", "UnKE"])
def test_edits_of_a_sequence_build_on_each_other_and_are_all_undone(measured, tokenizer, name):
    model = measured()
    snapshot = Snapshot(model)
    with pytest.raises(KeyboardInterrupt), sequence(model, tokenizer, WRITING[name]) as writer:
        writer.write(EDITS[:1])
        first, norms = state(model), writer.norms()
        assert moved(model, snapshot.weights) == set(norms) and min(norms.values()) > 0
        writer.write(EDITS[1:2])
        both = state(model)
        assert moved(model, first)
        raise KeyboardInterrupt
    snapshot.check()
    with sequence(model, tokenizer, WRITING[name]) as writer:
        writer.write(EDITS[1:2])
        assert moved(model, first) and moved(model, both)
    snapshot.check()


@pytest.mark.parametrize("name", ["FT-M", "LoRA", "AdaLoRA", "MEMIT", "UnKE"])
def test_one_edit_of_a_sequence_answers_as_it_does_alone_merged_or_not(measured, tokenizer, name):
    model, method = measured(), WRITING[name]
    with edited(model, tokenizer, EDITS[:1], method) as m:
        alone, record = logits(m, tokenizer), m.edit_record
    with sequence(model, tokenizer, method) as writer:
        assert writer.write(EDITS[:1]).losses == record.losses
        torch.testing.assert_close(logits(model, tokenizer), alone, rtol=1e-4, atol=1e-4)
        assert writer.norms() == pytest.approx(record.change_norm, rel=1e-4)


def test_baselines_keep_to_the_covariance_of_the_unedited_model(measured, tokenizer):
    model = measured()
    covariance._FINGERPRINTS.clear()  # as in a process that has not asked for it yet
    with sequence(model, tokenizer, WRITING["MEMIT"]) as writer:
        for edit in EDITS:
            writer.write([edit])


def test_a_sequence_of_a_method_that_writes_nothing_is_refused(tiny, tokenizer):
    with pytest.raises(InputError, match="in-context: moves no weight"):
        with sequence(tiny(), tokenizer, "in-context"):
            pytest.fail("handed out")


@pytest.mark.parametrize("name", ["FT-M", "FT-A", "LoRA", "AdaLoRA", "MEMIT"])
def test_a_saved_edit_is_loaded_with_the_same_logits(measured, tokenizer, tmp_path, name):
    model = measured()
    with edited(model, tokenizer, PAIR, WRITING[name]) as m:
        expected, record = logits(m, tokenizer), m.edit_record
        save(m, tmp_path / "edit")
        assert torch.equal(logits(m, tokenizer), expected)
    assert not torch.equal(logits(model, tokenizer), expected)
    for fresh in (measured(), model):
        loaded = load(fresh, tmp_path / "edit")
        assert torch.equal(logits(loaded, tokenizer), expected) and loaded.edit_record == record


@pytest.fixture(scope="module")
def saved(tiny, tokenizer, tmp_path_factory):
    """One saved edit of each form, made once: a folder of each method."""
    model, root = tiny(), tmp_path_factory.mktemp("saved")
    for name in ("FT-M", "LoRA"):
        with edited(model, tokenizer, PAIR, QUICK[name]) as m:
            save(m, root / name)
    return root


@pytest.mark.parametrize("name", ["FT-M", "LoRA"])
def test_a_saved_adapter_is_loaded_by_peft_and_none_on_another_model(tiny, tokenizer, saved, name):
    if name == "LoRA":
        plain = PeftModel.from_pretrained(tiny(), saved / name).eval()
        ours = load(tiny(), saved / name)
        assert torch.equal(logits(plain, tokenizer), logits(ours, tokenizer))
    other = tiny()
    other.model.embed_tokens.weight.data[5, 5] += 1e-3
    before = state(other)
    with pytest.raises(InputError, match="edit.json: expected a model with dtype=torch.float32"):
        load(tiny().to(torch.bfloat16), saved / name)
    (passing := tiny()).config.use_cache = False  # which changes no answer, nor does the next
    passing.config.pad_token_id = 2
    assert load(passing, saved / name)
    with pytest.raises(InputError, match="edit.json: field unchanged: .*another model"):
        load(other, saved / name)
    with pytest.raises(InputError, match="another model"):
        load(tiny("qwen2"), saved / name)
    assert not moved(other, before)


@pytest.mark.parametrize(
    ("name", "file", "changes", "expected"),
    [
        ("FT-M", WEIGHTS, {"layers": "all"}, "edit.safetensors: expected the weights of edit.json"),
        ("LoRA", ADAPTER, {"rank": 4}, "not the weights that adapter_config.json describes"),
    ],
)
def test_weights_of_another_record_are_refused(
    tiny, tokenizer, saved, tmp_path, name, file, changes, expected
):
    model = tiny()
    before = state(model)
    with edited(model, tokenizer, PAIR, QUICK[name].model_copy(update=changes)) as m:
        save(m, tmp_path)
    (tmp_path / file).write_bytes((saved / name / file).read_bytes())
    with pytest.raises(InputError, match=expected):
        load(model, tmp_path)
    assert not moved(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_an_edit_on_top_leaves_those_below_and_only_weights_are_saved(tiny, tokenizer, tmp_path):
    model = tiny()
    with pytest.raises(InputError, match="nothing to save"):
        save(model, tmp_path / "edit")
    with edited(model, tokenizer, PAIR, "in-context") as m:
        with pytest.raises(InputError, match="nothing to save"):
            save(m, tmp_path / "edit")
        assert not (tmp_path / "edit").exists()
        with edited(m, tokenizer, EDITS[2:], QUICK["FT-M"]):
            before, record = logits(m, tokenizer), m.edit_record
            for name in ("FT-M", "LoRA"):
                with edited(m, tokenizer, PAIR, QUICK[name]) as top:
                    save(top, tmp_path / name)
                assert m.edit_record is record and torch.equal(logits(m, tokenizer), before)
            save(m, tmp_path / "edit")
            with pytest.raises(InputError, match="edit.json: expected a folder to make"):
                save(m, tmp_path / "edit" / RECORD)
            (tmp_path / "other" / WEIGHTS).mkdir(parents=True)
            with pytest.raises(OSError, match="other: .* directory"):
                save(m, tmp_path / "other")
        with edited(m, tokenizer, EDITS[2:], "in-context"):
            assert set(m.passages) == {"ada", "alan", "grace"}
    assert load(tiny(), tmp_path / "edit").edit_record.change_norm
    content = json.loads((path := tmp_path / "edit" / RECORD).read_text())
    path.write_text(json.dumps(content | {"record": {"change_norm": True}}))
    with pytest.raises(InputError, match="edit.json: .* field 'change_norm': .* found True"):
        load(tiny(), tmp_path / "edit")


@pytest.mark.parametrize("enter", [edited, edited_each, lambda m, t, _, name: sequence(m, t, name)])
def test_a_model_with_an_adapter_is_refused_and_stays(tiny, tokenizer, saved, enter):
    model = load(tiny(), saved / "LoRA")
    before = state(model)
    for name in ("FT-M", "LoRA", "AdaLoRA"):
        with pytest.raises(InputError, match="already carries an adapter"):
            with enter(model, tokenizer, PAIR, QUICK[name]) as writer:
                writer.write(PAIR)
    with pytest.raises(InputError, match="already carries an adapter"):
        load(model, saved / "FT-M")
    assert not moved(model, before)
    with enter(model.merge_and_unload(), tokenizer, PAIR, QUICK["LoRA"]):
        pass


@pytest.mark.parametrize("enter", [edited, edited_each])
def test_a_model_with_lanes_takes_no_other_edit_but_one_in_context(tiny, tokenizer, enter):
    model = tiny()
    snapshot = Snapshot(model)
    with edited_each(model, tokenizer, PAIR, QUICK["FT-M"]) as m:
        with pytest.raises(InputError, match="the model has lanes of edited_each"):
            with enter(m, tokenizer, PAIR, QUICK["LoRA"]):
                pytest.fail("written")
        with enter(m, tokenizer, PAIR, "in-context"):
            assert m.passages and m.lanes.ids == ["ada", "alan"]
    snapshot.check()
