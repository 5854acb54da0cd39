"""The readable form of a model, for people, diffs and tests; and the parser of ONNX's own syntax, for small graphs.

Two forms, because one cannot be both: `to_text` shows types, roles and blocks and leaves the weights out; `parse`
reads the textual syntax of ONNX (https://onnx.ai/onnx/repo-docs/Syntax.html), which has all of a small model in it.
That syntax has no function overloads, so a model of the ``qc`` dialect has no round trip through ONNX's printer;
`parse` supplies the functions of the dialect instead.
"""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import onnx_ir as ir

from qc.ir.blocks import Blocks
from qc.ir.dialect import DOMAIN, VERSION, sync_functions
from qc.ir.errors import InputError
from qc.ir.model import OPSET, Model, set_role
from qc.ir.simplify import infer_shapes

__all__ = ["diff", "parse", "to_text"]

_SHOWN_ELEMENTS = 8
"""Constants of up to so many elements are printed whole: shapes, axes, scalars."""


def to_text(model: ir.Model, *, blocks: Blocks | None = None, hashes: bool = False) -> str:
    """Prints a model: header, inputs and outputs with roles, one line per node, then its functions.

    ``%y: f32[batch,seq,8] = qc.Linear(%x, w: f32[8,4]) {alpha=1.0}``: values with ``%``, stored tensors without. The
    text depends only on the model: same names, same order, no addresses. Small constants are read and shown, weights
    are not read unless `hashes` is set.

    Args:
        model: The model.
        blocks: If given, a comment line marks the start of each segment, and nodes are in the order of the segments.
        hashes: Whether to print the first 8 hex digits of the SHA-256 of each weight; reads them one at a time.
    """
    return "\n".join(_Printer(hashes).model(model, blocks)) + "\n"


def diff(a: ir.Model, b: ir.Model, *, hashes: bool = False, context: int = 3) -> str:
    """Returns the unified diff of two models' texts; empty if they print alike.

    Args:
        a: The model before.
        b: The model after.
        hashes: Whether weights of equal type and shape but different content differ.
        context: Lines of context.
    """
    before, after = (to_text(m, hashes=hashes).splitlines(keepends=True) for m in (a, b))
    return "".join(difflib.unified_diff(before, after, "before", "after", n=context))


def parse(
    text: str, *, weights: Mapping[str, np.ndarray] | None = None, roles: Mapping[str, str] | None = None
) -> Model:
    """Reads a small model written in ONNX's textual syntax.

    Types of inner values are inferred. Functions of the ``qc`` dialect are not written: ``y = qc.Linear (x, w)`` or,
    with a bias, ``y = qc.Linear:bias (x, w, b)``.

    Args:
        text: A model, or just its graph ``name (float[N,4] x) => (float[N,2] y) {...}``; then the header is supplied:
            our default opset and the ``qc`` domain. ``#`` starts a comment.
        weights: Initializers by name, for those not written in the text.
        roles: Roles of inputs and outputs by name, e.g. ``{"ids": "tokens", "k0": "past_key.0"}``.

    Raises:
        InputError: If the text is not valid ONNX syntax, or a weight or role names no value of the graph.
    """
    import onnx.parser

    if not text.lstrip().startswith("<"):
        text = f'<ir_version: 10, opset_import: ["": {OPSET}, "{DOMAIN}": {VERSION}]>\n{text}'
    try:
        proto = onnx.parser.parse_model(text)
    except onnx.parser.ParseError as error:
        raise InputError(f"Expected a model in ONNX's textual syntax, found an error in it: {error}") from error
    for name, array in (weights or {}).items():
        proto.graph.initializer.append(ir.serde.serialize_tensor(ir.tensor(np.asarray(array), name=name)))
    model = Model.of(ir.serde.deserialize_model(proto))
    unread = sorted(name for name in weights or {} if not model.graph.initializers[name].uses())
    if unread:
        raise InputError(f"Expected weights that some node reads, found {unread}, which none does.")
    ports = {v.name: v for v in (*model.graph.inputs, *model.graph.outputs)}
    for name, role in (roles or {}).items():
        if name not in ports:
            raise InputError(f"Expected a role for one of {sorted(map(str, ports))}, found one for {name!r}.")
        set_role(ports[name], role)
    sync_functions(model)
    infer_shapes(model)
    return model


class _Printer:
    """Turns parts of a model into lines."""

    def __init__(self, hashes: bool) -> None:
        self._hashes = hashes

    def model(self, model: ir.Model, blocks: Blocks | None) -> Iterator[str]:
        opsets = ", ".join(f"{domain or 'onnx'} {version}" for domain, version in sorted(model.opset_imports.items()))
        yield f"model  ir {model.ir_version}, opset {opsets}"
        for key, value in sorted(model.metadata_props.items()):
            if key.startswith("qc."):
                yield f"fact   {key[3:]} = {value!r}"
        graph = model.graph
        for word, values in (("input ", graph.inputs), ("output", graph.outputs)):
            for value in values:
                yield f"{word} {self._typed(value)}  {value.metadata_props.get('qc.role', 'other')}"
        for value in graph.initializers.values():
            if not value.uses():
                yield f"unused {self._stored(value)}"
        yield "{"
        if blocks is None:
            yield from self._nodes(graph, "  ")
        else:
            for segment in blocks.segments:
                yield f"  # {segment.label}"
                yield from self._nodes(segment.nodes, "  ")
        yield "}"
        for key, function in sorted(model.functions.items()):
            inputs = ", ".join(f"%{v.name}" for v in function.inputs)
            outputs = ", ".join(f"%{v.name}" for v in function.outputs)
            yield f"function {_operator(*key)}({inputs}) -> ({outputs}) {{"
            yield from self._nodes(function, "  ")
            yield "}"

    def _nodes(self, nodes: Iterable[ir.Node], indent: str) -> Iterator[str]:
        for node in nodes:
            inputs = ", ".join(self._read(v) for v in node.inputs)
            outputs = ", ".join(self._typed(v) if v.name else "_" for v in node.outputs)
            attributes = sorted(node.attributes.values(), key=lambda a: a.name)
            plain = ", ".join(f"{a.name}={self._attribute(a)}" for a in attributes if not _graphs(a))
            line = f"{indent}{outputs} = {_operator(*node.op_identifier())}({inputs})"
            yield f"{line} {{{plain}}}" if plain else line
            for attribute in attributes:
                for graph in _graphs(attribute):
                    yield from self._subgraph(attribute.name, graph, indent + "  ")

    def _subgraph(self, name: str, graph: ir.Graph, indent: str) -> Iterator[str]:
        inputs = ", ".join(self._typed(v) for v in graph.inputs)
        outputs = ", ".join(self._read(v) for v in graph.outputs)
        yield f"{indent}{name}: ({inputs}) -> ({outputs}) {{"
        yield from self._nodes(graph, indent + "  ")
        yield f"{indent}}}"

    def _read(self, value: ir.Value | None) -> str:
        if value is None:
            return "_"
        return self._stored(value) if value.is_initializer() else f"%{value.name}"

    def _typed(self, value: ir.Value) -> str:
        if value.dtype is None:
            return f"%{value.name}"
        if value.shape is None:
            return f"%{value.name}: {value.dtype.short_name()}[...]"
        return f"%{value.name}: {value.dtype.short_name()}[{','.join(map(_dim, value.shape))}]"

    def _stored(self, value: ir.Value) -> str:
        tensor = value.const_value
        return f"{value.name}: {self._tensor(tensor)}" if tensor is not None else f"{value.name}: unknown"

    def _tensor(self, tensor: ir.TensorProtocol) -> str:
        text = f"{tensor.dtype.short_name()}[{','.join(map(_dim, tensor.shape))}]"
        if math.prod(tensor.shape.numpy()) <= _SHOWN_ELEMENTS:
            return f"{text}{{{', '.join(str(x) for x in tensor.numpy().ravel())}}}"
        return f"{text} #{hashlib.sha256(tensor.tobytes()).hexdigest()[:8]}" if self._hashes else text

    def _attribute(self, attribute: ir.Attr) -> str:
        if attribute.is_ref():
            return f"@{attribute.ref_attr_name}"
        if attribute.type == ir.AttributeType.TENSOR:
            return self._tensor(attribute.as_tensor())
        if attribute.type == ir.AttributeType.FLOAT:
            return str(np.float32(attribute.as_float()))
        if attribute.type == ir.AttributeType.FLOATS:
            return f"[{', '.join(str(np.float32(x)) for x in attribute.as_floats())}]"
        if attribute.type == ir.AttributeType.STRING:
            return repr(attribute.as_string())
        if attribute.type in (ir.AttributeType.INTS, ir.AttributeType.STRINGS):
            return f"[{', '.join(map(repr, attribute.value))}]"
        return str(attribute.value)


def _operator(domain: str, name: str, overload: str) -> str:
    return (f"{domain}." if domain else "") + name + (f":{overload}" if overload else "")


def _graphs(attribute: ir.Attr) -> tuple[ir.Graph, ...]:
    if attribute.is_ref():
        return ()
    if attribute.type == ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return tuple(attribute.as_graphs()) if attribute.type == ir.AttributeType.GRAPHS else ()


def _dim(dim: int | ir.SymbolicDim) -> str:
    if isinstance(dim, int):
        return str(dim)
    return "?" if dim.value is None else str(dim.value).replace(" ", "")
