"""The study as a graph: every notebook that params/studies names, then the report. `make report` calls it.

Configuration: profile, data, threads (per notebook) and the parameters that the notebooks share (data_file, documents, structured, limit, methods, model).
A notebook keeps its rows outside `output:`, since Snakemake deletes the outputs of a job that fails and rows make a rerun resume.
"""

import shlex
import sys
from pathlib import Path

from uke.cli import params
from uke.data.documents import COLLECTIONS as COLLECTION_FOLDERS, find_collections
from uke.data.edits import find_data
from uke.project import Paths

ROOT = Path(workflow.basedir)
PROFILE = str(config.get("profile", "quick"))
DATA = params.dataset(ROOT, PROFILE, config.get("data"))
PATHS = Paths(PROFILE, DATA)
STUDIES = {study.notebook: study for study in params.studies(ROOT)}
TUNING = [name for name in STUDIES if name.split("_")[0] == "tuning"]
SHARED = {key: value for key, value in config.items() if key not in ("profile", "data", "threads")}
COLLECTIONS = {name: find_collections(name, [path for path in str(config.get(name, "")).split(",") if path]) for name in COLLECTION_FOLDERS}
REPORTED = [study.notebook for study in params.reported(ROOT, PROFILE, DATA, bool(COLLECTIONS["documents"]))]
FILE = [path] if (path := find_data(DATA, str(config.get("data_file", "")))) else []
GIVEN_COLLECTIONS = " ".join(f"--shared {shlex.quote(f'{name}={config[name]}')}" for name in COLLECTIONS if name in config)
RUN = shlex.join(["--profile", PROFILE, "--data", DATA])


def section(notebook):
    return str(PATHS.sections / f"{notebook}.json")


def sources(wildcards):
    names = ["lib/uke/**/*.py", "lib/uke/*/*.yaml", "lib/uke/embedded/*", "params/methods/*.yaml", f"params/profiles/{PROFILE}.yaml"]
    names += ["params/trials/*.yaml"] if wildcards.notebook in TUNING else ["params/tuned/*.yaml", "params/levels/*.yaml"]
    names += ["params/locality/*.yaml"]
    names += [f"notebooks/{wildcards.notebook}.ipynb", f"params/studies/{wildcards.notebook}.yaml"]
    names += ["params/claims.yaml", "params/paper.yaml", f"figures/{PATHS.figures.name}-world-*/numbers.json"] if wildcards.notebook == "11_verdicts" else []
    names += ["benchmarks/results/*.json"] if wildcards.notebook == "10_cost" else []
    files = sorted(str(path) for name in names for path in ROOT.glob(name))
    own = PROFILE == STUDIES[wildcards.notebook].report  # reads every file of UKE_DATA
    files += FILE + [str(path) for path in ROOT.glob("params/audit/*.yaml") if own]
    files += [str(path) for kind in COLLECTIONS.values() for path in kind if own or wildcards.notebook == params.LOCALITY and DATA != "world"]
    # Whoever comes first builds the world's locality set, the others wait for that alone and not for its audit.
    waited = [other for other in STUDIES[wildcards.notebook].after if other in REPORTED and (other != params.LOCALITY or DATA != "world")]
    return files + [section(other) for other in waited]


rule report:
    input:
        [section(name) for name in REPORTED],
        sorted(str(path) for path in ROOT.glob("lib/uke/report/templates/*")),
    output:
        PATHS.figures / "report.html",
        PATHS.figures / "report.pdf",
        PATHS.figures / "numbers.json",
    shell:
        "{sys.executable:q} -m uke.cli.run --compose {RUN} {GIVEN_COLLECTIONS}"


rule tune:
    input:
        [section(name) for name in TUNING],


rule locality:
    input:
        section(params.LOCALITY),


# A rule for each priority, since a rule of Snakemake has one for all its jobs.
for rank in sorted({study.priority for study in STUDIES.values()}):

    rule:
        name:
            f"notebook_{rank}"
        wildcard_constraints:
            notebook="|".join(name for name, study in STUDIES.items() if study.priority == rank),
        input:
            sources,
        output:
            section("{notebook}"),
        log:
            str(PATHS.results / "notebooks" / "{notebook}.ipynb"),
        params:
            shared=" ".join(f"--shared {shlex.quote(f'{key}={value}')}" for key, value in sorted(SHARED.items())),
        threads: int(config.get("threads", 1))
        priority: rank
        shell:
            "OMP_NUM_THREADS={threads} {sys.executable:q} -m uke.cli.run {wildcards.notebook} {RUN} {params.shared}"
