"""What `make bench` stored: ratios of the variants, growth and targets, as tables of the report.

runs = read_all(home)          # what benchmarks/results has, of processor and GPU
section.table(ratios_table(runs[0]), "speed_variants", caption)
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from uke.errors import InputError
from uke.methods.catalog import key
from uke.results.stats import Score, ordered

RESULTS = "benchmarks/results"
SHAPE = "Qwen2.5-7B shape"  # in the name of a method that was run on random weights of that shape
VARIANTS = {"loop": "published loop", "single": "one by one", "lanes": "lanes"}
MISSING = "No benchmark is stored here, so the speed of lanes is not shown; `make bench` measures \
it in 15 to 45 minutes on an idle machine."
BUSY = 0.5  # load of a machine when a run started; with more its seconds are not to be trusted
PARTS = ("timings", "same", "growth")


class Target(NamedTuple):
    """What is asked of a number below `speed`, at least or at most."""

    where: str
    what: str
    key: str
    least: float | None = None
    most: float | None = None


TWO_CORES = "two cores, embedded model, 64 edits, all probes"
OF_SHAPE = "one GPU, Qwen2.5-7B shape"
ON_SMOLLM2 = "two cores, SmolLM2, 4 edits of UnKEBench, all probes"
OVER_LOOP = "lanes over the published loop"
TARGETS = (
    Target(TWO_CORES, "lanes over the published loop", "two_cores.lanes_over_loop", least=3.5),
    Target(TWO_CORES, "lanes over one by one", "two_cores.lanes_over_single", least=1.7),
    Target(
        "one GPU, embedded model, 512 edits",
        "lanes over the published loop",
        "gpu.embedded.lanes_over_loop",
        least=40,
    ),
    Target(
        f"{OF_SHAPE}, LoRA, edits of 130 tokens, 11 probes of 128",
        "lanes over the published loop",
        "gpu.qwen_shape.lanes_over_loop",
        least=10,
    ),
    Target(
        f"{OF_SHAPE}, FT-M on all down projections",
        "peak memory (GiB)",
        "gpu.qwen_shape.peak_gib",
        most=80,
    ),
    Target(
        f"{OF_SHAPE}, LoRA, all probes",
        "minutes of 1,000 edits, scaled from 128",
        "gpu.qwen_shape.minutes_per_1000_scaled",
        most=60,
    ),
)
SMOLLM2_TARGETS = (
    Target(ON_SMOLLM2, f"FT-M: {OVER_LOOP}", "two_cores.lanes_over_loop", least=3),
    Target(ON_SMOLLM2, f"FT-UKE: {OVER_LOOP}", "two_cores.ft_uke.lanes_over_loop", least=3),
    Target(ON_SMOLLM2, f"LoRA: {OVER_LOOP}", "two_cores.lora.lanes_over_loop", least=2),
    Target(ON_SMOLLM2, f"AnyEdit (UnKE): {OVER_LOOP}", "two_cores.anyedit_unke.lanes_over_loop", 2),
)


@dataclass(frozen=True)
class Run:
    """One run on one machine; the frames have a row for each measurement.

    timings: method, variant, repeat, edits, probes, tokens, train_seconds, answer_seconds,
    peak_mib. same: method, variant, answers, share, average, average_lanes. growth: as timings,
    and what `grows` to which `value`.
    """

    about: Mapping[str, Any]
    timings: pd.DataFrame
    same: pd.DataFrame
    growth: pd.DataFrame

    @property
    def on_cpu(self) -> bool:
        return self.about["machine"]["device"] == "cpu"

    @property
    def busy(self) -> bool:
        return self.about["machine"]["load_before"] > BUSY


def read(path: Path) -> Run:
    """Read a stored run; InputError for a file that is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        lacking = {*PARTS, "size", "command", "machine", "versions", "seconds"} - set(content)
        if lacking:
            raise InputError(f"{path}: no '{min(lacking)}'; expected what `make bench` writes")
        return Run(content, *(pd.DataFrame(content[part]) for part in PARTS))
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(f"{path}: not a file that `make bench` writes ({error})") from None


def file_name(model: str) -> str:
    """Return the name of a file of timings on a processor."""
    return "cpu.json" if model == "embedded" else f"cpu-{model}.json"


def read_all(home: Path, model: str = "embedded") -> list[Run]:
    """Read the stored runs of a model on the processor, and of a GPU, those that there are."""
    paths = (home / RESULTS / name for name in (file_name(model), "gpu.json"))
    return [read(path) for path in paths if path.is_file()]


def rates(timings: pd.DataFrame) -> pd.DataFrame:
    """Add seconds an edit in all and of each part, edits a minute and answered tokens a second."""
    train, answer = timings["train_seconds"], timings["answer_seconds"]
    return timings.assign(
        train_each=train / timings["edits"],
        answer_each=answer / timings["edits"],
        each=(train + answer) / timings["edits"],
        edits_a_minute=60 * timings["edits"] / (train + answer),
        tokens_a_second=timings["tokens"] / answer,
    )


def ratio(timings: pd.DataFrame, method: str, over: str, part: str = "each") -> Score:
    """Return how many times as fast lanes are as a variant: median over repeats, least and most.

    `part`: "each" of the whole, "train_each" or "answer_each". A repeat compares what ran in turn.
    """
    own = rates(timings[timings["method"] == method])
    own = own.pivot(index="repeat", columns="variant", values=part)
    if missing := [variant for variant in (over, "lanes") if variant not in own]:
        raise InputError(f"benchmark: {method}: no timings of variant '{missing[0]}'")
    found = (own[over] / own["lanes"]).dropna()
    return Score(float(found.median()), float(found.min()), float(found.max()))


def ratios_table(run: Run) -> pd.DataFrame:
    """Return a row for each method: edits a minute, and how many times as fast lanes are."""
    parts = {"": "each", ", editing": "train_each", ", answering": "answer_each"}
    rows = []
    for method, own in rates(run.timings).groupby("method", sort=False):
        speeds = own.groupby("variant")["edits_a_minute"].median()
        row = {"method": method}
        row |= {f"{name} (edits a minute)": speeds.get(v) for v, name in VARIANTS.items()}
        for variant in ("loop", "single"):
            for text, part in parts.items():
                row[f"over {VARIANTS[variant]}{text}"] = ratio(own, method, variant, part)
        rows.append(row)
    return pd.DataFrame(rows)


def resources_table(run: Run) -> pd.DataFrame:
    """Return for each variant the edits timed, tokens a second, peak memory and agreement."""
    measures = {"edits": "sum", "tokens_a_second": "median", "peak_mib": "median"}
    found = rates(run.timings).groupby(["method", "variant"], sort=False).agg(measures)
    found = found.reset_index().merge(run.same, how="left", on=["method", "variant"])
    in_lanes = found.groupby("method")["average_lanes"].transform("max")
    found["average"] = found["average"].fillna(in_lanes)
    names = {"peak_mib": "peak memory (MiB)", "share": "same answers as in lanes"}
    found = found.drop(columns=["answers", "average_lanes"]).rename(columns=names)
    return found.assign(variant=found["variant"].map(VARIANTS))


def growth_by_edits(run: Run) -> pd.DataFrame:
    """Return variant, edits, panel and score, for `figures.trend`."""
    panels = {
        "edits_a_minute": "edits a minute",
        "tokens_a_second": "answered tokens a second",
        "peak_mib": "peak memory (MiB)",
    }
    own = rates(run.growth[run.growth["grows"] == "edits"]).drop(columns="edits")
    own = own.assign(variant=own["variant"].map(VARIANTS)).rename(
        columns=panels | {"value": "edits"}
    )
    return own.melt(["variant", "edits"], list(panels.values()), "panel", "score").dropna()


def growth_table(run: Run) -> pd.DataFrame:
    """Return seconds of an edit in each variant as length of the text or size of the model grow."""
    own = rates(run.growth[run.growth["grows"] != "edits"])
    own = own.assign(variant=own["variant"].map(VARIANTS) + " (s an edit)")
    means = own.pivot_table("each", ["grows", "value"], "variant", "median", sort=False)
    return means.reset_index().rename_axis(columns=None)


def scale_table(home: Path) -> pd.DataFrame:
    """Return what a step of `scale.py` costs an edit by their number; empty if it has not run."""
    if not (path := home / RESULTS / "scale.json").is_file():
        return pd.DataFrame()
    grown = pd.DataFrame(json.loads(path.read_text(encoding="utf-8"))["growth"])
    table = grown.drop(columns="batch").set_index("edits").T
    growth = table.iloc[:, -1] / table.iloc[:, 0]
    named = table.rename(columns="{:,} edits".format).assign(growth=growth)
    return named.rename_axis("step", axis=0).rename_axis(None, axis=1).reset_index()


def numbers(run: Run) -> dict[str, Score]:
    """Return the numbers of a run by their key below `speed`.

    The first method is the one of the targets; the keys of others have the method's name.
    """
    threads = run.about["machine"]["threads"]
    place = {1: "one_core", 2: "two_cores"}.get(threads, f"{threads}_cores")
    place = place if run.on_cpu else "gpu.embedded"
    found = {}
    for number, method in enumerate(ordered(run.timings["method"])):
        own = run.timings[run.timings["method"] == method]
        prefix = f"{place}.{key(method)}" if number else place
        prefix = "gpu.qwen_shape" if SHAPE in method else prefix
        variants = set(own["variant"])
        if set(VARIANTS) <= variants:
            for over in ("loop", "single"):
                found[f"{prefix}.lanes_over_{over}"] = ratio(own, method, over)
        if SHAPE in method and "lanes" in variants:
            seconds = rates(own[own["variant"] == "lanes"])["each"].median()
            found[f"{prefix}.minutes_per_1000_scaled"] = Score(float(1000 * seconds / 60))
        elif SHAPE in method:
            highest = (own["model_mib"] + own["peak_mib"]).max()
            found[f"{prefix}.peak_gib"] = Score(float(highest / 1024))
    return found


def about(run: Run) -> str:
    """Describe the machine, the versions and the command in two sentences."""
    machine, versions = run.about["machine"], run.about["versions"]
    processor = machine["processor"] if run.on_cpu else machine["device"]
    names = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    cores = f"{machine['threads']} threads of {machine['cores']} cores"
    trust = ", so its seconds are not to be trusted." if run.busy else "."
    return (
        f"`{run.about['command']}` on {processor}, {cores}, {machine['memory_gib']:g} GiB "
        f"({names}); it took {run.about['seconds'] / 60:.0f} min. "
        f"Load of the machine before it began: {machine['load_before']:g}{trust}"
    )


def targets_table(numbers: Mapping[str, Score], model: str = "embedded") -> pd.DataFrame:
    """Return a model's targets beside what was measured; a dash where nothing was."""
    rows = []
    for one in TARGETS if model == "embedded" else SMOLLM2_TARGETS:
        found = numbers.get(one.key)
        asked = f"at least {one.least:g}" if one.most is None else f"under {one.most:g}"
        met = found and (found.mean >= one.least if one.most is None else found.mean <= one.most)
        row = {"where": one.where, "what": one.what, "target": asked, "measured": found, "met": met}
        rows.append(row)
    return pd.DataFrame(rows)


def met(targets: pd.DataFrame) -> Sequence[bool]:
    """Return whether each target that was measured is met."""
    return [bool(each) for each in targets["met"] if each is not None]


def gains_more_in_answering(ratios: pd.DataFrame) -> Sequence[bool]:
    """Return for each method whether lanes gain more over one by one in answering than editing."""
    columns = (ratios[f"over {VARIANTS['single']}, {part}"] for part in ("answering", "editing"))
    return [answer.mean > edit.mean for answer, edit in zip(*columns, strict=True)]


def gain_with_edits(growth: pd.DataFrame) -> float:
    """Return how many times as many edits a minute lanes write with the most edits as with one."""
    lanes = growth[(growth["variant"] == "lanes") & (growth["panel"] == "edits a minute")]
    speeds = lanes.set_index("edits")["score"].sort_index()
    return float(speeds.iloc[-1] / speeds.iloc[0])


def rises(growth: pd.DataFrame) -> Sequence[bool]:
    """Return for each variant and each thing that grows whether seconds rise throughout."""
    columns = [name for name in growth if name not in ("grows", "value")]
    found = []
    for _, own in growth.groupby("grows", sort=False):
        found += [own.sort_values("value")[name].is_monotonic_increasing for name in columns]
    return found
