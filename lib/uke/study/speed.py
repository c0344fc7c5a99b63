"""What `make bench` measured, read from its committed file: ratios of the three ways, growth, memory, and the targets."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from uke.data.edits import AVERAGE, KINDS, Probe
from uke.errors import InputError
from uke.files import write_atomic
from uke.methods.catalog import key
from uke.results.metrics import score
from uke.results.rows import shortened
from uke.results.stats import Score, ordered

RESULTS = ("benchmarks", "results")
CPU, GPU = "cpu", "gpu"  # the names of the two files
SHAPE = "Qwen2.5-7B shape"  # in the name of a method that was run on random weights of that shape
WAYS = {"loop": "published loop", "single": "one by one", "lanes": "lanes"}
HOW = "No benchmark is stored here, so the speed of lanes is not shown; `make bench` measures it in 15 to 45 minutes on an idle machine."
# Greedy answers of the same edit made in another way differ where rounding tips a token. At least so many are the same, and
# the average metric of all is at most so far apart.
ALIKE, WITHIN = 0.95, 0.01
BUSY = 0.5  # processes that others had running when a benchmark started; with more its seconds are not to be trusted
TEXT = ("size", "command", "machine", "versions", "seconds")
DIGITS = 5  # as many as a measurement knows
ROWS = ("timings", "same", "growth", "memory", "gains")


class Target(NamedTuple):
    """One line of the targets: where, what, the number's key below `speed`, and what is asked of it, at least or at most."""

    where: str
    what: str
    key: str
    least: float | None = None
    most: float | None = None


TARGETS = (
    Target(
        "two cores, embedded model, 64 edits, all probes",
        "lanes over the published loop",
        "two_cores.lanes_over_loop",
        least=3.5,
    ),
    Target(
        "two cores, embedded model, 64 edits, all probes",
        "lanes over one by one",
        "two_cores.lanes_over_single",
        least=1.7,
    ),
    Target(
        "one GPU, embedded model, 512 edits",
        "lanes over the published loop",
        "gpu.embedded.lanes_over_loop",
        least=40,
    ),
    Target(
        "one GPU, Qwen2.5-7B shape, LoRA, edits of 130 tokens, 11 probes of 128",
        "lanes over the published loop",
        "gpu.qwen_shape.lanes_over_loop",
        least=10,
    ),
    Target(
        "one GPU, Qwen2.5-7B shape, FT-M on all down projections",
        "peak memory (GiB)",
        "gpu.qwen_shape.peak_gib",
        most=80,
    ),
    Target(
        "one GPU, Qwen2.5-7B shape, LoRA, all probes",
        "minutes of 1,000 edits, scaled from 128",
        "gpu.qwen_shape.minutes_per_1000_scaled",
        most=60,
    ),
)


@dataclass(frozen=True)
class Bench:
    """One run of the benchmark on one machine. The frames have a row for each measurement.

    timings: method, way, repeat, edits, probes, tokens, train_seconds, answer_seconds, train_mib, peak_mib. same: method, way,
    answers, share, average, average_lanes. growth: timings, and what grows (`grows`) to which `value`. memory: method, way, lanes,
    weights_mib, activations_mib, measured_mib. gains: optimisation, method, predicted, measured, low, high, why.
    """

    about: Mapping[str, Any]
    timings: pd.DataFrame
    same: pd.DataFrame
    growth: pd.DataFrame
    memory: pd.DataFrame
    gains: pd.DataFrame

    @property
    def place(self) -> str:
        """The first part of the keys of its numbers: `gpu`, or how many cores."""
        machine = self.about["machine"]
        return (
            "gpu"
            if machine["device"] != "cpu"
            else {1: "one_core", 2: "two_cores"}.get(
                machine["threads"], f"{machine['threads']}_cores"
            )
        )


def read(home: Path, name: str = CPU) -> Bench | None:
    """The committed run of this name; None where there is none. InputError for a file that is not one."""
    path = home.joinpath(*RESULTS, f"{name}.json")
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if lacking := [part for part in (*TEXT, *ROWS) if part not in content]:
            raise InputError(f"{path}: no '{lacking[0]}'; expected what `make bench` writes")
        return Bench(
            {part: content[part] for part in TEXT}, *(pd.DataFrame(content[part]) for part in ROWS)
        )
    except (ValueError, TypeError) as error:
        raise (
            error
            if isinstance(error, InputError)
            else InputError(f"{path}: not a file that `make bench` writes ({error})")
        ) from None


def save(content: Mapping[str, Any], path: Path) -> Path:
    """Write a run, a measurement a line, so that a reader of the file and of its changes can follow."""
    if lacking := [part for part in (*TEXT, *ROWS) if part not in content]:
        raise InputError(f"{path}: no '{lacking[0]}' to write")
    parts = []
    for part in (*TEXT, *ROWS):
        lines = (
            ",\n  ".join(
                json.dumps(shortened(row, DIGITS), ensure_ascii=False) for row in content[part]
            )
            if part in ROWS
            else ""
        )
        whole = (
            f"[\n  {lines}\n ]"
            if lines
            else json.dumps(shortened(content[part], DIGITS), ensure_ascii=False)
        )
        parts.append(f' "{part}": {whole}')
    return write_atomic(path, ("{\n" + ",\n".join(parts) + "\n}\n").encode())


def average(probes: Sequence[Probe], answers: Sequence[str], before: Sequence[str]) -> float:
    """The average metric of these answers, over all edits together: mean over kinds of each kind's own comparison."""
    frame = pd.DataFrame({"kind": [probe.kind for probe in probes]})
    references = [
        one if KINDS[probe.kind].against == "before" else probe.reference
        for probe, one in zip(probes, before, strict=True)
    ]
    scores = score(
        answers,
        references,
        [probe.aliases if KINDS[probe.kind].against == "reference" else () for probe in probes],
    )
    frame["score"] = [
        scores[KINDS[kind].metric].iat[place] for place, kind in enumerate(frame["kind"])
    ]
    means = frame.groupby("kind")["score"].mean()
    return float(means[means.index.isin(AVERAGE)].mean())


def rates(timings: pd.DataFrame) -> pd.DataFrame:
    """The rows with what they mean: seconds an edit in all and of each part, edits a minute, answered tokens a second."""
    seconds = timings["train_seconds"] + timings["answer_seconds"]
    each = {
        f"{part}_each": timings[f"{part}_seconds"] / timings["edits"]
        for part in ("train", "answer")
    }
    return timings.assign(
        **each,
        each=seconds / timings["edits"],
        edits_a_minute=60 * timings["edits"] / seconds,
        tokens_a_second=timings["tokens"] / timings["answer_seconds"],
    )


def ratio(timings: pd.DataFrame, method: str, over: str, part: str = "each") -> Score:
    """How many times as many edits lanes do as the way `over`: median over the repeats, with the least and the most.

    `part`: "each" of the whole, "train_each" or "answer_each". Each repeat compares what ran right after each other.
    """
    own = rates(timings[timings["method"] == method]).pivot(
        index="repeat", columns="way", values=part
    )
    if missing := [way for way in (over, "lanes") if way not in own]:
        raise InputError(f"benchmark: {method}: no timings of way '{missing[0]}'")
    found = (own[over] / own["lanes"]).dropna()
    return Score(float(found.median()), float(found.min()), float(found.max()))


def compared(bench: Bench) -> pd.DataFrame:
    """The table of ways: a row for each method, medians over the repeats, ratios with the least and the most."""
    lines = []
    timings = rates(bench.timings)
    for method in ordered(timings["method"]):
        own = timings[timings["method"] == method]
        per_minute = own.groupby("way")["edits_a_minute"].median()
        ratios = {
            f"over {name}{said}": ratio(own, method, way, part)
            for way, name in WAYS.items()
            if way != "lanes"
            for said, part in (
                ("", "each"),
                (", editing", "train_each"),
                (", answering", "answer_each"),
            )
        }
        lines.append(
            {"method": method}
            | {f"{name} (edits a minute)": per_minute.get(way) for way, name in WAYS.items()}
            | ratios
        )
    return pd.DataFrame(lines)


def resources(bench: Bench) -> pd.DataFrame:
    """The table of what each way needs: edits timed, answered tokens a second, peak memory, and how many answers are those in lanes."""
    found = (
        rates(bench.timings)
        .groupby(["method", "way"], sort=False)
        .agg(
            edits=("edits", "sum"),
            tokens_a_second=("tokens_a_second", "median"),
            peak_memory=("peak_mib", "median"),
        )
        .reset_index()
    )
    found = found.merge(bench.same, how="left", on=["method", "way"])
    found["average"] = found["average"].fillna(
        found.groupby("method")["average_lanes"].transform("max")
    )
    found = found.drop(columns=["answers", "average_lanes"]).rename(
        columns={"peak_memory": "peak memory (MiB)", "share": "same answers as in lanes"}
    )
    return found.assign(way=found["way"].map(WAYS))


def grown(bench: Bench, grows: str) -> pd.DataFrame:
    """For `diagrams.trends`: way, panel, score, and the value of what grows under its own name."""
    panels = {
        "edits_a_minute": "edits a minute",
        "tokens_a_second": "answered tokens a second",
        "peak_mib": "peak memory (MiB)",
    }
    own = rates(bench.growth[bench.growth["grows"] == grows])
    own = pd.DataFrame(
        {"way": own["way"].map(WAYS), grows: own["value"]}
        | {panel: own[column] for column, panel in panels.items()}
    )
    return own.melt(["way", grows], list(panels.values()), "panel", "score").dropna(subset="score")


def growth(bench: Bench) -> pd.DataFrame:
    """The table of growth but that with the number of edits: seconds of an edit in each way, at each value of what grows."""
    frame = rates(bench.growth[bench.growth["grows"] != "edits"])
    means = (
        frame.assign(way=frame["way"].map(WAYS) + " (s an edit)")
        .groupby(["grows", "value", "way"], sort=False)["each"]
        .median()
        .unstack("way")
    )
    return (
        means.reindex(columns=[f"{name} (s an edit)" for name in WAYS.values()])
        .reset_index()
        .rename_axis(columns=None)
    )


def remembered(bench: Bench) -> pd.DataFrame:
    """The table of memory: predicted beside measured, in MiB."""
    frame = bench.memory.assign(
        way=bench.memory["way"].map(WAYS),
        predicted=bench.memory["weights_mib"] + bench.memory["activations_mib"],
    )
    names = {"weights_mib": "weights", "activations_mib": "activations", "measured_mib": "measured"}
    return frame.rename(columns=names)[
        [
            "what",
            "method",
            "way",
            "lanes",
            "trained",
            "copies",
            "weights",
            "activations",
            "predicted",
            "measured",
        ]
    ]


def gained(bench: Bench) -> pd.DataFrame:
    """The table of optimisations: predicted and measured gain, and why they differ."""
    measured = [
        Score(*ends) for ends in bench.gains[["measured", "low", "high"]].itertuples(index=False)
    ]
    return bench.gains.assign(measured=measured)[
        ["optimisation", "method", "predicted", "measured", "why"]
    ]


def numbers(bench: Bench) -> dict[str, Score]:
    """Its numbers by their key below `speed`, medians over the repeats: lanes over each other way, and what the targets ask of the shape.

    The first method is the one of the targets; those of others have the method's name in their key.
    """
    found = {}
    for place, method in enumerate(ordered(bench.timings["method"])):
        own = bench.timings[bench.timings["method"] == method]
        first = bench.place + (
            ".qwen_shape" if SHAPE in method else ".embedded" if bench.place == "gpu" else ""
        )
        base = first if SHAPE in method or not place else f"{first}.{key(method)}"
        if set(WAYS) <= set(own["way"]):
            found |= {
                f"{base}.lanes_over_{way}": ratio(own, method, way)
                for way in WAYS
                if way != "lanes"
            }
        if SHAPE in method and "lanes" in set(own["way"]):
            lanes = rates(own[own["way"] == "lanes"])
            found[f"{base}.minutes_per_1000_scaled"] = Score(
                float(1000 * lanes["each"].median() / 60)
            )
        elif SHAPE in method:
            held = bench.memory.loc[bench.memory["method"] == method, "model_mib"].max()
            found[f"{base}.peak_gib"] = Score(float((held + own["peak_mib"].max()) / 1024))
    return found


def about(bench: Bench) -> str:
    """The machine, the versions and the command, in a sentence; how busy the machine was."""
    machine, versions = bench.about["machine"], bench.about["versions"]
    on = machine["processor"] if machine["device"] == "cpu" else machine["device"]
    said = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return (
        f"`{bench.about['command']}` on {on}, {machine['threads']} threads of {machine['cores']} cores, {machine['memory_gib']:g} GiB ({said}); it took "
        f"{bench.about['seconds'] / 60:.0f} min. Load of the machine before it began: {machine['load_before']:g}"
        + (", so its seconds are not to be trusted." if busy(bench) else ".")
    )


def busy(bench: Bench) -> bool:
    """Whether others had the machine when the run began."""
    return bench.about["machine"]["load_before"] > BUSY


def targets(numbers: Mapping[str, Score]) -> pd.DataFrame:
    """The targets beside what was measured, by key below `speed`; a dash where nothing was."""
    lines = []
    for one in TARGETS:
        found = numbers[one.key].mean if one.key in numbers else None
        met = (
            None if found is None else found >= one.least if one.most is None else found <= one.most
        )
        asked = f"at least {one.least:g}" if one.most is None else f"under {one.most:g}"
        lines.append(
            {
                "where": one.where,
                "what": one.what,
                "target": asked,
                "measured": numbers.get(one.key),
                "met": met,
            }
        )
    return pd.DataFrame(lines)
