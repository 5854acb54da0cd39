"""The shape of the project: what is imported when, what is public, what is shipped."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"qc": "qc", "ir": "qc/ir", "passes": "qc/passes", "frontend": "qc/frontend", "backends": "qc/backends"}
"""Where each folder of the checkout lies in an installation."""

HEAVY = {"torch", "transformers", "onnxruntime", "onnxruntime_genai", "onnxscript", "onnx", "tvm", "scipy", "sympy"}
"""Packages that take longer to import than the command line may take to answer."""


def modules() -> Iterator[tuple[Path, str]]:
    """Yields each module of the product with its path in an installation."""
    for folder, installed in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if not file.stem.endswith(("_test", "conftest")):
                yield file, f"{installed}/{file.relative_to(ROOT / folder).as_posix()}"


@pytest.mark.parametrize(
    "statement",
    [
        "import qc",
        "import qc.cli; qc.cli.build_parser()",
        "import qc.ir.errors",
        "sys.argv = ['qc', '--help']; from qc.cli import main; main()",
    ],
)
def test_a_light_import_loads_nothing_heavy(statement: str) -> None:
    script = (
        f"import sys, atexit, json\natexit.register(lambda: print('\\n' + json.dumps([*sys.modules])))\n{statement}"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    loaded = {name.partition(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}
    assert not loaded & HEAVY, f"{statement!r} must import these only when they are used: {sorted(loaded & HEAVY)}"


def top_level_names(tree: ast.Module) -> set[str]:
    """Every name that importing a module binds."""
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names.update(alias.asname or alias.name for alias in node.names)
        else:
            names.update(n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
    return names


@pytest.mark.parametrize("file", [pytest.param(f, id=i) for f, i in modules() if not f.name.startswith("_")])
def test_a_public_module_says_what_is_public(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    listed = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    assert listed, f"{file} needs an __all__: its public names are a decision."
    public = set(ast.literal_eval(listed[0]))
    unknown = public - top_level_names(tree)
    assert not unknown, f"{file}: __all__ lists names that the module does not have: {sorted(unknown)}"
    defined = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != "_"}
    assert not defined - public, f"{file}: list in __all__ or start with an underscore: {sorted(defined - public)}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: a build leaves files in its source tree, and files of older builds must not count."""
    copy = tmp_path_factory.mktemp("source") / "qc"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "demo", "site", "*.egg-info")
    )
    return copy


def build(source: Path, kind: str, out: Path) -> Path:
    """Builds a wheel or an sdist, without network; returns the file."""
    script = f"import sys, setuptools.build_meta as b; b.build_{kind}(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, out], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return next(out.iterdir())


@pytest.mark.slow
def test_the_wheel_holds_every_module_and_recipe_and_no_test(source: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build(source, "wheel", tmp_path)) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    recipes = {f"qc/recipes/{file.name}" for file in (ROOT / "qc" / "recipes").glob("*.yaml")}
    sources = [*(ROOT / "backends/tvm/host").glob("*.[ch]"), *(ROOT / "backends/tvm/host").glob("*.mjs")]
    host = {f"qc/backends/tvm/host/{file.name}" for file in sources}
    kits = {
        f"qc/{file.relative_to(ROOT).as_posix()}"
        for file in (ROOT / "backends/kits").rglob("*")
        if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert files == {installed for _, installed in modules()} | recipes | host | kits, (
        "Is a package missing in pyproject.toml?"
    )


@pytest.mark.slow
def test_the_source_distribution_holds_tests_documentation_and_the_built_in_model(source: Path, tmp_path: Path) -> None:
    with tarfile.open(build(source, "sdist", tmp_path)) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    folders = [*FOLDERS, "tests", "docs", "examples"]
    wanted = {
        file.relative_to(source).as_posix()
        for folder in folders
        for file in (source / folder).rglob("*")
        if file.is_file()
    }
    assert not wanted - files, "Is a pattern missing in MANIFEST.in?"
