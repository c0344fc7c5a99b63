"""The graph of the study, on two small notebooks: order, resumption, and what a failed job leaves."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PARAMETERS = 'profile = "quick"  # sizes\ndata = "world"  # dataset\nlimit = 4  # edits\n'
SECTION = """from uke.project import Paths
folder = Paths(profile, data).sections
folder.mkdir(parents=True, exist_ok=True)
"""


@pytest.fixture
def project(tmp_path):
    """A project whose `tuning` reads what `01_small` has written."""
    for folder in ("notebooks", "params/profiles", "params/studies"):
        (tmp_path / folder).mkdir(parents=True)
    shutil.copy(ROOT / "Snakefile", tmp_path)
    (tmp_path / "params/profiles/smoke.yaml").write_text("limit: 2\n")
    (tmp_path / "params/studies/01_small.yaml").write_text("notebook: 01_small\n")
    (tmp_path / "params/studies/tuning.yaml").write_text(
        "notebook: tuning\nreport: false\nafter: [01_small]\n"
    )
    write(tmp_path, "01_small", '(folder / "01_small.json").write_text(str(limit))')
    write(
        tmp_path,
        "tuning",
        '(folder / "tuning.json").write_text("after " + (folder / "01_small.json").read_text())',
    )
    return tmp_path


def write(project: Path, name: str, last: str) -> None:
    cell = nbformat.v4.new_code_cell
    cells = [cell(PARAMETERS, metadata={"tags": ["parameters"]}), cell(SECTION + last)]
    kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(
        nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec}),
        project / "notebooks" / f"{name}.ipynb",
    )


def tune(project: Path, *more: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "tune",
        "--cores",
        "2",
        "--config",
        "profile=smoke",
        *more,
    ]
    environment = os.environ | {"UKE_HOME": str(project), "XDG_CACHE_HOME": str(project / "cache")}
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=400
    )


def plan(project: Path, *config: str) -> str:
    done = tune(project, *config, "--dry-run", "--printshellcmds")
    return done.stdout + done.stderr


def test_notebooks_run_in_order_once_and_are_planned_again_when_a_parameter_changes(project):
    done = tune(project)
    assert done.returncode == 0, done.stderr
    assert (project / "results/smoke/sections/tuning.json").read_text() == "after 2"
    assert "Nothing to be done" in plan(project)
    planned = plan(project, "limit=3")
    assert "Params have changed" in planned and "--shared limit=3" in planned


def test_a_failed_job_keeps_its_executed_notebook_and_says_why_in_one_line(project):
    write(project, "01_small", "raise ValueError('nothing there')")
    done = tune(project)
    said = [
        line
        for line in done.stderr.splitlines()
        if "01_small.ipynb: cell [3]: ValueError: nothing there" in line
    ]
    assert done.returncode != 0 and len(said) == 1 and "Traceback" not in done.stderr
    assert (project / "results/smoke/notebooks/01_small.ipynb").exists()
    assert not (project / "results/smoke/sections/tuning.json").exists()


def test_both_searches_run_at_once_and_read_the_trials_while_other_notebooks_read_what_they_found(
    project,
):
    (project / "params/studies/tuning_levels.yaml").write_text(
        "notebook: tuning_levels\nreport: false\n"
    )
    write(project, "tuning_levels", '(folder / "tuning_levels.json").write_text("levels")')
    files = {
        folder: project / "params" / folder / "embedded.yaml"
        for folder in ("trials", "levels", "tuned")
    }
    for path in files.values():
        path.parent.mkdir()
        path.write_text("{}\n")
    done = tune(project)
    assert done.returncode == 0, done.stderr
    sections = sorted(path.stem for path in (project / "results/smoke/sections").iterdir())
    assert sections == ["01_small", "tuning", "tuning_levels"]

    def stale(folder):
        files[folder].write_text("changed: 1\n")
        planned = plan(project)
        files[folder].write_text("{}\n")
        return {name for name in sections if f"uke.cli.run {name} " in planned}

    assert stale("trials") == {"tuning", "tuning_levels"}
    assert stale("levels") == stale("tuned") == {"01_small", "tuning"}  # tuning reads 01_small


def test_the_locality_target_runs_its_notebook_alone_and_names_missing_documents(project):
    (project / "params/studies/02_locality.yaml").write_text("notebook: 02_locality\n")
    write(project, "02_locality", '(folder / "02_locality.json").write_text("built")')
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "locality",
        "--cores",
        "1",
        "--config",
        "profile=smoke",
    ]
    environment = os.environ | {"UKE_HOME": str(project), "XDG_CACHE_HOME": str(project / "cache")}
    done = subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (project / "results/smoke/sections").iterdir()] == [
        "02_locality.json"
    ]
    check = [
        sys.executable,
        "-m",
        "uke.cli.run",
        "--check",
        "--profile",
        "smoke",
        "--shared",
        "documents=/nope.jsonl",
    ]
    refused = subprocess.run(
        check, cwd=project, env=environment, capture_output=True, text=True, timeout=100
    )
    assert (
        refused.returncode == 2 and refused.stderr.strip() == "documents: /nope.jsonl: no such file"
    )


def test_notebooks_on_the_world_wait_for_the_audit_of_its_locality_set_or_others_do_not_wait_for_theirs(
    project,
):
    (project / "params/studies/02_locality.yaml").write_text("notebook: 02_locality\n")
    (project / "params/studies/01_small.yaml").write_text(
        "notebook: 01_small\nafter: [02_locality]\n"
    )
    (project / "made.jsonl").write_text("{}\n")
    write(project, "02_locality", "pass")
    given = (
        "data=unkebench",
        f"data_file={project / 'made.jsonl'}",
        f"documents={project / 'made.jsonl'}",
        f"structured={project / 'made.jsonl'}",
    )
    assert "uke.cli.run 02_locality " not in plan(project) and "uke.cli.run 01_small " in plan(
        project
    )
    assert "uke.cli.run 02_locality " in plan(project, *given)


def test_the_longest_notebook_starts_last(project):
    for name in ("00_short", "09_long"):
        (project / f"params/studies/{name}.yaml").write_text(
            f"notebook: {name}\n" + ("priority: 1\n" if name == "09_long" else "")
        )
        write(
            project, name, f'(folder / "{name}.json").write_text(str(__import__("time").time_ns()))'
        )
    command = [
        sys.executable,
        "-m",
        "snakemake",
        *(str(project / f"results/smoke/sections/{name}.json") for name in ("00_short", "09_long")),
        "--cores",
        "1",
        "--config",
        "profile=smoke",
    ]
    done = subprocess.run(
        command,
        cwd=project,
        env=os.environ | {"UKE_HOME": str(project), "XDG_CACHE_HOME": str(project / "cache")},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    short, long = (
        int((project / f"results/smoke/sections/{name}.json").read_text())
        for name in ("00_short", "09_long")
    )
    assert long < short
