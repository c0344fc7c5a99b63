"""The command line on small notebooks: what it refuses before a kernel starts, what it runs."""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
import yaml
from snakemake.cli import parse_config
from uke.cli import params
from uke.cli.execute import runs
from uke.cli.main import _parser, job, main
from uke.cli.preflight import check
from uke.data.find import find_data, find_files
from uke.errors import InputError
from uke.files import write_atomic
from uke.methods.catalog import key
from uke.project import Paths

ROOT = Path(__file__).parents[1]
PARAMETERS = """profile = "quick"  # sizes
data = "world"  # dataset
data_file = ""  # its file
model = "embedded"  # what is edited
limit = 4  # edits
rate = 1e-3  # learning rate
methods = ["FT-M"]  # compared
only = ""  # one unit
"""
PID = "import os\nopen('pid', 'w').write(str(os.getpid()))"
WRITE = """from uke.files import write_atomic
from uke.project import Paths
section = Paths(profile, data).sections / "01_small.json"
write_atomic(section, '{"answer": "It is, with %d."}' % limit)"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with two profiles and one notebook, which `write` changes."""
    monkeypatch.setenv("UKE_HOME", str(tmp_path))
    monkeypatch.delenv("UKE_DATA", raising=False)
    for folder in ("notebooks", "params/profiles", "params/methods"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "params/studies.yaml").write_text("01_small: {}\n")
    (tmp_path / "params/profiles/quick.yaml").write_text("limit: 5\n")
    (tmp_path / "params/profiles/smoke.yaml").write_text("limit: 2\n")
    for name in ("FT-L", "FT-M", "AnyEdit (MEMIT)"):
        (tmp_path / f"params/methods/{key(name)}.yaml").write_text(f"base: {name}\n")
    write(tmp_path, WRITE)
    return tmp_path


def write(project: Path, *cells: str) -> None:
    cell = nbformat.v4.new_code_cell
    tagged = cell(PARAMETERS, metadata={"tags": ["parameters"]})
    title = nbformat.v4.new_markdown_cell("# Is it small?\n\n**Answer** See below.\n\n**Cost** 0.")
    notebook = nbformat.v4.new_notebook(cells=[title, tagged, *(cell(source) for source in cells)])
    kernel = {"name": "python3", "display_name": "Python", "language": "python"}
    notebook.metadata.kernelspec = kernel
    nbformat.write(notebook, project / "notebooks" / "01_small.ipynb")


def run(*arguments: str, profile: str = "quick") -> int:
    return main(["run", "01_small", "--profile", profile, *arguments])


def merge(project: Path, profile: str = "quick", notebook: str = "01_small", **given) -> dict:
    return params.merge(project, notebook, profile, **given)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "limmit=3"], "--set: unknown parameter 'limmit'; did you mean 'limit'?"),
        (["--set", "limit=three"], "--set: limit: Input should be a valid integer"),
        (["--set", "limit=2.5"], "--set: limit: Input should be a valid integer"),
        (["--set", "limit=true"], "--set: limit: Input should be a valid integer"),
        (["--set", "limit"], "--set limit: expected name=value"),
        (["--shared", "metods=A"], "--shared: unknown parameter 'metods'; did you mean 'methods'?"),
        (["--set", "methods=FT-M,FT-Q"], "methods: unknown method 'FT-Q'; did you mean"),
        (["--set", "data=zsre"], "--set: 'data' is chosen by --data"),
        (["--data", "unkebensh"], "data: unknown dataset 'unkebensh'; did you mean 'unkebench'?"),
        (["--data", "unkebench"], "results/data, found none (`make data` downloads it); name it"),
        (["--data", "unkebench", "--set", "data_file=no.json"], "unkebench: no.json: no such file"),
        (["--set", "model=./nowhere"], "nowhere: no such directory"),
        (["--profile", "quik"], "quik.yaml: no such file; did you mean 'quick'?"),
    ],
)
def test_bad_parameters_are_refused_in_one_line_at_once(project, caplog, arguments, expected):
    assert run(*arguments) == 2
    assert expected in caplog.messages[-1]
    assert len(caplog.messages) == 1 and "\n" not in caplog.messages[-1]
    assert not (project / "results").exists() and not (project / "figures").exists()


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("profiles/quick.yaml", "limt: 3", "unknown parameter 'limt'; did you mean 'limit'?"),
        ("profiles/quick.yaml", "limit: many", "limit: Input should be a valid integer"),
        ("profiles/quick.yaml", "limit: 1\nlimit: 2", "key 'limit' is written twice"),
        ("profiles/quick.yaml", "limit: [1", "line 2: not valid YAML"),
        ("profiles/quick.yaml", 'data: "\\ud800"', "line 1: not valid YAML: a lone surrogate"),
        ("profiles/quick.yaml", "limit: 010", "valid integer; found '010'"),
        ("profiles/quick.yaml", "limit: 1:30", "valid integer; found '1:30'"),
        ("profiles/quick.yaml", "limit: !!int x", "quick.yaml: not valid YAML: invalid literal"),
        ("profiles/quick.yaml", "- limit", "quick.yaml: Input should be a valid dictionary; found"),
        ("profiles/quick.yaml", "profile: smoke", "'profile' is chosen by --profile"),
        ("studies.yaml", "01_small: {fixt: {}}", "did you mean 'fixed'?"),
        ("studies.yaml", "01_small: [1]", "01_small: Input should be a valid dictionary"),
        ("studies.yaml", "01_small: {priority: high}", "field 'priority': Input should be a valid"),
        ("studies.yaml", "01_small: {fixed: {rat: 1.0}}", "did you mean 'rate'?"),
        ("studies.yaml", "01_small: {fixed: {methods: [1]}}", "methods, field '0': Input should"),
        ("studies.yaml", "01_small: {profiles: {smok: {}}}", "did you mean 'smoke'?"),
    ],
)
def test_a_fault_in_a_parameter_file_is_named_with_key(project, caplog, file, content, expected):
    (project / "params" / file).write_text(content + "\n")
    assert run() == 2
    line = caplog.messages[-1]
    assert expected in line and file in line and "\n" not in line


def test_what_the_last_notebook_reads_is_checked_before_the_first_runs(project, caplog):
    (project / "params/studies.yaml").write_text("11_verdicts: {}\n")
    notebook = (ROOT / "notebooks/11_verdicts.ipynb").read_text()
    (project / "notebooks/11_verdicts.ipynb").write_text(notebook)
    for name, text in (("claims", ""), ("paper", "published: x")):
        assert main(["check", "--profile", "quick"]) == 2 and name in caplog.messages[-1]
        (project / f"params/{name}.yaml").write_text(text)
    assert main(["check", "--profile", "quick"]) == 2
    assert "paper.yaml, field 'published': Input should be a valid list" in caplog.messages[-1]


def test_a_file_in_place_of_the_folder_of_results_is_one_line(project, caplog):
    (project / "results").touch()
    assert run() == 2 and f"{project / 'results'}: expected a folder" in caplog.messages[-1]


def test_a_misspelt_notebook_is_named_with_the_nearest(project, caplog):
    assert main(["run", "01_smal", "--profile", "quick"]) == 2
    assert "no such notebook; did you mean '01_small'?" in caplog.messages[-1]


@pytest.mark.parametrize("source", ["limit = 2 + len('a')", "limit: int = 2", "limit ="])
def test_a_parameters_cell_holds_literals_alone(project, source):
    path = project / "notebooks" / "01_small.ipynb"
    path.write_text(path.read_text().replace("limit = 4  # edits", source))
    with pytest.raises(InputError, match="01_small.ipynb: .* of lines `name = literal`"):
        params.declared(path)


def test_the_later_source_of_a_parameter_wins(project):
    profile, study = project / "params/profiles/quick.yaml", project / "params/studies.yaml"
    profile.write_text("{}\n")
    assert merge(project)["limit"] == 4
    profile.write_text("limit: 5\n")
    assert merge(project)["limit"] == 5
    study.write_text("01_small: {fixed: {limit: 6}, profiles: {smoke: {limit: 7}}}\n")
    assert merge(project)["limit"] == 6 and merge(project, "smoke")["limit"] == 7
    assert merge(project, shared=["limit=8"])["limit"] == 8
    assert merge(project, shared=["limit=8"], own=["limit=9"])["limit"] == 9


def test_values_take_the_type_of_the_default(project):
    (project / "params/profiles/quick.yaml").write_text("rate: 5e-4\n")
    merged = merge(project, own=["methods=FT-L, FT-M", "data_file=12", "only=3"])
    assert merged["rate"] == 5e-4 and isinstance(merged["rate"], float)
    assert merged["methods"] == ["FT-L", "FT-M"]
    assert merged["data_file"] == "12" and merged["only"] == "3"
    assert isinstance(merge(project, own=["rate=1"])["rate"], float)


def test_a_shared_value_is_skipped_by_a_notebook_without_the_parameter(project):
    other = (project / "notebooks/01_small.ipynb").read_text().replace("only =", "shard =")
    (project / "notebooks/02_other.ipynb").write_text(other)
    assert "shard" not in merge(project, shared=["shard=2"])
    assert merge(project, notebook="02_other", shared=["shard=2"])["shard"] == "2"
    with pytest.raises(InputError, match="unknown parameter 'shard'"):
        merge(project, own=["shard=2"])


def test_data_is_found_by_folder_or_by_file_and_never_guessed(project, monkeypatch):
    folder = project / "bench"
    (folder / "unkebench").mkdir(parents=True)
    monkeypatch.setenv("UKE_DATA", str(folder))
    with pytest.raises(InputError, match="expected one file unkebench/final_data"):
        find_data("unkebench")
    first = folder / "unkebench" / "final_data_v2.json"
    first.write_text("[]")
    assert find_data("unkebench") == find_data("unkebench", str(first)) == str(first)
    (folder / "unkebench" / "final_data_v3.json").write_text("[]")
    with pytest.raises(InputError, match="v2.json, final_data_v3.json; name it with DATA_FILE"):
        find_data("unkebench")
    assert find_data("world") == ""


def test_collections_are_those_given_else_those_of_the_folder(project, monkeypatch):
    assert find_files("documents") == ()
    (project / "wikipedia").mkdir()
    for name in ("b.jsonl", "a.jsonl", ".hidden"):
        (project / "wikipedia" / name).write_text("{}")
    monkeypatch.setenv("UKE_DATA", str(project))
    assert [path.name for path in find_files("documents")] == ["a.jsonl", "b.jsonl"]
    given = [str(project / "wikipedia/b.jsonl")]
    assert [path.name for path in find_files("documents", given)] == ["b.jsonl"]
    with pytest.raises(InputError, match="documents: nowhere.jsonl: no such file"):
        find_files("documents", ["nowhere.jsonl"])


def test_a_profile_of_its_own_has_its_own_report_and_a_locality_set_needs_documents(project):
    studies = {"02_locality": True, "03_other": True, "own": "special", "never": False}
    text = yaml.safe_dump({name: {"report": report} for name, report in studies.items()})
    (project / "params/studies.yaml").write_text(text)

    assert params.reported(project, "special", "world") == ["own"]
    assert params.reported(project, "quick", "world", False) == ["02_locality", "03_other"]
    assert params.reported(project, "quick", "unkebench", True) == ["02_locality", "03_other"]
    assert params.reported(project, "quick", "unkebench", False) == ["03_other"]
    drawn = Paths("quick")
    drawn.exported("03_other").parent.mkdir(parents=True)
    drawn.exported("03_other").touch()  # drawn again from rows, a run has what has any
    assert params.reported(project, "quick", "world", True, drawn) == ["03_other"]


# What is checked of a run's parameters.


@pytest.fixture
def directory(tmp_path, tokenizer, tiny):
    """An ordinary model directory: four blocks, context of 256."""
    tiny("llama").save_pretrained(tmp_path / "a model")
    tokenizer.save_pretrained(tmp_path / "a model")
    return tmp_path / "a model"


def test_a_model_is_found_from_any_folder(project, directory, monkeypatch):
    monkeypatch.chdir(directory)
    monkeypatch.setenv("HOME", str(project))
    for given in (".", "~/a model"):
        line = ["run", "01_small", "--profile", "quick", "--set", f"model={given}"]
        assert job(_parser().parse_args(line), "01_small").parameters["model"] == str(directory)


def refuse(project, match, data="world", **parameters):
    with pytest.raises(InputError, match=match) as caught:
        check(project, data, {"methods": ["FT-L", "FT-M"], **parameters})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"limit": 0}, "limit: 0; expected whole numbers of at least 1"),
        ({"batch_sizes": [8, 0]}, "batch_sizes: 8, 0; expected whole numbers of at least 1"),
        ({"batch_sizes": []}, "batch_sizes: none"),
        ({"split": "tset"}, "unknown split 'tset'; did you mean 'test'"),
        ({"methods": ["AnyEdit (MEMIT)", "anyedit_memit"]}, "expected each method once"),
        ({"methods": ["MEMIT"]}, "methods: unknown method 'MEMIT'"),  # it has no file here
        ({"levels": ["al"]}, "levels: unknown level 'al'; did you mean 'all'"),
        ({"levels": [], "methods": ["anyedit_memit"]}, "AnyEdit .MEMIT.: it has no levels of"),
    ],
)
def test_a_bad_value_is_refused(project, parameters, match):
    refuse(project, match, **parameters)


def test_what_does_not_fit_the_model_is_named(project, directory, tmp_path):
    check(project, "world", {"methods": ["FT-M"], "model": str(directory)})
    command = f"python -m uke covariance '{directory}' TEXTS.json, or documents"
    refuse(project, re.escape(command), methods=["anyedit_memit"], model=str(directory))
    path = project / "params" / "methods" / f"{key('FT-M')}.yaml"
    path.write_text("base: FT-M\nlayers: [1, 40]\n")
    refuse(project, "FT-M: layers: 40 is out of range; expected a number 0-3", model=str(directory))
    path.write_text("base: FT-M\n")
    answers = ["word " * (400 if number == 2 else 5) for number in range(8)]
    asked = {"question": "Who?", "category": "x"}
    records = [asked | {"id": n, "answer": answer} for n, answer in enumerate(answers)]
    file = tmp_path / "edits.json"
    file.write_text(json.dumps(records))
    given = {"data_file": str(file), "model": str(directory)}
    with pytest.raises(InputError, match="FT-M: edit '2': .* tokens long; .* context holds 256"):
        for split in ("test", "development"):  # the long one is in one of them
            check(project, "editeverything", {"methods": ["FT-M"], "split": split, **given})
    file.write_text(json.dumps([*records[:7], records[7] | {"answer": ""}]))
    refuse(project, "edits.json.*answer", data="editeverything", limit=2, **given)


# What becomes of a notebook that is run.


def executed() -> list:
    path = Paths("quick").results / "notebooks" / "01_small.ipynb"
    return nbformat.read(path, as_version=4).cells


def manifest() -> dict:
    return json.loads((Paths("quick").results / "manifests" / "01_small.json").read_text())


def test_a_notebook_took_as_long_as_its_rows_say_where_they_are_rows_of_edits(project):
    paths, committed = Paths("quick"), ROOT / "figures" / "embedded" / "rows"
    for name in ("00_embedded_model", "07_recipe"):  # the first has an examination
        run = {"notebook": name, "seconds": 1.0}
        write_atomic(paths.results / "manifests" / f"{name}.json", json.dumps(run))
        write_atomic(paths.exported(name), (committed / f"{name}.parquet").read_bytes())
    first, second = runs(paths)
    assert first["seconds"] == 1 and second["seconds"] > 100


def test_a_run_uses_this_interpreter_and_leaves_section_answer_and_manifest(project, monkeypatch):
    decoy = project / "share" / "kernels" / "python3"
    decoy.mkdir(parents=True)
    kernel = {"argv": ["/bin/false"], "display_name": "x", "language": "python"}
    (decoy / "kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(project / "share"))
    listens = "from ipykernel.kernelapp import IPKernelApp\nown = IPKernelApp.instance()"
    write(project, WRITE, "import sys; sys.executable", listens, "own.transport, own.ip")
    with tempfile.TemporaryDirectory() as folder:  # short: a socket's path has a hundred letters
        monkeypatch.setattr(tempfile, "tempdir", folder)
        assert run("--set", "limit=3") == 0
        assert not list(Path(folder).glob("uke-*"))
    cells = executed()
    assert "**Answer** It is, with 3.\n\n**Cost** 0." in cells[0].source
    assert sys.executable in cells[-3].outputs[0].data["text/plain"]
    assert f"'ipc', '{folder}" in cells[-1].outputs[0].data["text/plain"]
    assert manifest()["status"] == "done" and manifest()["libraries"]["torch"]


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("from uke.errors import InputError\nraise InputError('x.json: empty')", "x.json: empty"),
        (f"{PID}\nraise RuntimeError('no\\nway')", "01_small.ipynb: cell [3]: RuntimeError: no ("),
        ("limit", "finished without writing its section"),
    ],
)
def test_a_failing_cell_is_one_line_and_an_old_section_fails(project, caplog, cell, expected):
    write_atomic(old := Paths("quick").sections / "01_small.json", "{}")
    os.utime(old, (2**32, 2**32))  # as before a clock was set back
    write(project, cell)
    assert run("--checked") == 1
    assert expected in caplog.messages[-1] and "\n" not in caplog.messages[-1]
    assert manifest()["status"] == "failed"
    if (pid := project / "pid").exists():  # its kernel has ended
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)


def test_a_killed_kernel_fails_the_run_and_rerunning_resumes(project, caplog):
    units = """from pathlib import Path
import os, signal
folder = Path("results/units")
folder.mkdir(parents=True, exist_ok=True)
for unit in "ab":
    if not (folder / unit).exists():
        (folder / unit).write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL) if unit == "a" else None"""
    write(project, units, f"{WRITE}\nos.utime(section, (0, 0))")  # a clock set back on the way
    assert run() == 1
    assert "kernel failed in 'Is it small?'" in caplog.messages[-1]
    first = (project / "results/units/a").read_text()
    assert run() == 0
    assert (project / "results/units/a").read_text() == first
    assert (project / "results/units/b").read_text() != first


def test_make_hands_on_every_character_of_a_path():
    path = '/a b/it\'s "$HOME" #1: {x} \\n,c.json'
    done = subprocess.run(["make", "-n", "report", f"MODEL={path}"], cwd=ROOT, capture_output=True)
    words = shlex.split(done.stdout.decode().replace("\\\n", " "))
    assert f"model={path}" in words
    (given,) = (word for word in words if word.startswith("model= "))
    assert parse_config([given]) == {"model": path}


def test_help_lists_every_target_of_the_makefile():
    targets = re.findall(r"^([a-z-]+): .*##", (ROOT / "Makefile").read_text(), re.M)
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True)
    assert set(re.findall(r"^make ([a-z-]+) ", done.stdout, re.M)) == set(targets)
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split()
    assert sorted(phony) == sorted(targets)
