"""Small inputs that a model accepts, made from its signature: what verification runs on when the user gives nothing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from qc.ir.model import Model, Port

__all__ = ["index_bound", "probe_inputs"]

_SIZES = {"prefill": {"batch": 2, "seq": 7, "past": 0}, "decode": {"batch": 1, "seq": 1, "past": 5}}
_OTHER_SIZE = 3
_INDEX_OPS = frozenset({"Gather", "GatherBlockQuantized"})
_TRANSPARENT = frozenset({"Cast", "Reshape", "Identity", "Unsqueeze", "Squeeze", "Flatten"})


def probe_inputs(model: Model, seed: int = 0, sizes: Mapping[str, int] | None = None) -> list[dict[str, np.ndarray]]:
    """Makes probe batches: for a decoder a prefill of two rows and one decode step on a cache, else one batch.

    Token ids are uniform below the size of the table that they index; masks are all ones, except that an encoder's last
    row is padded at its end; images and caches are standard normal.

    Args:
        model: The model.
        seed: Seed of all random values.
        sizes: Sizes of symbolic dimensions by name; overrides the built-in ones.
    """
    kinds = ("prefill", "decode") if model.signature.is_decoder else ("prefill",)
    batches = []
    for number, kind in enumerate(kinds):
        rng = np.random.default_rng([seed, number])
        dims = dict(_SIZES[kind]) | dict(sizes or {})
        dims.setdefault("total", dims["past"] + dims["seq"])
        batches.append({p.name: _array(model, p, dims, rng) for p in model.signature.inputs})
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


def _array(model: Model, port: Port, dims: Mapping[str, int], rng: np.random.Generator) -> np.ndarray:
    shape = tuple(d if isinstance(d, int) else dims.get(str(d), _OTHER_SIZE) for d in port.shape)
    dtype = port.dtype.numpy()
    decoder = model.signature.is_decoder
    match port.role:
        case "mask" | "decoder_mask":
            mask = np.ones(shape, dtype)
            if not decoder and shape[0] > 1 and shape[-1] > 2:
                mask[-1, -2:] = 0
            return mask
        case "positions":
            return np.broadcast_to(np.arange(shape[-1]) + dims["past"], shape).astype(dtype)
        case "token_types":
            return np.zeros(shape, dtype)
    if dtype.kind in "iu":
        bound = index_bound(model, port.name)
        return rng.integers(0, bound if bound is not None else 2, shape).astype(dtype)
    if dtype.kind == "b":
        return np.ones(shape, dtype)
    return rng.standard_normal(shape).astype(dtype)
