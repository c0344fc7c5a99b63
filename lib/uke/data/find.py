"""Find the files of a run: those given by name, else what the folder of benchmarks has."""

import os
from collections.abc import Iterable
from pathlib import Path

from uke.errors import InputError
from uke.project import Paths

COLLECTIONS = ("documents", "structured")  # what a benchmark's locality set is built from
# Where files lie below `data_folder()`, else in a folder of the dataset's name; "world" needs none.
PATTERNS = {
    "unkebench": "unkebench/final_data_v*",
    "akew-counterfact": "akew/CounterFact*",
    "akew-mquake": "akew/MQuAKE-CF*",
    "akew-wikiupdate": "akew/WikiUpdate*",
    "editeverything": "editeverything/editevery*",
    "documents": "wikipedia/[!.]*",
    "structured": "structured/[!.]*",
}


def data_folder() -> Path:
    """Return the folder of benchmarks: UKE_DATA, by default where `make data` puts them."""
    return Path(os.environ.get("UKE_DATA") or Paths("embedded").home / "results" / "data")


def find_files(name: str, given: Iterable[str] = ()) -> tuple[Path, ...]:
    """Return the absolute paths of the files given, else of those that `PATTERNS` names.

    Raises InputError for a given file that does not exist.
    """
    files = [Path(path).expanduser() for path in given]
    if missing := [path for path in files if not path.is_file()]:
        raise InputError(f"{name}: {missing[0]}: no such file")
    if not files:
        found = sorted(data_folder().glob(PATTERNS.get(name, f"{name}/*")))
        files = [path for path in found if path.suffix in (".json", ".jsonl", ".parquet")]
    return tuple(path.resolve() for path in files)


def find_data(data: str, data_file: str = "") -> str:
    """Return the absolute path of the file of the benchmark `data`; "" for the generated world.

    Raises InputError where neither `data_file` nor `data_folder()` names exactly one file.
    """
    if data == "world":
        if data_file:
            raise InputError(f"data_file: {data_file}: name the benchmark that it is of with DATA=")
        return ""
    files = find_files(data, filter(None, [data_file]))
    if len(files) != 1:
        found = ", ".join(path.name for path in files) or "none (`make data` downloads it)"
        raise InputError(
            f"data: {data}: expected one file {PATTERNS.get(data, data)} in {data_folder()}, "
            f"found {found}; name it with DATA_FILE"
        )
    return str(files[0])
