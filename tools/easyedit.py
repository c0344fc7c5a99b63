"""Read EasyEdit's list of requests as edits, and write a study's rows as its list of metrics.

python tools/easyedit.py figures/quick/rows/07_recipe.parquet FT-M > metrics.json
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from uke.data.edits import KINDS, Edit, Probe
from uke.data.formats import read_json
from uke.errors import InputError, about, located, nearest

NAMES = {"original": "rewrite_acc", "paraphrase": "rephrase_acc"}
FOLLOWS = ("detail", "multi_hop")  # from the text, so portability


def read(path: str | Path) -> list[Edit]:
    """Read requests: `prompt`, `target_new`, and where they are there `rephrase_prompt`, `subject`,
    `portability` (as details) and `locality` (as questions that must keep their answers)."""
    found = []
    for number, record in enumerate(read_json(path)):
        with located(place := f"{path}: record {number}"), about(place):
            own = str(record.get("case_id", number))
            details = [
                {"question": one["prompt"], "answer": _first(one["ground_truth"])}
                for one in _asked(record.get("portability"))
            ]
            kept = [
                Probe(
                    edit=own,
                    kind="rel_doc",
                    number=place,
                    question=one["prompt"],
                    reference=_first(one["ground_truth"]),
                )
                for place, one in enumerate(_asked(record.get("locality")))
            ]
            edit = Edit(
                id=own,
                question=record["prompt"],
                answer=record["target_new"],
                paraphrase=record.get("rephrase_prompt"),
                subject=record.get("subject"),
                details=details,
                extra=tuple(kept),
            )
            found.append(edit)
    return found


def _asked(groups: Any) -> list[dict]:
    """Flatten `{name: {"prompt": ..., "ground_truth": ...}}`, each a text or a list of them."""
    found = []
    for one in (groups or {}).values():
        for each in one if isinstance(one, list) else [one]:
            prompts, truths = each["prompt"], each["ground_truth"]
            pairs = (
                [(prompts, truths)]
                if isinstance(prompts, str)
                else zip(prompts, truths, strict=True)
            )
            found += [{"prompt": prompt, "ground_truth": truth} for prompt, truth in pairs]
    return found


def _first(answers: Any) -> str:
    while isinstance(answers, list):
        answers = answers[0]
    return answers


def metrics(frame: pd.DataFrame, method: str) -> list[dict[str, Any]]:
    """Return the single edits of a method as EasyEdit does: a record for each, `pre` and `post`."""
    every = frame[(frame["method"] == method) & frame["factor"].isna()]
    if (own := every[every["batch_size"] == 1]).empty:
        raise InputError(f"no single edits of '{method}'{nearest(method, set(frame['method']))}")
    probe, found = ["edit", "kind", "number"], []
    before = frame[frame["phase"] == "before"].drop_duplicates(probe).set_index(probe)
    for case, (edit, rows) in enumerate(own.groupby("edit", sort=False)):
        sides: dict[str, dict[str, Any]] = {"pre": {}, "post": {}}
        for row in rows.sort_values(["kind", "number"]).to_dict("records"):
            kind = KINDS[row["kind"]]
            unchanged = kind.against == "before"
            metric = f"{kind.metric}_before" if unchanged else kind.metric
            old = 1.0 if unchanged else before[metric].get(tuple(row[name] for name in probe))
            group = "portability" if row["kind"] in FOLLOWS else "locality"
            for side, score in {"pre": old, "post": row[metric]}.items():
                named = row["kind"] in NAMES
                place = sides[side] if named else sides[side].setdefault(group, {})
                place.setdefault(NAMES.get(row["kind"], f"{row['kind']}_acc"), []).append(score)
        asked = rows[rows["kind"] == "original"].iloc[0]
        request = {"prompt": asked["question"], "target_new": asked["reference"]}
        record = {"case_id": case, "edit": edit, "requested_rewrite": request}
        found.append(record | {"time": float(rows["train_seconds"].max())} | sides)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path, help="a parquet file of rows")
    parser.add_argument("method", help="its published name")
    options = parser.parse_args()
    try:
        print(json.dumps(metrics(pd.read_parquet(options.rows), options.method), indent=1))
    except (InputError, OSError) as error:
        sys.exit(f"easyedit: {error}")


if __name__ == "__main__":
    main()
