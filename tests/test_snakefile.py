"""The graph of the study, on small notebooks: order, resumption, and what a failed job leaves."""

import re
import shlex
import shutil
from pathlib import Path

import nbformat
import pytest
from snakemake.cli import main

ROOT = Path(__file__).parents[1]
PARAMETERS = 'profile = "quick"  # sizes\ndata = "world"  # dataset\nlimit = 4  # edits\n'
WRITE = """from uke.files import write_atomic
from uke.project import Paths
write_atomic(Paths(profile, data).sections / "{name}.json", "{{}}")"""
STUDIES = """
01_small: {}
02_locality: {}
03_long: {after: [02_locality], priority: 1}
tuning: {report: false, after: [01_small]}
"""


@pytest.fixture
def project(tmp_path):
    """A project of four notebooks; `tuning` comes after `01_small`."""
    for folder in ("notebooks", "params/profiles"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "Snakefile", tmp_path)
    (tmp_path / "params/profiles/smoke.yaml").write_text("limit: 2\n")
    (tmp_path / "params/studies.yaml").write_text(STUDIES)
    for name in re.findall(r"^\w+", STUDIES, re.M):
        write(tmp_path, name, WRITE.format(name=name))
    return tmp_path


def write(project: Path, name: str, source: str) -> None:
    cell = nbformat.v4.new_code_cell
    cells = [cell(PARAMETERS, metadata={"tags": ["parameters"]}), cell(source)]
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec})
    nbformat.write(notebook, project / "notebooks" / f"{name}.ipynb")


@pytest.fixture
def snakemake(project, monkeypatch, capfd):
    """Factory: run Snakemake in this process on a target; return what it prints."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("UKE_HOME", str(project))
    monkeypatch.setenv("XDG_CACHE_HOME", str(project / "cache"))

    def run(target: str, *more: str, fails: bool = False) -> str:
        with pytest.raises(SystemExit) as ended:
            main([target, "--cores", "2", "--config", "profile=smoke", *more])
        printed = "".join(capfd.readouterr())
        assert bool(ended.value.code) == fails, printed
        return printed

    return run


@pytest.fixture
def planned(snakemake):
    return lambda target, *config: snakemake(target, *config, "--dry-run", "--printshellcmds")


def test_notebooks_run_in_order_once_and_a_failed_one_says_why(project, snakemake, planned):
    write(project, "tuning", "raise ValueError('nothing there')")
    plan = planned("tune")
    assert plan.index("uke run 01_small") < plan.index("uke run tuning")
    printed = snakemake("tune", fails=True)
    line = "tuning.ipynb: cell [3]: ValueError: nothing there"
    assert sum(line in each for each in printed.splitlines()) == 1 and "Traceback" not in printed
    assert (project / "results/smoke/notebooks/tuning.ipynb").exists()
    sections = project / "results/smoke/sections"
    assert [path.name for path in sections.iterdir()] == ["01_small.json"]
    done = str(sections / "01_small.json")
    assert "Nothing to be done" in planned(done)
    (profile := project / "params/profiles/smoke.yaml").write_text("limit: 3\n")
    shutil.copystat(project / "params/studies.yaml", profile)  # as after a clock was set back
    assert "Params have changed" in planned(done)
    plan = planned(done, "limit=3")
    assert "Params have changed" in plan and "--shared limit=3" in plan


def test_a_benchmark_waits_for_its_locality_set_and_the_world_does_not(project, planned):
    made = project / "it's $HOME #1: {made}.jsonl"
    made.write_text("{}\n")
    given = [f'{name}= "{made}" ' for name in ("data_file", "documents", "structured")]
    section = str(project / "results/{}/sections/03_long.json")
    plan = planned(section.format("smoke"))
    assert "uke run 03_long" in plan and "uke run 02_locality" not in plan
    plan = planned(section.format("smoke-unkebench"), "data=unkebench", *given)
    assert plan.index("uke run 02_locality") < plan.index("uke run 03_long")
    command = next(line for line in plan.splitlines() if "uke run 03_long" in line)
    assert f"data_file={made}" in shlex.split(command)


def test_drawing_again_reads_the_committed_rows_of_the_searches_too(project, planned):
    assert "uke run tuning " not in planned("report")
    rows = project / "figures/smoke/rows"
    rows.mkdir(parents=True)
    (rows / "tuning.parquet").touch()
    plan = planned("report", "rows=committed")
    assert "uke run tuning " in plan
    assert all("--rows committed" in line for line in plan.splitlines() if "uke run" in line)
