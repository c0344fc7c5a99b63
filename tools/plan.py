"""Plan a run before anything starts: jobs, hours, memory, disk, and what is missing.

    python tools/plan.py --profile embedded --shares 4    # `make plan PROFILE=embedded SHARES=4`

The jobs of a cluster, and what they ask for, go to results/<run>/plan.json for the Snakefile.

Seconds are those of committed rows: of the very run, else of another run, in proportion to the
number of weights. A GPU's are these divided by an assumed factor, until its own rows are there.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
from fetch import Sources
from huggingface_hub import get_token
from pydantic import BaseModel, Field, StrictStr
from transformers import AutoConfig, AutoModelForCausalLM
from uke.cli import params
from uke.cli.execute import Job
from uke.cli.main import choices, job, offline, reported
from uke.cli.rows import Share, shares
from uke.errors import InputError, located, nearest
from uke.files import read_yaml, write_atomic
from uke.methods.catalog import configured
from uke.methods.edited import lane_mib
from uke.models.model import load
from uke.project import Paths
from uke.results import compare, rows
from uke.study.study import UNEDITED

GIB, MIB = 2**30, 2**20
SUBMITTED = ("slurm_partition", "slurm_account")
FASTER = 1000  # a current GPU against the two cores of the committed rows, assumed until measured
MEASURED_ON = {Paths("smollm2", "unkebench"): "smollm2", Paths("embedded"): "embedded"}
WEIGHTS = {"smollm2": 134_515_008, "embedded": 5_509_376}
MEASURED = ("07_recipe", "08_batch_size", "tuning")  # studies whose rows have the seconds
ROWS_MIB = 0.1  # of an edit's rows and of the answers before it
USED = 0.9  # of a GPU's memory: the rest is its driver's and lost between blocks
PROCESS_MIB = 3000  # Python with its libraries
AT_ONCE, LANES_MIB = 16, 4096  # single edits written side by side, and the memory asked for them


class Cluster(BaseModel, extra="allow"):
    """What params/cluster/NAME/config.yaml says of jobs; the rest is Snakemake's."""

    executor: StrictStr = ""
    asked: list[Annotated[str, Field(pattern=r"^\w+=[^\x00]*$")]] = Field(
        [], alias="default-resources"
    )


class Plan:
    """What a run on `paths` takes. `most`: jobs among which the edits of a method are divided;
    `gpu_gib`: memory of a GPU that a job gets.

    plan = Plan(Paths("embedded"), most=4)
    with plan.missing():  # notes bad input in place of raising it
        plan.add(job)
    print(plan.text())
    """

    def __init__(
        self, paths: Paths, most: int = 1, cluster: str | None = None, gpu_gib: int = 80
    ) -> None:
        self.paths, self.shares, self.faults = paths, [], []
        self.most, self.model, self.gpu_gib = most, "embedded", gpu_gib
        _check_cluster(paths, cluster)
        with self.missing():
            _check_renaming(paths.results)

    @contextmanager
    def missing(self) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            self.faults += [str(error)] if str(error) not in self.faults else []

    def add(self, job: Job) -> None:
        """Add the jobs of a notebook."""
        self.model = job.parameters.get("model", self.model)
        self.shares += shares(job, self.most)

    @cached_property
    def shape(self) -> torch.nn.Module:
        """The model without its weights: its own, or where it is not there the one listed."""
        path, name = self.paths.home / "params" / "sources.yaml", Path(self.model).name
        try:
            return load(self.model, device="meta")[0]
        except InputError:
            listed = read_yaml(path, Sources).model.get(name)
            if not listed or not listed.shape:
                raise
        token = "; gated: expected a token in HF_TOKEN" if listed.gated else ""
        token = "" if get_token() else token
        origin = f"{listed.hub} at {listed.revision[:7]}, licence {listed.licence}"
        self.faults.append(f"`make model MODEL={name}` fetches {origin}{token}")
        with located(f"{path}: {name}: shape"), torch.device("meta"):
            config = AutoConfig.for_model(**listed.shape.model_dump(exclude_none=True))
            return AutoModelForCausalLM.from_config(config)

    @cached_property
    def rates(self) -> tuple[int, dict[tuple[str, int], float]]:
        """Weights of the model whose rows are nearest, and its seconds for an edit by method and
        batch size."""
        places = {self.paths: self.model, **MEASURED_ON}
        nearest_first = sorted(places, key=lambda one: places[one] != self.model)
        known = [one for one in nearest_first if one.exported(MEASURED[0]).is_file()]
        place = (known or [Paths("embedded")])[0]
        weights = WEIGHTS.get(places[place]) or _count(self.shape)
        return weights, seconds(place)

    def seconds(self, method: str, size: int) -> float:
        """Return the seconds for an edit: of the method at the nearest size, or the median."""
        weights, known = self.rates
        own = {at: found for (name, at), found in known.items() if name == method}
        found = own[min(own, key=lambda at: abs(at - size))] if own else median(known.values())
        return found * _count(self.shape) / weights

    def jobs(self) -> dict[str, dict[str, Any]]:
        """Return by name what a job of a cluster asks for: `mem_mb` and, in plenty, `minutes`."""
        asked = {}
        for share in self.shares:
            with self.missing():
                taken = share.edits * self.seconds(share.method, share.batch_size)
                minutes = 30 + round(taken / 20)  # three times what is expected
                asked[share.name] = {"mem_mb": round(self.memory(share)[0]), "minutes": minutes}
        return asked

    def memory(self, share: Share) -> tuple[float, float]:
        """Return mebibytes of the processor's memory, with all weights, and of a GPU's with one
        edit at a time."""
        weights = _count(self.shape) / MIB
        if share.method == UNEDITED:
            return PROCESS_MIB + 5 * weights, 2 * weights
        known = configured(self.paths.home / "params", self.model, share.batch_size)
        method = known[share.method.removesuffix(" (at once)")]
        lane = lane_mib(self.shape, method) if method.moves_weights else 0
        # A study takes half of what is free for edits side by side, and at least one of them.
        lanes = min(AT_ONCE * lane, LANES_MIB) if share.batch_size == 1 else lane
        return PROCESS_MIB + 5 * weights + 2 * max(lane, lanes), 2 * weights + lane

    def gpus(self, share: Share) -> int:
        """Return the GPUs over which a job's model and one edit have to be laid."""
        return math.ceil(self.memory(share)[1] / 1024 / USED / self.gpu_gib)

    def text(self) -> str:
        """Return the plan in words, a line for each notebook and for each fault."""
        lines = []
        with self.missing():
            weights = _count(self.shape)
            lines += [
                f"model     {self.model}: {weights / 1e9:.3g} billion weights, "
                f"{2 * weights / GIB:.1f} GiB in bfloat16, {4 * weights / GIB:.1f} in float32"
            ]
            for name in dict.fromkeys(share.notebook for share in self.shares):
                own = [share for share in self.shares if share.notebook == name]
                hours = sum(s.edits * self.seconds(s.method, s.batch_size) for s in own) / 3600
                most, on_gpu = map(max, zip(*map(self.memory, own), strict=True))
                several = {s.method: n for s in own if (n := self.gpus(s)) > 1}
                lines += [
                    f"{name:24} {len(own):4} jobs, {sum(s.edits for s in own):6} edits, "
                    f"{hours:9.2f} h on two cores or about {hours / FASTER:8.2f} on a GPU; "
                    f"memory {most / 1024:.1f} GiB, or of a GPU {on_gpu / 1024:.1f}"
                ]
                if several:
                    each = ", ".join(f"{gpus} for {method}" for method, gpus in several.items())
                    self.faults.append(f"{name}: GPUs of {self.gpu_gib} GiB in a job: {each}")
            free = shutil.disk_usage(self.paths.home).free / GIB
            needed = 2 * weights / GIB + ROWS_MIB * sum(s.edits for s in self.shares) / 1024
            lines += [f"disk      {needed:.1f} GiB of weights and rows, {free:.0f} GiB free"]
            if needed > free:
                self.faults.append(f"disk: expected {needed:.0f} GiB free, found {free:.0f}")
        lines += [f"GPU       hours assume that it is {FASTER} times as fast as two cores"]
        with self.missing():
            lines += [compared()]
        return "\n".join([*lines, *(f"missing   {fault}" for fault in self.faults)])


def seconds(paths: Paths) -> dict[tuple[str, int], float]:
    """Return the seconds that an edit took in committed rows, by method and batch size."""
    found: dict[tuple[str, int], float] = {}
    for study in MEASURED:
        if study == MEASURED[0] or paths.exported(study).is_file():
            frame = rows.committed(paths, study)
            frame = frame[frame["factor"].isna() | (frame["factor"] == "trial")]
            for row in compare.costs(frame, ["method", "batch_size"]).itertuples():
                taken = (row.train_seconds + row.answer_seconds) / row.batch_size
                found.setdefault((row.method, row.batch_size), taken)
    return found


def compared() -> str:
    """Say how far hours in proportion to weights are from what was measured on the larger model."""
    (real, large), (world, small) = MEASURED_ON.items()
    measured, known = seconds(real), seconds(world)
    both = [key for key in measured if key in known]
    predicted = sum(known[key] for key in both) * WEIGHTS[large] / WEIGHTS[small]
    taken = sum(measured[key] for key in both)
    return (
        f"check     seconds for an edit of {large}, mean of {len(both)} methods and sizes: "
        f"{predicted / len(both):.0f} predicted from {small}, {taken / len(both):.0f} measured"
    )


def _count(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def _check_cluster(paths: Paths, cluster: str | None) -> None:
    """Refuse a cluster whose parameters, commands or partition are not there."""
    if not cluster:
        return
    file = paths.home / "params" / "cluster" / cluster / "config.yaml"
    chosen = read_yaml(file, Cluster)
    if chosen.executor != "slurm":
        return
    if not shutil.which("sbatch"):
        raise InputError(f"{file}: no command sbatch here; expected a machine that submits jobs")
    asked = dict(item.partition("=")[::2] for item in chosen.asked)
    known = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True)
    if known.returncode:
        raise InputError(f"{file}: sinfo: {known.stderr.strip()}")
    partition, names = asked.get("slurm_partition", ""), known.stdout.split()
    if partition and partition not in names:
        fault = f"unknown partition '{partition}'{nearest(partition, names)}"
        raise InputError(f"{file}: slurm_partition: {fault}")
    options = [f"--{name[6:]}={asked[name]}" for name in asked if name in SUBMITTED]
    tried = ["sbatch", "--test-only", *options, "--wrap=true"]
    if (done := subprocess.run(tried, capture_output=True, text=True)).returncode:
        reason = done.stderr.strip().splitlines()[-1]
        raise InputError(f"{file}: default-resources: SLURM takes no such job ({reason})")


def _check_renaming(folder: Path) -> None:
    """Refuse a file system that does not replace files by renaming: a kill would cost rows."""
    probe = folder / ".renaming"
    try:
        for content in ("old", "new"):
            write_atomic(probe, content)
        replaced = probe.read_text() == "new"
        probe.unlink()
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
    if not replaced:
        raise InputError(f"{folder}: expected a file system that replaces files by renaming")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[choices()])
    parser.add_argument("--shares", type=int, default=1, help="jobs among which edits are divided")
    parser.add_argument("--cluster", help="a folder of params/cluster")
    parser.add_argument("--gpu", type=int, default=80, help="GiB of a GPU (default: 80)")
    options = parser.parse_args()
    try:
        paths, notebooks = reported(options)
        plan = Plan(paths, options.shares, options.cluster, options.gpu)
        searches = [name for name in params.studies(paths.home) if name.startswith(params.SEARCH)]
        for notebook in [*notebooks, *searches]:
            options.checked = False
            with plan.missing():
                offline(job(options, notebook))
            options.checked = (
                True  # a fault, such as no weights, was noted; how many jobs are there?
            )
            with plan.missing():
                plan.add(offline(job(options, notebook)))
        asked = plan.jobs()
        print(plan.text())
        write_atomic(paths.results / "plan.json", json.dumps(asked, indent=1) + "\n")
    except (InputError, OSError) as error:
        sys.exit(f"plan: {error}")


if __name__ == "__main__":
    main()
