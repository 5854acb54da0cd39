"""Times of products with quantized weights by bits and group, for the table of `qc.passes.allocate`.

    python benchmarks/weight_costs.py [--target ort-cpu] [--size 2048] [--rounds 15]

One thread, one row, through the fused kernel of ONNX Runtime or the kernels of a C library (``--target tvm-cpu``), all
formats in turn in each round. Prints the median of processor time relative to 4 bits in groups of 32 with zero points,
without and with them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

BITS, GROUPS = {"ort-cpu": (2, 4, 8), "tvm-cpu": (2, 3, 4, 8)}, (16, 32, 64, 128, 256)


def library(bits: int, group: int, size: int, *, zero_points: bool) -> Callable[[np.ndarray], object] | None:
    """A C library of one product; None where no kernel reads the format."""
    import onnx_ir as ir

    from qc.backends.tvm.backend import TvmCpu
    from qc.ir import dialect
    from qc.ir.model import Model
    from qc.ir.quant import Format
    from qc.passes.manager import PassManager
    from qc.passes.quantize.weights import QuantizeWeights

    backend, format = TvmCpu(), Format.parse(f"{'u' if zero_points else ''}int{bits}:g{group}")
    if str(format) not in map(str, backend.target.formats):
        return None
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", size]))
    numbers = np.random.default_rng(0).standard_normal((size, size), np.float32)
    weight = ir.Value(name="w", const_value=ir.tensor(numbers, name="w"), shape=ir.Shape(numbers.shape))
    weight.dtype = ir.DataType.FLOAT
    node = dialect.linear(x, weight)
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 23}, name="g")
    steps = [QuantizeWeights(format=str(format), metric="none"), *backend.lowering()]
    model, _ = PassManager(steps, verify=False).run(Model.of(ir.Model(graph, ir_version=10)))
    directory = tempfile.TemporaryDirectory()
    backend.emit(model, Path(directory.name))
    runner = backend.open(Path(directory.name), threads=1)
    return lambda row, keep=directory: runner.run({"x": row})


def session(bits: int, group: int, size: int, *, zero_points: bool) -> Callable[[np.ndarray], object]:
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
    held = ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return lambda row: held.run(None, {"x": row})


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", choices=tuple(BITS), default="ort-cpu")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    x = np.random.default_rng(1).standard_normal((1, options.size)).astype(np.float32)
    make, widths = session if options.target == "ort-cpu" else library, BITS[options.target]
    signs = (True,) if options.target == "tvm-cpu" else (False, True)  # a library takes seconds to make
    kinds = [(bits, group, zeros) for bits in widths for group in GROUPS for zeros in signs]
    made = {kind: make(kind[0], kind[1], options.size, zero_points=kind[2]) for kind in kinds}
    products = {kind: product for kind, product in made.items() if product is not None}
    times: dict[tuple, list[float]] = {kind: [] for kind in products}
    for _ in range(options.rounds):
        for kind, product in products.items():
            started = time.process_time()
            for _ in range(4):
                product(x)
            times[kind].append(time.process_time() - started)
    base = statistics.median(times[4, 32, True])
    print(f"{'bits':>4}{'group':>7}{'symmetric':>11}{'asymmetric':>12}")
    for bits in widths:
        for group in GROUPS:
            if (bits, group, True) not in times:
                continue
            found = {z: statistics.median(times[bits, group, z]) / base for z in signs}
            print(f"{bits:>4}{group:>7}{found.get(False, float('nan')):>11.2f}{found[True]:>12.2f}")


if __name__ == "__main__":
    main()
