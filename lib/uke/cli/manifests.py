"""Manifests: what each notebook of a run last left of itself, by what, where and how long."""

import json
import platform
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

_LIBRARIES = ("torch", "transformers", "peft", "numpy", "pandas", "scipy", "matplotlib", "typst")
_VECTORS = {"avx512f": "AVX-512", "avx2": "AVX2"}


def read(paths: Any) -> list[dict]:
    """The manifests of a run, in the order of their notebooks' names."""
    directory = getattr(paths, "results", None)
    files = sorted((Path(directory) / "manifests").glob("*.json")) if directory else []
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


def write(root: Path, results: Path, outcome: dict) -> Path:
    """Write results/<run>/manifests/<notebook>.json; its path. `outcome` has notebook, parameters, status, device and seconds."""
    path = results / "manifests" / f"{outcome['notebook']}.json"
    describe = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = (
            subprocess.run(describe, cwd=root, capture_output=True, text=True).stdout.strip()
            or None
        )
    except FileNotFoundError:
        commit = None
    manifest = outcome | {
        "work_seconds": _work_seconds(results, outcome["seconds"], path),
        "executable": sys.executable,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "commit": commit,
        "versions": {
            each.name: each.version
            for each in sorted(metadata.distributions(), key=lambda each: each.name)
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(manifest, indent=1, default=str) + "\n", encoding="utf-8")
    return path


def machine(manifest: dict) -> dict:
    """Device, processor, Python, platform and the libraries that decide numbers, as a report states them."""
    versions = manifest.get("versions", {})
    known = {
        key: manifest[key]
        for key in ("device", "processor", "python", "platform")
        if manifest.get(key)
    }
    return known | (
        {"libraries": {key: versions[key] for key in _LIBRARIES if key in versions}}
        if versions
        else {}
    )


def account(paths: Any, manifest: dict) -> dict:
    """Return notebook, status, seconds and machine of a run, as the report accounts for it."""
    seconds = max(
        float(manifest["work_seconds"]), _row_seconds(paths.exported(manifest["notebook"]))
    )
    names = {"notebook": manifest["notebook"], "status": manifest.get("status"), "seconds": seconds}
    return names | machine(manifest)


def _row_seconds(path: Path) -> float:
    """Seconds of editing and answering that the rows of a study record, once for each unit."""
    if not path.is_file():
        return 0.0
    frame = pd.read_parquet(path)
    keys = ["method", "factor", "level", "batch_size", "batch", "recipe", "phase"]
    units = frame.drop_duplicates(keys)
    return float(units[["train_seconds", "answer_seconds"]].sum().sum())


def processor(told: Path = Path("/proc/cpuinfo")) -> str:
    """This machine's processor: name, generation, widest vectors. Seconds hang on it, and by rounding the scores of long trainings.

    In a virtual machine generations of different speed share a name ("AMD EPYC").
    """
    try:
        text = told.read_text(encoding="utf-8")
        name, family, model, flags = (
            re.search(rf"^{field}\s*:\s*(.+)$", text, re.MULTILINE)[1]
            for field in ("model name", "cpu family", "model", "flags")
        )
    except (OSError, TypeError):  # not Linux, or not x86
        return platform.processor() or platform.machine()
    vectors = next((said for flag, said in _VECTORS.items() if flag in flags.split()), "no AVX2")
    return f"{name} (family {family}, model {model}, {vectors})"


def _work_seconds(results: Path, seconds: float, earlier: Path) -> float:
    """Seconds that this notebook's work took: a rerun that finds all rows keeps what they cost, a resumed one adds."""
    before = json.loads(earlier.read_text(encoding="utf-8")) if earlier.is_file() else {}
    if before.get("status") == "failed":
        return round(seconds + before["work_seconds"], 2)
    wrote = any(
        path.stat().st_mtime >= time.time() - seconds for path in results.rglob("*.parquet")
    )
    return seconds if wrote or not before else before["work_seconds"]
