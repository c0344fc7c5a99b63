"""Plan a run before anything starts: jobs, hours, memory, disk, and what is missing.

    python tools/plan.py --profile embedded --shares 4    # `make plan PROFILE=embedded SHARES=4`

The jobs of a cluster, and what they ask for, go to results/<run>/plan.json for the Snakefile.

Seconds are those of committed rows: of the very run, else of another run, in proportion to the
number of weights. A GPU's are these divided by an assumed factor, until its own rows are there.
"""

import argparse
import getpass
import json
import math
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
from fetch import Sources
from huggingface_hub import get_token
from pydantic import BaseModel, Field, StrictStr
from transformers import AutoConfig, AutoModelForCausalLM
from uke.cli import params
from uke.cli.execute import Job
from uke.cli.main import SHIPPED, choices, job, offline, reported
from uke.cli.rows import Share, shares
from uke.errors import InputError, located, nearest
from uke.files import read_yaml, write_atomic
from uke.methods.catalog import configured
from uke.methods.edited import lane_mib
from uke.methods.locate_edit.anchors import sites
from uke.methods.method import Method
from uke.models.model import load
from uke.project import Paths
from uke.results import compare, rows
from uke.study.study import UNEDITED

GIB, MIB = 2**30, 2**20
SUBMITTED = ("slurm_partition", "slurm_account")
AT_ONCE_SUFFIX = " (at once)"  # of a sequence that is written as one batch
FASTER = 1000  # a current GPU against the two cores of the committed rows, assumed until measured
MEASURED_ON = {Paths("smollm2", "unkebench"): "smollm2", Paths("embedded"): "embedded"}
WEIGHTS = {"smollm2": 134_515_008, "embedded": 5_509_376}
MEASURED = ("07_recipe", "08_batch_size", "tuning")  # studies whose rows have the seconds
ROWS_MIB = 0.1  # of an edit's rows and of the answers before it
SOLVED = 3  # matrices of a covariance's size on the GPU while a layer is solved
USED = 0.9  # of a GPU's memory: the rest is its driver's and lost between blocks
PROCESS_MIB = 3000  # Python with its libraries
AT_ONCE, LANES_MIB = 16, 4096  # single edits written side by side, and the memory asked for them


class Options(BaseModel, extra="allow"):
    """What params/cluster/NAME/config.yaml says of jobs; the rest is Snakemake's."""

    executor: StrictStr = ""
    asked: list[Annotated[str, Field(pattern=r"^\w+=[^\x00]*$")]] = Field(
        [], alias="default-resources"
    )


class Cluster:
    """What `params/cluster/<name>/config.yaml` asks of SLURM for every job.

    `on_gpu`: whether jobs get a GPU. `check` raises InputError for what SLURM would refuse.
    """

    def __init__(self, home: Path, name: str) -> None:
        self.file = home / "params" / "cluster" / name / "config.yaml"
        chosen = read_yaml(self.file, Options)
        self.on_slurm = chosen.executor == "slurm"
        self.asked = dict(item.partition("=")[::2] for item in chosen.asked)
        with located(f"{self.file}: slurm_extra"):
            self.extra = shlex.split(self.asked.get("slurm_extra", "").strip("'\""))
        self.by_number = "gpu" in self.asked
        self.on_gpu = self.by_number or any("gres=gpu" in e or "--gpus" in e for e in self.extra)

    def check(self, jobs: Iterable[Mapping[str, int]]) -> None:
        """Ask SLURM for partition and account, and whether it takes the largest of these jobs."""
        if not self.on_slurm:
            return
        if not shutil.which("sbatch"):
            fault = "no command sbatch here; expected a machine that submits jobs"
            raise InputError(f"{self.file}: {fault}")
        told = self._said("scontrol", "show", "partition", "-o").splitlines()
        fields = [dict(word.partition("=")[::2] for word in line.split()) for line in told]
        partitions = {one["PartitionName"]: one for one in fields}
        default = next((name for name in partitions if partitions[name]["Default"] == "YES"), "")
        partition = self.asked.get("slurm_partition", default)
        if partition not in partitions:
            fault = f"unknown partition '{partition}'{nearest(partition, partitions)}"
            raise InputError(f"{self.file}: slurm_partition: {fault}")
        account, accounts = self.asked.get("slurm_account", ""), self.accounts()
        if account and accounts and account.lower() not in accounts:
            fault = f"unknown account '{account}'{nearest(account, accounts)}"
            raise InputError(f"{self.file}: slurm_account: {fault}")
        most = {
            name: max(job.get(name, 0) for job in jobs) for name in ("mem_mb", "minutes", "gpu")
        }
        # SLURM takes a job beyond these two limits, and lets it wait for ever.
        limits = {"minutes": _minutes(partitions[partition].get("MaxTime", "UNLIMITED"))}
        limits["mem_mb"] = float(
            partitions[partition].get("MaxMemPerNode", "inf").replace("UNLIMITED", "inf")
        )
        for name, limit in limits.items():
            if most[name] > limit:
                fault = f"a job asks for {most[name]} {name}, and may have {limit:.0f}"
                raise InputError(
                    f"{self.file}: partition {partition}: {fault}; expected another, or more SHARES"
                )
        options = [f"--{name[6:]}={self.asked[name]}" for name in SUBMITTED if name in self.asked]
        options += [f"--mem={most['mem_mb']}", f"--time={most['minutes']}", *self.extra]
        options += [f"--gpus={most['gpu']}"] if self.by_number else []
        self._said("sbatch", "--test-only", *options, "--wrap=true")

    def accounts(self) -> list[str]:
        """Return the accounts of this user, none where SLURM keeps none: it then ignores them."""
        listing = ["sacctmgr", "-nPs", "list", "user", getpass.getuser(), "format=account"]
        done = subprocess.run(listing, capture_output=True, text=True)
        return done.stdout.lower().split()

    def notes(self) -> Iterator[str]:
        """Say what SLURM will not say."""
        account = self.asked.get("slurm_account", "none")
        if self.on_slurm and account != "none" and not self.accounts():
            yield f"slurm_account={account}: SLURM keeps no accounts here, and ignores it"
        if self.on_slurm and not self.on_gpu:
            yield f"{self.file}: jobs ask for no GPU (gpu=1): they run on processors"

    def _said(self, *command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1]
            raise InputError(f"{self.file}: SLURM refuses `{' '.join(command)}`: {reason}")
        return done.stdout.strip()


def _minutes(limit: str) -> float:
    """Return minutes of a limit as SLURM writes it: 1-12:00:00, 30:00, infinite."""
    if not limit[0].isdigit():
        return math.inf
    days, _, clock = limit.rpartition("-")
    hours, minutes, seconds = ([0, 0] + [int(part) for part in clock.split(":")])[-3:]
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


class Plan:
    """What a run on `paths` takes. `most`: jobs among which the edits of a method are divided;
    `gpu_gib`: memory of a GPU that a job gets.

    plan = Plan(Paths("embedded"), most=4)
    with plan.missing():  # notes bad input in place of raising it
        plan.add(job)
    print(plan.text())
    """

    def __init__(
        self, paths: Paths, most: int = 1, cluster: Cluster | None = None, gpu_gib: int = 80
    ) -> None:
        self.paths, self.shares, self.faults = paths, [], []
        self.most, self.model, self.gpu_gib = most, "embedded", gpu_gib
        self.cluster, self.on_gpu = cluster, bool(cluster and cluster.on_gpu)
        with self.missing():
            _check_renaming(paths.results)

    @contextmanager
    def missing(self, purpose: str = "") -> Iterator[None]:
        try:
            yield
        except InputError as error:
            fault = f"{purpose}{error}"
            self.faults += [fault] if fault not in self.faults else []

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
        plain = f"{Path(self.model)}: no such directory"  # without the command that helps
        self.faults = [fault for fault in self.faults if plain not in fault]
        self.faults.append(f"weights: `make model MODEL={name}` fetches {origin}{token}")
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

    def jobs(self) -> dict[str, dict[str, int]]:
        """Return by name what a job of a cluster asks for: `mem_mb`, `gpu` and, in plenty,
        `minutes`: three times what is expected, on a GPU a tenth as fast as assumed."""
        asked = {}
        for share in self.shares:
            with self.missing():
                taken = share.edits * self.seconds(share.method, share.batch_size)
                taken /= FASTER / 10 if self.on_gpu else 1
                own = {"mem_mb": round(self.memory(share)[0]), "minutes": 30 + round(taken / 20)}
                counted = self.cluster and self.cluster.by_number
                asked[share.name] = own | ({"gpu": self.gpus(share)} if counted else {})
        return asked

    def memory(self, share: Share) -> tuple[float, float]:
        """Return mebibytes of the processor's memory, with all weights, and of a GPU's with one
        edit at a time."""
        weights = _count(self.shape) / MIB
        lane = lanes = 0.0
        if share.method != UNEDITED:
            known = configured(self.paths.home / "params", self.model, share.batch_size)
            method = known[_method_of(share)]
            lane = lane_mib(self.shape, method) if method.moves_weights else 0
            lane += SOLVED * max(self.covariances(method).values(), default=0)
            # A study takes half of what is free for edits side by side, and at least one of them.
            lanes = min(AT_ONCE * lane, LANES_MIB) if share.batch_size == 1 else lane
        here = 3 * weights if self.on_gpu else 5 * weights + 2 * max(lane, lanes)
        return PROCESS_MIB + here, 2 * weights + lane

    def covariances(self, method: Method) -> dict[str, float]:
        """Return the mebibytes of each layer's covariance that the method needs, in float64."""
        chosen = sites(self.shape, method.measured) if method.measured else ()
        return {site.name: 8 * site.projection.weight.shape[1] ** 2 / MIB for site in chosen}

    def disk(self) -> float:
        """Return the gibibytes that the run still writes: weights, covariances and rows."""
        known, found = configured(self.paths.home / "params", self.model, 1), {}
        for name in {_method_of(share) for share in self.shares}:
            found |= self.covariances(known[name]) if name != UNEDITED else {}
        written = sum(found.values()) + ROWS_MIB * sum(share.edits for share in self.shares)
        fetched = 0 if self.there() else 2 * _count(self.shape) / MIB
        return (written + fetched) / 1024

    def there(self) -> bool:
        return self.model in SHIPPED or Path(self.model).is_dir()

    def gpus(self, share: Share) -> int:
        """Return the GPUs over which a job's model and one edit have to be laid."""
        return math.ceil(self.memory(share)[1] / 1024 / USED / self.gpu_gib)

    def text(self) -> str:
        """Return the plan in words: a table of notebooks, then what it rests on and what to do."""
        lines = []
        with self.missing():
            weights = _count(self.shape)
            lines += [
                f"model     {self.model}: {weights / 1e9:.3g} billion weights, "
                f"{2 * weights / GIB:.1f} GiB in bfloat16, {4 * weights / GIB:.1f} in float32",
                *self.table(),
                "hours     of two cores are measured on a smaller model, in proportion to weights; "
                f"a GPU is taken to be {FASTER} times as fast, which nobody has measured",
                *self.laid(),
            ]
            self.paths.results.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.paths.results).free / GIB
            needed = self.disk()
            kinds = "covariances and rows" if self.there() else "weights, covariances and rows"
            lines += [f"disk      {needed:.1f} GiB of {kinds}, {free:.1f} GiB free"]
            if needed > free:
                fault = f"expected {needed:.1f} GiB free on the disk, found {free:.1f}"
                self.faults.append(f"{self.paths.results}: {fault}")
        with suppress(InputError):  # without the committed rows of both models
            lines += [compared()]
        lines += [f"note      {note}" for note in (self.cluster.notes() if self.cluster else ())]
        return "\n".join([*lines, *(f"missing   {fault}" for fault in self.faults)])

    def table(self) -> Iterator[str]:
        """Yield a line for each notebook, the most that any of its jobs takes in the columns of
        memory, and a sum."""
        every = []
        for name in dict.fromkeys(share.notebook for share in self.shares):
            own = [share for share in self.shares if share.notebook == name]
            edits = sum(share.edits for share in own)
            hours = sum(s.edits * self.seconds(s.method, s.batch_size) for s in own) / 3600
            most, on_gpu = map(max, zip(*map(self.memory, own), strict=True))
            every.append((name, len(own), edits, hours, on_gpu / 1024, most / 1024))
        if every:
            _, *sums, on_gpu, most = map(list, zip(*every, strict=True))
            every.append(("all", *map(sum, sums), max(on_gpu), max(most)))
            yield f"{'':26}jobs   edits   hours: a GPU  two cores   GiB: a GPU  processor"
        for name, jobs, edits, hours, on_gpu, most in every:
            times = f"{hours / FASTER:14.2f} {hours:10,.1f}"
            yield f"{name:24} {jobs:5} {edits:7} {times} {on_gpu:12.1f} {most:10.1f}"

    def laid(self) -> Iterator[str]:
        """Say how many GPUs a job takes, by method; note what cannot be laid over several."""
        found: dict[str, int] = {}
        for share in self.shares:
            name = _method_of(share)
            found[name] = max(found.get(name, 0), self.gpus(share))
        if not found:  # without data there are no jobs to count
            return
        counts = sorted(set(found.values()), reverse=True)
        by_count = ((n, [name for name in found if found[name] == n]) for n in counts)
        said = "; ".join(f"{n} for {', '.join(names)}" for n, names in by_count)
        yield f"GPUs      of {self.gpu_gib} GiB in a job: {said if counts[1:] else counts[0]}"
        if found.get("AdaLoRA", 0) > 1:
            fault = f"prunes ranks on one GPU, and {found['AdaLoRA']} are needed"
            self.faults.append(f"AdaLoRA: {fault}; expected larger ones, or METHODS= without it")


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
        f"check     an edit of {large} takes {taken / len(both):.0f} s of two cores, and would be "
        f"predicted from {small} to take {predicted / len(both):.0f} (mean of {len(both)} methods "
        "and sizes)"
    )


def _method_of(share: Share) -> str:
    """Name the method that writes a job's edits, one after another or at once."""
    return share.method.removesuffix(AT_ONCE_SUFFIX)


def _count(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def _check_renaming(folder: Path) -> None:
    """Refuse a file system that does not replace files by renaming: a kill would cost rows."""
    probe = folder / ".renaming"
    try:
        for content in ("old", "new"):
            write_atomic(probe, content)
        replaced = probe.read_text() == "new"
        probe.unlink()
        fault = "" if replaced else "the old file stays"
    except OSError as error:
        if not error.filename2:  # of no renaming
            raise InputError(f"{folder}: cannot be written ({error.strerror})") from None
        fault = error.strerror
    if fault:
        expected = "expected a file system that replaces files by renaming"
        raise InputError(f"{folder}: {expected} ({fault})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], parents=[choices()])
    parser.add_argument("--shares", type=int, default=1, help="jobs among which edits are divided")
    parser.add_argument("--cluster", help="a folder of params/cluster")
    parser.add_argument("--gpu", type=int, default=80, help="GiB of a GPU (default: 80)")
    options = parser.parse_args()
    try:
        paths, notebooks = reported(options)
        cluster = Cluster(paths.home, options.cluster) if options.cluster else None
        plan = Plan(paths, options.shares, cluster, options.gpu)
        own = read_yaml(paths.home / "params" / "profiles" / f"{options.profile}.yaml")
        plan.model = own.get("model", plan.model)  # though its data may be missing
        searches = [name for name in params.studies(paths.home) if name.startswith(params.SEARCH)]
        for notebook in [*notebooks, *searches]:
            options.checked, purpose = False, "" if notebook in notebooks else "for `make tune`: "
            with plan.missing(purpose):
                offline(job(options, notebook))
            options.checked = True  # faults, such as no weights, are noted; the jobs are counted
            with plan.missing(purpose):
                plan.add(offline(job(options, notebook)))
        asked = plan.jobs()
        print(plan.text())
        if cluster and asked:
            cluster.check(asked.values())
        write_atomic(paths.results / "plan.json", json.dumps(asked, indent=1) + "\n")
    except (InputError, OSError) as error:
        sys.exit(f"plan: {error}")


if __name__ == "__main__":
    main()
