"""Makes the reference pages from the code: an mkdocs hook. `cli.md` is what `--help` prints, `api/` the docstrings."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"qc": "qc", "ir": "qc.ir", "passes": "qc.passes", "frontend": "qc.frontend", "backends": "qc.backends"}

_INCLUDED = re.compile(r'^--8<-- "(\w+\.md)"$', re.MULTILINE)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the pages of recipes and the API pages to the navigation, the latter one group per folder."""
    recipes = [{name.stem: f"recipes/{name.name}"} for name in sorted((ROOT / "docs" / "recipes").glob("*.md"))]
    api = [{package: [{m: f"api/{m}.md"} for m in _modules(folder)]} for folder, package in FOLDERS.items()]
    config.nav = [*(config.nav or []), {"Each recipe": recipes}, {"API": api}]
    return config


def on_page_markdown(markdown: str, **_: object) -> str:
    """Includes a page that stands at the top of the checkout, with its links made right within the site."""
    return _INCLUDED.sub(lambda m: (ROOT / m[1]).read_text("utf-8").replace("](docs/", "]("), markdown)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages."""
    files.append(File.generated(config, "cli.md", content=_command_line()))
    for folder in FOLDERS:
        for module in _modules(folder):
            files.append(File.generated(config, f"api/{module}.md", content=f"# `{module}`\n\n::: {module}\n"))
    return files


def _modules(folder: str) -> list[str]:
    """Import names of the public modules in a folder of the checkout."""
    names = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        parts = file.relative_to(ROOT / folder).with_suffix("").parts
        if not any(p.startswith("_") for p in parts) and not parts[-1].endswith(("_test", "conftest")):
            names.append(".".join((FOLDERS[folder], *parts)))
    return names


def _command_line() -> str:
    os.environ["COLUMNS"] = "100"  # argparse wraps to the terminal; the page must not depend on it
    from qc.cli import build_parser

    pages = [f"## `{name}`\n\n```text\n{parser.format_help()}```\n" for name, parser in _parsers(build_parser())]
    return "# Command line\n\n" + "\n".join(pages)


def _parsers(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Yields a parser and the parsers of its commands, with the words that reach them."""
    yield parser.prog, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in dict.fromkeys(action.choices.values()):
                yield from _parsers(child)
