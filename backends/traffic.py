"""How many bytes of weights a model reads to yield one token: what bounds the speed of decoding."""

from __future__ import annotations

import concurrent.futures
import time

import numpy as np
import onnx_ir as ir

__all__ = ["copy_bandwidth", "streamed_bytes"]

# Operator type -> inputs of which only the indexed rows are read.
_INDEXED = {
    ("", "Gather"): {0},
    ("", "RotaryEmbedding"): {1, 2},
    ("com.microsoft", "GatherBlockQuantized"): {0, 2, 3},
    ("com.microsoft", "RotaryEmbedding"): {2, 3},
    ("com.microsoft", "GroupQueryAttention"): {7, 8},
}
# Operators through which a weight is only seen in another form.
_TRANSPARENT = frozenset({"Cast", "DequantizeLinear", "Identity", "Reshape", "Transpose", "Unsqueeze", "Squeeze"})

_COPY_BYTES = 1 << 27  # larger than any cache that the copy could stay in
_COPIES = 5


def streamed_bytes(model: ir.Model) -> int:
    """Bytes of all initializers that a run reads whole; of tables that are only indexed, none."""
    tensors: dict[int, int] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None and _read_whole(value):
                tensors[id(value.const_value)] = value.const_value.nbytes
    return sum(tensors.values())


def copy_bandwidth(threads: int = 1) -> float:
    """Measures bytes per second of a plain copy, read and written bytes counted, the best of a few copies."""
    threads = max(1, threads)
    sources = [np.ones(_COPY_BYTES // threads, np.uint8) for _ in range(threads)]
    targets = [np.empty_like(s) for s in sources]
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for _ in range(_COPIES):
            started = time.perf_counter()
            list(pool.map(np.copyto, targets, sources))
            best = max(best, 2 * sum(s.nbytes for s in sources) / (time.perf_counter() - started))
    return best


def _read_whole(value: ir.Value) -> bool:
    pending, seen = [value], set()
    while pending:
        value = pending.pop()
        if value in seen:
            continue
        seen.add(value)
        for node, slot in value.uses():
            if slot in _INDEXED.get((node.domain, node.op_type), ()):
                continue
            if node.op_type not in _TRANSPARENT:
                return True
            pending.extend(node.outputs)
    return False
