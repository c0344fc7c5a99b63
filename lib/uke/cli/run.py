"""Runs one notebook headlessly: strict parameters, this environment's kernel, declared outputs, a manifest.

`python -m uke.cli.run 01_edits --profile quick --set limit=4`; `python -m uke.cli.run --compose --profile quick` makes the report,
Exit status: 0 done, 1 the notebook failed, 2 bad input (nothing was started). Papermill's own gaps are closed here: it only
warns of an unknown parameter, never checks outputs, and can hang on a killed kernel.
"""

import argparse
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import papermill

from uke.cli import manifests, params, preflight
from uke.cli.kernels import Expired, Kernel, leased_device, time_limit
from uke.data.documents import COLLECTIONS, find_collections
from uke.data.edits import find_data
from uke.errors import InputError
from uke.project import Paths

logger = logging.getLogger("uke.cli.run")

BEAT_SECONDS = 15
QUOTED = "embedded"  # the run whose figures are committed and whose numbers README quotes


class Failure(RuntimeError):
    """The notebook ran and failed: one line that names it, the cell and the error."""


@dataclass(frozen=True)
class Plan:
    """One run of one notebook, checked: `outputs` must be new when it ends, `executed` is its copy with outputs."""

    root: Path
    source: Path
    parameters: dict
    results: Path
    outputs: tuple[Path, ...]
    timeout: float

    @property
    def name(self) -> str:
        return self.source.stem

    @property
    def executed(self) -> Path:
        return self.results / "notebooks" / self.source.name


@dataclass
class _Progress:
    """Says which section of a notebook is being executed, and now and then how many units of work it has written."""

    plan: Plan
    sections: dict[str, str] = field(default_factory=dict)
    started: bool = False
    shown: str = ""

    def __post_init__(self):
        heading = ""
        for cell in nbformat.read(self.plan.source, as_version=4).cells:
            if cell.cell_type == "markdown" and cell.source.startswith("#"):
                heading = cell.source.splitlines()[0].lstrip("# ")
            self.sections[cell.source] = heading

    def cell_started(self, cell, cell_index):
        self.started = True
        heading = self.sections.get(cell.source, self.shown)
        if heading != self.shown:
            self.shown = heading
            number = 1 + list(dict.fromkeys(self.sections.values())).index(heading)
            logger.info(
                "%s  %d/%d  %s", self.plan.name, number, len(set(self.sections.values())), heading
            )

    @contextmanager
    def beating(self) -> Iterator[None]:
        over, start = threading.Event(), time.time()

        def beat():
            while not over.wait(BEAT_SECONDS):
                new = sum(
                    path.stat().st_mtime >= start for path in self.plan.results.rglob("*.parquet")
                )
                logger.info(
                    "%s  %.0f s, files of rows written in this run: %d",
                    self.plan.name,
                    time.time() - start,
                    new,
                )

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            over.set()


def plan(options: argparse.Namespace) -> Plan:
    """Check everything that can be checked before a kernel starts; InputError otherwise."""
    root, name = Paths(options.profile).home, Path(options.notebook).stem
    data = params.dataset(root, options.profile, options.data)
    parameters = params.merge(
        root, name, options.profile, {"shared": options.shared, "set": options.set}
    )
    own = set(parameters)
    parameters |= {
        key: value
        for key, value in {"profile": options.profile, "data": data}.items()
        if key in own
    }
    if "data_file" in parameters:
        parameters["data_file"] = find_data(data, parameters["data_file"])
    for given in COLLECTIONS:
        if given in parameters and data != "world":
            parameters[given] = [str(path) for path in find_collections(given, parameters[given])]
    if {"levels", "methods"} <= own and any(pair.startswith("methods=") for pair in options.shared):
        parameters["methods"] = preflight.with_levels(root, parameters)
    preflight.check(root, data, parameters)
    paths = Paths(options.profile, data)
    declared = [root / out for out in options.out] or [paths.sections / f"{name}.json"]
    return Plan(
        root,
        root / "notebooks" / f"{name}.ipynb",
        parameters,
        paths.results,
        tuple(declared),
        options.timeout,
    )


def run(plan: Plan) -> None:
    """Execute the notebook of `plan`; Failure when a cell fails, the kernel dies, time runs out or an output is missing."""
    for output in (*plan.outputs, plan.executed):
        output.parent.mkdir(parents=True, exist_ok=True)
    stamps = {path: path.stat().st_mtime_ns if path.exists() else None for path in plan.outputs}
    start, status = time.time(), "failed"
    with leased_device() as device:
        try:
            _go_offline(plan.parameters.get("model", "embedded"))
            _execute(plan)
            _check_outputs(plan, stamps)
            status = "done"
        finally:
            outcome = {"status": status, "device": device, "seconds": round(time.time() - start, 2)}
            manifests.write(
                plan.root,
                plan.results,
                outcome | {"notebook": plan.name, "parameters": plan.parameters},
            )


def _execute(plan: Plan) -> None:
    for last in (False, True):
        progress = _Progress(plan)
        try:
            with progress.beating():
                return _execute_once(plan, progress)
        except papermill.PapermillExecutionError as error:
            raise Failure(_explain(plan, error)) from None
        except Expired:
            raise Failure(
                f"{plan.source}: not finished after {plan.timeout:.0f} s (--timeout)"
            ) from None
        except (
            Exception
        ) as error:  # a kernel that does not come up fails in many ways: time, memory, sockets
            line = f"{plan.source}: kernel failed{' in ' + repr(progress.shown) if progress.started else ' to start'}: {_first(error)}"
            if last or progress.started:
                raise Failure(line) from None
            logger.warning("%s; starting it once more", line)


def _execute_once(plan: Plan, progress: _Progress) -> None:
    kernel = Kernel()
    try:
        with time_limit(plan.timeout):
            papermill.execute_notebook(
                plan.source,
                plan.executed,
                plan.parameters,
                kernel_name="python3",
                progress_bar=False,
                start_timeout=120,
                cwd=plan.root,
                km=kernel,
                on_cell_start=progress.cell_started,
            )
    finally:
        kernel.end()


def _explain(plan: Plan, error: papermill.PapermillExecutionError) -> str:
    if error.ename == "InputError":
        return _first(error.evalue)
    said = f"{error.ename}: {_first(error.evalue)}"
    return f"{plan.source}: cell [{error.exec_count}]: {said} (the whole traceback is in {plan.executed})"


def _first(error: object) -> str:
    return next(
        (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
    )


def _check_outputs(plan: Plan, stamps: dict[Path, int | None]) -> None:
    for path, before in stamps.items():
        if not path.exists():
            raise Failure(f"{plan.source}: finished without writing its declared output {path}")
        if path.stat().st_mtime_ns == before:
            raise Failure(f"{plan.source}: finished without renewing its declared output {path}")


def _go_offline(model: str) -> None:
    """A model on disk needs no hub, so a mistaken look-up shall fail at once and not wait for a network."""
    if model == "embedded" or Path(model).expanduser().is_dir():
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m uke.cli.run", description=__doc__.splitlines()[0], allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("notebook", nargs="?", help="name of a notebook, for example 01_edits")
    what.add_argument(
        "--check", action="store_true", help="check the parameters of every study, run nothing"
    )
    what.add_argument(
        "--compose", action="store_true", help="compose numbers.json, report.html and report.pdf"
    )
    parser.add_argument("--profile", required=True, help="a file of params/profiles, without .yaml")
    parser.add_argument("--data", help="a benchmark's name instead of the profile's data")
    pair = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
    parser.add_argument("--set", **pair, help="a parameter of this notebook")
    parser.add_argument("--shared", **pair, help="a parameter, for the notebooks that have it")
    parser.add_argument(
        "--out",
        action="append",
        default=[],
        metavar="PATH",
        help="output to expect instead of the section",
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=86400,
        help="seconds for the whole notebook (default: a day)",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module's docstring."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for loud in ("papermill", "filelock", "traitlets", "fontTools"):
        logging.getLogger(loud).setLevel(logging.WARNING)
    try:
        if options.compose:
            _compose(options)
        elif options.check:
            _check(options)
        else:
            run(plan(options))
    except InputError as error:
        logger.error("%s", error)
        return 2
    except Failure as error:
        logger.error("%s", error)
        return 1
    return 0


def _compose(options: argparse.Namespace) -> None:
    from uke.report import compose as report

    home = Paths(options.profile).home
    paths = Paths(options.profile, params.dataset(home, options.profile, options.data))
    notebooks = [
        study.notebook
        for study in params.reported(home, options.profile, paths.data, _documents(options))
    ]
    runs = [manifests.account(paths, each) for each in manifests.read(paths)]
    report.account(paths, [each for each in runs if each["notebook"] in notebooks])
    report.compose(paths, notebooks, runs)
    if paths.figures == home / "figures" / QUOTED:
        report.quote(home / "README.md", paths)


def _documents(options: argparse.Namespace) -> bool:
    """Whether there are documents to build a locality set from; InputError for one that is named and does not exist."""
    given = dict(pair.partition("=")[::2] for pair in options.shared)
    found = {
        name: find_collections(name, [path for path in given.get(name, "").split(",") if path])
        for name in COLLECTIONS
    }
    return bool(found["documents"])


def _check(options: argparse.Namespace) -> None:
    home = Paths(options.profile).home
    data = params.dataset(home, options.profile, options.data)
    if Paths(options.profile, data).figures == home / "figures" / QUOTED and options.shared:
        changed = ", ".join(pair.partition("=")[0] for pair in options.shared)
        raise InputError(
            f"profile {QUOTED}: {changed}: this is the committed study, whose numbers README quotes; shrink another profile (PROFILE=quick)"
        )
    for study in params.reported(home, options.profile, data, _documents(options)):
        plan(argparse.Namespace(**vars(options) | {"notebook": study.notebook}))


if __name__ == "__main__":
    sys.exit(main())
