"""Numbers of a model that are learned: where they are stored, and how others are put in their place."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from qc.ir.quant import QuantizedTensor, Weight, emit, read_weight
from qc.passes.base import Context

__all__ = ["float_vectors", "float_weight", "is_vector", "replace_codes", "replace_vector", "static_steps"]

_VECTORS = {"RMSNormalization": (1,), "LayerNormalization": (1, 2), "Linear": (2,)}
"""Where gains and biases are read."""


def static_steps(model: ir.Model, context: Context) -> list[tuple[ir.Value, np.ndarray]]:
    """The stored steps of static grids of activations that only this part reads, and their numbers."""
    found = {}
    for node in (n for n in model.graph if n.op_type == "QuantizeLinear" and not n.domain and context.covers(n)):
        scale = node.inputs[1]
        assert scale is not None
        inside = all(context.covers(user) for user, _ in scale.uses())
        if inside and scale.const_value is not None and scale.is_initializer() and scale.dtype == ir.DataType.FLOAT:
            found[scale] = scale.const_value.numpy()
    return list(found.items())


def float_vectors(model: ir.Model, context: Context) -> list[ir.Value]:
    """Gains of norms and biases that only this part reads."""
    nodes = [node for node in model.graph if context.covers(node)]
    read = [n.inputs[i] for n in nodes for i in _VECTORS.get(n.op_type, ()) if i < len(n.inputs)]
    return [
        value
        for value in read
        if value is not None and is_vector(read_weight(value)) and all(context.covers(n) for n, _ in value.uses())
    ]


def is_vector(weight: Weight | None) -> bool:
    """Whether a weight is a float vector, such as a gain or bias, that can be stored anew."""
    if weight is None or weight.format is not None or weight.value.dtype != ir.DataType.FLOAT:
        return False
    return math.prod(weight.shape) == max(weight.shape, default=1)


def float_weight(name: str, numbers: np.ndarray, context: Context) -> Weight:
    """A float weight that no graph holds."""
    held = ir.Value(name=name, const_value=context.store.put(name, numbers))
    return Weight(held, held, {}, None, numbers.shape)


def replace_codes(weight: Weight, tensor: QuantizedTensor, context: Context) -> None:
    """Puts other codes and parameters behind a decode node."""
    node = weight.value.producer()
    assert node is not None
    for old, new in zip(node.inputs, emit(tensor, ir.Value(name=weight.name), context.store).inputs, strict=True):
        assert old is not None
        assert new is not None
        old.const_value = new.const_value


def replace_vector(model: ir.Model, vector: Weight, numbers: np.ndarray, context: Context) -> None:
    """Makes the readers of a float vector read other numbers, in single precision."""
    old, node = vector.value, vector.value.producer()
    if node is None:
        old.const_value = context.store.put(str(old.name), numbers)
        return
    new = ir.Value(name=f"{old.name}.tuned", shape=ir.Shape(numbers.shape), type=ir.TensorType(ir.DataType.FLOAT))
    new.const_value = context.store.put(str(new.name), numbers)
    model.graph.register_initializer(new)
    old.replace_all_uses_with(new)
    model.graph.remove(node, safe=True)
    if not vector.data.uses():
        model.graph.initializers.pop(str(vector.data.name), None)
