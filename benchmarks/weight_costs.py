"""Times of products with quantized weights by bits and group, for the table of `qc.passes.allocate`.

    python benchmarks/weight_costs.py [--target ort-cpu] [--size 2048] [--rounds 15]
    python benchmarks/weight_costs.py --formats int4:g64,nf4:g64,float [--tokens 1] [--size 2048] [--rounds 15]

One thread, one row, through the fused kernel of ONNX Runtime or the kernels of a C library (``--target tvm-cpu``), all
formats in turn in each round. Prints the median of processor time relative to 4 bits in groups of 32 with zero points,
without and with them. With ``--formats``, of a C library in these formats, relative to the first, for so many tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

Kind = TypeVar("Kind")

BITS, GROUPS = {"ort-cpu": (2, 4, 8), "tvm-cpu": (2, 3, 4, 8)}, (16, 32, 64, 128, 256)


def library(format: str, size: int) -> Callable[[np.ndarray], object] | None:
    """A C library of one product; None where no kernel reads the format, unless it is ``float``."""
    from qc.backends.tvm.backend import TvmCpu

    backend = TvmCpu()
    if format not in ("float", *backend.target.formats):
        return None
    directory = tempfile.TemporaryDirectory()
    emit_product(format, size, Path(directory.name))
    runner = backend.open(Path(directory.name), threads=1)
    return lambda row, keep=directory: runner.run({"x": row})


def emit_product(format: str, size: int, directory: Path) -> None:
    """Writes a C library that multiplies ``x`` by a weight of so many rows and columns."""
    import onnx_ir as ir

    from qc.backends.tvm.backend import TvmCpu
    from qc.ir import dialect
    from qc.ir.model import Model
    from qc.passes.manager import PassManager
    from qc.passes.quantize.weights import QuantizeWeights

    backend = TvmCpu()
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["rows", size]))
    numbers = np.random.default_rng(0).standard_normal((size, size), np.float32)
    weight = ir.Value(name="w", const_value=ir.tensor(numbers, name="w"), shape=ir.Shape(numbers.shape))
    weight.dtype = ir.DataType.FLOAT
    node = dialect.linear(x, weight)
    node.outputs[0].name = "y"
    graph = ir.Graph([x], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 23}, name="g")
    quantized = [] if format == "float" else [QuantizeWeights(format=format, metric="none")]
    steps = [*quantized, *backend.lowering()]
    model, _ = PassManager(steps, verify=False).run(Model.of(ir.Model(graph, ir_version=10)))
    backend.emit(model, directory)


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


def _library(bits: int, group: int, size: int, *, zero_points: bool) -> Callable[[np.ndarray], object] | None:
    return library(f"{'u' if zero_points else ''}int{bits}:g{group}", size)


def in_turn(products: Mapping[Kind, Callable[[np.ndarray], object]], x: np.ndarray, rounds: int) -> dict[Kind, float]:
    """The median processor time of each product, all in turn in each round."""
    times: dict[Kind, list[float]] = {kind: [] for kind in products}
    for _ in range(rounds):
        for kind, product in products.items():
            started = time.process_time()
            for _ in range(4):
                product(x)
            times[kind].append(time.process_time() - started)
    return {kind: statistics.median(held) for kind, held in times.items()}


def compare(formats: Sequence[str], x: np.ndarray, rounds: int) -> None:
    """Prints times relative to the first format."""
    made = {format: library(format, x.shape[1]) for format in formats}
    found = in_turn({format: product for format, product in made.items() if product is not None}, x, rounds)
    for format, seconds in found.items():
        print(f"{format:20}{seconds / found[formats[0]]:>8.2f}")


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", choices=tuple(BITS), default="ort-cpu")
    parser.add_argument("--size", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--formats", default="", help="formats to compare instead")
    parser.add_argument("--tokens", type=int, default=1, help="rows of the input, with --formats")
    options = parser.parse_args()
    rows = options.tokens if options.formats else 1
    x = np.random.default_rng(1).standard_normal((rows, options.size)).astype(np.float32)
    if options.formats:
        compare(options.formats.split(","), x, options.rounds)
        return
    make, widths = session if options.target == "ort-cpu" else _library, BITS[options.target]
    signs = (True,) if options.target == "tvm-cpu" else (False, True)  # a library takes seconds to make
    kinds = [(bits, group, zeros) for bits in widths for group in GROUPS for zeros in signs]
    made = {kind: make(kind[0], kind[1], options.size, zero_points=kind[2]) for kind in kinds}
    products = {kind: product for kind, product in made.items() if product is not None}
    times = in_turn(products, x, options.rounds)
    base = times[4, 32, True]
    print(f"{'bits':>4}{'group':>7}{'symmetric':>11}{'asymmetric':>12}")
    for bits in widths:
        for group in GROUPS:
            if (bits, group, True) not in times:
                continue
            found = {z: times[bits, group, z] / base for z in signs}
            print(f"{bits:>4}{group:>7}{found.get(False, float('nan')):>11.2f}{found[True]:>12.2f}")


if __name__ == "__main__":
    main()
