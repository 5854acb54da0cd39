"""What every recogniser of this package shares: reading constants, walking values, and replacing a matched value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir.model import OPSET
from qc.passes.base import Outcome, Site, site_name

__all__ = [
    "Decline",
    "add_constant",
    "attribute",
    "constant",
    "copy_props",
    "drop_unused",
    "integers",
    "lazily",
    "made_by",
    "main_nodes",
    "operands",
    "replace",
    "rewritten",
    "same_dim",
    "scalar",
    "sole_consumer",
    "stored",
    "too_old",
]

_SMALL = 4096  # elements; a constant that steers a rewrite (an axis, an epsilon, a shape) is never larger


class Decline(Exception):  # noqa: N818 - not an error: it carries the sentence why a site is left alone
    """Raised inside a matcher once a site looked right but one condition fails; its text is the reason of the site."""


def main_nodes(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """Yields the standard-domain nodes of the main graph with one of `op_types`.

    Subgraphs (of If, Loop, Scan) and model-local functions are outside the scope of every pass of this package.
    """
    yield from (n for n in tuple(model.graph) if n.domain == "" and n.op_type in op_types)


def rewritten(nodes: Iterable[ir.Node], rewrite: Callable[[ir.Node], Mapping[str, object] | None]) -> list[Site]:
    """Rewrites each node; its site has the details that `rewrite` returns, or the reason of its `Decline`."""
    sites = []
    for node in nodes:
        try:
            details = rewrite(node)
        except Decline as reason:
            sites.append(Site(site_name(node), Outcome.SKIPPED, str(reason)))
        else:
            sites.append(Site(site_name(node), Outcome.CHANGED, details=dict(details or {})))
    return sites


def too_old(model: ir.Model) -> str | None:
    """Why a pass that writes operators of opset 23 leaves `model` alone; None where it need not."""
    opset = model.opset_imports.get("", 1)
    return f"the model imports opset {opset}, expected at least {OPSET}; convert it first" if opset < OPSET else None


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The producer of `value` if it is a standard-domain node with one of `op_types`, else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in op_types else None


def stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or Constant node, not read from disk; None if `value` can differ between runs."""
    if value is None or value.is_graph_input():
        return None
    node = made_by(value, "Constant")
    if node is None:
        return value.const_value if value.producer() is None else None
    if value.const_value is not None:
        return value.const_value
    held = next(iter(node.attributes.values()))
    return held.as_tensor() if held.type == ir.AttributeType.TENSOR else ir.tensor(held.value)


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a small constant, else None; large tensors are never read."""
    tensor = stored(value)
    return tensor.numpy() if tensor is not None and tensor.size <= _SMALL else None


def scalar(value: ir.Value | None) -> float | None:
    """The number held by a constant of one element, else None."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def integers(value: ir.Value | None) -> list[int] | None:
    """The entries of a small integer constant (axes, shapes), else None."""
    array = constant(value)
    return [int(i) for i in array.reshape(-1)] if array is not None and array.dtype.kind in "iu" else None


def attribute(node: ir.Node, name: str, default: object = None) -> object:
    """The value of an attribute, or `default` where it is absent."""
    held = node.attributes.get(name)
    return default if held is None else held.value


def operands(node: ir.Node) -> Iterator[tuple[ir.Value | None, ir.Value | None]]:
    """Both orders of the two inputs of a commutative node."""
    a, b = node.inputs
    yield a, b
    yield b, a


def sole_consumer(value: ir.Value) -> ir.Node | None:
    """The node that alone reads `value`, once; None if it has other uses or is a graph output."""
    uses = value.uses()
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def same_dim(a: int | ir.SymbolicDim, b: int | ir.SymbolicDim) -> bool:
    """Whether two dimensions are proven equal: the same number, or expressions that simplify to the same."""
    if isinstance(a, int) or isinstance(b, int):
        return a == b
    return a.value is not None and b.value is not None and (a == b or a.simplify() == b.simplify())


def add_constant(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """Adds an initializer under `name`, or under that name with a number if it is taken."""
    unique, n = name, 0
    while unique in graph.initializers:
        n += 1
        unique = f"{name}_{n}"
    value = ir.Value(name=unique, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape), const_value=tensor)
    graph.register_initializer(value)
    return value


def copy_props(source: ir.Node, targets: Iterable[ir.Node]) -> None:
    """Gives new nodes the metadata (module path, ...) of the node they stand for, where they have none."""
    for node in targets:
        node.metadata_props.update({k: v for k, v in source.metadata_props.items() if k not in node.metadata_props})


def replace(old: ir.Value, nodes: Sequence[ir.Node], like: ir.Node) -> None:
    """Puts `nodes`, whose last one makes the new value, where `old` is made, and moves all uses of `old` to it.

    The new value takes over name, type, shape and metadata, so a graph output stays what it was. Matched nodes in
    front of `old` stay until `drop_unused`: whatever else reads them keeps its value.
    """
    root = old.producer()
    new = nodes[-1].outputs[0]
    new.type, new.shape, new.name = old.type, old.shape, old.name
    new.metadata_props.update(old.metadata_props)
    copy_props(like, nodes)
    root.graph.insert_before(root, nodes)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    root.graph.remove(root, safe=True)


def drop_unused(model: ir.Model) -> bool:
    """Removes nodes and initializers that nothing reads; returns whether there were any."""
    from onnx_ir.passes import common

    return common.RemoveUnusedNodesPass()(model).modified


def lazily(
    source: ir.TensorProtocol, change: Callable[[np.ndarray], np.ndarray], shape: Sequence[int]
) -> ir.LazyTensor:
    """A tensor of the same element type that is computed from `source` each time it is read, and holds no memory."""

    def read() -> ir.TensorProtocol:
        return ir.tensor(np.ascontiguousarray(change(source.numpy())), dtype=source.dtype)

    return ir.LazyTensor(read, dtype=source.dtype, shape=ir.Shape(shape), name=source.name)
