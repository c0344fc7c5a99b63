"""Baselines: residuals that no layer closes, wrong systems, another corpus's covariance."""

import pytest
import small
import torch
from conftest import FAMILIES, SENTENCES
from small import baseline, by_window, hooks, moved, state
from uke.data.edits import Probe
from uke.errors import InputError
from uke.methods.edited import edited, edited_each
from uke.methods.locate_edit import covariance
from uke.methods.locate_edit.anchors import locate, look, sites, states
from uke.methods.locate_edit.solvers import BlockSteps, least_squares
from uke.methods.locate_edit.targets import find_targets
from uke.methods.recipes import BASELINES, LocateRecipe
from uke.models import prompts
from uke.models.generate import answer, target_log_probability
from uke.models.prompts import example

EDITS = small.EDITS[:2]
SUBJECTS = (*small.SUBJECTS, "mathematician", "Turing", "Hopper")
ASKED = zip(SUBJECTS, SENTENCES * 3, strict=False)
TEXTS = [{"question": f"Who is {one}?", "answer": other} for one, other in ASKED]
TEXTS += SENTENCES
WRITING = tuple(name for name in BASELINES if name != "in_context")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Every test measures its own models."""
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def ready(tiny, tokenizer):
    """Factory: a tiny model whose covariance is measured."""

    def build(family: str = "llama", **changes):
        model = tiny(family, **changes)
        covariance.measure(model, tokenizer, TEXTS, layers=range(model.config.num_hidden_layers))
        return model

    return build


def quick(name: str, **changes) -> LocateRecipe:
    """The named recipe for an untrained model of four blocks, in few and large steps."""
    return baseline(name, **{"steps": 8, "unke_steps": 15, "preservation": 4, **changes})


def refused(model, tokenizer, edits, recipe, message: str) -> None:
    with pytest.raises(InputError, match=message), edited(model, tokenizer, edits, recipe):
        pytest.fail("written")


def log_probabilities(model, tokenizer, edits=EDITS) -> list[float]:
    return target_log_probability(model, tokenizer, [edit.probes[0] for edit in edits])


def distances(model, tokenizer, edits, recipe) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How far hidden states are from the targets before and after the edit, and log p gained."""
    last = sites(model, recipe.layers)[-1]
    located = locate(model, recipe.examples(model, tokenizer, edits), recipe)
    wanted, _ = find_targets(model, located, last, recipe)
    before, old = states(model, located, last, last), log_probabilities(model, tokenizer, edits)
    with edited(model, tokenizer, edits, recipe) as m:
        after, new = states(m, located, last, last), log_probabilities(m, tokenizer, edits)
    far = [(wanted - one.hidden).norm(dim=-1) for one in (before, after)]
    return *far, torch.tensor(new) - torch.tensor(old)


# --- the choices ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "memit", "unke"), [(32, [4, 5, 6, 7, 8], [7]), (8, [1, 2], [1])])
def test_published_blocks_become_fractions_of_the_depth(tiny, depth, memit, unke):
    model = tiny(num_hidden_layers=depth)
    for name, wanted in (("memit", memit), ("unke", unke)):
        found = [int(site.name.split(".")[2]) for site in sites(model, BASELINES[name].layers)]
        assert found == wanted


def test_the_fingerprint_sees_every_choice_of_a_baseline_and_bad_ones_are_refused():
    base = BASELINES["memit"]
    other = {
        "solver": "unke",
        "anchors": "windows",
        "window": 7,
        "layers": (3,),
        **dict.fromkeys(("chat_template", "end_of_turn"), False),
        "keep_keys": True,
        **dict.fromkeys(("steps", "unke_steps", "seed", "preservation"), 2),
        **dict.fromkeys(("learning_rate", "stop_loss", "clamp", "decay", "memit_lambda"), 0.1),
        **dict.fromkeys(("alphaedit_l2", "null_threshold", "unke_rate", "unke_decay"), 0.1),
    }
    assert set(LocateRecipe.model_fields) - set(other) == {"name", "weighting", "as_published"}
    changed = [base.model_dump() | {field: value} for field, value in other.items()]
    fingerprints = {LocateRecipe(**one).fingerprint for one in changed}
    assert len({base.fingerprint, *fingerprints}) == len(other) + 1
    wrong = {"sovler": "memit", "solver": "rome", "steps": 1, "clamp": True, "as_published": True}
    for field, value in wrong.items():  # no file of windows has the defect, nor has ours
        with pytest.raises(InputError, match=f"LocateRecipe.*{field}"):
            LocateRecipe(**BASELINES["anyedit_memit"].model_dump() | {field: value})


def test_baselines_have_the_settings_of_the_published_code():
    """Losses of a search, where it stops, preservation texts, and whether other keys are kept."""
    none, one, windows = 0.0, 1e-2, ("anyedit_memit", "anyedit_alphaedit", "anyedit_pp", "muke")
    stops = {"alphaedit": none, "unke": none, "anyedit_unke": 5e-3}
    for name in WRITING:
        method = BASELINES[name]
        assert (method.steps, method.preservation) == (25, 20)
        assert method.stop_loss == stops.get(name, one) and method.keep_keys == (name in windows)


# --- covariance -----------------------------------------------------------------------------------


def test_covariances_are_the_mean_outer_product_of_the_keys(tiny, tokenizer):
    model = tiny()
    covariance.measure(model, tokenizer, TEXTS, (1, 3))
    chosen = sites(model, (1, 3))
    for site, found in zip(chosen, covariance.covariances(model, chosen), strict=True):
        keys = []
        for text in TEXTS:
            if isinstance(text, str):
                ids = tokenizer(text)["input_ids"]
            else:
                ids = example(tokenizer, text["question"], text["answer"], True, True).ids
            keys.append(look(model, torch.tensor([ids]), (site.projection,))[0].args[0][0].double())
        keys = torch.cat(keys)
        assert torch.allclose(found, keys.T @ keys / len(keys), atol=1e-5)
        assert found.dtype == torch.float64
    assert hooks(model) == 0


def test_a_layer_is_measured_once_on_the_same_texts(tiny, tokenizer, monkeypatch):
    model, looked = tiny(), []
    monkeypatch.setattr(prompts, "PADDING", 1.0)  # one pass, whatever the lengths
    monkeypatch.setattr(covariance, "look", lambda *seen: looked.append(seen) or look(*seen))
    covariance.measure(model, tokenizer, TEXTS, (1,))
    first, digest = covariance.covariances(model, sites(model, (1,))), covariance.digest(model)
    covariance.measure(model, tokenizer, TEXTS, (1, 2))
    assert [len(modules) for *_, modules in looked] == [1, 1]
    covariance.measure(model, tokenizer, TEXTS[:3], (1,))
    (other,) = covariance.covariances(model, sites(model, (1,)))
    assert not torch.equal(*first, other) and covariance.digest(model) != digest
    with pytest.raises(InputError, match="--layers 2, or documents"):
        covariance.covariances(model, sites(model, (1, 2)))


def test_a_covariance_of_another_model_is_not_used(ready, tiny, tokenizer):
    ready()
    other = tiny()
    other.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    lacking = "no covariance of this model; .*uke covariance MODEL TEXTS.json --layers 1 2"
    refused(other, tokenizer, EDITS, quick("memit"), lacking)
    lacking = "no preservation texts of this model; .*python -m uke covariance"
    refused(other, tokenizer, EDITS, quick("unke"), lacking)


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}', '[""]', '[{"question": "a"}]', "[1]"])
def test_a_corpus_of_another_shape_is_refused(tmp_path, content):
    (tmp_path / "texts.json").write_text(content)
    with pytest.raises(InputError, match="texts.json: "):
        covariance.read_texts(tmp_path / "texts.json")


def test_a_projector_keeps_the_directions_the_corpus_does_not_use(ready):
    model = ready()
    (site,) = sites(model, (1,))
    (moment,) = covariance.covariances(model, (site,))
    (null,) = covariance.projectors(model, (site,), 0.3)
    assert torch.allclose(null @ null, null, atol=1e-10) and torch.allclose(null, null.T)
    values, vectors = torch.linalg.eigh(moment)
    assert 0 < int((values < 0.3).sum()) == round(float(null.trace())) < len(values)
    assert (null @ vectors[:, values >= 0.3]).abs().max() < 1e-10
    with pytest.raises(InputError, match="no direction.*null_threshold 1e-30"):
        covariance.projectors(model, (site,), 1e-30)


# --- the solve ------------------------------------------------------------------------------------


def drawn(n: int = 7, wide: int = 12, deep: int = 5, kept: int = 4):
    torch.manual_seed(3)
    root = torch.randn(wide, wide).double()
    shapes = ((n, deep), (n, wide), (kept, wide))
    return (*(torch.randn(*shape).double() for shape in shapes), root @ root.T)


def test_the_memit_solve_is_the_least_squares_solution():
    *drawn_states, moment = drawn()
    residual, keys, others = (one.float() for one in drawn_states)
    change = least_squares(residual, keys, others, 2.5 * moment)
    residual, keys, others = residual.double(), keys.double(), others.double()
    # |D K - R|^2 + |D K_p|^2 + 2.5 tr(D C D^T) as one least-squares problem.
    left = torch.cat([keys, others, torch.linalg.cholesky(2.5 * moment).T])
    missing = torch.zeros(len(left) - len(residual), residual.shape[1]).double()
    solution = torch.linalg.lstsq(left, torch.cat([residual, missing])).solution
    assert change.dtype == torch.float64 and torch.allclose(change, solution.T, atol=1e-10)


def test_the_alphaedit_solve_is_the_published_formula_and_leaves_kept_directions_alone():
    residual, keys, others, moment = drawn()
    values, vectors = torch.linalg.eigh(moment)
    null = vectors[:, values < values[6]] @ vectors[:, values < values[6]].T
    eye = torch.eye(12).double()
    change = least_squares(residual, keys, others, 0.7 * eye, null)
    inner = others.T @ others @ null + keys.T @ keys @ null + 0.7 * eye
    assert torch.allclose(change, residual.T @ keys @ null @ torch.linalg.inv(inner), atol=1e-10)
    kept = change @ vectors[:, values >= values[6]]
    assert float(kept.abs().max()) < 1e-12 < float(change.norm())


@pytest.mark.parametrize(
    "moment", [torch.zeros(12, 12), torch.full((12, 12), float("nan")), -torch.eye(12)]
)
def test_a_singular_or_broken_system_is_refused(moment):
    residual, keys, others, _ = drawn()
    with pytest.raises(ValueError, match="singular or not finite"):
        least_squares(residual, keys, others[:0], moment.double())


# --- writing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", ["memit", "anyedit_alphaedit"])
def test_the_last_layer_closes_the_residual(ready, tokenizer, family, name):
    small_ridges = {"memit_lambda": 1e-7, "alphaedit_l2": 1e-9, "null_threshold": 1e9}
    recipe = quick(name, layers=(0, 1, 2), keep_keys=False, **small_ridges)
    before, after, gained = distances(ready(family), tokenizer, EDITS, recipe)
    # Behind Gemma's norm the projection sets a direction alone: the residual is met in part.
    assert float((after / before).max()) < (0.5 if family == "gemma3_text" else 1e-2)
    assert float(gained.min()) > 0


def test_alphaedit_moves_no_key_of_the_directions_it_keeps(ready, tokenizer):
    model, recipe = ready(), quick("anyedit_alphaedit")
    places = sites(model, recipe.layers)
    before = [site.projection.weight.detach().clone() for site in places]
    with edited(model, tokenizer, EDITS, recipe):
        moments = covariance.covariances(model, places)
        for site, old, moment in zip(places, before, moments, strict=True):
            values, vectors = torch.linalg.eigh(moment)
            change = site.projection.weight.detach().double() - old.double()
            kept = change @ vectors[:, values >= recipe.null_threshold]
            assert float(kept.norm()) < 1e-5 * float(change.norm()) and kept.shape[1] > 3


@pytest.mark.parametrize("name", ["anyedit_memit", "anyedit_alphaedit"])
def test_kept_keys_hold_the_other_positions_by_the_published_formula(ready, tokenizer, name):
    model, recipe = ready(), quick(name, layers=(2,), memit_lambda=1e-4)
    located = locate(model, recipe.examples(model, tokenizer, EDITS), recipe)
    (site,) = sites(model, recipe.layers)
    wanted, _ = find_targets(model, located, site, recipe)
    at, drift = states(model, located, site, site), {}
    keys, residual, others = at.keys.double(), wanted - at.hidden, at.others.double()
    ridge, null = 1e-4 * covariance.covariances(model, (site,))[0], torch.eye(48).double()
    if recipe.solver == "alphaedit":
        ridge = recipe.alphaedit_l2 * null
        (null,) = covariance.projectors(model, (site,), recipe.null_threshold)
    old = site.projection.weight.detach().double()
    for keep in (True, False):
        held = others.T @ others * keep
        system = (held + keys.T @ keys) @ null + ridge
        with edited(model, tokenizer, EDITS, recipe.model_copy(update={"keep_keys": keep})):
            change = site.projection.weight.detach().double() - old
        formula = residual.T @ keys @ null @ torch.linalg.inv(system)
        assert float((change - formula).norm() / formula.norm()) < 1e-3
        drift[keep] = float((others @ change.T).norm())
    assert drift[True] < 0.5 * drift[False]


@pytest.mark.parametrize("name", ["unke", "anyedit_unke"])
def test_the_block_learns_published_positions_on_its_own_texts(ready, tokenizer, name, monkeypatch):
    model, recipe, errors, texts = ready(), quick(name), [], []

    def descend(solver, parts, edits):
        each = (((call() - wanted).square().sum(-1) * share).sum() for call, wanted, share in parts)
        errors.append(sum(each).item())

    read = covariance.token_ids
    monkeypatch.setattr(covariance, "token_ids", lambda *one: texts.append(one[2]) or read(*one))
    monkeypatch.setattr(BlockSteps, "_descend", descend)
    located = locate(model, recipe.examples(model, tokenizer, EDITS), recipe)
    (site,) = sites(model, recipe.layers)
    wanted, _ = find_targets(model, located, site, recipe)
    missing = wanted - states(model, located, site, site).hidden
    for batch in (EDITS, EDITS[:1], EDITS[1:]):
        with edited(model, tokenizer, batch, recipe):
            pass
    with edited_each(model, tokenizer, EDITS, recipe):
        pass
    # The mean over positions and width: those of the question, and with windows of the answer too.
    examples = [one.example for one in located]
    tokens = sum(len(one.ids) if name != "unke" else one.prompt_length for one in examples)
    assert errors[0] == pytest.approx(float(missing.square().sum()) / (tokens * 32), rel=1e-4)
    together, *alone = [texts[start : start + 4] for start in range(0, 20, 4)]
    assert alone[:2] == alone[2:] and together != alone[0] != alone[1] != together


def test_preservation_texts_hold_the_block_to_what_it_was(ready, tokenizer, monkeypatch):
    model, drift = ready(), {}
    monkeypatch.setattr(covariance, "preservation", lambda model: TEXTS[:1])
    (site,) = sites(model, (2,))
    ids = torch.tensor([covariance.token_ids(model, tokenizer, TEXTS[0])])
    for count in (0, 1):
        (before,) = look(model, ids, (site.block,))
        with edited(model, tokenizer, EDITS, quick("unke", preservation=count)) as m:
            (after,) = look(m, ids, (site.block,))
        drift[count] = float((after.output - before.output).norm())
    assert drift[1] < 0.5 * drift[0]


@pytest.mark.parametrize(("name", "family"), list(zip(WRITING, FAMILIES * 2, strict=False)))
def test_every_method_makes_its_windows_likelier_without_a_trace(ready, tokenizer, name, family):
    model, recipe = ready(family), quick(name, null_threshold=1e9)
    located = locate(model, recipe.examples(model, tokenizer, EDITS), recipe)
    old, snapshot = by_window(model, located), small.Snapshot(model)
    with pytest.raises(KeyError), edited(model, tokenizer, EDITS, recipe) as m:
        record = m.edit_record
        assert m is model and moved(m, snapshot.weights) == set(record.change_norm)
        assert "unke" not in name or all(".layers.2." in one for one in record.change_norm)
        assert min(record.change_norm.values()) > 0
        assert all(sum(one) > sum(was) for one, was in zip(by_window(m, located), old, strict=True))
        assert record.steps and record.losses
        raise KeyError
    snapshot.check()
    assert hooks(model) == 0


def test_a_block_that_diverges_is_an_error_and_no_silent_nan(ready, tokenizer):
    model, recipe = ready(), quick("unke", unke_rate=1e30)
    before = state(model)
    message = "UnKE: the block's error of edit 'ada', 'alan'.* is not finite after . steps"
    with pytest.raises(FloatingPointError, match=message):
        with edited(model, tokenizer, EDITS, recipe):
            pass
    assert not moved(model, before)


def test_in_context_editing_puts_the_passage_into_the_prompt_and_moves_no_weight(tiny, tokenizer):
    model = tiny()
    before = state(model)
    rest, what = {"kind": "detail", "reference": "Ada."}, "Who was that?"
    probes = [Probe(edit=edit.id, question=what, **rest) for edit in EDITS]
    told = [Probe(edit=e.id, question=f"Read this text: {e.answer}\n{what}", **rest) for e in EDITS]

    def read(m, probes):
        answers = answer(m, tokenizer, probes, max_new_tokens=9)
        return answers, target_log_probability(m, tokenizer, probes)

    expected, plain = read(model, told), read(model, probes)
    with edited(model, tokenizer, EDITS, "in_context") as m:
        assert read(m, probes) == expected != plain and not moved(m, before)
    assert read(model, probes) == plain
