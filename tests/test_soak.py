"""The campaign that looks for faults: a little of it in `make test`, all of it in `make soak`.

`make soak PART=kills` runs one part, SHARE=0.1 a tenth of each. A part whose line of this very
commit stands in figures/reliability.csv is not run again.
"""

import contextlib
import copy
import hashlib
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import safetensors.torch
import torch
import yaml
from conftest import SENTENCES, TEMPLATE
from filelock import FileLock
from hypothesis import HealthCheck, given
from hypothesis import settings as bounds
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from small import EDITS, QUICK, TEXTS, Snapshot, baseline, toys
from test_cli import write
from test_edits import RECORDS, TRIPLE, probe
from test_studies import LORA, MEASURED, MEMIT
from test_studies import QUICK as FT_M
from uke.cli import params
from uke.cli.execute import Failure, Job, execute, processor
from uke.data import documents, formats
from uke.data.edits import Edit
from uke.errors import InputError
from uke.explore.html import Page, marked
from uke.files import read_yaml
from uke.locality import card
from uke.methods import catalog, edited, edited_each, load, save, sequence
from uke.methods.locate_edit import covariance
from uke.methods.recipes import BASELINES
from uke.models import model as models
from uke.models.generate import AnswerCache
from uke.models.prompts import example
from uke.project import Paths
from uke.results.metrics import score
from uke.study.study import Study

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import fetch
import plan

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "figures" / "reliability.csv"
SHARE = float(os.environ.get("SHARE") or 0)
COMMIT = subprocess.getoutput(f"git -C '{ROOT}' rev-parse --short HEAD")
pytestmark = pytest.mark.soak
set_hypothesis_home_dir(ROOT / ".pytest_cache" / "hypothesis")


class Part:
    """The cases of a part of the campaign, and what went wrong in them."""

    def __init__(self) -> None:
        self.done, self.all, self.faults = 0, 0, []

    def cases(self, few: int, every: int):
        """Yield a generator of its own for each case: few, or a share of them all."""
        self.all = every
        for number in range(max(few, round(SHARE * every))):
            self.done += 1
            yield random.Random(number)

    def examples(self, few: int, every: int, strategy):
        """Run a test at once on examples of a strategy; a fault is the least that it fails on."""
        self.all, most = every, max(few, round(SHARE * every))
        bound = bounds(max_examples=most, derandomize=True, database=None, deadline=None)

        def run(test) -> None:
            def case(value):
                self.done = min(self.done + 1, most)  # it fails more often until that is found
                test(value)

            try:
                bounds(bound, suppress_health_check=HealthCheck)(given(strategy)(case))()
            except AssertionError as error:
                self.check(False, str(error))

        return run

    def check(self, holds: bool, fault: str) -> None:
        self.faults += [] if holds else [fault]


@pytest.fixture
def part(request):
    """A part by the test's name; a share of the campaign leaves a line of it in the table."""
    name, found, started = request.node.name.removeprefix("test_"), Part(), time.time()
    read = {"index_col": "part", "dtype": {"commit": str}}
    table = pd.read_csv(TABLE, **read) if SHARE and TABLE.is_file() else pd.DataFrame()
    if name in table.index and table.loc[name, "commit"] == COMMIT:
        if table.loc[name, "cases"] >= SHARE * table.loc[name, "of"]:
            pytest.skip("done at this commit")
    yield found
    found.check(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2**22, "4 GiB of memory")
    if SHARE and found.done:
        line = {"cases": found.done, "of": found.all, "faults": len(found.faults)}
        line |= {"seconds": round(time.time() - started), "commit": COMMIT, "machine": processor()}
        with FileLock(TABLE.with_suffix(".lock")):
            table = pd.read_csv(TABLE, **read) if TABLE.is_file() else table
            others = table.drop(index=name, errors="ignore")
            table = pd.concat([others, pd.DataFrame(line, index=[name])]).rename_axis("part")
            table.sort_index().to_csv(TABLE)
    assert not found.faults, found.faults[:5]


# --- Studies: disturbed and resumed, or done otherwise, they have the rows of one left in peace.


def begun(work) -> int:
    """Run `work` in a child of this process; return the child's id."""
    if child := os.fork():
        return child
    with contextlib.suppress(BaseException):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work()
        os._exit(0)
    os._exit(1)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


ALL = (FT_M, MEMIT, LORA)
FEW, EDITED = (ALL, 4) if SHARE else (ALL[:2], 2)  # where the small form has fewer


def study(model, tokenizer, folder, methods=FEW, **options) -> pd.DataFrame:
    """The rows of a small study in a folder, made or resumed there."""
    os.environ["UKE_HOME"] = str(folder)
    covariance.measure(model, tokenizer, SENTENCES, (1, 2))
    dataset = toys(struct_trip="was born").first(EDITED)
    own = Study("soak", dataset, (model, tokenizer), False, max_new_tokens=4, **options)
    for method in methods:
        own.run(method)
    frame = pd.concat([own.read(), own.before]).drop(columns=MEASURED)
    return frame.sort_values(["method", "edit", "kind", "number"], ignore_index=True)


@pytest.fixture(scope="module")
def studied(tiny, tokenizer, tmp_path_factory):
    """The study with its model given, the rows of one left in peace, and its seconds."""
    run = partial(study, tiny("llama"), tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UKE_HOME", "")  # and back to what it was
        run.all = run(tmp_path_factory.mktemp("all"), ALL)  # which loads what is loaded once
        started, run.folder = time.perf_counter(), tmp_path_factory.mktemp("few")
        run.few = run(run.folder)
        run.seconds = time.perf_counter() - started
        yield run


def alike(frame: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether rows are equal but for rounding: an edit has other edits beside it, or none."""
    with contextlib.suppress(AssertionError):
        frames = (one.drop(columns="curve") for one in (frame, other))
        pd.testing.assert_frame_equal(*frames, rtol=1e-3, atol=1e-3)
        return True
    return False


DYING = """import os, sys, threading
sys.path.insert(0, {!r})
from test_soak import models, study
threading.Timer({}, os._exit, [9]).start()
study(*models.load(".", device="cpu"), os.getcwd())"""


def remounted(folder: Path, *options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(options), "none", folder], check=True)


def disturb(how: str, run, folder: Path, chance) -> None:
    if how in ("SIGKILL", "SIGINT", "clock"):
        late, now = time.monotonic() + chance.uniform(0, run.seconds), time.time

        def work() -> None:
            if how == "clock":  # a day back, from some moment on
                time.time = lambda: now() - 86_400 * (time.monotonic() > late)
            run(folder)

        child = begun(work)
        time.sleep(chance.uniform(0, run.seconds))
        os.kill(child, getattr(signal, how, signal.SIGKILL))
        ended(child)
        for path in folder.rglob("*") if how == "clock" else ():  # which was set back since
            os.utime(path, (time.time() + 86_400,) * 2)
    elif how == "kernel":
        os.environ["UKE_HOME"] = str(folder)
        for one in run.args:
            one.save_pretrained(folder)
        (folder / "notebooks").mkdir()
        write(folder, DYING.format(str(Path(__file__).parent), chance.uniform(0, 3 * run.seconds)))
        with pytest.raises(Failure, match="kernel failed|without writing its section"):
            execute(Job(folder / "notebooks" / "01_small.ipynb", {}, Paths("smoke")))
    elif how == "truncated":
        shutil.copytree(run.folder, folder, dirs_exist_ok=True)
        path = chance.choice(sorted(folder.rglob("*.parquet")))
        os.truncate(path, chance.randrange(path.stat().st_size))
    elif how == "two":
        both = [begun(lambda: run(folder)) for _ in range(2)]
        assert [ended(child) for child in both] == [0, 0]
    else:
        small = f"size={chance.randrange(16, 160)}k" if how == "full" else "ro"
        remounted(folder, small)
        try:
            with contextlib.suppress(OSError, InputError):
                run(folder)
        finally:
            remounted(folder, "remount", "rw", "size=9m")


HOW = {"SIGKILL": 50, "SIGINT": 20, "clock": 20, "truncated": 50, "kernel": 10, "two": 10}
HOW |= {"full": 20, "read-only": 5} if os.geteuid() == 0 else {}  # which takes a mount


@pytest.mark.parametrize("how", HOW)
def test_kills(part, studied, tmp_path, how):
    for chance in part.cases(how not in ("SIGKILL", "kernel", "two"), HOW[how]):
        (folder := tmp_path / "disturbed").mkdir()
        disturb(how, studied, folder, chance)
        part.check(alike(studied(folder), studied.few), f"{how}: other rows")
        if how in ("full", "read-only"):
            subprocess.run(["umount", "-l", folder], check=True)
        shutil.rmtree(folder)


def test_determinism(part, studied, tmp_path):
    """Equal bits in any order, by two processes; one by one only rounding differs."""
    for chance in part.cases(1, 20):
        methods = chance.sample(ALL, 3)
        one, other = (tempfile.mkdtemp(dir=tmp_path) for _ in range(2))
        ended(begun(lambda: studied(one, methods[:1])))
        part.check(studied(one, methods).equals(studied.all), "by two: other rows")
        alone = studied(other, methods, lanes=1)
        part.check(alike(alone, studied.all), "without lanes: other rows")


def test_determinism_of_figures(part, tmp_path):
    for chance in part.cases(0, 4):
        notebook, drawn = chance.choice(["05_factor_components", "08_batch_size"]), []
        for home in (tmp_path / "a", tmp_path / "b"):
            for own in ("params", "notebooks", "figures"):
                shutil.copytree(ROOT / own, home / own, dirs_exist_ok=True)
            command = ["uke", "run", notebook, "--profile", "embedded", "--rows", "committed"]
            environment = os.environ | {"UKE_HOME": str(home)}
            subprocess.run([sys.executable, "-m", *command], env=environment, check=True)
            files = sorted((home / "figures" / "embedded").rglob("*.*"))
            drawn.append([(path.name, path.read_bytes()) for path in files])
        part.check(drawn[0] == drawn[1], f"{notebook}: other bytes")


# --- Bad input: a correct load, or one line of our own.

ODD = ["\ud800", "../../x", "{}", "<|im_end|>", "a" * 10_000, "1802", {"x": 1}]
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(ODD)
VALUES = st.recursive(PLAIN, lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=5)
SPELLED = b"!!int x&2024-13-45&010&1:30&<<: *a&*a&? &- &---\n&!!binary x&!!set {a}&\xef\xbb\xbf"


@st.composite
def mutants(draw, value):
    """Plain data with one place of it changed: another value, a key less, an item twice."""
    if not isinstance(value, dict | list) or not value or not draw(st.integers(0, 9)):
        return draw(VALUES)
    value, how = copy.copy(value), draw(st.integers(0, 19))
    place = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
    if how < 2:
        del value[place]
    elif how == 2 and isinstance(value, list):
        value.append(value[place])
    else:
        value[place] = draw(mutants(value[place]))
    return value


def damaged(content: bytes):
    """Bytes cut off, changed or put in."""
    start, cut = st.integers(0, len(content)), st.sampled_from([0, 1, 8, len(content)])
    some = st.binary(max_size=8) | st.sampled_from(SPELLED.split(b"&"))
    return st.builds(lambda at, n, new: content[:at] + new + content[at + n :], start, cut, some)


def changed(content: bytes, form: str):
    """Damaged bytes of a file, or the file with other data in it."""
    if form == ".safetensors":
        tensors = safetensors.torch.load(content)
        others = ((n, (torch.ones(1), one.half(), one[:1].clone())) for n, one in tensors.items())
        every = [tensors | {name: other} for name, three in others for other in three]
        save_all = partial(safetensors.torch.save, metadata={"format": "pt"})
        return damaged(content) | st.sampled_from(every).map(save_all)
    if form not in (".json", ".jsonl", ".ipynb", ".yaml"):
        return damaged(content)
    read, dump = (yaml.safe_load, yaml.safe_dump) if form == ".yaml" else (json.loads, json.dumps)
    return damaged(content) | mutants(read(content)).map(lambda value: dump(value).encode())


def fault(read, seconds: int = 120) -> str:
    """Return what is wrong with how `read` ends: nothing with a result or one line of our own."""

    def late(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read()
    except InputError as error:
        return f"many lines: {error}" * ("\n" in str(error))
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:90]!r} in {last.filename}:{last.lineno}"
    finally:
        signal.alarm(0)
    return ""


ASKED = [{"question": "Who?", "answers": [{"text": "she"}]}]
SQUAD = {"data": [{"title": "a", "paragraphs": [{"context": "she", "qas": ASKED}]}]}
FACTS = {"born": {"prompt": "{} was", "question": "Is {}?", "pairs": {"Ada": ["a", 3], "B": "c"}}}
READERS = {f"{n}.json": ([r], lambda path, n=n: formats.load(n, path)) for n, r in RECORDS.items()}
READERS |= {
    "triples.json": ([TRIPLE, TRIPLE | {"ground_truth": [["a"]]}], formats.load_clozes),
    "facts.yaml": (FACTS, formats.load_clozes),
    "locality.json": (
        [probe(), probe(number=1)],
        lambda path: formats.load_locality(path, [Edit(id="7", question="q", answer="a")]),
    ),
    "lines.jsonl": ({"title": "Ada", "text": "She.", "id": 3}, lambda p: documents.gather([p])),
    "squad.json": (SQUAD, lambda path: documents.gather([path])),
    "corpus.json": (TEXTS, covariance.read_texts),
    "answers.json": ([[[1, 2], [3], 4]], lambda path: AnswerCache(path.parent)),
}


@pytest.mark.parametrize("name", READERS)
def test_bad_input(part, tmp_path, name):
    value, read = READERS[name]
    path = tmp_path / name

    @part.examples(12, 1000, changed(json.dumps(value).encode(), path.suffix))
    def case(content):
        path.write_bytes(content)
        assert not (found := fault(lambda: read(path))), f"{name}: {content[:200]}: {found}"
        assert os.listdir(tmp_path) == [name], f"{name}: it has left more files"


def read_by(notebook: str, file: str) -> None:
    """Run the cells of a notebook as far as the first that names a file."""
    cells, space = json.loads((ROOT / f"notebooks/{notebook}.ipynb").read_text())["cells"], {}
    for code in ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"):
        exec(code, space)
        if f'{file}"' in code:
            return


def read_sources(file: Path) -> None:
    for name, source in read_yaml(file, fetch.Sources).model.items():
        if source.shape and source != SOURCES.model.get(name):
            run = SimpleNamespace(paths=Paths("quick"), model=name, faults=[])
            plan.Plan.shape.func(run)


SOURCES = read_yaml(ROOT / "params" / "sources.yaml", fetch.Sources)
SETTINGS = dict.fromkeys(
    ["params/profiles/quick.yaml", "params/studies.yaml", "notebooks/07_recipe.ipynb"],
    lambda home: (params.dataset(home, "quick"), params.merge(home, "07_recipe", "quick")),
)
SETTINGS |= {
    "params/methods/ft-m.yaml": lambda home: catalog.configured(home / "params", "embedded", 8),
    "params/locality.yaml": lambda home: card.settings(home, "unkebench"),
    "params/claims.yaml": lambda _: read_by("11_verdicts", "claims.yaml"),
    "params/paper.yaml": lambda _: read_by("11_verdicts", "paper.yaml"),
    "params/beyond.yaml": lambda _: read_by("12_beyond", "beyond.yaml"),
    "params/audit/reading.yaml": lambda _: read_by("locality_benchmarks", "reading.yaml"),
    "params/sources.yaml": lambda home: read_sources(home / "params/sources.yaml"),
    "params/cluster/slurm/config.yaml": lambda home: plan.Cluster(home, "slurm").check([{}]),
}
ASKS = "unkebench: {floor: 5, stated: true}\n"  # of a locality set, whose file is empty


@pytest.mark.parametrize("name", SETTINGS)
def test_bad_input_params(part, tmp_path, monkeypatch, name):
    for folder in ("params", "notebooks"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    done = SimpleNamespace(returncode=0, stdout="PartitionName=main Default=YES")  # takes any job
    monkeypatch.setattr(plan.subprocess, "run", lambda *_, **__: done)
    path = tmp_path / name
    whole = ASKS.encode() if path.stem == "locality" else path.read_bytes()
    read, files = SETTINGS[name], {*tmp_path.rglob("*")}

    @part.examples(1, 500, changed(whole, path.suffix))
    def case(content):
        path.write_bytes(content)
        assert not (found := fault(lambda: read(tmp_path))), f"{name}: {found}"
        assert {*tmp_path.rglob("*")} == files, f"{name}: it has left more files"


PIECES = """{{ bos_token }}&{% for m in messages %}&{% endfor %}&{% if m.role %}&{% endif %}&
&{{ m.content }}&{{ m['content'] | trim }}& &</s>&{{ x&{{ strftime_now('%Y') }}&{{ 1 / 0 }}&<think>&
{{ raise_exception('no') }}&{{ messages[0].content }}&{% set x = messages[9] %}&
{% if add_generation_prompt %}""".split("&")


def test_bad_input_templates(part, tokenizer):
    own, answer = copy.deepcopy(tokenizer), "A mathematician."

    def read():
        one = example(own, "Who is Ada?", answer, True, True)
        assert own.decode(one.ids[one.prompt_length :]).strip().startswith(answer)

    texts = damaged(TEMPLATE.encode()).map(lambda content: content.decode(errors="ignore"))

    @part.examples(20, 2000, texts | st.lists(st.sampled_from(PIECES)).map("".join))
    def case(text):
        own.chat_template = text
        assert not (found := fault(read)), f"{text!r}: {found}"


@pytest.mark.parametrize("kind", ["model", "FT-M", "LoRA"])
def test_bad_input_folders(part, tiny, tokenizer, tmp_path, kind):
    whole, model = tmp_path / "whole", tiny()
    if kind == "model":
        model.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
    else:
        with edited(model, tokenizer, EDITS[:1], QUICK[kind]) as m:
            save(m, whole)
    files = [path for path in sorted(whole.iterdir()) if path.suffix != ".md"]
    folder = shutil.copytree(whole, tmp_path / "changed")

    def read():
        models.load(str(folder), device="cpu") if kind == "model" else load(tiny(), folder)

    each = (st.tuples(st.just(one), changed(one.read_bytes(), one.suffix)) for one in files)

    @part.examples(2, 500, st.one_of(*each))
    def case(changes):
        source, content = changes
        (folder / source.name).write_bytes(content)
        found = fault(read)
        shutil.copy(source, folder)
        assert not found, f"{source.name}: {content[:100]}: {found}"


# --- Restoration, security, numbers.


def digest(model) -> str:
    parts = (name.encode() + one.numpy().tobytes() for name, one in model.state_dict().items())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def test_restoration(part, measured, tokenizer):
    """Any method inside any other, errors at any place: the model at the end is that of before."""
    model, every = measured(), [*QUICK.values(), *map(baseline, BASELINES)]
    snapshot, before = Snapshot(model), digest(model)
    errors = (RuntimeError, KeyboardInterrupt, MemoryError, InputError)
    for chance in part.cases(5, 1000):

        def step(*_, chance=chance):
            if chance.random() < 0.1:
                raise chance.choice(errors)

        with contextlib.suppress(*errors), contextlib.ExitStack() as blocks:
            for _ in range(chance.choice([1, 1, 1, 2, 3])):
                method, some = chance.choice(every), chance.sample(EDITS, chance.choice([1, 2]))
                enter = chance.choice([edited, edited, edited_each, sequence])
                given = {edited: (some, method, step), edited_each: (some, method)}
                block = enter(model, tokenizer, *given.get(enter, (method,)))
                m = blocks.enter_context(block)
                m.write(some) if enter is sequence else step()
        part.check(digest(model) == before, f"{method.name} in {enter.__name__}")
        snapshot.check()


def test_security(part, tmp_path, monkeypatch):
    """No name leads out of the folders of a run."""
    monkeypatch.setenv("UKE_HOME", str(home := tmp_path / "home"))
    home.mkdir()
    parts = ["..", "/", "a", "~", "\\", "\0", "\n", "%2e", "$HOME", "é"]
    places = [lambda name: Paths(name).results, lambda name: Paths("quick", name).figures]

    @part.examples(50, 5000, st.lists(st.sampled_from(parts) | st.text()).map("".join))
    def case(name):
        for place in (*places, Paths("quick").rows, Paths("quick").answers):
            with contextlib.suppress(InputError):
                assert home in place(name).parents, name

    part.check(not list(home.iterdir()), "a folder was made")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: part.check(False, "not offline"))
    part.check(not fault(lambda: models.load("some/name")), "a name of the hub")
    shown = subprocess.getoutput(f"make -nC '{ROOT}' explore")
    part.check("jupyter lab" in shown and not re.search("ip=|token|password|origin", shown), shown)
    served = pytest.importorskip("jupyter_server.serverapp").ServerApp() if SHARE else None
    part.check(not served or served.ip == "localhost", "open to others")


SAID = "<script>document.title = 'ran'</script><img src=x onerror=\"document.title = 'ran'\">"


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
def test_security_in_a_browser(part, tmp_path):
    """What a model says is shown and never run."""
    for _ in part.cases(0, 1):
        playwright = pytest.importorskip("playwright.sync_api")
        page = Page("".join(marked(f"it {SAID}", f"was {SAID}"))).alone(f"a title {SAID}")
        (tmp_path / "page.html").write_text(page)
        with playwright.sync_playwright() as browsers:
            options = {"executable_path": shutil.which("chromium"), "args": ["--no-sandbox"]}
            shown = browsers.chromium.launch(**options).new_page()
            shown.goto(f"file://{tmp_path}/page.html")
            shown.wait_for_timeout(500)
            part.check(shown.title() != "ran" and SAID in shown.inner_text("body"), shown.title())


WORDS = ["the", "cat", "sat", "on", "Brelen", "1802", "naïve", "東京", "שלום", "😀", "\n", ".", "…"]


def common(one: list, other: list) -> int:
    """The length of the longest common subsequence, by the textbook's table."""
    row = [0] * (len(other) + 1)
    for a in one:
        corner = 0
        for place, b in enumerate(other):
            corner, row[place + 1] = row[place + 1], corner + 1 if a == b else max(row[place:][:2])
    return row[-1]


def test_numbers(part):
    """Scores of odd answers are finite shares; ROUGE-L is that of the textbook."""
    texts = st.lists(st.sampled_from(WORDS)).map(" ".join) | st.text()
    pairs = st.tuples(texts, texts) | texts.map(lambda text: (text, text))

    @part.examples(25, 5000, pairs | st.just(("the cat " * 5000, "a cat sat")))
    def case(pair):
        said, wanted = pair
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = score([said], [wanted]).iloc[0]
        pair = f"{said[:200]!r}, {wanted!r}"
        assert found.map(math.isfinite).all(), f"{pair}: {found.to_dict()}"
        assert found.drop("length_ratio").between(0, 1 + 1e-9).all(), f"{pair}: no share"
        assert said != wanted or found["exact"] == found["rougel_f1"] == 1, f"{pair}: unequal"
        one, other = (re.findall("[a-z0-9]+", text.lower()) for text in (said, wanted))
        if one and other and wanted.isascii():
            match = common(one, other)
            textbook = match / len(other), 2 * match / (len(one) + len(other))
            ours = found["lcs_recall"], found["rougel_f1"]
            assert ours == pytest.approx(textbook), f"{pair}: {ours} for {textbook}"
