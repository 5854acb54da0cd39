"""Small inputs that a model accepts, made from its signature: what verification runs on when the user gives nothing.

A signature does not say everything: an image size may be open and yet decide whether a matrix fits, an integer may be a
shape. So inputs are tried (`find_inputs`), and a model for which none is found is not verified in numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir.model import ANY_SHAPE, Model, Port, Signature
from qc.ir.simplify import RANDOM_OPS, all_graphs

__all__ = ["Found", "continues_cache", "find_inputs", "index_bound", "probe_inputs", "run_in_turn"]

Batch = dict[str, np.ndarray]

_SIZES = {"prefill": {"batch": 2, "seq": 7, "past": 0}, "decode": {"batch": 1, "seq": 1, "past": 5}}
_OTHER_SIZES = (3, 1, 2, 4, 8, 16, 32, 64, 224)
"""Sizes to try for axes of no known meaning; the larger ones are those of images."""

_PLAIN_DOMAINS = frozenset({"", "qc", "com.microsoft", "ai.onnx.ml"})
_INDEX_OPS = frozenset({"Gather", "GatherBlockQuantized"})
_TRANSPARENT = frozenset({"Cast", "Reshape", "Identity", "Unsqueeze", "Squeeze", "Flatten"})


@dataclasses.dataclass(frozen=True)
class Found:
    """Inputs that a model runs on.

    Attributes:
        batches: The inputs; none if nothing that was tried runs.
        outputs: What the model yields on each, run in turn.
        obstacle: Why there are none: a sentence without its period; empty if there are.
    """

    batches: Sequence[Batch] = ()
    outputs: Sequence[Batch] = ()
    obstacle: str = ""


def find_inputs(
    model: Model, run: Callable[[Batch], Batch], seed: int = 0, sizes: Mapping[str, int] | None = None
) -> Found:
    """Tries inputs until the model runs on them.

    Args:
        model: The model.
        run: Runs it; raises where it does not.
        seed: Seed of all random values.
        sizes: As in `probe_inputs`; tried first.
    """
    obstacle = ""
    for batches in _candidates(model, seed, sizes):
        try:
            outputs = run_in_turn(run, model.signature, batches)
            if _draws(model) and not _equal(outputs, run_in_turn(run, model.signature, batches)):
                return Found(obstacle="it draws random numbers, so that no two runs agree")
        except Exception as error:  # noqa: BLE001  whatever the runtime raises, these inputs are none
            obstacle = obstacle or f"it runs on no input that was tried ({str(error).splitlines()[0]})"
            continue
        return Found(batches, outputs)
    return Found(obstacle=obstacle)


def run_in_turn(run: Callable[[Batch], Batch], signature: Signature, batches: Sequence[Mapping]) -> list[Batch]:
    """Runs batches one after the other. What a model writes into a cache in one, it reads in the next.

    A batch that brings a cache of its own gets the beginning of the one written before it, as many rows and positions
    as it brings, where that is long enough. So two models can be compared that mean different things by what their
    caches hold.
    """
    outputs: list[Batch] = []
    for batch in batches:
        own = _continued(signature, batch, outputs[-1] if outputs else {})
        outputs.append(run({**batch, **(own or {})}))
    return outputs


def continues_cache(signature: Signature, batch: Mapping, written: Mapping) -> bool:
    """Whether `written`, the outputs of the batch before, hold all that `batch` brings in caches."""
    return _continued(signature, batch, written) is not None


def _continued(signature: Signature, batch: Mapping, written: Mapping) -> Batch | None:
    """What takes the place of the caches of a batch, or None if not all of it was written."""
    own: Batch = {}
    for past, present in signature.caches:
        brought, held = batch.get(past.name), written.get(present.name)
        if brought is None or brought.size == 0:
            continue
        if held is None or held.ndim != brought.ndim or any(np.less(held.shape, brought.shape)):
            return None
        own[past.name] = np.ascontiguousarray(held[tuple(map(slice, brought.shape))])
    return own


def probe_inputs(
    model: Model,
    seed: int = 0,
    sizes: Mapping[str, int] | None = None,
    *,
    other: int = _OTHER_SIZES[0],
    ones: bool = False,
) -> list[Batch]:
    """Makes probe batches: for a decoder a prefill of two rows and one decode step on a cache, else one batch.

    Token ids are uniform below the size of the table that they index; masks are all ones, except that an encoder's last
    row is padded at its end; images and caches are standard normal.

    Args:
        model: The model.
        seed: Seed of all random values.
        sizes: Sizes of symbolic dimensions by name; overrides the built-in ones.
        other: Size of axes of no known meaning.
        ones: Whether integers of no known meaning are all one, which as a shape fits nearly everything.
    """
    kinds = ("prefill", "decode") if model.signature.is_decoder else ("prefill",)
    batches = []
    for number, kind in enumerate(kinds):
        rng = np.random.default_rng([seed, number])
        dims = dict(_SIZES[kind]) | dict(sizes or {})
        dims.setdefault("total", dims["past"] + dims["seq"])
        dims[""] = other
        batches.append({p.name: _value(model, p, dims, rng, ones) for p in model.signature.inputs})
    return batches


def index_bound(model: ir.Model, name: str) -> int | None:
    """The number of rows of the smallest constant table that is indexed by that input, or None if none is."""
    value = next((v for v in model.graph.inputs if v.name == name), None)
    pending, seen, bound = [value], set(), None
    while pending:
        value = pending.pop()
        if value is None or value in seen:
            continue
        seen.add(value)
        for node, slot in value.uses():
            if node.op_type in _INDEX_OPS and slot == 1 and node.inputs[0] is not None:
                axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
                axis = node.attributes["gather_axis"].as_int() if "gather_axis" in node.attributes else axis
                shape = node.inputs[0].shape
                rows = shape[axis] if shape is not None and shape.rank() > axis else None
                if isinstance(rows, int) and rows > 1:
                    bound = rows if bound is None else min(bound, rows)
            elif node.op_type in _TRANSPARENT and slot == 0:
                pending.extend(node.outputs)
    return bound


def _candidates(model: Model, seed: int, sizes: Mapping[str, int] | None) -> Iterator[list[Batch]]:
    open_axes = any(not isinstance(d, int) for p in model.signature.inputs for d in p.shape)
    integers = any(p.role == "other" and p.dtype.is_integer() for p in model.signature.inputs)
    if sizes is not None:
        yield probe_inputs(model, seed, sizes)
    for ones in (False, True) if integers else (False,):
        for other in _OTHER_SIZES if open_axes else _OTHER_SIZES[:1]:
            yield probe_inputs(model, seed, other=other, ones=ones)


def _draws(model: Model) -> bool:
    """Whether two runs may differ: random operators, or foreign ones, which may be random."""
    nodes = (node for graph in all_graphs(model) for node in graph)
    return any(
        n.op_type in RANDOM_OPS or (n.domain not in _PLAIN_DOMAINS and n.op_identifier() not in model.functions)
        for n in nodes
    )


def _equal(first: Sequence[Batch], second: Sequence[Batch]) -> bool:
    return all(
        np.array_equal(value, b[name], equal_nan=value.dtype.kind == "f")
        for a, b in zip(first, second, strict=True)
        for name, value in a.items()
    )


def _value(
    model: Model, port: Port, dims: Mapping[str, int], rng: np.random.Generator, ones: bool
) -> np.ndarray | list[np.ndarray]:
    if port.kind == "sequence":
        return [_array(model, port, dims, rng, ones) for _ in range(2)]
    return _array(model, port, dims, rng, ones)


def _array(model: Model, port: Port, dims: Mapping[str, int], rng: np.random.Generator, ones: bool) -> np.ndarray:
    known = port.shape if port.shape != ANY_SHAPE else (None, None)  # most things are matrices
    shape = tuple(d if isinstance(d, int) else dims.get(str(d), dims[""]) for d in known)
    if port.dtype == ir.DataType.STRING:
        return rng.choice(np.array(["a", "few", "Words"], object), shape)
    dtype = port.dtype.numpy()
    match port.role:
        case "mask" | "decoder_mask":
            mask = np.ones(shape, dtype)
            if shape[0] > 1 and shape[-1] > 2 and not model.signature.is_decoder:
                mask[-1, -2:] = 0
            return mask
        case "positions":
            return np.broadcast_to(np.arange(shape[-1]) + dims["past"], shape).astype(dtype)
        case "token_types":
            return np.zeros(shape, dtype)
    if dtype.kind in "iu":
        bound = index_bound(model, port.name)
        if bound is None and ones:
            return np.ones(shape, dtype)
        return rng.integers(0, bound if bound is not None else 2, shape).astype(dtype)
    if dtype.kind == "b":
        return np.ones(shape, dtype)
    return rng.standard_normal(shape).astype(dtype)
