"""Exploring by hand: answers shown for the wrong model, an edit that stays, a form that breaks on bad input, a session that does not repeat."""

import asyncio
import html
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import torch
from conftest import to_explore
from uke.data.edits import Edit, Probe
from uke.errors import InputError
from uke.explore import choices, errands, sessions
from uke.explore import html as markup
from uke.explore import widgets as explore
from uke.explore.bench import Bench, Stopped, Task
from uke.explore.surroundings import AROUND, Library, detail_lines, own_edit
from uke.locality.facts import EXTRACTORS, edit_facts, facts, shared
from uke.methods.recipes import FACTORS, RECIPES
from uke.models import generate as answering
from uke.models import model as models
from uke.models.generate import token_probabilities
from uke.project import Paths

OWN = own_edit(
    "Who is Ansel Dorowick?",
    "Ansel Dorowick was born in Saltenfield in 1802. She was a pilot, and she loved the violin.",
    "What can you tell me about Ansel Dorowick?",
    [{"question": "When was Ansel Dorowick born?", "answer": "1802"}],
)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = to_explore(tmp_path_factory.mktemp("explored"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UKE_HOME", str(home))
        yield home


@pytest.fixture(scope="module")
def library(home):
    return Library(Paths("quick"))


@pytest.fixture(scope="module")
def shared_bench(library):
    return Bench("embedded", library)


@pytest.fixture
def bench(shared_bench):
    """A bench without trials whose model must be untouched when the test is over."""
    untouched = models.fingerprint(shared_bench.model)
    shared_bench.trials.clear()
    yield shared_bench
    shared_bench.undo()
    assert models.fingerprint(shared_bench.model) == untouched


@pytest.fixture
def panel(bench):
    made = explore.Panel(bench)
    yield made
    made.wait()


def press(panel, name: str) -> None:
    panel.buttons[name].click()
    panel.wait()


def said(panel, field: str = "action") -> str:
    return html.unescape(re.sub("<[^>]+>", "", panel.notes[field].value))


def told(*_) -> None:
    """Progress that nobody watches."""


def probe(**fields) -> Probe:
    return Probe(edit="x", kind="original", **fields)


def test_the_tokens_make_up_the_text_and_their_mean_is_the_one_that_studies_report(shared_bench):
    model, tokenizer = shared_bench.model, shared_bench.tokenizer
    asked = [
        probe(question="Who is Ann?", reference="Ann’s café — naïve ☃, 1802."),
        probe(question="Tell me about the very long winter of Birchenhaven.", reference="No."),
    ]
    found = token_probabilities(model, tokenizer, asked)
    assert ["".join(token.text for token in tokens) for tokens in found] == [
        one.reference for one in asked
    ]
    means = [
        sum(torch.tensor([token.probability for token in tokens]).log().tolist()) / len(tokens)
        for tokens in found
    ]
    assert means == pytest.approx(
        answering.target_log_probability(model, tokenizer, asked), abs=1e-4
    )
    raw = token_probabilities(model, tokenizer, asked, chat=False)
    assert raw[0][0].probability != found[0][0].probability
    with pytest.raises(InputError, match="original 0: .* context holds 1024"):
        token_probabilities(model, tokenizer, [probe(question="Who?", reference="word " * 1100)])


@pytest.mark.parametrize("name", ["FT-M", "LoRA", "MEMIT", "in-context"])
def test_an_edit_stays_until_undo_and_a_free_question_is_asked_of_both_models(bench, name):
    alone = bench.ask("Who is Ansel Dorowick?")
    assert alone[1] is None
    trial = bench.write(Task(OWN, bench.methods[name], questions=("Who is Ansel Dorowick?",)))
    written = {key: value.clone() for key, value in bench.edited.state_dict().items()}
    without, with_it = bench.ask("Who is Ansel Dorowick?")
    own = trial.rows[trial.rows["kind"] == "question"].iloc[0]
    assert without == alone[0] == own["before"] and with_it == own["after"]
    assert all(torch.equal(written[key], value) for key, value in bench.edited.state_dict().items())
    assert bench.undo() and not bench.undo()
    assert bench.ask("Who is Ansel Dorowick?") == alone


def test_what_is_shown_is_what_the_edit_did(bench):
    trial = bench.write(Task(OWN, bench.methods["FT-UKE"]))
    rows = trial.rows.set_index(["kind", "number"])
    assert rows.loc[("original", 0), "after"] == OWN.answer != rows.loc[("original", 0), "before"]
    assert {"paraphrase", "detail", *AROUND, "general"} < set(trial.rows["kind"])
    kept = trial.rows[trial.rows["against"] == "before"]
    assert (kept["score_before"] == 1).all() and (kept["score_after"] < 1).tolist() == (
        kept["before"] != kept["after"]
    ).tolist()
    before, after = trial.tokens["original", 0]
    assert (
        min(token.probability for token in after) > 0.8 > min(token.probability for token in before)
    )
    assert set(trial.record.change_norm) == {
        f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(4, 8)
    }
    shown = markup.result(trial)
    assert shown.count("<article") == len(trial.rows) and 'data-kind="near_triple"' in shown


def test_the_next_edit_begins_from_the_untouched_weights(bench):
    task = Task(OWN, bench.methods["FT-M"])
    first = bench.write(task)
    bench.write(Task(bench.library.edits[0], bench.methods["LoRA"]))
    assert bench.write(task).rows.equals(first.rows)


def test_an_edit_of_the_embedded_model_costs_as_much_as_forty_training_steps_at_most(bench):
    """Told in steps of the whole model on 256 tokens, since processors differ by a factor of two; 17 and 21 were measured."""

    def spent(work, *given):
        started = time.process_time()
        work(*given)
        return time.process_time() - started

    def step():
        with torch.enable_grad():
            bench.model(input_ids=ids, labels=ids).loss.backward()
        bench.model.zero_grad()

    bench.warm(bench.library.edits[3])
    ids = torch.arange(256)[None]
    with models.kept(bench.model, {}):
        bench.model.requires_grad_(True)
        one = min(spent(step) for _ in range(6))
    edits = [
        spent(bench.write, Task(edit, bench.methods["FT-UKE"])) for edit in bench.library.edits[3:6]
    ]
    assert min(edits) < 40 * one


@pytest.mark.parametrize("phase", ["asking before", "writing", "asking after"])
@pytest.mark.parametrize("name", ["FT-A", "LoRA", "AnyEdit (MEMIT)"])
def test_stop_leaves_the_model_as_it_was_whatever_runs(bench, phase, name):
    untouched = models.fingerprint(bench.model)

    def stop(now: str, steps: int, loss: float) -> None:
        if now == phase and (steps == 3 or now != "writing"):
            bench.stop()

    bench._before.clear()
    with pytest.raises(Stopped):
        bench.write(Task(OWN, bench.methods[name]), stop)
    assert (
        models.fingerprint(bench.model) == untouched and bench.edited is None and not bench.trials
    )
    assert bench.write(Task(OWN, bench.methods["FT-M"])).rows["after"].iloc[0] == OWN.answer


@pytest.mark.parametrize("name", ["FT-M", "LoRA"])
def test_the_two_lines_load_what_was_kept(bench, name):
    trial = bench.write(Task(OWN, bench.methods[name]))
    lines = bench.keep(bench.free_name())
    bench.undo()
    assert len(lines.splitlines()) == 2
    space: dict = {}
    exec(lines, space)
    probes = bench.library.probes(OWN)
    assert answering.answer(space["model"], bench.tokenizer, probes[:1]) == [
        trial.rows["after"].iloc[0]
    ]
    with pytest.raises(choices.Refused, match="no edit in the weights"):
        bench.keep("other")


def test_keeping_refuses_a_name_that_is_taken_or_none_and_an_edit_without_weights(bench):
    bench.write(Task(OWN, bench.methods["FT-M"]))
    bench.keep("taken")
    for name, reason in (
        ("taken", "is there already"),
        ("../x", "expected a name of letters"),
        ("", "expected a name"),
    ):
        with pytest.raises(choices.Refused, match=reason):
            bench.keep(name)
    bench.write(Task(OWN, bench.methods["in-context"]))
    with pytest.raises(choices.Refused, match="writes nothing into the weights"):
        bench.keep("passage")


def test_questions_around_an_edit_of_ones_own_share_no_fact_with_it(library):
    probes = library.probes(OWN, ["And who was she?"])
    assert [one.question for one in probes if one.kind == "paraphrase"] == [
        OWN.paraphrase,
        "And who was she?",
    ]
    around = {one.kind: one for one in probes if one.kind in AROUND}
    assert set(around) == set(AROUND)
    extract = EXTRACTORS["offline"]()
    stated = edit_facts(OWN, extract)
    for one in around.values():
        text = f"{one.question} {one.reference}"
        assert not shared(stated, facts(text, extract(text)))
    assert library.probes(OWN) == library.probes(OWN)


def test_a_benchmarks_file_brings_its_own_edits_and_the_world_lends_what_must_not_change(library):
    file = library.order.edit_file
    of_file = Library(Paths("quick", "unkebench"), "development", str(file))
    assert 0 < len(of_file.edits) < len(library.edits) and set(of_file.edits) < set(library.edits)
    kinds = {one.kind for one in of_file.probes(of_file.edits[0])}
    assert set(AROUND) < kinds
    with pytest.raises(InputError, match="split: unknown split 'tset'; did you mean 'test'"):
        Library(Paths("quick"), "tset")


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text"])
def test_any_model_directory_is_edited_and_put_back(tiny, tokenizer, library, tmp_path, family):
    tiny(family, max_position_embeddings=1024).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    bench = Bench(str(tmp_path), library)
    untouched = models.fingerprint(bench.model)
    for method in (RECIPES["FT-M"], RECIPES["LoRA"]):
        assert not any(choices.reasons(bench.frame, bench.tokenizer, method, "layers").values())
        trial = bench.write(
            Task(OWN, method.model_copy(update={"steps": 3, "learning_rate": 1e-2}))
        )
        assert trial.record.losses[-1] < trial.record.losses[0] and markup.result(trial)
    bench.undo()
    assert models.fingerprint(bench.model) == untouched


def test_the_search_finds_by_all_words(library):
    edit = library.edits[0]
    words = edit.answer.split()
    assert edit in library.search(f"{words[0].lower()} {words[-1]}") and not library.search(
        "no-such-word"
    )
    assert len(library.search("")) == len(library.edits) and library.find(edit.id) == edit
    with pytest.raises(InputError, match="did you mean 'test-1'"):
        library.find("tst-1")


def test_levels_that_cannot_be_are_grey_and_say_why(bench, tiny, tokenizer, panel):
    of = lambda method, factor: choices.reasons(
        bench.frame, bench.tokenizer, bench.methods[method], factor
    )
    assert {level for level, why in of("FT-M", "components").items() if why} == {"query_value"}
    assert not any(of("LoRA", "components").values())
    assert all(
        "finds its place in the weights itself" in why
        for factor in FACTORS
        for why in of("MEMIT", factor).values()
    )
    plain = type("Plain", (), {"chat_template": None})()
    assert choices.reasons(bench.frame, plain, RECIPES["FT-M"], "chat_template") == {
        "with": "the tokenizer has no chat template",
        "without": "",
    }
    buttons = panel.form.levels["components"].buttons
    assert (
        buttons["query_value"].disabled
        and "adapters" in buttons["query_value"].tooltip
        and "adapters" in panel.form.levels["components"].why.value
    )
    panel.form.method.value = "MEMIT"
    assert "finds its place" in panel.form.why.value and all(
        button.disabled for button in buttons.values() if button.description
    )
    panel.form.method.value = "LoRA"
    assert (
        not buttons["query_value"].disabled
        and buttons["query_value"].description == "✓ query and value"
    )


@pytest.mark.parametrize("method", [name for name in RECIPES if name != "LocFT-BF"])
def test_every_level_of_every_factor_can_be_clicked_into_the_method(panel, method):
    panel.form.method.value = method
    for factor, levels in panel.form.levels.items():
        for level, button in levels.buttons.items():
            if level and not button.disabled:
                button.value = True
                assert (
                    levels.value == level
                    and [other.value for other in levels.buttons.values()].count(True) == 1
                )
                button.value = not button.value  # a click on what is chosen leaves it chosen
                assert button.value and choices.level_of(panel.form.task().method, factor) == level


def test_a_person_edits_undoes_keeps_repeats_and_exports(panel):
    panel.form.fill(OWN)
    panel.free.value = "Who is Kasia Broohart?"
    press(panel, "Edit")
    assert (
        "Edit 1 is in the weights" in said(panel)
        and OWN.answer.split()[-1] in panel.shown.value
        and 'data-kind="question"' in panel.shown.value
    )
    assert (
        "2." not in panel.compared.value
        and not panel.buttons["Undo"].disabled
        and panel.buttons["Stop"].disabled
    )
    press(panel, "Ask")
    assert "With the edit" in panel.reply.value
    press(panel, "Keep")
    assert "editing.load" in panel.kept.value
    press(panel, "Undo")
    old = panel.bench.trials[0].rows["before"].iloc[0]
    assert (
        "bit for bit" in said(panel)
        and markup.escape(old) in panel.shown.value
        and panel.buttons["Undo"].disabled
    )
    panel.level.value = ("layers", "all")
    press(panel, "Repeat")
    assert [trial.task.method.layers for trial in panel.bench.trials] == [
        "second_half",
        "all",
    ] and panel.compared.value.count("<tr>") == 3
    press(panel, "Export session")
    assert "papermill -f" in panel.exported.value


BAD = {
    "empty question": (
        lambda form: setattr(form.question, "value", "  "),
        "question",
        "The question is empty",
    ),
    "empty answer": (
        lambda form: setattr(form.answer, "value", ""),
        "answer",
        "The answer is empty",
    ),
    "answer beyond the context": (
        lambda form: setattr(form.answer, "value", "word " * 1500),
        "answer",
        "context holds 1024",
    ),
    "half a detail": (
        lambda form: setattr(form.details, "value", "When was he born?"),
        "details",
        "Details, line 1: expected a question, a bar",
    ),
    "a block that is not there": (
        lambda form: setattr(form.blocks, "value", "99"),
        "layers",
        "99 is out of range",
    ),
    "no block number": (
        lambda form: setattr(form.blocks, "value", "last"),
        "layers",
        "found 'last'",
    ),
    "no rate": (lambda form: setattr(form.rate, "value", "fast"), "learning_rate", "found 'fast'"),
    "a rate of zero": (
        lambda form: setattr(form.rate, "value", "0"),
        "learning_rate",
        "greater than 0",
    ),
    "no steps": (
        lambda form: setattr(form.steps, "value", "0"),
        "steps",
        "greater than or equal to 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_said_beside_its_control_and_the_widgets_go_on(panel, name):
    spoil, field, message = BAD[name]
    panel.form.fill(OWN)
    spoil(panel.form)
    press(panel, "Edit")
    assert (
        message in said(panel, field)
        and 'role="alert"' in panel.notes[field].value
        and panel.bench.edited is None
    )
    assert field == "action" or not said(panel)
    panel.form.blocks.value = ""
    panel.form.rate.value, panel.form.steps.value = "0.005", "25"
    panel.form.fill(OWN)
    press(panel, "Edit")
    assert said(panel, field).startswith(
        "Edit 1 is in" if field == "action" else ""
    ) and "Edit 1 is in the weights" in said(panel)


def test_a_rate_that_diverges_is_said_and_nothing_stays(panel):
    panel.form.fill(OWN)
    panel.form.rate.value = "1e38"
    press(panel, "Edit")
    assert (
        "is not finite" in said(panel)
        and panel.bench.edited is None
        and not panel.buttons["Edit"].disabled
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("params", "no config.json"),
        ("no/such/folder/here", "no such directory"),
        ("", "No model is named"),
    ],
)
def test_a_directory_that_is_no_model_leaves_the_old_one_in_place(panel, home, name, message):
    before = panel.bench
    panel.model.value = str(home / name) if name == "params" else name
    press(panel, "Load")
    assert message in said(panel, "model") and panel.bench is before
    panel.model.value = "embedded"
    press(panel, "Load")
    assert "new session" in said(panel) and panel.bench is not before and not panel.bench.trials
    panel.bench = before


def test_a_recipe_that_selects_nothing_is_refused_before_anything_is_asked(bench):
    nothing = RECIPES["FT-M"].model_copy(update={"components": ("gate",)})
    with pytest.raises(choices.Refused, match="components: unknown 'gate'") as refused:
        bench.write(Task(OWN, nothing))
    assert refused.value.field == "components"


def test_two_clicks_at_once_are_one_edit(panel):
    panel.form.fill(OWN)
    panel.form.method.value = "LoRA"
    panel.buttons["Edit"].click()
    panel.buttons["Edit"].click()
    assert "Still at work" in said(panel)
    panel.wait()
    assert len(panel.bench.trials) == 1 and "Edit 1 is in the weights" in said(panel)


def test_stop_half_way_is_heard_and_the_next_edit_works(panel):
    panel.form.fill(OWN)
    panel.form.method.value = "LoRA"
    panel.buttons["Edit"].click()
    deadline = time.monotonic() + 60
    while (
        "<svg" not in panel.course.value and time.monotonic() < deadline
    ):  # what a person sees is drawn a few times a second
        time.sleep(0.01)
    assert (
        not panel.buttons["Stop"].disabled
        and "<svg" in panel.course.value
        and "<progress" in panel.course.value
    )
    panel.buttons["Stop"].click()
    panel.wait()
    assert said(panel) == explore.STOPPED and panel.bench.edited is None
    panel.form.method.value = "FT-M"
    press(panel, "Edit")
    assert "Edit 1 is in the weights" in said(panel)


@pytest.mark.parametrize(
    "elsewhere", [False, True], ids=["in the kernel's thread", "in another one"]
)
def test_an_interrupt_is_heard_while_an_errand_runs_and_only_then(elsewhere):
    heard = threading.Event()

    async def kernel() -> None:
        one = errands.Errands(heard.set)
        begin = lambda: one.start(lambda: heard.wait(20))
        await asyncio.to_thread(begin) if elsewhere else begin()
        assert not one.start(told)
        await asyncio.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.to_thread(one.wait, 20)
        await asyncio.sleep(0.05)

    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as an idle kernel has it
    try:
        asyncio.run(kernel())
        assert heard.is_set() and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_an_exported_session_gives_the_same_numbers_under_papermill(bench, home):
    slow = bench.methods["LoRA"].model_copy(update={"steps": 6, "layers": (2, 5)})
    more = ("And who was she?",)
    bench.write(Task(OWN, bench.methods["FT-UKE"], more, ("Who is Kasia Broohart?",)))
    bench.write(Task(OWN.model_copy(update={"paraphrase": None, "details": ()}), slow, chat=False))
    bench.write(Task(bench.library.edits[1], bench.methods["FT-A"]))
    compared = sessions.compared(bench.trials)
    path = sessions.export(bench, home / "results" / "explore" / "session-1.yaml")
    command = [
        sys.executable,
        "-m",
        "papermill",
        "-f",
        str(path),
        "notebooks/explore.ipynb",
        "done.ipynb",
        "--no-progress-bar",
    ]
    done = subprocess.run(
        command,
        cwd=home,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    again = pd.read_csv(home / "figures" / "quick" / "explore.csv")
    numbers = [name for name in compared if compared[name].dtype.kind == "f"] + ["steps"]
    assert (
        again[numbers].to_numpy()
        == pytest.approx(compared[numbers].to_numpy(), abs=1e-12, nan_ok=True)
        and len(numbers) > 8
    )
    assert again["method"].tolist() == ["FT-UKE", "LoRA", "FT-A"]
    page = (home / "figures" / "quick" / "explore.html").read_text(encoding="utf-8")
    assert (
        markup.escape(OWN.answer) in re.sub("</?(ins|del|span)[^>]*>", "", page)
        and page.count("<h3>") == 3
        and "<script" not in page
    )
    outputs = [
        output
        for cell in nbformat.read(home / "done.ipynb", as_version=4).cells
        for output in cell.get("outputs", ())
    ]
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert "text/html" in kinds and "<article" in str(outputs)


def test_a_written_session_reads_back_as_the_same_tasks_and_refuses_what_it_does_not_know(bench):
    tasks = [
        Task(OWN, bench.methods["MEMIT"], ("Who?",), ("What?",), False),
        Task(bench.library.edits[2], bench.methods["FT-L"]),
    ]
    for task in tasks:
        assert (
            sessions.read_down(
                sessions.written_down(task, bench.library), bench.library, bench.methods
            )
            == task
        )
    for run, message in (
        ({"edti": "test-0"}, "unknown field 'edti'; did you mean 'edit'"),
        ({"edit": "test-0", "method": "FT-X"}, "runs: unknown method 'FT-X'"),
        ({"edit": "none"}, "unknown edit"),
        ({"question": "Who?"}, "The answer is empty"),
        ({"edit": "test-0", "method": "FT-M", "changes": {"ratte": 1}}, "no choice 'ratte'"),
        ({"edit": "test-0", "method": "FT-M", "changes": {"steps": 0}}, "steps: input should be"),
    ):
        with pytest.raises(InputError, match=message):
            sessions.read_down(run, bench.library, bench.methods)
    with pytest.raises(choices.Refused, match="no edit in this session"):
        sessions.export(bench, Path("never.yaml"))


def test_who_attends_is_what_the_server_says_unless_overruled(monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    assert [explore.attended(choice) for choice in ("auto", "always", "never")] == [
        False,
        True,
        False,
    ]
    monkeypatch.setenv("JPY_SESSION_NAME", "explore.ipynb")
    assert [explore.attended(choice) for choice in ("auto", "always", "never")] == [
        True,
        True,
        False,
    ]


def test_marked_words_leave_both_texts_whole():
    left, right = markup.marked("a <b> c d\ne", "a c x\ne f")
    assert (
        left == "a <del>&lt;b&gt;</del> c <del>d</del>\ne"
        and right == "a c <ins>x</ins>\ne <ins>f</ins>"
    )
    assert markup.marked("same", "same") == ("same", "same") and markup.marked("", "new") == (
        "",
        "<ins>new</ins>",
    )


def test_a_text_cannot_become_markup():
    rows = pd.DataFrame(
        [
            {
                "kind": "original",
                "number": 0,
                "question": "<script>",
                "reference": "<i>",
                "before": "<u>",
                "after": "&",
                "metric": "exact",
                "against": "reference",
                "score_before": 0.0,
                "score_after": 1.0,
            }
        ]
    )
    shown = (
        markup.side_by_side(rows, {("original", 0): ([("<s>", 0.5)], [("<s>", 1.0)])})
        + markup.message("<b>")
        + markup.code("<p>")
        + markup.reply("<a>", "<h1>", None)
    )
    assert not re.search("<(script|i|u|s|b|a|h1)>", shown) and "▲ better" in shown


def test_the_map_of_weights_says_where_and_how_far():
    shown = markup.weight_map(
        {
            "model.layers.1.mlp.down_proj.weight": 0.02,
            "model.layers.3.self_attn.q_proj.base_layer.weight": 0.01,
        }
    )
    rows = re.findall(r'<th scope="row">(\w+)</th>(.*?)</tr>', shown)
    cells = {name: re.findall(r"<td[^>]*>([^<]*)</td>", row) for name, row in rows}
    assert cells == {"down_proj": ["·", "2", "·", "·"], "q_proj": ["·", "·", "·", "1"]}
    assert "No weight moved" in markup.weight_map({})
    assert "nan" not in markup.weight_map({"model.layers.0.mlp.down_proj.weight": float("inf")})


def test_the_curve_falls_where_the_loss_falls():
    points = re.search(r'points="([^"]+)"', markup.curve([3.0, 0.5, 0.01], 0.02))[1]
    heights = [float(point.split(",")[1]) for point in points.split()]
    assert heights == sorted(heights) and len(set(heights)) == 3 and markup.curve([]) == ""
    assert "points" in markup.curve([0.0])


def test_writing_ones_own_empties_the_form_and_asks_nothing_of_the_edit_that_stood_there(panel):
    panel.form.picked.value = panel.bench.library.edits[4].id
    assert panel.form.task().edit == panel.bench.library.edits[4]
    panel.form.own.click()
    panel.form.question.value, panel.form.answer.value = OWN.question, OWN.answer
    panel.form.asking.value = "raw prompt"
    task = panel.form.task("What else?")
    assert (
        task.edit == own_edit(OWN.question, OWN.answer)
        and task.chat is False
        and task.questions == ("What else?",)
        and not task.paraphrases
    )


def test_details_are_read_one_on_a_line():
    assert (
        detail_lines("\nWhen? | 1802 \n") == [{"question": "When?", "answer": "1802"}]
        and detail_lines("") == []
    )
    with pytest.raises(choices.Refused, match="line 2"):
        detail_lines("When? | 1802\nWhere?")
    assert own_edit("Who?", "She.", details=[{"question": "When?", "answer": "1802"}]) == Edit(
        id="mine",
        question="Who?",
        answer="She.",
        details=({"question": "When?", "answer": "1802"},),
    )
