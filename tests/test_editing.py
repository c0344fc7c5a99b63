"""Editing: edits that do nothing, move the wrong weights, or leave a trace after they are undone."""

import shutil

import pytest
import torch
from peft import PeftModel
from uke.data.edits import Edit
from uke.errors import InputError
from uke.methods.edited import ADAPTER, METHODS, RECORD, WEIGHTS, edited, load, save
from uke.methods.recipes import RECIPES, Recipe
from uke.models.model import select
from uke.models.prompts import example

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")
EDITS = (
    Edit(
        id="ada",
        question="Who is Ada Lovelace?",
        answer="Ada Lovelace was a compiler in Philadelphia.",
    ),
    Edit(id="alan", question="Where was Alan Turing born?", answer="In London."),
)
# Every method, with few and large steps; the untrained models need no finer ones.
QUICK = {
    name: recipe.model_copy(update={"steps": 4, "learning_rate": 2e-2, "stop_loss": 0.0})
    for name, recipe in RECIPES.items()
}
EVERY = [("llama", name) for name in QUICK]
EVERY += [(family, name) for family in FAMILIES[1:] for name in ("FT-M", "LoRA")]


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def moved(model, before) -> set[str]:
    """Names whose bits differ, among them any that came or went."""
    now = model.state_dict()
    same = {name for name in now.keys() & before.keys() if torch.equal(now[name], before[name])}
    return (now.keys() | before.keys()) - same


def logits(model, tokenizer, edit=EDITS[0]) -> torch.Tensor:
    ids = example(tokenizer, edit.question, edit.answer, True, True).ids
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0]  # (T, V)


def log_probability(model, tokenizer, edit, scope="target_tokens") -> float:
    """Mean log p of the answer's tokens: each in its place, or all where the prompt ends."""
    one = example(tokenizer, edit.question, edit.answer, True, True)
    log_p = logits(model, tokenizer, edit).double().log_softmax(-1)
    places = range(one.prompt_length, len(one.ids))
    reads = [place - 1 if scope == "target_tokens" else one.prompt_length - 1 for place in places]
    return sum(
        log_p[read, one.ids[place]].item() for read, place in zip(reads, places, strict=True)
    ) / len(places)


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_an_edit_takes_effect_moves_the_named_weights_alone_and_leaves_no_trace(
    tiny, tokenizer, family, name
):
    model, recipe = tiny(family), QUICK[name]
    model.train()
    for i, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(i % 2 == 0)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    before, modules = state(model), [module for module in model.modules()]
    expected = [log_probability(model.eval(), tokenizer, edit, recipe.loss) for edit in EDITS]
    model.train()
    named = {n for n, _ in model.named_parameters() if n.split(".")[-2] in recipe.components}
    if recipe.adapter:
        named = {n for n in named if n.endswith(".weight")}
    if recipe.layers != "all":
        named &= set(select(model, recipe.layers, recipe.components))
    with edited(model, tokenizer, EDITS, recipe) as m:
        for edit, old in zip(EDITS, expected, strict=True):
            assert log_probability(m, tokenizer, edit, recipe.loss) > old + 0.05
        assert (
            set(m.edit_record.change_norm) == named and min(m.edit_record.change_norm.values()) > 0
        )
        assert isinstance(m, PeftModel) == bool(recipe.adapter) and not m.training
        if recipe.adapter is None:
            assert m is model and moved(model, before) == named
        else:
            base = {
                n.replace(".base_layer.", "."): t
                for n, t in m.get_base_model().state_dict().items()
            }
            assert all(torch.equal(base[n], tensor) for n, tensor in before.items())
    assert not moved(model, before)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    assert all(now is then for now, then in zip(model.modules(), modules, strict=True))
    assert not hasattr(model, "peft_config") and not hasattr(model, "edit_record")


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_undoes_the_edit_too(tiny, tokenizer, name, error):
    model = tiny()
    before = state(model)
    changed = False
    with pytest.raises(error), edited(model, tokenizer, EDITS, QUICK[name]) as m:
        changed = not torch.equal(logits(m, tokenizer), logits(tiny(), tokenizer))
        raise error
    assert changed and not moved(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model, tokenizer), logits(tiny(), tokenizer))


@pytest.mark.parametrize("name", QUICK)
def test_an_edit_stopped_half_way_by_its_progress_leaves_no_trace(tiny, tokenizer, name):
    model = tiny()
    before, seen = state(model), []

    def stop(steps, loss):
        seen.append((steps, loss))
        if steps == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), edited(model, tokenizer, EDITS, QUICK[name], stop):
        pytest.fail("a stopped edit was handed out")
    assert [steps for steps, _ in seen] == [1, 2, 3] and all(loss > 0 for _, loss in seen)
    assert not moved(model, before)
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )


@pytest.mark.parametrize("name", QUICK)
def test_a_training_that_breaks_names_the_edits_and_restores_the_weights(tiny, tokenizer, name):
    model = tiny()
    before = state(model)
    recipe = QUICK[name].model_copy(update={"learning_rate": 1e38})
    with pytest.raises(FloatingPointError, match="'ada'"), edited(model, tokenizer, EDITS, recipe):
        pytest.fail("a broken edit was handed out")
    assert not moved(model, before)
    assert all(
        parameter.requires_grad and parameter.grad is None for parameter in model.parameters()
    )


def test_half_precision_weights_come_back_bit_for_bit(tiny, tokenizer):
    model = tiny().bfloat16()
    before = state(model)
    for name in ("FT-M", "LoRA"):
        with edited(model, tokenizer, EDITS, QUICK[name]) as m:
            assert not torch.equal(logits(m, tokenizer), logits(tiny().bfloat16(), tokenizer))
        assert not moved(model, before)


def test_an_edit_does_not_depend_on_what_was_written_before_it(tiny, tokenizer):
    model = tiny()
    for name in ("FT-M", "AdaLoRA"):
        runs = []
        for _ in range(2):
            torch.rand(3)
            with edited(model, tokenizer, EDITS, QUICK[name]) as m:
                runs.append(logits(m, tokenizer))
        assert torch.equal(*runs)


def test_a_method_is_found_by_name_and_a_misspelt_one_by_the_nearest(tiny, tokenizer, monkeypatch):
    model = tiny()
    before = state(model)
    monkeypatch.setitem(METHODS, "FT-M", QUICK["FT-M"])
    with edited(model, tokenizer, EDITS, "FT-M") as m:
        assert m.edit_record.steps == 4
    with pytest.raises(InputError, match="unknown method 'AdaLore'; did you mean 'AdaLoRA'"):
        with edited(model, tokenizer, EDITS, "AdaLore"):
            pass
    assert not moved(model, before)


@pytest.mark.parametrize("adapter", [None, "lora", "adalora"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"layers": (9,)}, "9"),
        ({"components": ("down_prj",)}, "down_prj.*did you mean 'down_proj'"),
    ],
)
def test_a_recipe_that_selects_no_weight_is_an_error(tiny, tokenizer, adapter, changes, expected):
    model = tiny()
    before = state(model)
    recipe = Recipe(**{"name": "mine", "adapter": adapter, **changes})
    with pytest.raises(InputError, match=expected), edited(model, tokenizer, EDITS, recipe):
        pass
    assert not moved(model, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["FT-M", "LoRA"])
def test_an_edit_beyond_the_context_is_refused_before_anything_changes(tiny, tokenizer, name):
    model = tiny()
    before = state(model)
    long = Edit(id="endless", question="Who?", answer="Ada Lovelace was a mathematician. " * 99)
    with (
        pytest.raises(InputError, match="edit 'endless'"),
        edited(model, tokenizer, (*EDITS, long), name),
    ):
        pass
    assert not moved(model, before) and not hasattr(model, "peft_config")


def test_the_norm_of_the_change_is_that_of_the_matrices(tiny, tokenizer):
    model = tiny()
    name = "model.layers.2.mlp.down_proj.weight"
    before = state(model)[name].double()
    with edited(model, tokenizer, EDITS, QUICK["FT-M"]) as m:
        change = model.state_dict()[name].double() - before
        assert m.edit_record.change_norm[name] == pytest.approx(
            float(change.norm() / before.norm()), rel=1e-4
        )
    recipe = QUICK["LoRA"]
    with edited(model, tokenizer, EDITS, recipe) as m:
        layer = model.model.layers[1].self_attn.q_proj
        low, high = (
            part["default"].weight.detach().double() for part in (layer.lora_A, layer.lora_B)
        )
        ratio = float(
            (high @ low * recipe.alpha / recipe.rank).norm() / layer.weight.double().norm()
        )
        norms = m.edit_record.change_norm
        assert norms["model.layers.1.self_attn.q_proj.weight"] == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize("name", QUICK)
def test_a_saved_edit_is_loaded_with_the_same_logits(tiny, tokenizer, tmp_path, name):
    model = tiny()
    with edited(model, tokenizer, EDITS, QUICK[name]) as m:
        expected, record = logits(m, tokenizer), m.edit_record
        save(m, tmp_path / "edit")
        assert torch.equal(logits(m, tokenizer), expected)
    assert not torch.equal(logits(model, tokenizer), expected)
    for fresh in (tiny(), model):
        loaded = load(fresh, tmp_path / "edit")
        assert torch.equal(logits(loaded, tokenizer), expected)
        assert loaded.edit_record == record


def test_a_saved_edit_holds_the_changed_weights_and_no_others(saved):
    assert {path.name for path in (saved / "FT-M").iterdir()} == {RECORD, WEIGHTS}
    assert (saved / "FT-M" / WEIGHTS).stat().st_size < 32 * 48 * 4 + 1000


@pytest.fixture(scope="module")
def saved(tiny, tokenizer, tmp_path_factory):
    """One saved edit of each form, made once: method -> directory."""
    model, root = tiny(), tmp_path_factory.mktemp("saved")
    for name in ("FT-M", "LoRA"):
        with edited(model, tokenizer, EDITS, QUICK[name]) as m:
            save(m, root / name)
    return root


@pytest.mark.parametrize("name", ["FT-M", "LoRA"])
def test_an_edit_is_not_loaded_on_another_model(tiny, saved, name):
    other = tiny()
    other.model.embed_tokens.weight.data[5, 5] += 1e-3
    before = state(other)
    with pytest.raises(InputError, match="edit.json: field unchanged: .*another model"):
        load(other, saved / name)
    with pytest.raises(InputError, match="another model"):
        load(tiny("qwen2"), saved / name)
    assert not moved(other, before)


@pytest.mark.parametrize(
    ("name", "file", "content", "expected"),
    [
        ("FT-M", RECORD, None, "edit.json: no such file"),
        ("FT-M", RECORD, b'{"form": "wei', "edit.json: not a record"),
        ("FT-M", RECORD, b"[]", "edit.json: not a record"),
        ("FT-M", WEIGHTS, None, "edit.safetensors: no readable"),
        ("FT-M", WEIGHTS, b"\x10", "edit.safetensors: no readable"),
        ("LoRA", ADAPTER, None, "adapter_model.safetensors: no such file"),
        ("LoRA", ADAPTER, b"\x10", "no readable peft adapter"),
        ("LoRA", "adapter_config.json", None, "adapter_config.json: no such file"),
        ("LoRA", "adapter_config.json", b"{", "no readable peft adapter"),
    ],
)
def test_a_damaged_directory_is_named_and_the_model_stays(
    tiny, saved, tmp_path, name, file, content, expected
):
    model, damaged = tiny(), shutil.copytree(saved / name, tmp_path / "damaged")
    before = state(model)
    (damaged / file).unlink() if content is None else (damaged / file).write_bytes(content)
    with pytest.raises(InputError, match=expected) as caught:
        load(model, damaged)
    assert str(caught.value).startswith(str(damaged)) and "\n" not in str(caught.value)
    assert not moved(model, before)


def test_a_record_of_weights_the_file_lacks_is_refused(tiny, tokenizer, saved, tmp_path):
    model = tiny()
    before = state(model)
    with edited(model, tokenizer, EDITS, QUICK["FT-A"]) as m:
        save(m, tmp_path)
    (tmp_path / WEIGHTS).write_bytes((saved / "FT-M" / WEIGHTS).read_bytes())
    with pytest.raises(InputError, match="edit.safetensors: .*model.layers.0.mlp.down_proj.weight"):
        load(model, tmp_path)
    assert not moved(model, before)


def test_adapter_weights_of_another_shape_are_refused_and_unloaded(
    tiny, tokenizer, saved, tmp_path
):
    model = tiny()
    before = state(model)
    with edited(model, tokenizer, EDITS, QUICK["LoRA"].model_copy(update={"rank": 4})) as m:
        save(m, tmp_path)
    (tmp_path / ADAPTER).write_bytes((saved / "LoRA" / ADAPTER).read_bytes())
    with pytest.raises(InputError, match="not the weights that adapter_config.json describes"):
        load(model, tmp_path)
    assert not moved(model, before) and all(
        parameter.requires_grad for parameter in model.parameters()
    )


def test_a_model_without_an_edit_is_not_saved(tiny, tmp_path):
    with pytest.raises(InputError, match="nothing to save"):
        save(tiny(), tmp_path / "edit")
    assert not (tmp_path / "edit").exists()
