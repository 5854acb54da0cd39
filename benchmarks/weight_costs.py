"""Times of products with quantized weights by bits and group, for the table of `qc.passes.allocate`.

    python benchmarks/weight_costs.py [--size 2048] [--rounds 15]

One thread, one row, through the fused kernel of ONNX Runtime, all formats in turn in each round. Prints the median of
processor time relative to 4 bits in groups of 32, without and with zero points.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np

BITS, GROUPS = (2, 4, 8), (16, 32, 64, 128, 256)


def session(bits: int, group: int, size: int, *, zero_points: bool) -> object:
    """A model of one ``MatMulNBits``, loaded."""
    import onnx
    import onnxruntime as ort
    from onnx import TensorProto, helper, numpy_helper

    rng, blocks = np.random.default_rng(0), size // group
    arrays = {
        "codes": rng.integers(0, 256, (size, blocks, group * bits // 8), dtype=np.uint8),
        "scales": rng.random(size * blocks, dtype=np.float32),
    }
    if zero_points:
        arrays["zeros"] = rng.integers(0, 256, size * -(-blocks * bits // 8), dtype=np.uint8)
    attributes = {"K": size, "N": size, "bits": bits, "block_size": group, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft", **attributes)
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, size]) for name in ("x", "y")]
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph([node], "product", ends[:1], ends[1:], constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    x = np.random.default_rng(1).standard_normal((1, options.size)).astype(np.float32)
    kinds = [(bits, group, zeros) for bits in BITS for group in GROUPS for zeros in (False, True)]
    sessions = {kind: session(kind[0], kind[1], options.size, zero_points=kind[2]) for kind in kinds}
    times: dict[tuple, list[float]] = {kind: [] for kind in kinds}
    for _ in range(options.rounds):
        for kind, held in sessions.items():
            started = time.process_time()
            for _ in range(4):
                held.run(None, {"x": x})  # type: ignore[attr-defined]
            times[kind].append(time.process_time() - started)
    base = statistics.median(times[4, 32, True])
    print(f"{'bits':>4}{'group':>7}{'symmetric':>11}{'asymmetric':>12}")
    for bits in BITS:
        for group in GROUPS:
            plain, zeros = (statistics.median(times[bits, group, z]) / base for z in (False, True))
            print(f"{bits:>4}{group:>7}{plain:>11.2f}{zeros:>12.2f}")


if __name__ == "__main__":
    main()
