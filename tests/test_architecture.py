"""The project keeps its architecture: layers, sizes, words, dependencies, committed artefacts."""

import ast
import io
import re
import subprocess
import sys
import tokenize
import tomllib
from importlib import metadata
from itertools import combinations
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
LIBRARY = ROOT / "lib" / "uke"
MODULES = sorted(LIBRARY.rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# Words that GLOSSARY.md has retired: in identifiers and docstrings, and as whole identifiers alone.
RETIRED = "abreast errand errands hparams peer peers rival rivals thrift wiring".split()
RETIRED_NAMES = "course helpers mark material materials misc moments told".split()


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_imports_go_one_way_and_no_torch_comes_below_the_models():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_reading_rows_and_reports_loads_no_torch():
    names = ["data", "world", "results.rows", "results.compare", "report.section", "cli.params"]
    imports = "; ".join(f"import uke.{name}" for name in names)
    code = f"import sys; {imports}; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_every_package_stays_within_its_lines():
    allowed, most = PROJECT["tool"]["uke"]["lines"], PROJECT["tool"]["uke"]["test_lines"]
    assert sum(allowed.values()) <= 13_000 and most <= 9_898  # the library is thin, its tests few
    counted = dict.fromkeys(allowed, 0)
    for path in MODULES:
        parts = path.relative_to(LIBRARY).parts
        counted[parts[0] if len(parts) > 1 else "base"] += lines(path)
    over = {name: count for name, count in counted.items() if count > allowed[name]}
    assert not over, f"lines by package: {over}; allowed: {allowed}"
    tests = sum(lines(path) for path in (ROOT / "tests").rglob("*.py"))
    assert tests <= most, f"{tests} lines of tests"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(LIBRARY)))
def test_no_module_prints_evaluates_unpickles_or_trusts_remote_code(path):
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    names = {call.id for call in calls if isinstance(call, ast.Name)}
    assert not names & {"print", "eval", "exec"}
    assert not re.search(r"^\s*(import|from) pickle", source, re.M)
    assert "trust_remote_code=True" not in source
    assert ast.get_docstring(tree) or not source.strip()


def words(text: str) -> set[str]:
    """The words of a text or an identifier, in lower case; camelCase and snake_case are split."""
    return set(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text).lower()))


def test_retired_words_are_in_no_identifier_and_no_docstring():
    used = []
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NAME:
                retired = words(token.string) & set(RETIRED)
                retired |= {token.string} & set(RETIRED_NAMES)
            elif token.type == tokenize.STRING and token.string.startswith(('"""', 'r"""')):
                retired = words(token.string) & set(RETIRED)
            else:
                continue
            used += [f"{path.relative_to(LIBRARY)}:{token.start[0]}: {word}" for word in retired]
    assert not used, used[:20]


def test_the_glossary_explains_the_words_of_the_field():
    text = (ROOT / "GLOSSARY.md").read_text(encoding="utf-8").lower()
    for word in ("baseline", "covariance", "dataset", "efficacy", "locality", "lane", "probe"):
        assert re.search(rf"\| \*?\*?{word}", text), word


def sections(path: Path) -> list[str]:
    """The code of a notebook's cells, one text a cell, but for its parameters."""
    cells = nbformat.read(path, as_version=4).cells
    return [
        cell.source
        for cell in cells
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", ())
    ]


def test_no_two_notebooks_share_six_lines():
    runs = {}
    for path in NOTEBOOKS:
        code = [line for cell in sections(path) for line in cell.splitlines() if line.strip()]
        code = [line for line in code if not line.startswith(("import ", "from "))]
        runs[path.stem] = {tuple(code[i : i + 6]) for i in range(len(code) - 5)}
    shared = {(one, two) for one, two in combinations(runs, 2) if runs[one] & runs[two]}
    assert not shared


@pytest.fixture(scope="module")
def artefacts() -> list[Path]:
    command = ["git", "ls-files", "-z", "figures"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout, so what is committed is unknown")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_committed_artefacts_are_few_and_small(artefacts):
    files = artefacts
    assert len(files) <= 300 and sum(path.stat().st_size for path in files) <= 12e6
    allowed = {".csv", ".tex", ".svg", ".png", ".md", ".parquet", ".json", ".html", ".pdf"}
    assert {path.suffix for path in files} <= allowed


def test_no_text_of_a_benchmark_is_committed_nor_any_answer_to_one(artefacts):
    texts = {"question", "reference", "answer", "before"}
    read = {".csv": pd.read_csv, ".parquet": pd.read_parquet}
    for path in artefacts:
        folder = path.relative_to(ROOT / "figures").parts[0]
        if not folder.startswith(("embedded", "benchmarks")):
            if path.suffix in read and path.stem != "published":  # whose questions are kinds
                frame = read[path.suffix](path)
                assert frame[list(texts & set(frame))].isna().all(axis=None), path
            if path.suffix == ".html":  # drawn where there are texts, a report shows some
                assert "drawn from committed rows" in path.read_text(encoding="utf-8")


# pyproject.toml, constraints.txt and environment.yml name the same packages and versions.

CONDA = {"pytorch": "torch", "matplotlib-base": "matplotlib", "snakemake-minimal": "snakemake"}


def ranges() -> dict[str, Requirement]:
    extras = PROJECT["project"]["optional-dependencies"].values()
    texts = [*PROJECT["project"]["dependencies"], *(text for extra in extras for text in extra)]
    return {canonicalize_name(Requirement(text).name): Requirement(text) for text in texts}


def pins() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text()
    found = re.findall(r"^([A-Za-z0-9._-]+)==([0-9][0-9.a-z]*)$", text, re.M)
    return {canonicalize_name(name): version for name, version in found}


def conda() -> dict[str, str]:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    texts = [text for text in listed if isinstance(text, str)]
    texts += next(item["pip"] for item in listed if isinstance(item, dict))
    pairs = [re.split("==?", text) for text in texts if re.search("[^<>]=", text)]
    return {canonicalize_name(CONDA.get(name, name)): version for name, version in pairs}


def test_every_direct_dependency_is_pinned_alike_everywhere():
    assert set(pins()) == set(ranges()) and len(pins()) > 20
    assert conda() == pins()
    for name, version in pins().items():
        assert ranges()[name].specifier.contains(Version(version)), name
    assert str(ranges()["torch"].specifier) == ">=2.11" and pins()["torch"] == "2.13.0"
    assert str(ranges()["transformers"].specifier) == ">=5.17"


@pytest.mark.skipif(
    not (ROOT / ".venv" / ".installed").exists(), reason="not the environment that make installs"
)
def test_make_installed_the_pinned_versions():
    assert {name: metadata.version(name).split("+")[0] for name in pins()} == pins()


def test_the_library_imports_only_what_it_declares():
    owners = metadata.packages_distributions()
    undeclared = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            foreign = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
            for top in foreign - {"uke"}:
                if not {canonicalize_name(each) for each in owners.get(top, [])} & set(ranges()):
                    undeclared.add(f"{path.name}: {top}")
    assert not undeclared
