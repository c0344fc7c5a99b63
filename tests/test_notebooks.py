"""Every notebook keeps the one skeleton, runs on profile smoke, and says the same when nbval runs it again."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from graphlib import TopologicalSorter
from pathlib import Path

import nbformat
import pytest
from uke.cli import params

ROOT = Path(__file__).parents[1]
REQUIRED = ("01_edits", "03_factor_loss_scope")
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
# What needs benchmark files runs only where UKE_DATA names their folder.
RUN = [
    name
    for name in NAMES
    if params.study(ROOT, name).report != "benchmarks" or os.environ.get("UKE_DATA")
]
STRUCTURE = ("Set-up", "Checks", "Saved", "Limits")  # every other heading asks something
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


def faults(notebook) -> list[str]:
    """Where a notebook leaves the skeleton, in words."""
    cells = notebook.cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    return [
        *_title_faults(cells[0]),
        *_parameter_faults(
            [cell for cell in code if "parameters" in cell.metadata.get("tags", ())], cells[1]
        ),
        *(fault for cell in code for fault in _code_faults(cell)),
        *_heading_faults(
            [
                line
                for cell in cells[1:]
                if cell.cell_type == "markdown"
                for line in cell.source.splitlines()
            ]
        ),
        *(
            ["kernelspec is not python3"]
            if notebook.metadata.get("kernelspec", {}).get("name") != "python3"
            else []
        ),
        *(["metadata of papermill"] if "papermill" in notebook.metadata else []),
    ]


def _title_faults(cell) -> list[str]:
    first = cell.source.splitlines()[0]
    asks = cell.cell_type == "markdown" and first.startswith("# ") and first.endswith("?")
    missing = [
        word for word in ("Answer", "Reads", "Writes", "Cost") if f"**{word}**" not in cell.source
    ]
    return ([] if asks else ["the title asks no question"]) + [
        f"the title cell has no **{word}**" for word in missing
    ]


def _parameter_faults(tagged, second) -> list[str]:
    if len(tagged) != 1 or tagged[0] is not second:
        return ["the second cell, and no other, must be tagged parameters"]
    lines = tagged[0].source.splitlines()
    return [f"parameter line: {line}" for line in lines if not PARAMETER.fullmatch(line)] + (
        ["more than twelve parameters"] if len(lines) > 12 else []
    )


def _code_faults(cell) -> list[str]:
    found = (
        [f"more than 15 lines: {cell.source[:40]!r}"] if len(cell.source.splitlines()) > 15 else []
    )
    if cell.outputs or cell.execution_count is not None:
        found.append("outputs are committed")
    try:
        tree = ast.parse(cell.source)
    except SyntaxError:
        return [*found, f"no plain Python (a magic, a shell line?): {cell.source[:40]!r}"]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            found.append("defines a function or a class")
        if isinstance(node, ast.Name) and node.id == "plt":
            found.append("draws with plt")
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and re.match(r"[/~]\w|[A-Z]:\\", node.value)
        ):
            found.append(f"an absolute path: {node.value}")
    return found


def _heading_faults(lines: list[str]) -> list[str]:
    headings = [line.lstrip("# ") for line in lines if re.match(r"#+ ", line)]
    found = [
        f"heading is no question: {each}"
        for each in headings
        if each not in STRUCTURE and not each.endswith("?")
    ]
    if not any(each.endswith("?") for each in headings):
        found.append("the body asks no question")
    return (
        found
        if headings and headings[-1] == "Limits"
        else [*found, "the last section is not Limits"]
    )


def sound() -> nbformat.NotebookNode:
    markdown, code = nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell
    title = markdown("# Is it so?\n\n**Answer** Yes.\n\n**Reads** x. **Writes** y. **Cost** z.")
    parameters = code(
        'profile = "quick"  # sizes\nlimit = 4  # edits', metadata={"tags": ["parameters"]}
    )
    cells = [
        title,
        parameters,
        markdown("## Set-up"),
        code("import uke"),
        markdown("## Does it hold?"),
        code("limit"),
        markdown("## Limits"),
    ]
    return nbformat.v4.new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )


MUTATIONS = {
    "the title asks no question": lambda n: n.cells[0].update(
        source=n.cells[0].source.replace("?", "")
    ),
    "the title cell has no **Cost**": lambda n: n.cells[0].update(
        source=n.cells[0].source.replace("Cost", "Price")
    ),
    "tagged parameters": lambda n: n.cells[1].metadata.clear(),
    "parameter line: limit = 4": lambda n: n.cells[1].update(source="limit = 4"),
    "parameter line: limit = 4  # n = 4": lambda n: n.cells[1].update(source="limit = 4  # n = 4"),
    "more than twelve": lambda n: n.cells[1].update(
        source="\n".join(f"p{'x' * i} = {i}  # one" for i in range(13))
    ),
    "more than 15 lines": lambda n: n.cells[3].update(source="x = 1\n" * 16),
    "outputs are committed": lambda n: n.cells[3].update(execution_count=3),
    "no plain Python": lambda n: n.cells[3].update(source="%pip install x"),
    "(a magic, a shell line?)": lambda n: n.cells[3].update(source="!ls"),
    "defines a function": lambda n: n.cells[3].update(source="def f():\n    return 1"),
    "draws with plt": lambda n: n.cells[3].update(source="plt.plot(1)"),
    "an absolute path": lambda n: n.cells[3].update(source="open('/data/x.json')"),
    "heading is no question: Results": lambda n: n.cells[4].update(source="## Results"),
    "the body asks no question": lambda n: n.cells[4].update(source="## Checks"),
    "not Limits": lambda n: n.cells.pop(),
    "kernelspec is not python3": lambda n: n.metadata.kernelspec.update(name="mine"),
    "metadata of papermill": lambda n: n.metadata.update(papermill={}),
}


@pytest.mark.parametrize("fault", MUTATIONS)
def test_the_skeleton_check_sees_the_fault(fault):
    notebook = sound()
    assert faults(notebook) == []
    MUTATIONS[fault](notebook)
    assert any(fault in found for found in faults(notebook))


def test_the_required_notebooks_exist():
    assert set(REQUIRED) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_keeps_the_skeleton(name):
    assert faults(nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_notebooks_defaults_are_profile_quick(name):
    defaults = params.declared(ROOT / "notebooks" / f"{name}.ipynb")
    assert params.merge(ROOT, name, "quick", {}) == defaults
    assert defaults.get("profile") == "quick" and defaults.get("data") == "world"


@pytest.fixture(scope="module")
def home(tmp_path_factory, results):
    """A copy of the project without rows, for the runs of this module."""
    home = tmp_path_factory.mktemp("study")
    shutil.copytree(results, home / "results")
    for folder in ("notebooks", "params", "benchmarks", "figures/embedded"):
        if (ROOT / folder).is_dir():
            shutil.copytree(ROOT / folder, home / folder)
    return home


@pytest.fixture(scope="module")
def environment(home):
    """Of the processes that run notebooks there; bars are off, since a rerun has no work to show."""
    return os.environ | {"UKE_HOME": str(home), "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def executed(home, environment) -> list[Path]:
    """Every notebook run on profile smoke, two at once, those that read another's rows after it; then once more.

    The first run shows bars while it works; the second finds all rows, as every later one does, and is the one compared.
    """
    order = TopologicalSorter({name: params.study(ROOT, name).after for name in RUN})
    order.prepare()
    with ThreadPoolExecutor(2) as pool:
        while order.is_active():
            ready = order.get_ready()
            for name, done in zip(
                ready, pool.map(lambda name: run_smoke(name, environment), ready), strict=True
            ):
                assert done.returncode == 0, f"{name}: {done.stderr}"
                order.done(name)
        assert all(
            done.returncode == 0
            for done in pool.map(lambda name: run_smoke(name, environment), RUN)
        )
    return [home / "results" / "smoke" / "notebooks" / f"{name}.ipynb" for name in RUN]


def run_smoke(name: str, environment: dict) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "uke", "run", name, "--profile", "smoke"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


def rerun(notebooks: list[Path], folder: Path, environment: dict) -> subprocess.CompletedProcess:
    """Pytest with nbval on executed notebooks, in a process of its own."""
    assert notebooks, "without a file to run, pytest would collect this very suite"
    (folder / "sanitise.cfg").write_text(SANITISE)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--nbval",
        "--nbval-current-env",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
    ]
    command += [
        "--rootdir",
        str(folder),
        "--nbval-sanitize-with",
        str(folder / "sanitise.cfg"),
        *map(str, notebooks),
    ]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )


def test_every_notebook_runs_and_its_rerun_says_the_same(executed, home, environment):
    cells = sum(
        cell.cell_type == "code"
        for path in executed
        for cell in nbformat.read(path, as_version=4).cells
    )
    done = rerun(executed, home, environment)
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"{cells} passed" in done.stdout and cells >= 2 * len(REQUIRED)


def test_a_notebook_shows_every_figure_table_and_finding_of_its_section(executed, home):
    """Also those placed within an `if` or a loop, which a cell shows no value of."""
    for path in executed:
        section = json.loads(
            (home / "results" / "smoke" / "sections" / path.with_suffix(".json").name).read_text()
        )
        outputs = [
            output
            for cell in nbformat.read(path, as_version=4).cells
            for output in cell.get("outputs", [])
        ]
        data = [output["data"] for output in outputs if "data" in output]
        texts = [each["text/plain"] for each in data]
        kinds = Counter(block["type"] for block in section["blocks"])
        assert sum("image/png" in each for each in data) >= kinds["figure"], path.name
        assert sum("text/html" in each for each in data) >= kinds["table"], path.name
        assert all(
            block["text"] in texts for block in section["blocks"] if block["type"] == "finding"
        ), path.name


def test_a_changed_number_in_an_output_fails_the_rerun(tmp_path, environment):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("print('0.93 [0.90, 0.96], n = 40, 1.2 s')")]
    )
    notebook.cells[0].execution_count = 1
    for value, status in (("0.93", 0), ("0.94", 1)):
        text = f"{value} [0.90, 0.96], n = 40, 7.5 s\n"
        notebook.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
        nbformat.write(notebook, tmp_path / "one.ipynb")
        assert rerun([tmp_path / "one.ipynb"], tmp_path, environment).returncode == status
