"""Execute one notebook headlessly with papermill, and check and record what it leaves behind.

Papermill never checks outputs, so the notebook's section is checked after it.
"""

import asyncio
import json
import logging
import platform
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import nbformat
import papermill
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec

from uke.files import write_atomic
from uke.project import Paths
from uke.results import rows

logger = logging.getLogger(__name__)

# The libraries that decide numbers.
LIBRARIES = ("torch", "transformers", "peft", "numpy", "pandas", "scipy", "matplotlib", "typst")


class Failure(RuntimeError):
    """The notebook ran and failed: one line that names it, the cell and the error."""


@dataclass(frozen=True)
class Job:
    """One notebook with checked parameters; its section must be new when it ends."""

    notebook: Path
    parameters: Mapping[str, Any]
    paths: Paths

    @property
    def executed(self) -> Path:
        """The copy with outputs."""
        return self.paths.results / "notebooks" / self.notebook.name


def execute(job: Job) -> None:
    """Run the notebook; Failure if a cell fails, the kernel dies or there is no new section."""
    job.executed.parent.mkdir(parents=True, exist_ok=True)
    started, status = time.monotonic(), "failed"
    section = job.paths.sections / f"{job.notebook.stem}.json"
    section.unlink(missing_ok=True)  # its age would say nothing where a clock was set back
    try:
        _run(job)
        if not section.exists():
            raise Failure(f"{job.notebook}: finished without writing its section {section}")
        said = json.loads(section.read_text(encoding="utf-8"))
        if void := said.get("void"):
            logger.warning("%s: %s Its conclusion is void.", job.notebook, void)
        if answer := said.get("answer"):
            # It replaces the answer in the notebook's title.
            notebook, text = nbformat.read(job.executed, as_version=4), f"**Answer** {answer}"
            title, pattern = notebook.cells[0], r"(?s)\*\*Answer\*\*.*?(?=\n\n|$)"
            title.source = re.sub(pattern, lambda _: text, title.source)
            write_atomic(job.executed, nbformat.writes(notebook))
        status = "done"
    finally:
        manifest = {
            "notebook": job.notebook.stem,
            "status": status,
            "processor": processor(),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "libraries": {name: metadata.version(name) for name in LIBRARIES},
            "seconds": round(time.monotonic() - started, 2),
        }
        path = job.paths.results / "manifests" / f"{job.notebook.stem}.json"
        write_atomic(path, json.dumps(manifest, indent=1) + "\n")


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
    heading = "the first cells"

    def cell_started(cell, cell_index):
        nonlocal heading
        if cell.cell_type == "markdown" and cell.source.startswith("#"):
            heading = cell.source.splitlines()[0].lstrip("# ")
            logger.info("%s  %s", job.notebook.stem, heading)

    with tempfile.TemporaryDirectory(prefix="uke-") as folder:
        kernel = _Kernel(transport="ipc", ip=str(Path(folder) / "kernel"))
        try:
            papermill.execute_notebook(
                job.notebook,
                job.executed,
                job.parameters,
                progress_bar=False,
                stderr_file=sys.stderr,  # bars with the time left, and warnings
                start_timeout=120,
                cwd=job.paths.home,
                km=kernel,
                on_cell_start=cell_started,
            )
        except papermill.PapermillExecutionError as error:
            fault = _first_line(error.evalue)
            if error.ename != "InputError":  # which says itself where the fault is
                fault = f"cell [{error.exec_count}]: {error.ename}: {fault}"
                fault = f"{job.notebook}: {fault} (traceback in {job.executed})"
            raise Failure(fault) from None
        except Exception as error:  # a kernel fails in many ways: memory, sockets, a signal
            fault = f"kernel failed in '{heading}': {_first_line(error)}"
            raise Failure(f"{job.notebook}: {fault}") from None
        finally:
            if kernel.has_kernel:
                asyncio.run(kernel.shutdown_kernel(now=True))


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def runs(paths: Paths) -> list[dict[str, Any]]:
    """Read what the report says of each notebook's last run; its rows may have taken longer."""
    unit = ["method", "factor", "level", "batch_size", "batch", "recipe", "phase"]
    seconds, found = ["train_seconds", "answer_seconds"], []
    for path in sorted((paths.results / "manifests").glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if paths.exported(path.stem).is_file():
            frame = rows.committed(paths, path.stem, None).drop_duplicates(unit)
            run["seconds"] = max(run["seconds"], float(frame[seconds].sum().sum()))
        found.append(run)
    return found


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Name this machine's processor: timings depend on it, and through rounding long trainings.

    Family and model are named too: in virtual machines, generations share a name ("AMD EPYC").
    """
    text = cpuinfo.read_text(encoding="utf-8") if cpuinfo.is_file() else ""
    fields = dict(re.findall(r"^(cpu family|model|model name)\s*:\s*(.+)$", text, re.MULTILINE))
    return ", ".join(f"{name} {value}" for name, value in fields.items()) or platform.machine()
