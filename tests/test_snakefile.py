"""The graph of the study, on small notebooks: order, resumption, and what a failed job leaves."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PARAMETERS = 'profile = "quick"  # sizes\ndata = "world"  # dataset\nlimit = 4  # edits\n'
WRITE = """import time
from uke.files import write_atomic
from uke.project import Paths
write_atomic(Paths(profile, data).sections / "{name}.json", '{{"at": %d}}' % time.time_ns())"""
STUDIES = """
01_small: {}
02_locality: {}
03_long: {after: [02_locality], priority: 1}
tuning: {report: false, after: [01_small]}
"""


@pytest.fixture
def project(tmp_path):
    """A project of four notebooks; `tuning` reads what `01_small` has written."""
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


def snakemake(project: Path, target: str, *more: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "snakemake", target, "--cores", "2", "--config"]
    environment = os.environ | {"UKE_HOME": str(project), "XDG_CACHE_HOME": str(project / "cache")}
    return subprocess.run(
        [*command, "profile=smoke", *more],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )


def planned(project: Path, target: str, *config: str) -> str:
    done = snakemake(project, target, *config, "--dry-run", "--printshellcmds")
    return done.stdout + done.stderr


def written(project: Path) -> dict[str, int]:
    sections = (project / "results/smoke/sections").glob("*.json")
    return {path.stem: int(path.read_text().split()[1].strip("}")) for path in sorted(sections)}


def test_notebooks_run_in_order_once_and_again_when_a_parameter_changes(project):
    done = snakemake(project, "tune")
    assert done.returncode == 0, done.stderr
    times = written(project)
    assert list(times) == ["01_small", "tuning"] and times["01_small"] < times["tuning"]
    assert "Nothing to be done" in planned(project, "tune")
    plan = planned(project, "tune", "limit=3")
    assert "Params have changed" in plan and "--shared limit=3" in plan


def test_a_failed_job_keeps_its_executed_notebook_and_says_why_in_one_line(project):
    write(project, "01_small", "raise ValueError('nothing there')")
    done = snakemake(project, "tune")
    line = "01_small.ipynb: cell [3]: ValueError: nothing there"
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert sum(line in each for each in done.stderr.splitlines()) == 1
    assert (project / "results/smoke/notebooks/01_small.ipynb").exists()
    assert "tuning" not in written(project)


def test_a_benchmark_waits_for_its_locality_set_and_the_world_does_not(project):
    made = project / "made.jsonl"
    made.write_text("{}\n")
    given = [f"{name}={made}" for name in ("data_file", "documents", "structured")]
    section = str(project / "results/{}/sections/03_long.json")
    plan = planned(project, section.format("smoke"))
    assert "uke run 03_long" in plan and "uke run 02_locality" not in plan
    plan = planned(project, section.format("smoke-unkebench"), "data=unkebench", *given)
    assert plan.index("uke run 02_locality") < plan.index("uke run 03_long")


def test_drawing_again_reads_the_committed_rows_of_the_searches_too(project):
    assert "uke run tuning " not in planned(project, "report")
    rows = project / "figures/smoke/rows"
    rows.mkdir(parents=True)
    (rows / "tuning.parquet").touch()
    plan = planned(project, "report", "rows=committed")
    assert "uke run tuning " in plan
    assert all("--rows committed" in line for line in plan.splitlines() if "uke run" in line)
