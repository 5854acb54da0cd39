"""What the documentation shows must work."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx_ir as ir
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"qc": "qc", "ir": "qc.ir", "passes": "qc.passes", "frontend": "qc.frontend", "backends": "qc.backends"}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("drop_unit_scale", ROOT / "docs" / "examples" / "drop_unit_scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def scaled(factor: np.ndarray) -> ir.Model:
    """``y = Relu(x * factor)``."""
    graph = "<ir_version: 10, opset_import: ['' : 23]> g (float[3] x) => (float[3] y) { z = Mul (x, f) y = Relu (z) }"
    model = ir.from_onnx_text(graph.replace("'", '"'))
    value = ir.Value(name="f", const_value=ir.tensor(factor))
    next(iter(model.graph)).replace_input_with(1, value)
    model.graph.register_initializer(value)
    return model


def test_the_example_pass_drops_a_scale_of_one_and_then_finds_nothing(example: ModuleType) -> None:
    from qc.passes.manager import PassManager

    model, (report,) = PassManager([example.DropUnitScale()]).run(scaled(np.float32(1.0)))
    assert report.modified
    assert [node.op_type for node in model.graph] == ["Relu"]
    assert not example.DropUnitScale()(model).modified


@pytest.mark.parametrize(("factor", "reason"), [(np.float32(2), "is not one"), (np.ones(1, np.float32), "has axes")])
def test_the_example_pass_says_why_it_declines(example: ModuleType, factor: np.ndarray, reason: str) -> None:
    model = scaled(factor)
    result = example.DropUnitScale()(model)
    assert not result.modified
    assert reason in result.sites[0].reason
    assert [node.op_type for node in model.graph] == ["Mul", "Relu"]


def with_examples() -> list[str]:
    """Import names of the modules whose docstrings hold examples."""
    names = []
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            if not file.stem.endswith(("_test", "conftest")) and ">>> " in file.read_text(encoding="utf-8"):
                parts = [p for p in file.relative_to(ROOT / folder).with_suffix("").parts if p != "__init__"]
                names.append(".".join([package, *parts]))
    return names


@pytest.mark.parametrize("module", with_examples())
def test_the_examples_in_docstrings_are_true(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def snippets(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_link_in_the_repository_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not missing


def test_the_page_on_json_names_every_command_and_every_figure_of_an_evaluation() -> None:
    from qc.backends.evaluate import KEYS
    from qc.cli.parser import build_parser

    page = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    commands = next(a.choices for a in build_parser()._actions if isinstance(a.choices, dict))
    assert [name for name in commands if f"`qc {name}`" not in page] == []
    assert [key for key in KEYS if f"`{key}`" not in page] == []


def test_the_page_on_artifacts_names_every_key_of_a_manifest() -> None:
    from qc.backends.manifest import Manifest

    page = (ROOT / "docs" / "artifacts.md").read_text(encoding="utf-8")
    assert [f.name for f in dataclasses.fields(Manifest) if f"`{f.name}`" not in page] == []


def test_every_recipe_has_a_page_with_its_source_and_what_differs() -> None:
    from qc.recipes import load_recipe, recipe_names

    pages = {file.stem: file.read_text(encoding="utf-8") for file in (ROOT / "docs" / "recipes").glob("*.md")}
    assert sorted(pages) == recipe_names()
    listing = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name, page in pages.items():
        assert page.startswith(f"# `{name}`\n"), name
        assert f'"qc/recipes/{name}.yaml"' in page, name
        assert "**Source.**" in page, name
        assert "## What differs" in page, name
        papers = re.findall(r"\d{4}\.\d{5}", load_recipe(name).source)
        assert [paper for paper in papers if f"arxiv.org/abs/{paper}" not in page] == [], name
        assert f"(recipes/{name}.md)" in listing, name


@pytest.mark.parametrize("name", ["quantize-weights", "quantize-activations", "allocate"])
def test_the_page_on_recipes_names_every_option(name: str) -> None:
    from qc.passes.pipeline import options_of, pass_class

    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [option for option in options_of(pass_class(name)) if f"`{option}`" not in page] == []


@pytest.mark.slow
def test_the_python_of_the_readme_and_of_the_page_on_artifacts_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for text in (*snippets("README.md"), *snippets("docs/artifacts.md")):
        if "onnxruntime_genai" in text and importlib.util.find_spec("onnxruntime_genai") is None:
            continue
        exec(text, names)
