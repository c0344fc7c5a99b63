"""Every notebook keeps the skeleton, runs on profile smoke, and shows the same drawn again."""

import ast
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from graphlib import TopologicalSorter
from pathlib import Path

import nbformat
import pytest
from uke.cli import params

ROOT = Path(__file__).parents[1]
FORKED = ROOT / "tests" / "forked" / "ipykernel_launcher.py"
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
STUDIES = params.studies(ROOT)
# What needs benchmark files runs only where UKE_DATA names their folder.
RUN = [
    name
    for name in NAMES
    if os.environ.get("UKE_DATA") or name not in STUDIES or STUDIES[name].report != "benchmarks"
]
SLOWEST = dict.fromkeys(NAMES, 0) | {"02_locality": 2, "tuning_levels": 1}  # these start first
HEADINGS = ("Set-up", "Checks", "Saved", "Limits")  # every other heading asks something
PARAMETER = re.compile(r"[a-z_]+ = [^#]+  # [^=]+")
SANITISE = r"""
[seconds]
regex: \b\d+(\.\d+)?(e-?\d+)? ?(ms|s|seconds|min|minutes)\b
replace: TIME

[address]
regex: 0x[0-9a-f]{6,}
replace: ADDRESS

[path]
regex: (/[\w.-]+){3,}
replace: PATH
"""


def faults(notebook: nbformat.NotebookNode) -> list[str]:
    """Where a notebook leaves the skeleton, in words."""
    cells = notebook.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    tagged = [cell for cell in code if "parameters" in cell.metadata.get("tags", ())]
    if len(tagged) != 1 or tagged[0] is not cells[1]:
        return ["the second cell, and no other, must be tagged parameters"]
    rows = cells[1].source.splitlines()
    body = [cell.source.splitlines() for cell in code if cell is not cells[1]]
    sizes = [len(each) for each in body]
    found = [f"parameter line: {row}" for row in rows if not PARAMETER.fullmatch(row)]
    checks = {
        "more than twelve parameters": len(rows) > 12,
        "a cell of more than 15 lines": max(sizes) > 15,
        "the median cell has more than 8 lines": statistics.median(sizes) > 8,
        "a line of more than 100 columns": max(len(row) for each in body for row in each) > 100,
        "less than one prose cell per code cell": 2 * len(code) > len(cells),
        "kernelspec is not python3": notebook.metadata.get("kernelspec", {}).get("name")
        != "python3",
        "metadata of papermill": "papermill" in notebook.metadata,
    }
    found += [fault for fault, holds in checks.items() if holds]
    found += [fault for cell in code for fault in code_faults(cell)]
    return found + prose_faults([cell.source for cell in cells if cell.cell_type == "markdown"])


def code_faults(cell: nbformat.NotebookNode) -> list[str]:
    found = []
    if cell.outputs or cell.execution_count is not None:
        found.append("outputs are committed")
    try:
        nodes = list(ast.walk(ast.parse(cell.source)))
    except SyntaxError:
        return [*found, f"no plain Python (a magic, a shell line?): {cell.source[:40]!r}"]
    if any(isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Lambda) for node in nodes):
        found.append("defines a function or a class")
    if any(isinstance(node, ast.Name) and node.id == "plt" for node in nodes):
        found.append("draws with plt")
    texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
    paths = [text for text in texts if isinstance(text, str) and re.match(r"[/~]\w", text)]
    return found + [f"an absolute path: {path}" for path in paths]


def prose_faults(texts: list[str]) -> list[str]:
    lines = [line for text in texts for line in text.splitlines()]
    headings = [line.lstrip("# ") for line in lines if re.match(r"##+ ", line)]
    found = [f"the title cell has no **{word}**" for word in ("Answer", "Reads", "Writes", "Cost")]
    found = [fault for fault in found if fault[22:] not in texts[0]]
    if not (lines[0].startswith("# ") and lines[0].endswith("?")):
        found.append("the title asks no question")
    questions = [each for each in headings if each not in HEADINGS]
    found += [f"heading is no question: {each}" for each in questions if not each.endswith("?")]
    if not questions:
        found.append("the body asks no question")
    return found if headings[-1:] == ["Limits"] else [*found, "the last section is not Limits"]


def sound() -> nbformat.NotebookNode:
    markdown, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    title = markdown("# Is it so?\n\n**Answer** Yes.\n\n**Reads** x. **Writes** y. **Cost** z.")
    source = 'profile = "quick"  # sizes\nlimit = 4  # edits'
    parameters = code(source, metadata={"tags": ["parameters"]})
    setup, body = code("import uke"), code("limit\nlimit")
    heads = [markdown(f"## {text}") for text in ("Set-up", "Does it hold?", "Limits")]
    cells = [title, parameters, heads[0], setup, heads[1], body, heads[2]]
    kernelspec = {"name": "python3", "display_name": "Python 3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec})


MUTATIONS = {
    "the title asks no question": (0, "# It is so.\n\n**Answer** **Reads** **Writes** **Cost**"),
    "the title cell has no **Cost**": (0, "# Is it?\n\n**Answer** **Reads** **Writes**"),
    "parameter line: limit = 4": (1, "limit = 4"),
    "parameter line: limit = 4  # n = 4": (1, "limit = 4  # n = 4"),
    "more than twelve": (1, "\n".join(f"p{'x' * i} = {i}  # one" for i in range(13))),
    "more than 15 lines": (3, "x = 1\n" * 16),
    "median cell has more than 8": (3, "x = 1\n" * 15),
    "more than 100 columns": (3, f"x = {'1' * 100}"),
    "(a magic, a shell line?)": (3, "%pip install x"),
    "defines a function": (3, "def f():\n    return 1"),
    "draws with plt": (3, "plt.plot(1)"),
    "an absolute path": (3, "open('/data/x.json')"),
    "heading is no question: Results": (4, "## Results"),
    "the body asks no question": (4, "## Checks"),
    "not Limits": (6, "## Saved"),
}


@pytest.mark.parametrize("fault", MUTATIONS)
def test_the_skeleton_check_sees_the_fault(fault):
    notebook = sound()
    assert faults(notebook) == []
    index, source = MUTATIONS[fault]
    notebook.cells[index].source = source
    assert any(fault in found for found in faults(notebook))


@pytest.mark.parametrize("name", NAMES)
def test_notebook_keeps_the_skeleton_and_has_the_defaults_of_quick(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    assert faults(nbformat.read(path, as_version=4)) == []
    defaults = params.declared(path)
    of_quick = defaults | ({"model": "embedded"} if name == "explore" else {})
    assert params.merge(ROOT, name, "quick") == of_quick
    assert defaults.get("profile") == "quick" and defaults.get("data") == "world"


@pytest.fixture(scope="module")
def home(tmp_path_factory, results):
    """A copy of the project without rows, for the runs of this module."""
    home = tmp_path_factory.mktemp("study")
    shutil.copytree(results, home / "results")
    for folder in ("notebooks", "params", "benchmarks", "tools", "figures/embedded"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, home / folder)
    return home


@pytest.fixture(scope="module")
def environment(home):
    """The environment of processes that run notebooks there, in kernels forked from one process.

    Progress bars are off.
    """
    quiet = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(FORKED.parent), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:  # a socket's path must be short
        quiet |= {"UKE_HOME": str(home), "PYTHONPATH": path, "FORKED_KERNELS": f"{folder}/socket"}
        environment = os.environ | quiet
        options = {"env": environment, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, FORKED], **options) as server:
            assert server.stdout.readline() == "ready\n"
            yield environment
            server.kill()


@pytest.fixture(scope="module")
def executed(home, environment) -> list[Path]:
    """Every notebook run on profile smoke, two at once, those that read another's rows after it."""

    def run(name: str) -> tuple[str, subprocess.CompletedProcess]:
        return name, command("run", name, "--checked")

    def command(*given: str) -> subprocess.CompletedProcess:
        given = [sys.executable, "-m", "uke", *given, "--profile", "smoke"]
        options = {"env": environment, "capture_output": True, "text": True, "timeout": 900}
        return subprocess.run(given, **options)

    assert (checked := command("check")).returncode == 0, checked.stderr

    needs = {name: set(STUDIES[name].after) if name in STUDIES else set() for name in RUN}
    needs["tuning"].add("tuning_levels")  # whose rows are in its budget
    for name in ("07_recipe", "08_batch_size"):  # whose best baseline tuning decides
        needs[name].add("tuning")
    order = TopologicalSorter(needs)
    order.prepare()
    running = set()
    with ThreadPoolExecutor(2) as pool:
        while order.is_active():
            ready = sorted(order.get_ready(), key=SLOWEST.get, reverse=True)
            running |= {pool.submit(run, name) for name in ready}
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for name, done in (each.result() for each in ended):
                assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
                order.done(name)
    return [home / "results" / "smoke" / "notebooks" / f"{name}.ipynb" for name in RUN]


def rerun(notebooks: list[Path], folder: Path, environment: dict) -> subprocess.CompletedProcess:
    """Pytest with nbval on executed notebooks, at most two at once, in a process of its own."""
    (folder / "sanitise.cfg").write_text(SANITISE)
    options = "--nbval --nbval-current-env -q --dist loadfile -p no:cacheprovider".split()
    options += ["-n", str(min(2, len(notebooks) - 1))]
    command = [sys.executable, "-m", "pytest", *options, "-c", os.devnull, "--rootdir", str(folder)]
    command += ["--nbval-sanitize-with", str(folder / "sanitise.cfg"), *map(str, notebooks)]
    options = {"capture_output": True, "text": True, "timeout": 900}
    return subprocess.run(command, cwd=folder, env=environment, **options)


def test_drawing_again_from_the_rows_shows_the_same(executed, home, environment):
    """Every output but a duration is that of the run that made the rows."""
    before = numbers_of(home)
    environment = environment | {"UKE_ROWS": "committed"}
    verdicts = [path for path in executed if path.stem == "11_verdicts"]  # reads all the others
    for notebooks in ([path for path in executed if path not in verdicts], verdicts):
        done = rerun(notebooks, home, environment)
        assert done.returncode == 0, done.stdout[-5000:]
    assert numbers_of(home) == before


def numbers_of(home: Path) -> dict[str, dict]:
    """Every number of every section, but for its cell: nbval counts none."""
    found = {}
    for path in (home / "results/smoke/sections").glob("*.json"):
        numbers = json.loads(path.read_text())["numbers"]
        found[path.stem] = {key: number | {"source": ""} for key, number in numbers.items()}
    return found


def test_a_notebook_shows_all_of_its_section_and_its_answer_on_top(executed, home):
    for path in executed:
        section = json.loads((home / "results/smoke/sections" / f"{path.stem}.json").read_text())
        cells = nbformat.read(path, as_version=4).cells
        assert f"**Answer** {section['answer']}" in cells[0].source, path.name
        outputs = [output for cell in cells for output in cell.get("outputs", [])]
        data = [output["data"] for output in outputs if "data" in output]
        kinds = Counter(part["type"] for part in section["body"])
        assert sum("image/svg+xml" in each for each in data) >= kinds["figure"], path.name
        assert sum("text/html" in each for each in data) >= kinds["table"], path.name


def test_every_number_names_its_notebook_and_cell(executed, home):
    for path in executed:
        section = json.loads((home / "results/smoke/sections" / f"{path.stem}.json").read_text())
        for key, number in section["numbers"].items():
            assert re.fullmatch(rf"{path.stem}, cell \d+", number["source"]), key


def test_a_changed_number_in_an_output_fails_the_rerun(tmp_path, environment):
    source = "print('0.93 [0.90, 0.96], n = 40, 1.2 s')"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    notebook.cells[0].execution_count = 1
    for value, status in (("0.93", 0), ("0.94", 1)):
        text = f"{value} [0.90, 0.96], n = 40, 7.5 s\n"
        notebook.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
        nbformat.write(notebook, tmp_path / "one.ipynb")
        assert rerun([tmp_path / "one.ipynb"], tmp_path, environment).returncode == status
