"""Binding: the initializers of a traced graph become views of the checkpoint's own bytes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from qc.frontend.cleanup import SCOPE
from qc.frontend.prequantized import Packed
from qc.frontend.safetensors_file import Entry
from qc.ir import dialect
from qc.ir.errors import InputError
from qc.ir.quant import emit, require_opset
from qc.ir.store import Store

__all__ = ["bind", "bind_quantized"]

_CASTABLE = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE, ir.DataType.FLOAT})


def bind(graph: ir.Graph, entries: Mapping[str, Entry]) -> None:
    """Binds initializers to checkpoint entries, in place and without reading a byte of weight.

    An entry of the graph's own type becomes the initializer's data. One of another floating type becomes an
    initializer of *that* type followed by a ``Cast``, in front of all uses. Initializers that share one entry
    (tied weights) become one. All take the names that the checkpoint uses.

    Args:
        graph: Its initializers are named as in `entries`; those without an entry are left alone.
        entries: Checkpoint entry of each initializer, by the initializer's name.

    Raises:
        InputError: If an entry's shape, or its type beyond a float cast, is not what the graph needs.
    """
    first: dict[tuple[str, str], ir.Value] = {}
    casts: list[ir.Node] = []
    bound = [(name, value) for name, value in graph.initializers.items() if name in entries]
    for parameter, _ in bound:
        del graph.initializers[parameter]
    for parameter, value in bound:
        entry = entries[parameter]
        name = entry.key
        _check(parameter, value, entry)
        place = (str(entry.file), entry.key)
        if place in first:
            value.replace_all_uses_with(first[place])
            continue
        if entry.dtype == value.dtype:
            value.name, value.const_value = name, entry.tensor(name)
            graph.initializers[name] = value
            first[place] = value
            continue
        stored = ir.Value(
            name=name, shape=ir.Shape(entry.shape), type=ir.TensorType(entry.dtype), const_value=entry.tensor(name)
        )
        cast = ir.Node(
            "", "Cast", [stored], [ir.AttrInt64("to", int(ir.DataType.FLOAT))],
            name=f"{name}.cast", metadata_props={SCOPE: parameter.rpartition(".")[0]},
        )  # fmt: skip
        output = cast.outputs[0]
        output.name = f"{name}.float"
        output.shape, output.type = ir.Shape(entry.shape), ir.TensorType(ir.DataType.FLOAT)
        value.replace_all_uses_with(output)
        graph.initializers[name] = stored
        first[place] = output
        casts.append(cast)
    if casts and len(graph):
        graph.insert_before(graph[0], casts)


def bind_quantized(model: ir.Model, weights: Mapping[str, Packed], store: Store) -> None:
    """Replaces initializers by decode nodes of quantized weights, in place, one weight in memory at a time.

    Args:
        model: Its initializers are named as in `weights`.
        weights: The quantized weight of each initializer; initializers that share one (tied weights) read one node.
        store: Where codes and scales are written.

    Raises:
        InputError: If a shape is not what the graph needs, or the parts of a weight do not fit together.
    """
    graph = model.graph
    first: dict[str, ir.Value] = {}
    for parameter, weight in weights.items():
        value = graph.initializers.pop(parameter)
        if weight.name not in first:
            _check(parameter, value, weight.entry())
            tensor = weight.read()
            node = emit(tensor, ir.Value(name=weight.name), store)
            node.metadata_props[SCOPE] = parameter.rpartition(".")[0]
            for held in node.inputs:
                if held is not None:
                    graph.register_initializer(held)
            require_opset(model, tensor.format)
            graph.insert_before(graph[0], node)
            first[weight.name] = node.outputs[0]
        value.replace_all_uses_with(first[weight.name])
    dialect.sync_functions(model)


def _check(name: str, value: ir.Value, entry: Entry) -> None:
    shape = None if value.shape is None else tuple(value.shape.numpy())
    if shape != entry.shape:
        raise InputError(
            f"{entry.file}: weight {entry.key!r} has shape {list(entry.shape)}, the configuration asks for "
            f"{list(shape or ())} ({name}). Check that config.json belongs to these weights."
        )
    if entry.dtype != value.dtype and not (value.dtype == ir.DataType.FLOAT and entry.dtype in _CASTABLE):
        raise InputError(
            f"{entry.file}: weight {entry.key!r} has type {entry.dtype}, expected {value.dtype} or a float type. "
            "Is it quantized without a quantization_config in config.json? Give the float model then."
        )
