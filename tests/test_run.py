"""The runner on small notebooks written here: what it refuses before a kernel starts, and what it makes of a failing one."""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pytest
from uke.cli import kernels, manifests, params, run
from uke.data.documents import find_collections
from uke.data.edits import DATA_FILES, find_data
from uke.errors import InputError

PARAMETERS = """profile = "quick"  # sizes
data = "world"  # dataset
data_file = ""  # its file
model = "embedded"  # what is edited
limit = 4  # edits
rate = 1e-3  # learning rate
methods = ["FT-M"]  # compared
only = None  # one unit
"""
SECTION = "sections/01_small.json"
WRITE = """from uke.project import Paths
section = Paths(profile, data).sections / "01_small.json"
section.parent.mkdir(parents=True, exist_ok=True)
section.write_text(str(limit))"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with two profiles and, by `write`, one notebook."""
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    monkeypatch.delenv("UKE_DATA", raising=False)
    for folder in ("notebooks", "params/profiles", "params/studies", "params/methods"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "params/profiles/quick.yaml").write_text("limit: 5\n")
    (tmp_path / "params/profiles/smoke.yaml").write_text("limit: 2\n")
    for name in ("FT-L", "FT-M"):
        (tmp_path / f"params/methods/{name.lower()}.yaml").write_text(f"base: {name}\n")
    write(tmp_path, WRITE)
    return tmp_path


def write(project: Path, *cells: str) -> None:
    cell = nbformat.v4.new_code_cell
    tagged = cell(PARAMETERS, metadata={"tags": ["parameters"]})
    title = nbformat.v4.new_markdown_cell("# Is this small?")
    notebook = nbformat.v4.new_notebook(cells=[title, tagged, *(cell(source) for source in cells)])
    notebook.metadata.kernelspec = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    nbformat.write(notebook, project / "notebooks" / "01_small.ipynb")


def small(*arguments: str, profile: str = "quick") -> int:
    return run.main(["01_small", "--profile", profile, *arguments])


def executed(project: Path) -> list:
    return nbformat.read(project / "results/quick/notebooks/01_small.ipynb", as_version=4).cells


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--set", "limmit=3"], "--set: unknown parameter 'limmit'; did you mean 'limit'?"),
        (["--set", "limit=three"], "--set: limit: expected int, found 'three' (str)"),
        (["--set", "limit=2.5"], "--set: limit: expected int, found 2.5 (float)"),
        (["--set", "limit=true"], "--set: limit: expected int, found True (bool)"),
        (["--set", "limit"], "--set limit: expected name=value"),
        (
            ["--shared", "metods=FT-M"],
            "--shared: unknown parameter 'metods'; did you mean 'methods'?",
        ),
        (["--set", "methods=FT-M,FT-Q"], "methods: unknown method 'FT-Q'; did you mean"),
        (["--set", "data=zsre"], "--set: 'data' is chosen by --data"),
        (["--data", "unkebensh"], "data: unknown dataset 'unkebensh'; did you mean 'unkebench'?"),
        (["--data", "unkebench"], "data: unkebench needs a file, and UKE_DATA is not set"),
        (["--data", "zsre", "--set", "data_file=none.json"], "data_file: none.json: no such file"),
        (["--set", "model=./nowhere"], "model: ./nowhere: no such directory"),
        (["--profile", "quik"], "unknown profile 'quik'; did you mean 'quick'?"),
    ],
)
def test_bad_parameters_are_refused_in_one_line_before_anything_starts(
    project, caplog, arguments, expected
):
    assert small(*arguments) == 2
    assert expected in caplog.messages[-1]
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[-1]
    assert not (project / "results").exists() and not (project / "figures").exists()


@pytest.mark.parametrize(
    "file, content, expected",
    [
        (
            "profiles/quick.yaml",
            "limt: 3\n",
            "quick.yaml: unknown parameter 'limt'; did you mean 'limit'?",
        ),
        ("profiles/quick.yaml", "limit: many\n", "quick.yaml: limit: expected int, found 'many'"),
        ("profiles/quick.yaml", "limit: 1\nlimit: 2\n", "quick.yaml: key 'limit' is written twice"),
        ("profiles/quick.yaml", "limit: [1\n", "quick.yaml, line 2: not valid YAML"),
        (
            "profiles/quick.yaml",
            "- limit\n",
            "quick.yaml: expected a mapping of names to values, found list",
        ),
        ("profiles/quick.yaml", "profile: smoke\n", "quick.yaml: 'profile' is chosen by --profile"),
        (
            "studies/01_small.yaml",
            "notebook: 01_small\nfixt: {}\n",
            "unknown key 'fixt'; did you mean 'fixed'?",
        ),
        (
            "studies/01_small.yaml",
            "notebook: 01_big\n",
            "notebook: expected '01_small', found '01_big'",
        ),
        (
            "studies/01_small.yaml",
            "notebook: 01_small\nvary: {limit: 3}\n",
            "vary: limit: expected a list, found 3",
        ),
        (
            "studies/01_small.yaml",
            "notebook: 01_small\nfixed: {rat: 1.0}\n",
            "unknown parameter 'rat'; did you mean 'rate'?",
        ),
        (
            "studies/01_small.yaml",
            "notebook: 01_small\nvary: {methods: [1]}\n",
            "methods[0]: expected str, found 1",
        ),
        (
            "studies/01_small.yaml",
            "notebook: 01_small\nprofiles: {smok: {}}\n",
            "unknown profile 'smok'; did you mean 'smoke'?",
        ),
    ],
)
def test_a_fault_in_a_params_file_names_file_key_and_nearest_name(
    project, caplog, file, content, expected
):
    (project / "params" / file).write_text(content)
    assert small() == 2
    assert (
        expected in caplog.messages[-1]
        and file in caplog.messages[-1]
        and "\n" not in caplog.messages[-1]
    )


def test_a_misspelt_notebook_is_named_with_the_nearest(project, caplog):
    assert run.main(["01_smal", "--profile", "quick"]) == 2
    assert "no such notebook; did you mean '01_small'?" in caplog.messages[-1]


@pytest.mark.parametrize(
    "source, expected",
    [
        ("limit = 2 + len('a')", "limit: expected a literal value"),
        ("limit: int = 2", "expected `name = literal`"),
        ("limit = {'a': 1}", "limit: expected bool, int, float, str, list or None"),
        ("limit =", "not valid Python"),
    ],
)
def test_a_parameters_cell_that_is_no_list_of_literals_is_refused(project, source, expected):
    path = project / "notebooks" / "01_small.ipynb"
    path.write_text(path.read_text().replace("limit = 4  # edits", source))
    with pytest.raises(InputError, match="parameters cell, line 5") as caught:
        params.declared(path)
    assert expected in str(caught.value)


def test_the_later_source_of_a_parameter_wins(project):
    study = project / "params/studies/01_small.yaml"
    given = {"set": [], "shared": []}

    def merged(name, profile="quick"):
        return params.merge(project, "01_small", profile, given)[name]

    (project / "params/profiles/quick.yaml").write_text("{}\n")
    assert merged("limit") == 4
    (project / "params/profiles/quick.yaml").write_text("limit: 5\n")
    assert merged("limit") == 5
    study.write_text("notebook: 01_small\nfixed: {limit: 6}\n")
    assert merged("limit") == 6
    study.write_text("notebook: 01_small\nfixed: {limit: 6}\nprofiles: {smoke: {limit: 7}}\n")
    assert merged("limit") == 6 and merged("limit", "smoke") == 7
    given["shared"] = ["limit=8"]
    assert merged("limit") == 8
    given["set"] = ["limit=9"]
    assert merged("limit") == 9


def test_values_take_the_type_of_the_default(project):
    (project / "params/profiles/quick.yaml").write_text("rate: 5e-4\n")
    texts = ["methods=FT-L, FT-M", "data_file=12", "only=3"]
    merged = params.merge(project, "01_small", "quick", {"set": texts})
    assert merged["rate"] == 5e-4 and isinstance(merged["rate"], float)
    assert (
        merged["methods"] == ["FT-L", "FT-M"]
        and merged["data_file"] == "12"
        and merged["only"] == 3
    )
    whole = params.merge(project, "01_small", "quick", {"set": ["rate=1"]})["rate"]
    assert whole == 1.0 and isinstance(whole, float)


def test_a_shared_value_is_skipped_by_a_notebook_without_the_parameter(project):
    other = (project / "notebooks/01_small.ipynb").read_text().replace("only =", "shard =")
    (project / "notebooks/02_other.ipynb").write_text(other)
    assert "shard" not in params.merge(project, "01_small", "quick", {"shared": ["shard=2"]})
    assert params.merge(project, "02_other", "quick", {"shared": ["shard=2"]})["shard"] == 2
    with pytest.raises(InputError, match="unknown parameter 'shard'"):
        params.merge(project, "01_small", "quick", {"set": ["shard=2"]})


def test_data_is_found_by_folder_or_by_file_and_never_guessed(project, monkeypatch):
    folder = project / "bench"
    (folder / "structured").mkdir(parents=True)
    monkeypatch.setenv("UKE_DATA", str(folder))
    with pytest.raises(InputError, match="expected one file structured/zsre"):
        find_data("zsre")
    first = folder / "structured" / "zsre_a.json"
    first.write_text("[]")
    assert find_data("zsre") == str(first)
    (folder / "structured" / "zsre_b.json").write_text("[]")
    with pytest.raises(InputError, match="zsre_a.json, zsre_b.json; name it with DATA_FILE"):
        find_data("zsre")
    assert find_data("zsre", str(first)) == str(first)
    assert find_data("world") == ""


def test_every_dataset_that_can_be_read_can_be_found():
    from uke.data import edits

    assert set(DATA_FILES) == set(edits.DATASETS)


def test_a_run_uses_this_interpreter_and_writes_outputs_and_manifest(project, monkeypatch):
    decoy = project / "share" / "kernels" / "python3"
    decoy.mkdir(parents=True)
    (decoy / "kernel.json").write_text(
        json.dumps({"argv": ["/bin/false"], "display_name": "x", "language": "python"})
    )
    monkeypatch.setenv("JUPYTER_PATH", str(project / "share"))
    write(project, WRITE, "import sys; sys.executable")
    assert small("--set", "limit=3") == 0
    assert (project / "results/quick" / SECTION).read_text() == "3"
    assert sys.executable in executed(project)[-1].outputs[0].data["text/plain"]
    manifest = json.loads((project / "results/quick/manifests/01_small.json").read_text())
    assert manifest["status"] == "done" and manifest["parameters"]["limit"] == 3
    assert (
        manifest["executable"] == sys.executable
        and manifest["seconds"] > 0
        and manifest["processor"]
        and manifest["versions"]["papermill"]
    )


def test_processors_of_one_name_are_told_apart(tmp_path):
    said = []
    for number, (model, flags) in enumerate(
        (("1", "fma avx avx2"), ("17", "fma avx avx2 avx512f avx512bw"))
    ):
        told = tmp_path / f"cpuinfo{number}"
        told.write_text(
            f"processor\t: 0\ncpu family\t: 25\nmodel\t\t: {model}\nmodel name\t: AMD EPYC\nflags\t\t: {flags}\n\n"
            * 2
        )
        said.append(manifests.processor(told))
    assert said == [
        "AMD EPYC (family 25, model 1, AVX2)",
        "AMD EPYC (family 25, model 17, AVX-512)",
    ]
    assert manifests.processor(tmp_path / "none")


def test_a_failing_cell_is_one_line_on_stderr(project):
    write(project, "first = 1", "raise RuntimeError('no\\nway')")
    command = [sys.executable, "-m", "uke.cli.run", "01_small", "--profile", "quick"]
    done = subprocess.run(command, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "01_small.ipynb: cell [4]: RuntimeError: no (" in last
    assert (
        json.loads((project / "results/quick/manifests/01_small.json").read_text())["status"]
        == "failed"
    )


def test_an_input_error_of_a_cell_is_shown_as_its_own_line(project, caplog):
    write(
        project,
        "from uke.errors import InputError",
        "raise InputError('x.json: record 3: empty answer')",
    )
    assert small() == 1
    assert caplog.messages[-1] == "x.json: record 3: empty answer"


def test_a_missing_or_old_declared_output_fails_the_run(project, caplog):
    write(project, "limit")
    assert small() == 1
    assert "finished without writing its declared output" in caplog.messages[-1]
    section = project / "results/quick" / SECTION
    section.write_text("old")
    assert small() == 1
    assert "finished without renewing its declared output" in caplog.messages[-1]


def test_a_killed_kernel_fails_the_run_and_rerunning_resumes(project, caplog):
    write(
        project,
        "from pathlib import Path\nimport os, signal\nfolder = Path('results/units')\nfolder.mkdir(parents=True, exist_ok=True)",
        "for unit in 'ab':\n    if not (folder / unit).exists():\n        (folder / unit).write_text(str(os.getpid()))\n"
        "        os.kill(os.getpid(), signal.SIGKILL) if unit == 'a' else None",
        WRITE,
    )
    assert small() == 1
    assert "kernel failed in 'Is this small?'" in caplog.messages[-1]
    first = (project / "results/units/a").read_text()
    assert small() == 0
    assert (
        (project / "results/units/a").read_text()
        == first
        != (project / "results/units/b").read_text()
    )


def test_the_outer_timeout_ends_a_hanging_notebook_and_its_kernel(project, monkeypatch, caplog):
    at_start(
        project, monkeypatch, "pathlib.Path(__file__).with_name('pid').write_text(str(os.getpid()))"
    )
    write(project, "import time\ntime.sleep(300)")
    start = time.time()
    assert small("--timeout", "5") == 1
    assert "not finished after 5 s" in caplog.messages[-1] and time.time() - start < 100
    with pytest.raises(ProcessLookupError):
        os.kill(int((project / "trap/pid").read_text()), 0)


def at_start(project: Path, monkeypatch, source: str) -> None:
    """Have every Python that starts from now on run `source` first."""
    trap = project / "trap"
    trap.mkdir()
    (trap / "sitecustomize.py").write_text(f"import os, pathlib\n{source}\n")
    monkeypatch.setenv("PYTHONPATH", f"{trap}:{os.environ.get('PYTHONPATH', '')}")


def test_a_kernel_that_fails_to_start_is_started_once_more(project, monkeypatch, caplog):
    once = "mark = pathlib.Path(__file__).with_name('started')\nif not mark.exists():\n    mark.touch()\n    os._exit(3)"
    at_start(project, monkeypatch, once)
    assert small() == 0
    assert any(
        "failed to start" in message and "once more" in message for message in caplog.messages
    )


def test_a_kernel_listens_in_a_folder_of_its_own_that_goes_with_it(project, monkeypatch):
    """Over TCP, kernels that start together take each other's ports, and other users of the machine can listen."""
    where = "from ipykernel.kernelapp import IPKernelApp\nfrom pathlib import Path\nown = IPKernelApp.instance()"
    write(
        project,
        where,
        'Path("listening").write_text(f"{own.transport} {Path(own.ip).parent.stat().st_mode & 0o777:o} {own.ip}")',
        WRITE,
    )
    with (
        tempfile.TemporaryDirectory() as folder
    ):  # short: the path of a socket has a hundred characters at most
        monkeypatch.setattr(tempfile, "tempdir", folder)
        assert small() == 0
        transport, mode, place = (project / "listening").read_text().split()
        assert (transport, mode) == ("ipc", "700") and place.startswith(folder)
        assert not list(Path(folder).glob("uke-*/kernel*"))


def test_parallel_runs_lease_different_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with kernels.leased_device() as first:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == first.removeprefix("cuda:")
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
        with kernels.leased_device() as second:
            assert {first, second} == {"cuda:4", "cuda:5"}
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,5"


def test_a_profile_of_its_own_has_its_own_report_and_a_set_needs_documents(project):
    for name, report in (
        ("02_locality", "true"),
        ("03_other", "true"),
        ("own", "special"),
        ("never", "false"),
    ):
        (project / f"params/studies/{name}.yaml").write_text(
            f"notebook: {name}\nreport: {report}\n"
        )

    def names(*arguments):
        return [study.notebook for study in params.reported(project, *arguments)]

    assert names("special", "world") == ["own"]
    assert "own" not in names("quick", "world") and "never" not in names("quick", "world")
    assert "02_locality" in names("quick", "world", False) and "02_locality" in names(
        "quick", "unkebench", True
    )
    assert "02_locality" not in names("quick", "unkebench", False)


def test_collections_are_those_given_else_those_of_the_folder(project, monkeypatch):
    monkeypatch.delenv("UKE_DATA", raising=False)
    assert find_collections("documents") == ()
    (project / "wikipedia").mkdir()
    for name in ("b.jsonl", "a.txt", ".hidden"):
        (project / "wikipedia" / name).write_text("x")
    monkeypatch.setenv("UKE_DATA", str(project))
    assert [path.name for path in find_collections("documents")] == ["a.txt", "b.jsonl"]
    assert [
        path.name for path in find_collections("documents", [str(project / "wikipedia/b.jsonl")])
    ] == ["b.jsonl"]
    with pytest.raises(InputError, match="documents: nowhere.jsonl: no such file"):
        find_collections("documents", ["nowhere.jsonl"])
