"""The command line, `python -m uke`.

    python -m uke run 01_edits --profile quick --set limit=4     execute one notebook
    python -m uke check --profile quick                          check every notebook's parameters
    python -m uke report --profile quick                         compose numbers.json and the report
    python -m uke rows 07_recipe.ft_m.1.2of4 --profile quick     write the rows of one cluster job
    python -m uke covariance MODEL TEXTS.json --layers 3 4       measure what baselines need

Exit status: 0 done, 1 the notebook failed, 2 bad input (nothing was started).
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from uke.cli import params
from uke.cli.execute import Failure, Job, execute, runs
from uke.data.find import COLLECTIONS, find_data, find_files
from uke.errors import InputError
from uke.files import read_yaml, write_atomic
from uke.project import Paths

logger = logging.getLogger("uke")

SHIPPED = ("embedded", "smollm2")  # models that are known by these names
PAIR = {"action": "append", "default": [], "metavar": "NAME=VALUE"}
QUOTED = "embedded"  # the profile whose numbers README quotes by their mere keys


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for loud in "papermill filelock traitlets fontTools absl sentence_transformers".split():
        logging.getLogger(loud).setLevel(logging.ERROR)
    try:
        options.command(options)
    except (InputError, Failure, OSError) as error:  # such as a file in place of results/
        logger.error("%s", error)
        return 2 if isinstance(error, InputError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m uke", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    profile = choices()

    def command(name, function, text, parents=(profile,)):
        added = commands.add_parser(name, help=text, allow_abbrev=False, parents=parents)
        added.set_defaults(command=function)
        return added

    run = command("run", _run, "execute one notebook")
    run.add_argument("notebook", help="name of a notebook, for example 01_edits")
    run.add_argument("--set", **PAIR, help="a parameter of this notebook")
    run.add_argument("--checked", action="store_true", help="`check` has passed: start at once")
    part = command("rows", _rows, "write the rows of one job of a cluster (see tools/plan.py)")
    part.add_argument("share", help="its name, for example 07_recipe.ft_m.1.2of4")
    command("check", _check, "check the parameters of every notebook, run nothing")
    command("report", _report, "compose numbers.json, report.html and report.pdf")
    measure = command("covariance", _covariance, "measure key covariances of a model", ())
    measure.add_argument("model", help="embedded, smollm2, a model directory or a hub name")
    measure.add_argument("texts", nargs="?", help="JSON list of texts; the world's for 'embedded'")
    measure.add_argument("--layers", type=int, nargs="+", help="blocks (default: every block)")
    return parser


def choices() -> argparse.ArgumentParser:
    """Return the options that choose a run, for a parser of its own or as a parent."""
    found = argparse.ArgumentParser(add_help=False)
    found.add_argument("--profile", required=True, help="a file of params/profiles")
    found.add_argument("--data", help="a benchmark's name instead of the profile's data")
    found.add_argument("--shared", **PAIR, help="a parameter, for the notebooks that have it")
    found.add_argument("--rows", choices=["committed"], help="draw again from committed rows")
    found.set_defaults(set=[], checked=False)
    return found


def job(options: argparse.Namespace, notebook: str) -> Job:
    """Check everything that can be checked before a kernel starts; InputError otherwise."""
    home, name = Paths(options.profile).home, Path(notebook).stem
    if (home / "results").is_file():
        raise InputError(f"{home / 'results'}: expected a folder, found a file")
    data = params.dataset(home, options.profile, options.data)
    parameters = params.merge(home, name, options.profile, options.shared, options.set)
    parameters |= {"profile": options.profile, "data": data}
    if "data_file" in parameters and not options.rows:
        parameters["data_file"] = find_data(data, parameters["data_file"])
    for kind in COLLECTIONS:
        if kind in parameters and (data != "world" or parameters[kind]):
            parameters[kind] = [str(path) for path in find_files(kind, parameters[kind])]
    model = parameters.get("model", "embedded")
    if model not in SHIPPED and (path := Path(model).expanduser()).is_dir():
        parameters["model"] = str(path.resolve())  # the kernel has a folder of its own
    if not (options.rows or options.checked):
        # Torch comes with the methods: a run that needs no look at them does not wait for it.
        from uke.cli.preflight import check

        check(home, data, parameters)
    return Job(home / "notebooks" / f"{name}.ipynb", parameters, Paths(options.profile, data))


def _run(options: argparse.Namespace) -> None:
    planned = offline(job(options, options.notebook))
    if options.rows:
        os.environ["UKE_ROWS"] = options.rows
    execute(planned)


def offline(planned: Job) -> Job:
    """Return the job; a model on disk needs no hub: a mistaken look-up fails and waits for none."""
    model = planned.parameters.get("model", "embedded")
    if model in SHIPPED or Path(model).is_dir():
        os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return planned


def _rows(options: argparse.Namespace) -> None:
    from uke.cli.rows import write

    options.checked = True  # by whoever planned it
    write(offline(job(options, options.share.partition(".")[0])), options.share)


def reported(options: argparse.Namespace) -> tuple[Paths, list[str]]:
    home = Paths(options.profile).home
    data = params.dataset(home, options.profile, options.data)
    given = dict(pair.partition("=")[::2] for pair in options.shared)
    documents = find_files("documents", params.items(given.get("documents", "")))
    own = Paths(options.profile, data)
    drawn = own if options.rows else None
    return own, params.reported(home, options.profile, data, bool(documents), drawn)


def _check(options: argparse.Namespace) -> None:
    from uke.report import verdicts

    paths, notebooks = reported(options)
    if _quoting(paths) and options.shared:
        quoted = "README quotes the numbers of this study; change another profile (PROFILE=quick)"
        raise InputError(f"profile {paths.profile}: {', '.join(options.shared)}: {quoted}")
    for notebook in notebooks:
        job(options, notebook)
    if verdicts.NOTEBOOK in notebooks:  # it reads these last of all
        verdicts.claims(paths.home / "params" / "claims.yaml")
        read_yaml(paths.home / "params" / "paper.yaml", verdicts.PAPER)


def _report(options: argparse.Namespace) -> None:
    from uke.report.compose import account, compose, quote

    paths, notebooks = reported(options)
    kept = paths.figures / "rows" / "runs.json"  # what made the rows, for who draws them again
    if options.rows:
        made = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else []
    else:
        made = runs(paths)
        write_atomic(kept, json.dumps(made, indent=1) + "\n")
    timed = [name for name in notebooks if not name.startswith(params.SEARCH)]  # not `make tune`
    account(paths, [run for run in made if run["notebook"] in timed])
    compose(paths, notebooks, made, prune=bool(options.rows))  # then all sections are drawn
    for page in _quoting(paths):
        quote(page, Paths(QUOTED))


def _quoting(paths: Paths) -> list[Path]:
    """List the pages that quote numbers of this run: README.md and those of docs."""
    run, pages = paths.figures.name, [*paths.home.glob("README.md"), *paths.home.glob("docs/*.md")]
    return [p for p in pages if run == QUOTED or f": {run}/" in p.read_text(encoding="utf-8")]


def _covariance(options: argparse.Namespace) -> None:
    from uke.methods.locate_edit import covariance
    from uke.models.model import load

    if options.texts is None and options.model != "embedded":
        raise InputError("covariance: expected a JSON file of texts for any model but 'embedded'")
    texts = covariance.read_texts(options.texts) if options.texts else covariance.world_texts()
    covariance.measure(*load(options.model), texts, options.layers or covariance.LAYERS)
