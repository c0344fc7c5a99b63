"""Execute one notebook headlessly with papermill, and check and record what it leaves behind.

Papermill only warns of an unknown parameter and never checks outputs, so parameters are checked
before (`uke.cli.params`) and the notebook's section after.
"""

import asyncio
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import CellTimeoutError

from uke.files import write_atomic
from uke.project import Paths

logger = logging.getLogger(__name__)

# The libraries that decide numbers.
LIBRARIES = ("torch", "transformers", "peft", "numpy", "pandas", "scipy", "matplotlib", "typst")
ACCOUNTED = ("notebook", "status", "device", "processor", "python", "platform", "libraries")


class Failure(RuntimeError):
    """The notebook ran and failed: one line that names it, the cell and the error."""


@dataclass(frozen=True)
class Job:
    """One notebook with checked parameters; its section must be new when it ends."""

    notebook: Path
    parameters: Mapping[str, Any]
    paths: Paths
    cell_timeout: int

    @property
    def name(self) -> str:
        return self.notebook.stem

    @property
    def executed(self) -> Path:
        """The copy with outputs."""
        return self.paths.results / "notebooks" / self.notebook.name

    @property
    def section(self) -> Path:
        return self.paths.sections / f"{self.name}.json"


def execute(job: Job) -> None:
    """Run the notebook; Failure if a cell fails, the kernel dies or there is no new section."""
    job.executed.parent.mkdir(parents=True, exist_ok=True)
    before = job.section.stat().st_mtime_ns if job.section.exists() else None
    started, status = time.time(), "failed"
    try:
        _run(job)
        if not job.section.exists():
            raise Failure(f"{job.notebook}: finished without writing its section {job.section}")
        if job.section.stat().st_mtime_ns == before:
            raise Failure(f"{job.notebook}: finished without renewing {job.section}")
        _put_answer_on_top(job)
        status = "done"
    finally:
        _write_manifest(job, status, round(time.time() - started, 2))


class _Kernel(AsyncKernelManager):
    """A kernel of this very interpreter, whatever kernelspecs the machine has.

    It listens on sockets in a folder of its own: over TCP, kernels that start together take each
    other's ports, and other users of the machine can listen.
    """

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def _run(job: Job) -> None:
    shown = []

    def cell_started(cell, cell_index):
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            shown.append(cell.source.splitlines()[0].lstrip("# "))
            logger.info("%s  %s", job.name, shown[-1])

    with tempfile.TemporaryDirectory(prefix="uke-") as folder:
        kernel = _Kernel(transport="ipc", ip=str(Path(folder) / "kernel"))
        try:
            papermill.execute_notebook(
                job.notebook,
                job.executed,
                job.parameters,
                kernel_name="python3",
                progress_bar=False,
                start_timeout=120,
                execution_timeout=job.cell_timeout,
                cwd=job.paths.home,
                km=kernel,
                on_cell_start=cell_started,
            )
        except papermill.PapermillExecutionError as error:
            raise Failure(_explain(job, error)) from None
        except CellTimeoutError:
            limit = f"a cell took more than {job.cell_timeout} s (--cell-timeout)"
            raise Failure(f"{job.notebook}: {limit}") from None
        except Exception as error:  # a kernel fails in many ways: memory, sockets, a signal
            where = f" in '{shown[-1]}'" if shown else ""
            raise Failure(f"{job.notebook}: kernel failed{where}: {_first_line(error)}") from None
        finally:
            if kernel.has_kernel:
                asyncio.run(kernel.shutdown_kernel(now=True))


def _explain(job: Job, error: papermill.PapermillExecutionError) -> str:
    if error.ename == "InputError":
        return _first_line(error.evalue)
    text = f"{error.ename}: {_first_line(error.evalue)}"
    return f"{job.notebook}: cell [{error.exec_count}]: {text} (traceback in {job.executed})"


def _first_line(error: object) -> str:
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)


def _put_answer_on_top(job: Job) -> None:
    """Replace the answer in the title of the executed copy by the one that the run has given."""
    answer = json.loads(job.section.read_text(encoding="utf-8")).get("answer")
    notebook = nbformat.read(job.executed, as_version=4)
    title = notebook.cells[0]
    if answer and "**Answer**" in title.source:
        title.source = re.sub(
            r"\*\*Answer\*\*.*?(?=\n\n|$)",
            lambda _: f"**Answer** {answer}",
            title.source,
            flags=re.S,
        )
        write_atomic(job.executed, nbformat.writes(notebook))


def _device() -> str:
    """Name what the kernel computes on, as far as the environment tells."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus is None:
        gpus = ",".join(str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*")))
    return f"cuda:{gpus}" if gpus else f"cpu ({os.cpu_count()} cores)"


def _write_manifest(job: Job, status: str, seconds: float) -> None:
    """Record in results/<run>/manifests what ran, by what, where and for how long."""
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, cwd=job.paths.home, capture_output=True, text=True)
        commit = done.stdout.strip() or None
    except FileNotFoundError:
        commit = None
    path = job.paths.results / "manifests" / f"{job.name}.json"
    manifest = {
        "notebook": job.name,
        "status": status,
        "device": _device(),
        "seconds": seconds,
        "parameters": dict(job.parameters),
        "work_seconds": _work_seconds(job, seconds, path),
        "executable": sys.executable,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "commit": commit,
        "libraries": {name: metadata.version(name) for name in LIBRARIES},
        "versions": {each.name: each.version for each in metadata.distributions()},
    }
    write_atomic(path, json.dumps(manifest, indent=1, sort_keys=True, default=str) + "\n")


def _work_seconds(job: Job, seconds: float, earlier: Path) -> float:
    """Seconds of work: a rerun that finds all rows keeps what they cost, a resumed one adds."""
    before = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else {}
    if before.get("status") == "failed":
        return round(seconds + before["work_seconds"], 2)
    rows = job.paths.results.rglob("*.parquet")
    wrote = any(path.stat().st_mtime >= time.time() - seconds for path in rows)
    return seconds if wrote or not before else before["work_seconds"]


def runs(paths: Paths) -> list[dict[str, Any]]:
    """Read what the report says of each notebook's last run: status, seconds of work, machine.

    The seconds are at least those that the rows record, which another process may have made.
    """
    found = []
    for path in sorted((paths.results / "manifests").glob("*.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        seconds = max(manifest["work_seconds"], _row_seconds(paths.exported(path.stem)))
        found.append({key: manifest[key] for key in ACCOUNTED} | {"seconds": seconds})
    return found


def _row_seconds(path: Path) -> float:
    if not path.is_file():
        return 0.0
    unit = ["method", "factor", "level", "batch_size", "batch", "recipe", "phase"]
    seconds = ["train_seconds", "answer_seconds"]
    frame = pd.read_parquet(path, columns=[*unit, *seconds])
    return float(frame.drop_duplicates(unit)[seconds].sum().sum())


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name, generation and widest vectors of this machine's processor.

    Timings depend on it and, through rounding, the scores of long trainings. In a virtual machine,
    generations of different speed share a name ("AMD EPYC").
    """
    try:
        text = cpuinfo.read_text(encoding="utf-8")
        name, family, model, flags = (
            re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)[1]
            for field in ("model name", "cpu family", "model", "flags")
        )
    except (OSError, TypeError):  # not Linux, or not x86
        return platform.processor() or platform.machine()
    names = {"avx512f": "AVX-512", "avx2": "AVX2"}
    vectors = next((names[flag] for flag in names if flag in flags.split()), "no AVX2")
    return f"{name} (family {family}, model {model}, {vectors})"
