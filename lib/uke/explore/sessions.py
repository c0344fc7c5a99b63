"""A session of trials in plain values: the parameter file that repeats it, its edits side by side, and one more with another level."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from uke.errors import InputError, nearest
from uke.explore.bench import QUESTION, Bench, Task, Trial
from uke.explore.choices import Refused, composed
from uke.explore.surroundings import Library, own_edit
from uke.methods.catalog import PUBLISHED, Method, changes, differences, find

RUN = (
    "edit",
    "question",
    "answer",
    "paraphrases",
    "details",
    "method",
    "changes",
    "chat",
    "questions",
)


def written_down(task: Task, library: Library) -> dict[str, Any]:
    """A task in plain values, as a run of the notebook's parameter `runs`."""
    edit = task.edit
    if edit in library.edits:
        run: dict[str, Any] = {"edit": edit.id}
    else:
        run = {
            "question": edit.question,
            "answer": edit.answer,
            "details": [detail.model_dump() for detail in edit.details],
        }
    own = [edit.paraphrase] if edit.paraphrase and "edit" not in run else []
    run |= {
        "paraphrases": [*own, *task.paraphrases],
        "questions": list(task.questions),
        "chat": task.chat,
        "method": task.method.name,
    }
    return {name: value for name, value in run.items() if value not in ([], None)} | {
        "changes": changes(task.method, PUBLISHED[task.method.name])
    }


def read_down(run: Mapping[str, Any], library: Library, methods: Mapping[str, Method]) -> Task:
    """The task that a run of the parameter `runs` stands for; InputError for an unknown field, method or edit.

    `changes` are those from the published method; where there are none, the method is as tuned for the model.
    """
    if unknown := [name for name in run if name not in RUN]:
        raise InputError(f"runs: unknown field '{unknown[0]}'{nearest(str(unknown[0]), RUN)}")
    paraphrases = tuple(run.get("paraphrases", ()))
    if "edit" in run:
        edit, more = library.find(run["edit"]), paraphrases
    else:
        edit, more = (
            own_edit(
                run.get("question", ""),
                run.get("answer", ""),
                "".join(paraphrases[:1]),
                run.get("details", ()),
            ),
            paraphrases[1:],
        )
    name = run.get("method", "FT-UKE")
    method = (
        composed(find(name, PUBLISHED, "runs: "), run["changes"])
        if "changes" in run
        else find(name, methods, "runs: ")
    )
    return Task(edit, method, more, tuple(run.get("questions", ())), run.get("chat"))


def export(bench: Bench, path: Path) -> Path:
    """Write the session's trials as a parameter file for papermill (`papermill -f`) and the notebook `explore`; its path."""
    if not bench.trials:
        raise Refused("export", "There is no edit in this session yet.")
    library = bench.library
    said = {
        "model": bench.name,
        "data": library.paths.data,
        "data_file": library.data_file,
        "split": library.split,
        "world_seed": library.world_seed,
    }
    said |= {
        "widgets": "never",
        "runs": [written_down(trial.task, library) for trial in bench.trials],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        yaml.safe_dump(said, sort_keys=False, allow_unicode=True, width=110), encoding="utf-8"
    )
    return path


def compared(trials: Sequence[Trial]) -> pd.DataFrame:
    """The trials side by side: number, edit, method and its settings, mean headline score of each kind after the edit, steps."""
    found = []
    for trial in trials:
        scores = {row.kind: row.after for row in trial.scores.itertuples() if row.kind != QUESTION}
        found.append(
            {
                "number": trial.number,
                "edit": trial.task.edit.question,
                "method": trial.task.method.name,
                "settings": differences(trial.task.method, PUBLISHED[trial.task.method.name]),
                **scores,
                "steps": trial.record.steps,
            }
        )
    return pd.DataFrame(found)
