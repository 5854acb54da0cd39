"""Pipelines: one meaning, two spellings. A string (``a,b{x=1}``) and recipe data both become `Step` objects.

Both spellings come from the dataclass fields of the passes, so neither can know an option that the pass has not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Callable, Mapping, Sequence

from qc.ir.errors import InputError
from qc.passes.base import Pass

__all__ = [
    "Step",
    "build_pass",
    "format_pipeline",
    "options_of",
    "parse_pipeline",
    "pass_class",
    "pass_names",
    "steps_of",
]


@dataclasses.dataclass(frozen=True)
class Step:
    """A pass in a pipeline.

    Attributes:
        action: The pass.
        optional: Whether it may match nothing. A pass that a recipe asks for must find something to do otherwise.
    """

    action: Pass
    optional: bool = False

    def __str__(self) -> str:
        options = {
            k: v for k, v in dataclasses.asdict(self.action).items() if v != options_of(type(self.action))[k].default
        }
        if self.optional:
            options["optional"] = True
        inner = ",".join(f"{k.replace('_', '-')}={_spell(v)}" for k, v in options.items())
        return self.action.spec_name() + (f"{{{inner}}}" if inner else "")


def _quantize_weights() -> type[Pass]:
    from qc.passes.quantize.weights import QuantizeWeights

    return QuantizeWeights


def _quantize_activations() -> type[Pass]:
    from qc.passes.quantize.activations import QuantizeActivations

    return QuantizeActivations


def _allocate() -> type[Pass]:
    from qc.passes.allocate.allocate import Allocate

    return Allocate


def _smooth() -> type[Pass]:
    from qc.passes.transform.smooth import Smooth

    return Smooth


def _awq() -> type[Pass]:
    from qc.passes.transform.awq import Awq

    return Awq


def _rotate() -> type[Pass]:
    from qc.passes.transform.rotate import Rotate

    return Rotate


def _equalize() -> type[Pass]:
    from qc.passes.transform.equalize import Equalize

    return Equalize


def _reassemble() -> type[Pass]:
    from qc.passes.transform.reassemble import Reassemble

    return Reassemble


def _smooth_percentile() -> type[Pass]:
    from qc.passes.transform.percentile import SmoothPercentile

    return SmoothPercentile


def _smooth_powers() -> type[Pass]:
    from qc.passes.transform.powers import SmoothPowers

    return SmoothPowers


def _outlier_tune() -> type[Pass]:
    from qc.passes.transform.outlier_tune import OutlierTune

    return OutlierTune


def _permute() -> type[Pass]:
    from qc.passes.transform.permute import PermuteChannels

    return PermuteChannels


def _tune() -> type[Pass]:
    from qc.passes.tune.learn import Tune

    return Tune


def _tune_network() -> type[Pass]:
    from qc.passes.tune.network import TuneNetwork

    return TuneNetwork


_REGISTRY: dict[str, Callable[[], type[Pass]]] = {
    "allocate": _allocate,
    "quantize-weights": _quantize_weights,
    "quantize-activations": _quantize_activations,
    "smooth": _smooth,
    "awq": _awq,
    "tune": _tune,
    "tune-network": _tune_network,
    "equalize": _equalize,
    "rotate": _rotate,
    "reassemble": _reassemble,
    "smooth-percentile": _smooth_percentile,
    "smooth-powers": _smooth_powers,
    "outlier-tune": _outlier_tune,
    "permute-channels": _permute,
}
"""The passes that a recipe may name; values import on call, so listing the names imports no pass."""


def pass_names() -> list[str]:
    """Names of all passes that pipelines and recipes may use."""
    return sorted(_REGISTRY)


def pass_class(name: str) -> type[Pass]:
    """Imports a pass by name.

    Raises:
        InputError: If there is no such pass.
    """
    if name not in _REGISTRY:
        raise InputError(
            f"Expected a pass among {', '.join(pass_names())}; found {name!r}. `qc passes` describes them."
        )
    return _REGISTRY[name]()


def options_of(cls: type[Pass]) -> dict[str, dataclasses.Field]:
    """The options of a pass: its dataclass fields by name."""
    return {f.name: f for f in dataclasses.fields(cls)}


def build_pass(name: str, options: Mapping[str, object]) -> Pass:
    """Builds a pass from its name and options; strings are converted to the field's type.

    Raises:
        InputError: If the pass or an option does not exist, or a value does not fit.
    """
    cls = pass_class(name)
    fields, hints = options_of(cls), typing.get_type_hints(cls)
    given = {}
    for key, value in options.items():
        field = key.replace("-", "_")
        if field not in fields:
            known = ", ".join(k.replace("_", "-") for k in fields) or "none"
            raise InputError(f"Pass {name} has no option {key!r}. Its options: {known}.")
        given[field] = _convert(value, hints[field], f"{name}.{key}")
    return cls(**given)


def steps_of(recipe: Sequence[Mapping[str, object] | str]) -> list[Step]:
    """Builds the steps of recipe data: a list of ``{pass-name: {option: value}}`` or bare names.

    Raises:
        InputError: If an entry is malformed; all entries are checked, and all errors reported together.
    """
    steps, problems = [], []
    for entry in recipe:
        try:
            steps.append(_step(entry))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError("\n".join(problems))
    return steps


def _step(entry: Mapping[str, object] | str) -> Step:
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise InputError(f"Expected one pass per entry, as `- name: {{option: value}}`; found {entry!r}.")
    ((name, options),) = entry.items()
    if not isinstance(options or {}, Mapping):
        raise InputError(f"Expected options of {name} as a mapping, found {options!r}.")
    options = dict(options or {})  # type: ignore[arg-type]
    optional = _convert(options.pop("optional", False), bool, f"{name}.optional")
    return Step(build_pass(name, options), bool(optional))


def parse_pipeline(text: str) -> list[Step]:
    """Reads ``name{option=value,option=value},name``, the spelling that `format_pipeline` writes.

    A comma inside a value is written within brackets: ``{a=[1,2]}``.

    Raises:
        InputError: If the text is malformed or names something unknown.
    """
    entries = []
    for item in _split(text):
        name, brace, rest = item.partition("{")
        if brace and not rest.endswith("}"):
            raise InputError(f"Expected a closing brace at the end of {item!r}.")
        options = {}
        for pair in _split(rest[:-1]) if brace else []:
            key, equals, value = pair.partition("=")
            if not equals:
                raise InputError(f"Expected option=value, found {pair!r} in {item!r}.")
            options[key.strip()] = value.strip()
        entries.append({name.strip(): options})
    return steps_of(entries)


def format_pipeline(steps: Sequence[Step]) -> str:
    """Writes steps as a string that `parse_pipeline` reads back; options at their default are left out."""
    return ",".join(str(step) for step in steps)


def _split(text: str) -> list[str]:
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "{[") - (char in "}]")
        if char == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    if depth != 0:
        raise InputError(f"Unbalanced braces in {text!r}.")
    return [p.strip() for p in parts if p.strip()]


_BOOLS = {"true": True, "false": False}
_WIDER = {float: (float, int)}
"""Types that are taken for another; any other value must have its field's very type, or be a string that spells it."""


def _convert(value: object, hint: object, where: str) -> object:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        kinds = typing.get_args(hint)
        if type(None) in kinds and (value is None or value in ("none", "null")):
            return None
        *others, last = (k for k in kinds if k is not type(None))
        for kind in others:
            with contextlib.suppress(InputError):
                return _convert(value, kind, where)
        hint = last
    if typing.get_origin(hint) is tuple:
        items = _split(value.strip("[]")) if isinstance(value, str) else value
        if not isinstance(items, Sequence):
            raise InputError(f"Expected a list for {where}, found {value!r}.")
        return tuple(_convert(i, typing.get_args(hint)[0], where) for i in items)
    try:
        if isinstance(value, str):
            return _BOOLS[value.lower()] if hint is bool else hint(value)  # type: ignore[operator]
        if type(value) not in _WIDER.get(hint, (hint,)):
            raise TypeError
        return hint(value)  # type: ignore[operator]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"Expected {getattr(hint, '__name__', hint)} for {where}, found {value!r}.") from error


def _spell(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ",".join(_spell(v) for v in value) + "]"
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
