"""Processor time of the channel analysis from 1k to 50k nodes: it must grow linearly.

    python benchmarks/channels.py [--nodes 1000 5000 20000 50000] [--width 64]

Prints a table, and the slope of log(time) over log(nodes), which is 1 for linear growth.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.channels import find_groups
from qc.ir.model import OPSET, Model

HEADS, KEY_HEADS, LAYER_NODES = 4, 2, 22


def decoder(nodes: int, width: int) -> Model:
    """A gated decoder of about so many nodes, with grouped-query attention and rotary embeddings. Weights are zeros."""
    graph = ir.Graph((), (), nodes=(), opset_imports={"": OPSET, dialect.DOMAIN: dialect.VERSION}, name="decoder")
    size = width // HEADS
    tensors: dict[tuple[int, ...], ir.TensorProtocol] = {}

    def weight(*shape: int) -> ir.Value:
        if shape not in tensors:
            tensors[shape] = ir.tensor(np.zeros(shape, np.float32))
        value = ir.Value(
            name=f"w{len(graph.initializers)}",
            const_value=tensors[shape],
            shape=ir.Shape(shape),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        graph.register_initializer(value)
        return value

    def integers(*numbers: int) -> ir.Value:
        value = ir.Value(name=f"w{len(graph.initializers)}", const_value=ir.tensor(np.array(numbers, np.int64)))
        graph.register_initializer(value)
        return value

    def op(kind: str, inputs: list[ir.Value], shape: tuple, **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes)
        graph.append(node)
        node.outputs[0].dtype, node.outputs[0].shape = ir.DataType.FLOAT, ir.Shape(shape)
        return node.outputs[0]

    def linear(x: ir.Value, rows: int) -> ir.Value:
        node = dialect.linear(x, weight(rows, int(x.shape[-1])))
        graph.append(node)
        return node.outputs[0]

    def heads(x: ir.Value, count: int) -> ir.Value:
        split = op("Reshape", [x, to_heads[count]], ("batch", "seq", count, size))
        return op("Transpose", [split], ("batch", count, "seq", size), perm=[0, 2, 1, 3])

    ids = ir.Value(name="ids", shape=ir.Shape(("batch", "seq")), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(ids)
    to_heads = {n: integers(0, 0, n, size) for n in (HEADS, KEY_HEADS)}
    to_width = integers(0, 0, width)
    cos, sin = weight(16, size // 2), weight(16, size // 2)
    x = op("Gather", [weight(32, width), ids], ("batch", "seq", width))
    for _ in range(max(1, nodes // LAYER_NODES)):
        h = op("RMSNormalization", [x, weight(width)], x.shape, axis=-1)
        q, k, v = (heads(linear(h, n * size), n) for n in (HEADS, KEY_HEADS, KEY_HEADS))
        q, k = (op("RotaryEmbedding", [y, cos, sin, ids], y.shape) for y in (q, k))
        y = op("Attention", [q, k, v], q.shape)
        y = op("Transpose", [y], ("batch", "seq", HEADS, size), perm=[0, 2, 1, 3])
        y = op("Reshape", [y, to_width], ("batch", "seq", width))
        x = op("Add", [x, linear(y, width)], x.shape)
        h = op("RMSNormalization", [x, weight(width)], x.shape, axis=-1)
        gate, up = linear(h, 2 * width), linear(h, 2 * width)
        node = dialect.swish(gate)
        graph.append(node)
        y = op("Mul", [node.outputs[0], up], up.shape)
        x = op("Add", [x, linear(y, width)], x.shape)
    graph.outputs.append(x)
    model = Model(graph, ir_version=10)
    dialect.sync_functions(model)
    return model


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1000, 5000, 20000, 50000])
    parser.add_argument("--width", type=int, default=64)
    arguments = parser.parse_args()
    rows = []
    print(f"{'nodes':>8} {'groups':>8} {'seconds':>8} {'µs/node':>8}")
    for wanted in arguments.nodes:
        model = decoder(wanted, arguments.width)
        start = time.process_time()
        groups = find_groups(model)
        seconds = time.process_time() - start
        rows.append((len(model.graph), seconds))
        print(f"{len(model.graph):8} {len(groups):8} {seconds:8.2f} {seconds / len(model.graph) * 1e6:8.1f}")
    if len(rows) > 1:
        slope = np.polyfit(*np.log(np.array(rows)).T, 1)[0]
        print(f"growth: nodes ^ {slope:.2f}")


if __name__ == "__main__":
    main()
