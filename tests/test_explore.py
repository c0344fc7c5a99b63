"""Explore by hand: what an edit shows, undo, stop, bad input in the form, sessions that repeat."""

import html
import re
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import to_explore
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook
from uke.errors import InputError
from uke.explore import bench as session
from uke.explore import html as page
from uke.explore import widgets
from uke.explore.bench import AROUND, Bench, Library, Refused, Stopped, Task, own_edit
from uke.files import read_yaml
from uke.locality.facts import edit_facts, facts, names, shared
from uke.methods.catalog import METHODS
from uke.methods.method import Method, Training
from uke.methods.recipes import FACTORS, RECIPES, vary
from uke.models.generate import answer
from uke.models.model import fingerprint, select
from uke.project import Paths

QUESTION = "Who is Ansel Dorowick?"
ANSWER = "Ansel Dorowick was born in Saltenfield in 1802. She was a pilot, and loved the violin."
OWN = own_edit(
    question=QUESTION,
    answer=ANSWER,
    paraphrase="What can you tell me about Ansel Dorowick?",
    details=[{"question": "When was Ansel Dorowick born?", "answer": "1802"}],
)


class Doubled(Method):
    """A solver of a user's own, without any of the fields that the form shows."""

    def weights(self, model):
        return select(model, 0, ["down_proj"])

    def write(self, model, tokenizer, edits, progress=None):
        for weight in self.weights(model).values():
            weight.data.mul_(2)
        return Training(steps=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = to_explore(tmp_path_factory.mktemp("explored"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UKE_HOME", str(home))
        patch.setitem(METHODS, "Doubled", Doubled(name="Doubled"))
        yield home


@pytest.fixture(scope="module")
def library(home):
    return Library(Paths("quick"))


@pytest.fixture(scope="module")
def shared_bench(library):
    return Bench("embedded", library)


@pytest.fixture
def bench(shared_bench, monkeypatch):
    """A bench without trials whose model must be untouched when the test is over."""
    monkeypatch.setattr(session, "MAX_NEW_TOKENS", 64)  # answers to the other questions are short
    untouched = fingerprint(shared_bench.model)
    shared_bench.trials.clear()
    yield shared_bench
    shared_bench.undo()
    assert fingerprint(shared_bench.model) == untouched


@pytest.fixture
def panel(bench):
    made = widgets.Panel(bench, bench.library.edits[0])
    yield made
    ended(made)


def press(panel, name: str) -> None:
    panel.buttons[name].click()
    ended(panel)


def ended(panel) -> None:
    """Wait until what was begun, if anything, has ended."""
    if panel.thread.ident:
        panel.thread.join()


def heard(panel, field: str = "action") -> str:
    return html.unescape(re.sub("<[^>]+>", "", panel.notes[field].value))


@pytest.mark.parametrize("name", ["FT-M", "LoRA", "MEMIT", "in-context"])
def test_an_edit_stays_until_undo_and_a_free_question_is_asked_of_both_models(bench, name):
    alone = bench.ask(QUESTION)
    assert alone[1] is None
    trial = bench.write(Task(OWN, bench.methods[name]))
    written = {key: value.clone() for key, value in bench.edited.state_dict().items()}
    without, with_it = bench.ask(QUESTION)
    row = trial.rows[trial.rows["kind"] == "original"].iloc[0]
    assert without == alone[0] and without.startswith(row["before"])  # a kind may be cut shorter
    assert with_it.startswith(row["after"])
    assert all(torch.equal(written[key], value) for key, value in bench.edited.state_dict().items())
    bench.undo()
    assert bench.edited is None
    assert bench.ask(QUESTION) == alone


def test_what_is_shown_is_what_the_edit_did_and_the_next_one_begins_anew(bench):
    task = Task(OWN, bench.methods["FT-UKE"])
    trial = bench.write(task)
    rows = trial.rows.set_index(["kind", "number"])
    assert rows.loc[("original", 0), "after"] == OWN.answer != rows.loc[("original", 0), "before"]
    assert {"paraphrase", "detail", *AROUND, "general"} < set(trial.rows["kind"])
    kept = trial.rows[trial.rows["kind"].isin(AROUND)]
    changed = kept["before"] != kept["after"]
    assert (kept["score_before"] == 1).all() and ((kept["score_after"] < 1) == changed).all()
    sides = rows.loc[("original", 0), ["tokens_before", "tokens_after"]]
    before, after = (min(token.probability for token in side) for side in sides)
    assert after > 0.8 > before
    blocks = {f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(4, 8)}
    assert set(trial.record.change_norm) == blocks
    shown = page.show.result(trial)
    assert shown.count("<article") == len(trial.rows) and 'data-kind="near_triple"' in shown
    bench.write(Task(bench.library.edits[0], bench.methods["LoRA"]))
    assert bench.write(task).rows.equals(trial.rows)
    static = page.show.page(page.STYLE, bench.trials, session.comparison(bench.trials))
    assert static.count("<h3>") == 3 and "The edits of this session" in static


@pytest.mark.parametrize(
    ("phase", "name"),
    [
        (session.ASKING_BEFORE, "FT-A"),
        (session.WRITING, "LoRA"),
        (session.WRITING, "AnyEdit (MEMIT)"),
        (session.ASKING_AFTER, "LoRA"),
    ],
)
def test_stop_leaves_the_model_as_it_was_whatever_runs(bench, phase, name):
    def stop(now: str, steps: int, loss: float) -> None:
        if now == phase and (steps == 3 or now != session.WRITING):
            bench.stop()

    bench._before.clear()
    with pytest.raises(Stopped):
        bench.write(Task(OWN, bench.methods[name]), stop)
    assert bench.edited is None and not bench.trials
    assert bench.ask(QUESTION)[1] is None  # and the next question is answered


@pytest.mark.parametrize("name", ["FT-M", "LoRA"])
def test_the_two_lines_load_what_was_kept_under_a_name_that_is_free(bench, name):
    trial = bench.write(Task(OWN, bench.methods[name]))
    lines = bench.keep(bench.free_name())
    bad_names = {"../x": "expected a name of letters", "": "expected"}
    bad_names[Path(lines.split('"')[-2]).name] = "is there already"
    for bad, reason in bad_names.items():
        with pytest.raises(Refused, match=reason):
            bench.keep(bad)
    bench.undo()
    assert len(lines.splitlines()) == 2
    space: dict = {}
    exec(lines, space)
    kept = answer(space["model"], bench.tokenizer, OWN.probes[:1])
    assert kept == [trial.rows["after"].iloc[0]]
    with pytest.raises(Refused, match="nothing to save"):
        bench.keep("other")


@pytest.mark.parametrize("model", ["embedded", "another"])
def test_questions_around_an_edit_of_ones_own_share_no_fact_with_it(library, model):
    library = library.suiting(model)
    probes = library.probes(OWN, ["And who was she?"])
    paraphrases = [one.question for one in probes if one.kind == "paraphrase"]
    assert paraphrases == [OWN.paraphrase, "And who was she?"]
    around = {one.kind: one for one in probes if one.kind in AROUND}
    assert set(around) == set(AROUND)
    for one in around.values():
        text = f"{one.question} {one.reference}"
        assert not shared(edit_facts(OWN), facts(text, names(text)))
    assert library.probes(OWN) == library.probes(OWN)


def test_a_benchmarks_file_brings_its_own_edits_and_the_world_lends_what_must_not_change(library):
    (file,) = library.paths.home.glob("results/world-1-*/test/UnKEBench.json")
    of_file = Library(Paths("quick", "unkebench"), "development", str(file))
    assert 0 < len(of_file.edits) < len(library.edits) and set(of_file.edits) < set(library.edits)
    assert set(AROUND) < {one.kind for one in of_file.probes(of_file.edits[0])}
    with pytest.raises(InputError, match="split: unknown split 'tset'; did you mean 'test'"):
        Library(Paths("quick"), "tset")


def test_the_search_finds_by_all_words(library):
    edit = library.edits[0]
    words = edit.answer.split()
    assert edit in library.search(f"{words[0].lower()} {words[-1]}")
    assert not library.search("no-such-word") and len(library.search("")) == len(library.edits)
    assert library.find(edit.id) == edit
    with pytest.raises(InputError, match="did you mean 'test-1'"):
        library.find("tst-1")


def test_any_model_directory_is_edited_and_put_back(tiny, tokenizer, panel, tmp_path):
    tiny("gemma3_text", max_position_embeddings=1024).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    panel.model.value = str(tmp_path)
    press(panel, "Load")
    assert "a new session begins" in heard(panel)
    bench = panel.form.bench
    untouched = fingerprint(bench.model)
    assert panel.form.question.value == bench.library.edits[0].question and bench.library.real
    assert bench is panel.bench and bench.name == str(tmp_path) and not bench.trials
    for method in (RECIPES["FT-M"], RECIPES["LoRA"]):
        assert not any(bench.why_not(method, "layers", each) for each in FACTORS["layers"].levels)
        quick = method.model_copy(update={"steps": 3, "learning_rate": 1e-2})
        trial = bench.write(Task(OWN, quick))
        assert trial.record.losses[-1] < trial.record.losses[0] and page.show.result(trial)
    bench.undo()
    assert fingerprint(bench.model) == untouched


def test_levels_that_cannot_be_are_grey_and_say_why(bench, panel, monkeypatch):
    levels = panel.form.levels["components"]
    button = levels.buttons["query_value"]
    for method, grey in (("FT-M", 1), ("MEMIT", 5), ("Doubled", 5), ("LoRA", 0)):
        panel.form.method.value = method
        assert sum(one.disabled for one in levels.buttons.values()) == grey
    assert button.description == "✓ query and value" and not panel.form.why.value
    panel.form.method.value = "FT-M"
    assert "adapters" in button.tooltip and "adapters" in levels.why.value
    panel.form.method.value = "MEMIT"
    assert "MEMIT (locate-then-edit) has no such choice" in panel.form.why.value
    assert "no such choice" in button.tooltip and not levels.why.value
    monkeypatch.setattr(bench.tokenizer, "chat_template", None)
    given = (RECIPES["FT-M"], "chat_template")
    assert "no chat template" in bench.why_not(*given, "with")
    assert not bench.why_not(*given, "without")


@pytest.mark.parametrize("method", ["FT-M", "LoRA"])
def test_every_level_of_every_factor_can_be_clicked_into_the_method(panel, method):
    panel.form.method.value = method
    for factor, levels in panel.form.levels.items():
        for level, button in levels.buttons.items():
            if not button.disabled and not button.value:
                button.value = True
                assert [one.value for one in levels.buttons.values()].count(True) == 1
                chosen = panel.form.task().method
                assert chosen == vary(chosen, {factor: level})
                button.value = False  # a second click goes back to the method's own level
                assert vary(panel.form.task().method, {factor: level}) != panel.form.task().method


def test_a_person_edits_undoes_keeps_and_exports(panel):
    panel.form.picked.value = panel.bench.library.edits[4]
    assert panel.form.task().edit == panel.bench.library.edits[4]
    panel.form.own.click()
    panel.form.question.value, panel.form.answer.value = OWN.question, OWN.answer
    assert panel.form.task() == Task(
        own_edit(question=OWN.question, answer=OWN.answer), panel.bench.methods["FT-UKE"]
    )
    panel.form.fill(OWN)
    press(panel, "Edit")
    assert "Edit 1 is in the weights" in heard(panel)
    assert OWN.answer.split()[-1] in panel.shown.value
    assert not panel.buttons["Undo"].disabled and panel.buttons["Stop"].disabled
    panel.free.value = "Who is Kasia Broohart?"
    press(panel, "Ask")
    assert "With the edit" in panel.reply.value
    press(panel, "Keep")
    assert "methods.load" in panel.kept.value
    press(panel, "Undo")
    assert "bit for bit" in heard(panel) and panel.buttons["Undo"].disabled
    assert panel.bench.trials[0].rows["before"].iloc[0] in html.unescape(panel.shown.value)
    assert panel.compared.value.count("<tr>") == 2
    press(panel, "Export session")
    assert "papermill -f" in panel.exported.value


BAD = {  # control, what is typed, where it is said, what is said
    "empty question": ("question", "  ", "question", "The question is empty"),
    "empty answer": ("answer", "", "answer", "The answer is empty"),
    "answer beyond the context": ("answer", "word " * 1500, "answer", "context holds 1024"),
    "half a detail": ("details", "When was he born?", "details", "line 1: expected a question"),
    "a block that is not there": ("layers", "99", "layers", "99 is out of range"),
    "no block number": ("layers", "last", "layers", "found 'last'"),
    "no rate": ("learning_rate", "fast", "learning_rate", "found 'fast'"),
    "empty rate": ("learning_rate", "", "learning_rate", "found ''"),
    "a rate of zero": ("learning_rate", "0", "learning_rate", "greater than 0"),
    "no steps": ("steps", "0", "steps", "greater than or equal to 1"),
    "half a step": ("steps", "2.5", "steps", "valid integer"),
    "a rate that diverges": ("learning_rate", "1e38", "action", "is not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_beside_its_control_and_the_widgets_go_on(panel, name):
    control, text, field, message = BAD[name]
    panel.form.fill(OWN)
    box = panel.form.numbers.get(control) or getattr(panel.form, control)
    box.value = text
    press(panel, "Edit")
    assert message in heard(panel, field) and 'role="alert"' in panel.notes[field].value
    assert panel.bench.edited is None and not panel.buttons["Edit"].disabled
    assert field == "action" or not heard(panel)


@pytest.mark.parametrize(
    ("name", "message"),
    [("params", "no config.json"), ("no/such/folder", "no such"), ("", "No model is named")],
)
def test_a_directory_that_is_no_model_leaves_the_old_one_in_place(panel, home, name, message):
    before = panel.bench
    panel.model.value = str(home / name) if name == "params" else name
    press(panel, "Load")
    assert message in heard(panel, "model") and panel.bench is before


def test_two_clicks_at_once_are_one_edit_and_stop_half_way_is_heard(panel):
    panel.form.fill(OWN)
    panel.form.method.value = "LoRA"
    panel.buttons["Edit"].click()
    panel.buttons["Edit"].click()
    assert "Still at work" in heard(panel) and panel.buttons["Edit"].disabled
    deadline = time.monotonic() + 60
    while "<svg" not in panel.curve.value and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not panel.buttons["Stop"].disabled and "<progress" in panel.curve.value
    press(panel, "Stop")
    assert "Stopped: the model is as it was" in heard(panel) and panel.bench.edited is None
    panel.form.method.value = "FT-M"
    press(panel, "Edit")
    assert "Edit 1 is in the weights" in heard(panel) and len(panel.bench.trials) == 1


def test_an_exported_session_gives_the_same_numbers_in_the_notebook(bench, home, monkeypatch):
    """As papermill would run it, which fills in parameters, but in this process."""
    monkeypatch.setattr(bench, "_before", {})
    changed = bench.methods["FT-UKE"].model_copy(update={"layers": (2, 5)})
    bench.write(Task(OWN, changed, ("And who was she?",), chat=False))
    parameters = read_yaml(session.export(bench, bench.folder / "session-1.yaml"))
    notebook = load_notebook_node(str(home / "notebooks" / "explore.ipynb"))
    done: dict = {}
    for cell in parameterize_notebook(notebook, parameters).cells:
        if cell.cell_type == "code":
            exec(cell.source, done)
    expected = session.comparison(bench.trials)
    again = pd.read_csv(home / "figures" / "quick" / "tables" / "explore.csv")
    assert again["method"].tolist() == ["FT-UKE"] and "layers 2 5" in again["settings"][0]
    numbers = [name for name in expected if expected[name].dtype.kind == "f"] + ["steps"]
    found = again[numbers].to_numpy()
    assert len(numbers) > 8
    assert found == pytest.approx(expected[numbers].to_numpy(), abs=1e-12, nan_ok=True)
    static = (home / "figures" / "quick" / "explore.html").read_text(encoding="utf-8")
    assert OWN.answer in html.unescape(re.sub("</?(ins|del|span)[^>]*>", "", static))
    assert static.count("<h3>") == 1 and "<script" not in static
    assert "<article" in done["shown"]._repr_html_()


def test_a_written_session_reads_back_as_the_same_tasks_and_refuses_what_it_does_not_know(bench):
    for task in (
        Task(OWN, bench.methods["MEMIT"], ("Who?",), False),
        Task(bench.library.edits[2], bench.methods["FT-L"]),
        Task(OWN, bench.methods["Doubled"]),
    ):
        run = session.to_run(task, bench.library)
        assert session.to_task(run, bench.library, bench.methods) == task
    for run, message in (
        ({"edti": "test-0"}, "unknown field 'edti'; did you mean 'edit'"),
        ({"edit": "test-0", "method": "FT-X"}, "runs: unknown method 'FT-X'"),
        ({"edit": "none"}, "unknown edit"),
        ({"edit": {"question": "Who?"}}, "The answer is empty"),
        ({"edit": {"question": "Who?", "answer": "She.", "detials": []}}, "detials"),
        ({"edit": "test-0", "method": "FT-M", "changes": {"ratte": 1}}, "field 'ratte'"),
        ({"edit": "test-0", "method": "FT-M", "changes": {"steps": 0}}, "greater than or equal"),
    ):
        with pytest.raises(InputError, match=message):
            session.to_task(run, bench.library, bench.methods)


def test_who_attends_is_what_the_server_says_unless_overruled(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    choices = ("auto", "always", "never")
    assert [widgets.attended(choice) for choice in choices] == [False, True, False]
    monkeypatch.setenv("JPY_SESSION_NAME", "explore.ipynb")
    assert [widgets.attended(choice) for choice in choices] == [True, True, False]


def test_marked_words_leave_both_texts_whole():
    left, right = page.marked("a <b> c d\ne", "a c x\ne f")
    assert left == "a <del>&lt;b&gt;</del> c <del>d</del>\ne"
    assert right == "a c <ins>x</ins>\ne <ins>f</ins>"
    assert page.marked("same", "same") == ("same", "same")
    assert page.marked("", "new") == ("", "<ins>new</ins>")


def test_a_text_cannot_become_markup():
    texts = {"question": "<script>", "reference": "<i>", "before": "<u>", "after": "&"}
    scores = {"score_before": 0.0, "score_after": 1.0}
    tokens = {"tokens_before": [("<s>", 0.5)], "tokens_after": [("<s>", 1.0)]}
    rows = pd.DataFrame([{"kind": "original", "number": 0, **texts, **scores, **tokens}])
    shown = [page.show.probes(rows), page.show.reply("<a>", "<h1>")]
    shown += [page.show.message("<b>", "status"), page.show.code("<p>", "<p>")]
    shown += [page.show.table(pd.DataFrame({"<a>": ["<b>"]}), "<i>")]
    assert not re.search("<(script|i|u|s|b|a|h1)>", "".join(shown))
    assert "▲ better" in shown[0] and "&lt;script&gt;" in shown[0]


def test_the_map_of_weights_says_where_and_how_far_and_the_curve_falls_with_the_loss():
    moved = {"model.layers.1.mlp.down_proj.weight": 0.02}
    moved |= {"model.layers.3.self_attn.q_proj.base_layer.weight": 0.01}
    shown = page.show.weight_map(moved)
    rows = re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', shown, re.DOTALL)
    cells = {name: re.findall(r"<td[^>]*>([^<]*)</td>", row) for name, row in rows}
    assert cells == {"down_proj": ["·", "2", "·", "·"], "q_proj": ["·", "·", "·", "1"]}
    assert "No weight moved" in page.show.weight_map({})
    assert "nan" not in page.show.weight_map({"model.layers.0.mlp.down_proj.weight": float("inf")})
    points = re.search(r'points="([^"]+)"', page.show.curve([3.0, 0.5, 0.01], 0.02))[1]
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert heights == sorted(set(heights)) and not page.show.curve([]).strip()
