"""pyproject.toml, constraints.txt and environment.yml name the same packages and versions, and the code imports no others."""

import ast
import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONDA_NAMES = {
    "pytorch": "torch",
    "matplotlib-base": "matplotlib",
    "snakemake-minimal": "snakemake",
}


def ranges() -> dict[str, Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + [
        text for extra in project["optional-dependencies"].values() for text in extra
    ]
    return {canonicalize_name(Requirement(text).name): Requirement(text) for text in texts}


def pins() -> dict[str, str]:
    lines = [
        line
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    found = {}
    for line in lines:
        name, version = re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][0-9.a-z]*)", line).groups()
        found[canonicalize_name(name)] = version
    return found


def conda() -> dict[str, str]:
    listed = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    texts = [
        re.sub(r"^([^=<>]+)=([^=])", r"\1==\2", text) for text in listed if isinstance(text, str)
    ]
    texts += next(item["pip"] for item in listed if isinstance(item, dict))
    pairs = [text.split("==") for text in texts if "==" in text]
    return {canonicalize_name(CONDA_NAMES.get(name, name)): version for name, version in pairs}


def test_every_direct_dependency_is_pinned_and_nothing_else():
    assert set(pins()) == set(ranges()) and len(pins()) > 20


def test_conda_users_get_the_pinned_versions():
    assert conda() == pins()


def test_pins_lie_within_the_stated_ranges():
    assert all(
        ranges()[name].specifier.contains(Version(version)) for name, version in pins().items()
    )
    assert str(ranges()["torch"].specifier) == ">=2.11" and pins()["torch"] == "2.13.0"
    assert str(ranges()["transformers"].specifier) == ">=5.17"


@pytest.mark.skipif(
    not (ROOT / ".venv" / ".installed").exists(), reason="not the environment that make installs"
)
def test_make_installed_the_pinned_versions():
    installed = {name: metadata.version(name).split("+")[0] for name in pins()}
    assert installed == pins()


def test_the_library_imports_only_what_it_declares():
    owners = metadata.packages_distributions()
    undeclared = set()
    for path in (ROOT / "lib" / "uke").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for top in (
                {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"uke"}
            ):
                if not {canonicalize_name(owner) for owner in owners.get(top, [])} & set(ranges()):
                    undeclared.add(f"{path.name}: {top}")
    assert not undeclared
