"""The house stays in order: one direction of imports, small rooms, no torch where none is needed, nothing forbidden."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import uke

FOLDER = Path(uke.__file__).parent
MODULES = {
    path.stem: ast.parse(path.read_text(encoding="utf-8"))
    for path in FOLDER.glob("*.py")
    if path.stem != "__init__"
}
# The list in the package's docstring, from the bottom up: rooms on one line may use each other from left to right.
ORDER = [
    name
    for line in uke.__doc__.splitlines()
    if "  " in line
    and set(names := [word.strip() for word in line.split("  ")[0].split(",")]) <= set(MODULES)
    for name in names
]


def imports(tree: ast.Module) -> set[str]:
    """The rooms a module imports from, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "uke":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("uke."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1] for alias in node.names if alias.name.startswith("uke.")
            }
    return found


def test_every_room_stands_once_in_the_docstring():
    assert sorted(ORDER) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_one_way(name):
    above = ORDER[ORDER.index(name) :]
    assert not imports(MODULES[name]) & set(above)


@pytest.mark.parametrize("name", MODULES)
def test_rooms_and_functions_are_small(name):
    lines = (FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 300
    for node in ast.walk(MODULES[name]):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 40, f"{node.name} is long"
            positional = [
                argument for argument in node.args.args if argument.arg not in ("self", "cls")
            ]
            # `say(key, value, low, high, n, unit)` is one number, spelt out.
            assert len(positional) <= (6 if node.name == "say" else 5), (
                f"{node.name} has many parameters"
            )


@pytest.mark.parametrize("name", MODULES)
def test_nothing_forbidden(name):
    source = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    calls = {
        node.func.id
        for node in ast.walk(MODULES[name])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"print", "eval", "exec"}
    assert (
        "pickle" not in source.replace("pickle, and then", "")
        and "trust_remote_code=True" not in source
    )
    assert ast.get_docstring(MODULES[name])


def test_rooms_of_rows_import_no_torch():
    light = ORDER[: ORDER.index("models")] + ["params", "preflight", "kernels", "run"]
    code = f"import sys\nfor name in {light}: __import__('uke.' + name)\nassert 'torch' not in sys.modules, 'torch'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
