"""The study on a real SLURM of two nodes on this machine, with a job, a node and the controller
killed on the way (`make test-cluster`; needs the Debian packages slurm-wlm and munge)."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path

import pandas as pd
import psutil
import pytest
from uke.errors import InputError
from uke.project import Paths
from uke.results import rows

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import loopback
import plan

ROOT = Path(__file__).parents[1]
STUDY = "07_recipe"
STUDIES = f"""
{STUDY}:
  fixed: {{split: test}}
  profiles:
    smoke: {{methods: [FT-UKE, MEMIT], akew_limit: 2, limit: 4}}
"""

able = all(map(shutil.which, loopback.NEEDED)) and os.getuid() == 0
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(not able, reason="no SLURM, or not root")]


@pytest.fixture
def home(tmp_path, results, monkeypatch):
    """A project with one small study; the world, and the rows that a plan reads, are there."""
    home = tmp_path / "project"
    for folder in ("params", "notebooks", "figures/embedded/rows"):
        shutil.copytree(ROOT / folder, home / folder)
    shutil.copytree(results, home / "results")
    shutil.copy(ROOT / "Snakefile", home)
    (home / "params/studies.yaml").write_text(STUDIES)
    for name, value in {"UKE_HOME": home, "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT / "lib"}.items():
        monkeypatch.setenv(name, str(value))
    return home


@pytest.fixture
def slurm(tmp_path):
    with closing(loopback.Slurm(tmp_path / "slurm")) as started:
        yield started


def running(node: str, other: str = "") -> str:
    """The id of a job that has run on a node for some seconds, another than that named."""
    command, before = ["squeue", "-h", "-t", "R", "-o", "%i", "-w", node], set()
    for _ in range(200):
        found = set(subprocess.run(command, capture_output=True, text=True).stdout.split())
        if lasting := sorted(found & before - {other}):
            return lasting[0]
        before = found
        time.sleep(3)
    raise AssertionError("no job runs")


def python(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments, "--profile", "smoke"], check=True)


def study(home: Path, log: Path) -> subprocess.Popen:
    """Start the divided study, which ends with its notebook."""
    options = "--nolock --rerun-incomplete --workflow-profile params/cluster/loopback"
    options = f"{options} --config profile=smoke cluster=loopback".split()
    section = str(home / f"results/smoke/sections/{STUDY}.json")
    command = [sys.executable, "-m", "snakemake", section, *options]
    return subprocess.Popen(command, cwd=home, stdout=log.open("ab"), stderr=subprocess.STDOUT)


def kept() -> pd.DataFrame:
    """The rows of the study but for clocks, memory and steps, which rounding decides."""
    every = [rows.committed(Paths("smoke"), name, None) for name in (STUDY, f"{STUDY}_akew")]
    lost = ["train_seconds", "answer_seconds", "peak_mib", "curve", "steps"]
    return pd.concat(every).drop(columns=lost)


def test_a_job_that_ran_out_of_memory_is_tried_again_with_more(slurm, tmp_path):
    (tmp_path / "Snakefile").write_text(f"""rule:
    output: touch("done")
    resources: mem_mb=lambda wildcards, attempt: 400 * attempt
    shell: "{sys.executable} -c 'import time; held = bytes(range(250)) * 2_000_000; time.sleep(15)'"
""")
    command = f"{sys.executable} -m snakemake --workflow-profile {ROOT}/params/cluster/loopback"
    done = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Error in rule" in done.stderr, done.stderr


def test_the_plan_says_what_slurm_would_refuse_or_never_start(slurm, tmp_path):
    text = (ROOT / "params/cluster/loopback/config.yaml").read_text()
    (file := tmp_path / "params/cluster/mine/config.yaml").parent.mkdir(parents=True)

    def refused(expected: str, old: str = "", new: str = "", **more: int) -> None:
        file.write_text(text.replace(old, new))
        with pytest.raises(InputError, match=expected):
            plan.Cluster(tmp_path, "mine").check([{"mem_mb": 3000, "minutes": 90} | more])

    refused("unknown partition 'mian'; did you mean 'main'?", "=main", "=mian")
    refused("Invalid generic resource", "slurm_extra=", "gpu=1\n  - slurm_extra=", gpu=1)
    subprocess.run(["scontrol", "update", "partition=main", "MaxTime=60"], check=True)
    refused("asks for 90 minutes, and may have 60")
    file.write_text(text.replace("=none", "=nobody"))
    assert "=nobody: SLURM keeps no accounts" in next(plan.Cluster(tmp_path, "mine").notes())


def test_who_is_killed_on_a_cluster_costs_no_row(home, slurm, tmp_path, monkeypatch):
    log = tmp_path / "snakemake.log"
    python(str(ROOT / "tools/plan.py"), "--shares", "2", "--cluster", "loopback")
    watching = study(home, log)
    first = running("one")
    subprocess.run(["scancel", first], check=True)
    job = running("two", first)
    slurm.kill("two")
    for process in psutil.process_iter():  # with all that ran on it
        with suppress(psutil.Error):
            if process.environ().get("SLURM_JOB_ID") == job:
                process.kill()
    time.sleep(15)
    slurm.start("two")
    slurm.kill("controller")
    time.sleep(5)
    slurm.start("controller")
    watching.send_signal(signal.SIGINT)
    watching.wait(timeout=400)
    assert study(home, log).wait() == 0, log.read_text()[-4000:]
    assert "'CANCELLED'" in log.read_text()
    divided, local = kept(), tmp_path / "local"

    shutil.copytree(home, local, ignore=shutil.ignore_patterns("smoke", ".snakemake"))
    monkeypatch.setenv("UKE_HOME", str(local))
    python("-m", "uke", "run", STUDY)
    pd.testing.assert_frame_equal(divided, kept(), rtol=1e-2, atol=1e-3)  # lanes differ in rounding

    made = "results/smoke/rows"
    shutil.rmtree(local / made)
    shutil.copytree(home / made, local / made)
    python("-m", "uke", "run", STUDY)
    one, other = (
        {path.name: path.read_bytes() for path in (root / "figures/smoke").rglob("*.[cst]*")}
        for root in (home, local)
    )
    assert one == other and len(one) > 10
