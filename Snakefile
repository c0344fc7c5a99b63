"""The study as a graph: the notebooks of params/studies.yaml, then the report (`make report`).

Configuration: profile, data, rows, threads (per notebook) and the parameters that notebooks share
(data_file, documents, structured, limit, levels, methods, model); `cluster` divides rows into jobs. A notebook's rows are no output
of its rule: Snakemake deletes the outputs of a job that fails, and rows let a rerun resume.
"""

import functools
import hashlib
import json
import shlex
import sys
from pathlib import Path

from uke.cli import params
from uke.data.find import COLLECTIONS, find_data, find_files
from uke.files import sha256
from uke.project import Paths
from uke.world.files import world_of

ROOT = Path(workflow.basedir)
PROFILE = str(config.get("profile", "quick"))
DATA = params.dataset(ROOT, PROFILE, config.get("data"))
PATHS = Paths(PROFILE, DATA)
STUDIES = params.studies(ROOT)
SHARED = {
    key: value
    for key, value in sorted(config.items())
    if key not in ("profile", "data", "rows", "threads", "cluster")
}
NAMED = {kind: list(filter(None, str(config.get(kind, "")).split(","))) for kind in COLLECTIONS}
FILES = {kind: list(map(str, find_files(kind, NAMED[kind]))) for kind in COLLECTIONS}
REPORTED = params.reported(
    ROOT, PROFILE, DATA, bool(FILES["documents"]), PATHS if "rows" in config else None
)
MODEL = config.get("model") or params.merge(ROOT, params.LOCALITY, PROFILE).get("model", "embedded")
MODEL = str(Path(MODEL).expanduser())
OWN_SET = DATA != "world" or world_of(MODEL) is None  # of this run alone, so others wait for it
TUNING = [name for name in STUDIES if name.startswith(params.SEARCH)]
OPTIONS = shlex.join(
    ["--profile", PROFILE, "--data", DATA]
    + (["--rows", config["rows"]] if "rows" in config else [])
    + [part for key, value in SHARED.items() for part in ("--shared", f"{key}={value}")]
)


# Jobs of a cluster by name, as `make plan` has listed them: parts of the rows of a notebook, which
# then only draws. What precedes any edit is made once, by the first of all.
PLAN = PATHS.results / "plan.json"
JOBS = json.loads(PLAN.read_text(encoding="utf-8")) if "cluster" in config else {}
FIRST = [name for name in JOBS if ".unedited." in name]


def asked(kind, notebook, attempt=1):
    """Return what a notebook asks for, which only draws: its model is loaded to be compared."""
    own = [name for name in FIRST if name.startswith(f"{notebook}.")] or FIRST
    least = 8000 if kind == "mem_mb" else 0
    return attempt * max([JOBS[name].get(kind, 0) for name in own] + [least])


def marks(names):
    return [str(PATHS.results / "shares" / name) for name in names]


def section(notebook):
    return str(PATHS.sections / f"{notebook}.json")


def written(notebook):
    """Name the code and settings of a notebook, but for the methods."""
    patterns = [
        "lib/uke/**/*.py",
        "lib/uke/*/*.yaml",
        "lib/uke/embedded/*",
        "params/studies.yaml",
        f"params/profiles/{PROFILE}.yaml",
        "params/locality*",
        f"notebooks/{notebook}.ipynb",
    ]
    if notebook == "11_verdicts":
        patterns += ["params/claims.yaml", "params/paper.yaml"]
        patterns += ["figures/embedded*/numbers.json", "figures/smollm2*/numbers.json"]
    if notebook == "10_cost":
        patterns += ["benchmarks/results/*.json"]
    found = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    found.discard(PATHS.figures / "numbers.json")  # which the report of this run writes
    return sorted(map(str, found))


@functools.cache
def content(notebook):
    """Return a digest of these files: their age says nothing where a clock was set back."""
    digests = [digest_of(path) for path in written(notebook)]
    return hashlib.sha256(repr(digests).encode()).hexdigest()[:16]


digest_of = functools.cache(lambda path: sha256(Path(path)))


def sources(wildcards):
    notebook = wildcards.notebook
    files = written(notebook)
    # Tuning writes what it chose into the files of methods: newer ones are no reason to tune again.
    methods = sorted(map(str, ROOT.glob("params/methods/*.yaml")))
    files += [ancient(path) for path in methods] if notebook in TUNING else methods
    if "rows" not in config and (path := find_data(DATA, str(config.get("data_file", "")))):
        files.append(path)
    own = PROFILE == STUDIES[notebook].report  # a profile of its own reads every file of UKE_DATA
    if own or (notebook == params.LOCALITY and OWN_SET):
        files += [path for kind in FILES.values() for path in kind]
    # Braces would be wildcards: such a file is no input, but rows of other data are other rows.
    files = [path for path in files if "{" not in path]
    # Whoever comes first builds the world's locality set; nobody waits for its audit.
    needed = [name for name in STUDIES[notebook].after if name in REPORTED]
    return files + [section(name) for name in needed if name != params.LOCALITY or OWN_SET]


def shared(wildcards):
    """Sources of a notebook, and the jobs that write its rows."""
    own = [name for name in JOBS if name.partition(".")[0] == wildcards.notebook]
    return sources(wildcards) + marks(own)


def preceding(wildcards):
    """Sources of a job, and the jobs that it waits for."""
    (own,) = [name for name in FIRST if name.partition(".")[0] == wildcards.notebook]
    searches = wildcards.notebook in TUNING
    first = [name for name in FIRST if (name.partition(".")[0] in TUNING) == searches][0]
    me = f"{wildcards.notebook}.{wildcards.share}"
    return sources(wildcards) + marks({own, first} - {me} if me != first else ())


onstart:
    few = " (a demonstration: few edits, six to twelve minutes on two cores)" * (
        PROFILE == "quick"
    )
    print(f"Profile {PROFILE}, data {DATA}{few}: {len(REPORTED)} notebooks, then the report.")
    print(
        "Lines name notebook and heading; a run that is stopped resumes where it was.",
        flush=True,
    )


onsuccess:
    if (page := PATHS.figures / "report.html").is_file():
        place = page.parent.relative_to(PATHS.home)
        print(f"To read, in {place}: report.html or report.pdf; README.md shows all figures")
        print(
            f"The notebooks as they ran: {PATHS.results.relative_to(PATHS.home)}/notebooks/*.html"
        )


localrules:
    report,


rule report:
    input:
        [section(name) for name in REPORTED],
        sorted(str(path) for path in ROOT.glob("lib/uke/report/templates/*")),
    output:
        PATHS.figures / "report.html",
        PATHS.figures / "report.pdf",
        PATHS.figures / "numbers.json",
    params:
        executed=PATHS.results / "notebooks",
    shell:
        "(find {params.executed:q} -name '*.ipynb' -exec {sys.executable:q} -m nbconvert --to html "
        "--log-level ERROR --no-prompt {{}} + || true) && {sys.executable:q} -m uke report {OPTIONS}"


rule tune:
    input:
        [section(name) for name in TUNING],


rule locality:
    input:
        section(params.LOCALITY),


rule rows:
    input:
        preceding,
    output:
        touch(marks(["{notebook}.{share}"])[0]),
    wildcard_constraints:
        notebook="|".join(STUDIES),
    threads: int(config.get("threads", 1))
    resources:
        mem_mb=lambda own, attempt: attempt * JOBS[f"{own.notebook}.{own.share}"]["mem_mb"],
        runtime=lambda own, attempt: attempt * JOBS[f"{own.notebook}.{own.share}"]["minutes"],
        gpu=lambda own: JOBS[f"{own.notebook}.{own.share}"].get("gpu", 0),
    params:
        options=OPTIONS,
    shell:
        "OMP_NUM_THREADS={threads} {sys.executable:q} -m uke rows "
        "{wildcards.notebook}.{wildcards.share} {params.options}"


# A rule for each priority, since all jobs of one rule have one priority.
for rank in sorted({study.priority for study in STUDIES.values()}):

    rule:
        name:
            f"notebook_{rank}"
        input:
            shared,
        output:
            section("{notebook}"),
        log:
            str(PATHS.results / "notebooks" / "{notebook}.ipynb"),
        wildcard_constraints:
            notebook="|".join(name for name, study in STUDIES.items() if study.priority == rank),
        priority: rank
        threads: int(config.get("threads", 1))
        resources:
            mem_mb=lambda own, attempt: asked("mem_mb", own.notebook, attempt),
            gpu=lambda own: asked("gpu", own.notebook),
        params:
            options=lambda _: OPTIONS,  # as it is: a text would have wildcards
            content=lambda own: content(own.notebook),
        shell:
            "OMP_NUM_THREADS={threads} {sys.executable:q} -m uke run {wildcards.notebook} --checked "
            "{params.options}"
