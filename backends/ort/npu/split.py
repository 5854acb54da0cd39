"""Cuts a lowered model in two: what runs beside the NPU, and what runs on it at fixed shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.backends.ort.npu.fitting import PAST, Fitting
from qc.backends.ort.npu.outside import outside_values
from qc.backends.ort.npu.shapes import Dimensions, GraphSizes
from qc.ir.errors import UnsupportedError
from qc.ir.model import Model, Signature, port_of
from qc.ir.simplify import infer_shapes
from qc.passes.canonicalize._graph import add_constant, drop_unused, made_by, stored

__all__ = ["cache_grids", "inside", "outside"]

_ROUNDING = ("QuantizeLinear", "DequantizeLinear")
_LOOKING_UP = ("Gather", "GatherBlockQuantized")
_HOLDING = (*_ROUNDING, "Cast")
"""Operators between what a cache holds and what the model yields."""


def outside(model: Model, dimensions: Dimensions, graphs: Sequence[GraphSizes]) -> Model | None:
    """The graph beside the NPU: masks and positions from the inputs; None if there is nothing.

    They are computed at the true lengths, and padded to the fixed shapes. Lengths that come from the cache, or from
    activations, come from the token ids and `PAST` instead. The model is unchanged.

    Args:
        model: A lowered model.
        dimensions: What its symbolic dimensions mean.
        graphs: The sizes of the inner graphs.
    """
    held = Model.of(model.clone())
    graph, signature = held.graph, held.signature
    made = outside_values(graph)
    if not made:
        return None
    past = ir.Value(name=PAST, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([1]))
    lengths = _Lengths(graph, signature, past)
    needed = _upstream(made)
    for node in needed:
        if node.op_type == "Shape" and not _tells_length(node.inputs[0], signature):
            node.outputs[0].replace_all_uses_with(lengths.of(node))
    fitting = Fitting(graph, past, graphs[0].past, [g.new for g in graphs])
    fitted = [fitting.fitted(v, dimensions.of(port_of(v).shape, str(v.name))) for v in made]
    graph.outputs.clear()
    graph.outputs.extend(fitted)
    drop_unused(held)
    used = [v for v in graph.inputs if v.uses()]
    graph.inputs.clear()
    graph.inputs.extend(used + [v for v in (past, fitting.length) if v.uses() and v.name not in graph.initializers])
    return held


def _upstream(values: list[ir.Value]) -> list[ir.Node]:
    found: dict[ir.Node, None] = {}
    pending = list(values)
    while pending:
        node = pending.pop().producer()
        if node is not None and node not in found:
            found[node] = None
            pending.extend(v for v in node.inputs if v is not None)
    return list(found)


def _tells_length(value: ir.Value, signature: Signature) -> bool:
    """Whether the shape of a value may be asked for beside the NPU: it is no activation and no cache."""
    return value.is_graph_input() and not value.metadata_props.get("qc.role", "").startswith("past_")


class _Lengths:
    """Writes the shape of an activation in terms of inputs that the outer graph has."""

    def __init__(self, graph: ir.Graph, signature: Signature, past: ir.Value) -> None:
        self._graph, self._past = graph, past
        tokens = next((v for v in graph.inputs if v.metadata_props.get("qc.role") == "tokens"), None)
        self._known: dict[str, ir.Value] = {}
        if tokens is not None and tokens.shape is not None and tokens.shape.rank() == 2:
            for axis, dim in enumerate(tokens.shape):
                if not isinstance(dim, int):
                    size = ir.node("Shape", [tokens], {"start": axis, "end": axis + 1})
                    self._insert(size, f"{tokens.name}.size_{axis}")
                    self._known[_spell(dim)] = size.outputs[0]
        new = _spell(tokens.shape[1]) if tokens is not None and tokens.shape is not None else ""
        for key, value in signature.caches:
            self._known.setdefault(str(key.shape[2]), past)
            if str(value.shape[2]) not in self._known and new in self._known:
                total = ir.node("Add", [self._known[new], past])
                self._insert(total, "total_length")
                self._known[str(value.shape[2])] = total.outputs[0]

    def of(self, node: ir.Node) -> ir.Value:
        """What a ``Shape`` node yields."""
        shape = node.inputs[0].shape
        if shape is None:
            raise _unknown(node)
        start, end = (
            node.attributes[k].as_int() if k in node.attributes else d for k, d in (("start", 0), ("end", None))
        )
        parts = [self._dim(d, node) for d in list(shape)[start:end]]
        joined = ir.node("Concat", parts, {"axis": 0})
        joined.outputs[0].name, joined.outputs[0].dtype = f"{node.outputs[0].name}.lengths", ir.DataType.INT64
        self._graph.insert_before(node, joined)
        return joined.outputs[0]

    def _dim(self, dim: int | ir.SymbolicDim, node: ir.Node) -> ir.Value:
        if isinstance(dim, int):
            return add_constant(self._graph, f"size_{dim}", ir.tensor(np.array([dim], np.int64)))
        found = self._known.get(_spell(dim))
        if found is None:
            raise _unknown(node)
        return found

    def _insert(self, node: ir.Node, name: str) -> None:
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.INT64)
        node.outputs[0].shape = ir.Shape([1])
        self._graph.insert_before(self._graph[0], node) if node.op_type == "Shape" else self._graph.insert_after(
            self._known[next(iter(self._known))].producer(), node
        )


def _spell(dim: ir.SymbolicDim) -> str:
    return str(dim.value)


def _unknown(node: ir.Node) -> UnsupportedError:
    return UnsupportedError(
        f"A mask depends on the shape of {node.inputs[0].name!r}, {node.inputs[0].shape}, which neither token ids nor "
        "the length of the cache tell. Compile for another target."
    )


def inside(model: Model, sizes: Mapping[str, int]) -> Model:
    """The graph on the NPU, at fixed shapes; the model is unchanged.

    * What is computed beside the NPU is an input, and tokens are int32.
    * A cache goes in as it is held inside, as codes or floats, and the new positions come out: the caller puts them
      behind the old ones.
    * Everything that depends on shapes alone is a constant.

    Args:
        model: A lowered model.
        sizes: The size of each symbolic dimension of an input, by its spelling; others are an error.

    Raises:
        UnsupportedError: If a shape stays open.
    """
    held = Model.of(model.clone())
    graph, signature = held.graph, held.signature
    for value in outside_values(graph):
        _cut(graph, value)
    pasts = {p.name: q.name for p, q in signature.caches}
    named = {v.name: v for v in (*graph.inputs, *graph.outputs)}
    for past, present in pasts.items():
        _cut_cache(graph, named[past], named[present])
    drop_unused(held)
    used = [v for v in graph.inputs if v.uses()]
    graph.inputs.clear()
    graph.inputs.extend(used)
    for value in graph.inputs:
        value.shape = ir.Shape([_size(d, value, sizes) for d in value.shape])
        if value.dtype == ir.DataType.INT64:
            _narrow(graph, value)
    _fix(held)
    return held


def _size(dim: int | ir.SymbolicDim, value: ir.Value, sizes: Mapping[str, int]) -> int:
    size = dim if isinstance(dim, int) else sizes.get(_spell(dim))
    if size is None:
        raise UnsupportedError(
            f"Expected fixed shapes for an NPU, found the size {_spell(dim)!r} of input {value.name!r} open. Say it: "
            f"--target ort-npu:qnn,{_spell(dim)}=SIZE."
        )
    return size


def _cut(graph: ir.Graph, value: ir.Value) -> None:
    """Makes a value an input."""
    new = ir.Value(name=f"{value.name}", type=value.type, shape=value.shape)
    value.name = f"{value.name}.outside"
    value.replace_all_uses_with(new)
    graph.inputs.append(new)


def _cache_ends(past: ir.Value, present: ir.Value) -> tuple[ir.Value, ir.Value]:
    """What a cache holds inside (codes, halves, or the input itself), and the new positions behind it.

    Raises:
        UnsupportedError: If the cache is not simply appended to.
    """
    joined = present.producer()
    while joined is not None and joined.op_type in _HOLDING:
        joined = joined.inputs[0].producer()
    readers = [u.node for u in past.uses() if u.node.op_type != "Shape"]
    held, decoded = past, past
    if [n.op_type for n in readers] == ["QuantizeLinear"]:
        held = readers[0].outputs[0]
        decoded = held.uses()[0].node.outputs[0]
    elif [n.op_type for n in readers] == ["Cast"]:
        held = decoded = readers[0].outputs[0]
    if joined is None or joined.op_type != "Concat" or joined.inputs[0] is not decoded or len(joined.inputs) != 2:
        raise UnsupportedError(
            f"Expected a cache that new positions are appended to, found another use of {past.name!r}. Compile for "
            "another target."
        )
    new = made_by(joined.inputs[1], "DequantizeLinear") if decoded is not held else None
    return held, new.inputs[0] if new is not None else joined.inputs[1]


def _cut_cache(graph: ir.Graph, past: ir.Value, present: ir.Value) -> None:
    """Turns a cache's input into what it holds inside, and its output into the new positions."""
    inner, new = _cache_ends(past, present)
    held = ir.Value(name=past.name, type=inner.type, shape=past.shape)
    held.metadata_props.update(past.metadata_props)
    past.name = f"{past.name}.exact"
    inner.replace_all_uses_with(held)
    past.replace_all_uses_with(held)  # what asks for its shape
    inputs, outputs = graph.inputs, graph.outputs
    place = [v is past for v in inputs].index(True)
    inputs[place] = held
    new.metadata_props.update(present.metadata_props)
    name, present.name = present.name, f"{present.name}.whole"
    new.name = name
    outputs[[v is present for v in outputs].index(True)] = new


def _narrow(graph: ir.Graph, value: ir.Value) -> None:
    """Makes an input of token ids int32, which is what NPUs index with."""
    value.type = ir.TensorType(ir.DataType.INT32)  # not in place: copies of a graph share types
    others = [u for u in value.uses() if not (u.node.op_type in _LOOKING_UP and u.idx == 1)]
    if not others:
        return
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.INT64)})
    out = cast.outputs[0]
    out.name, out.type, out.shape = f"{value.name}.wide", ir.TensorType(ir.DataType.INT64), value.shape
    graph.insert_before(graph[0], cast)
    for use in others:
        use.node.replace_input_with(use.idx, out)


def _fix(model: Model) -> None:
    """Infers all shapes from those of the inputs, and turns what depends on nothing else into constants."""
    import logging

    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants_ir

    logging.getLogger("onnxscript.optimizer._constant_folding").setLevel(logging.ERROR)
    rows = {n: n.outputs[0].shape[-1] for n in model.graph if n.op_type == "GatherBlockQuantized"}
    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    for value in model.graph.outputs:
        value.shape = None
    common.LiftConstantsToInitializersPass()(model)

    def should_fold(node: ir.Node) -> bool | None:
        return False if node.op_type in _ROUNDING else None

    for _ in range(4):
        infer_shapes(model)
        for node, width in rows.items():  # which no schema of ONNX tells
            index = stored(node.inputs[1]) or node.inputs[1]
            node.outputs[0].shape = ir.Shape([*index.shape, width])
        modified = fold_constants_ir(
            model, onnx_shape_inference=False, output_size_limit=8192, should_fold=should_fold
        ).modified
        modified |= _fold_look_ups(model)
        drop_unused(model)
        if not modified:
            break
    infer_shapes(model)


def _fold_look_ups(model: Model) -> bool:
    """``QuantizeLinear(Gather(DequantizeLinear(table), constant))`` on one grid -> the codes of the rows."""
    changed = False
    for node in tuple(model.graph):
        index = stored(node.inputs[1]) if node.op_type == "Gather" and node.domain == "" else None
        decode = made_by(node.inputs[0], "DequantizeLinear") if index is not None else None
        codes = stored(decode.inputs[0]) if decode is not None else None
        readers = [u.node for u in node.outputs[0].uses()]
        if (
            codes is None
            or decode.inputs[1].const_value.size != 1
            or [r.op_type for r in readers] != ["QuantizeLinear"]
        ):
            continue
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        rows = np.take(codes.numpy(), index.numpy(), axis)
        held = add_constant(model.graph, f"{node.outputs[0].name}.codes", ir.tensor(rows))
        readers[0].outputs[0].replace_all_uses_with(held)
        changed = True
    return changed


def cache_grids(model: Model) -> dict[str, dict[str, object]]:
    """What each cache holds by the name of its input, with the name of the output that the new positions come in.

    Codes have ``scale`` and ``zero_point``, floats have none.
    """
    found: dict[str, dict[str, object]] = {}
    named = {v.name: v for v in (*model.graph.inputs, *model.graph.outputs)}
    for past, present in model.signature.caches:
        held, _ = _cache_ends(named[past.name], named[present.name])
        facts: dict[str, object] = {"present": present.name, "dtype": held.dtype.numpy().name}
        quantize = made_by(held, "QuantizeLinear")
        if quantize is not None:
            scale, zero = (stored(v) for v in quantize.inputs[1:])
            facts |= {"scale": float(scale.numpy()), "zero_point": int(zero.numpy())}
        found[past.name] = facts
    return found
