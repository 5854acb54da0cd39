"""Named recipes: a paper, or a common choice, as a list of passes with options in a YAML file."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from qc.ir.errors import InputError

__all__ = ["Recipe", "load_recipe", "recipe_names"]

_KEYS = {"about", "source", "passes"}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe as written.

    Attributes:
        name: File name without its suffix.
        about: One line for the listing.
        source: The paper, if any.
        passes: Entries as `qc.passes.pipeline.steps_of` reads them.
    """

    name: str
    about: str
    source: str
    passes: Sequence[dict[str, dict[str, object]] | str]

    def with_options(self, settings: Sequence[str]) -> Recipe:
        """Returns the recipe with ``pass.option=value`` settings applied.

        Raises:
            InputError: If a setting is malformed or names a pass that the recipe does not have.
        """
        entries = copy.deepcopy([{e: {}} if isinstance(e, str) else e for e in self.passes])
        for setting in settings:
            target, equals, value = setting.partition("=")
            name, dot, option = target.partition(".")
            if not (equals and dot and option):
                raise InputError(f"Expected --set pass.option=value, found {setting!r}.")
            matches = [e for e in entries if name in e]
            if not matches:
                names = ", ".join(k for e in entries for k in e) or "none"
                raise InputError(f"Recipe {self.name} has no pass {name!r} for --set {setting}. Its passes: {names}.")
            for entry in matches:
                entry[name] = {**(entry[name] or {}), option: value}
        return dataclasses.replace(self, passes=entries)


def recipe_names() -> list[str]:
    """Names of the recipes that come with qc."""
    return sorted(f.name.removesuffix(".yaml") for f in resources.files(__name__).iterdir() if f.name.endswith(".yaml"))


def load_recipe(name: str) -> Recipe:
    """Reads a recipe by name, or from a ``.yaml`` file.

    Raises:
        InputError: If there is no such recipe, or the file is not one.
    """
    import yaml

    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise InputError(f"Expected a recipe file at {path}, found none. `qc recipes` lists the named ones.")
        try:
            text, title = path.read_text(encoding="utf-8"), path.stem
        except UnicodeDecodeError as error:
            raise InputError(f"Expected a recipe in UTF-8 at {path}, found other bytes ({error}).") from error
    elif name in recipe_names():
        text, title = resources.files(__name__).joinpath(f"{name}.yaml").read_text(encoding="utf-8"), name
    else:
        raise InputError(
            f"Expected a recipe among {', '.join(recipe_names())}, or a .yaml file; found {name!r}. "
            "`qc recipes` describes them."
        )
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"Recipe {name} is not valid YAML: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("passes"), list) or set(data) - _KEYS:
        raise InputError(f"Expected a recipe with the keys {', '.join(sorted(_KEYS))} in {name}, passes being a list.")
    return Recipe(title, str(data.get("about", "")), str(data.get("source", "")), data["passes"])
