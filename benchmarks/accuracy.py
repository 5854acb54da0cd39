"""Accuracy of weight quantizers at equal stored bits: one model, one text, one evaluator.

    python benchmarks/accuracy.py TEXT --calib TEXT [--windows 64] [--bits 4]

Every row is the same canonical ``builtin:tiny-llama`` with the same float embedding and head; its other products are
quantized by ONNX Runtime's own tools or by qc, in 4 bits (or 2 bits, for those that can) in groups of 32. It runs in
ONNX Runtime with float activations, so that only the weights differ. Bits are those stored per quantized weight, with
scales in float32 as ONNX Runtime's tools write them.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from qc.backends.evaluate import evaluate
from qc.backends.reference import ModelRunner
from qc.backends.tokenizer import Tokenizer
from qc.frontend import load
from qc.ir.model import Model
from qc.measurement import read_data
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.quantize._sites import Kind, Use, weight_uses
from qc.passes.quantize.weights import QuantizeWeights

Decoded = Callable[[np.ndarray], tuple[np.ndarray, int]]
"""From a weight ``[N, K]`` to what it decodes to, and the bits that it takes."""


def products(model: Model) -> list[Use]:
    """The products that every tool quantizes."""
    return [u for u in weight_uses(model) if u.kind in (Kind.LINEAR, Kind.VALUE) and not u.reason]


def by_onnxruntime(config: str, bits: int) -> Decoded:
    """The quantizer of ``onnxruntime.quantization.matmul_nbits_quantizer``, a weight at a time."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    logging.getLogger(tool.__name__).setLevel(logging.WARNING)

    def run(weight: np.ndarray) -> tuple[np.ndarray, int]:
        rows, columns = weight.shape
        ends = [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", s]) for n, s in (("x", columns), ("y", rows))
        ]
        graph = helper.make_graph(
            [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
            "g", ends[:1], ends[1:], [numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")],
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        if config == "hqq":
            algorithm = tool.HQQWeightOnlyQuantConfig(block_size=32, bits=bits)
        else:
            algorithm = tool.DefaultWeightOnlyQuantConfig(
                block_size=32, is_symmetric=config == "symmetric", bits=bits, accuracy_level=0
            )
        quantizer = tool.MatMulNBitsQuantizer(model, algo_config=algorithm)
        quantizer.process()
        done = quantizer.model.model
        stored = sum(numpy_helper.to_array(i).nbytes for i in done.graph.initializer if i.name != "w")
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(done.SerializeToString(), options, ["CPUExecutionProvider"])
        decoded = session.run(None, {"x": np.eye(columns, dtype=np.float32)})[0].T
        return decoded, 8 * stored

    return run


def replaced(model: Model, decode: Decoded) -> tuple[Model, float]:
    """The model with its products' weights replaced by what they decode to, and their bits per weight."""
    import onnx_ir as ir

    copy, bits, elements = model.clone(), 0, 0
    for use in products(copy):
        assert use.weight is not None
        decoded, stored = decode(use.weight.numpy())
        name = f"{use.weight.name}.replaced"
        value = ir.Value(name=name, const_value=ir.tensor(decoded, name=name), shape=ir.Shape(decoded.shape))
        value.dtype = ir.DataType.FLOAT
        copy.graph.register_initializer(value)
        use.node.replace_input_with(use.slot, value)
        bits, elements = bits + stored, elements + decoded.size
    return copy, bits / elements


def by_qc(model: Model, calibration: Sequence, action: QuantizeWeights) -> tuple[Model, float]:
    """The model quantized by a pass of ours, and the bits per weight of its products."""
    manager = PassManager([action], verify=False)
    done, _ = manager.run(model.clone(), calibration=calibration)
    weights = [u.weight for u in products(done) if u.weight is not None]
    return done, 8 * sum(w.stored_bytes for w in weights) / sum(w.shape[0] * w.shape[1] for w in weights)


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path, help="UTF-8 text to measure on")
    parser.add_argument("--calib", type=Path, required=True, help="another text to calibrate on")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--bits", type=int, choices=(2, 4), default=4)
    options = parser.parse_args()
    model = load("builtin:tiny-llama")
    model, _ = PassManager(canonicalize_passes(), verify=False).run(model)
    tokens = Tokenizer(model.assets["tokenizer.json"].parent).encode(options.text.read_text(encoding="utf-8"))
    reference = ModelRunner(model)

    def ours(**choices: object) -> Callable[[], tuple[Model, float]]:
        action = QuantizeWeights(format=f"uint{options.bits}", embedding="float", head="float", **choices)  # type: ignore[arg-type]
        data = read_data(model, options.calib, tokens=action.calibration_tokens)
        return lambda: by_qc(model, data.calibration or (), action)

    def theirs(config: str) -> Callable[[], tuple[Model, float]]:
        return lambda: replaced(model, by_onnxruntime(config, options.bits))

    rows: dict[str, Callable[[], tuple[Model, float]]] = {
        "onnxruntime, default": theirs("symmetric"),
        "onnxruntime, asymmetric": theirs("asymmetric"),
        "onnxruntime, HQQ": theirs("hqq"),
        "qc, search without data": ours(metric="none"),
        "qc, search": ours(),
        "qc, gptq": ours(assign="gptq"),
        "qc, gptq with 4 sweeps": ours(assign="gptq", sweeps=4),
    }
    if options.bits == 2:
        del rows["onnxruntime, HQQ"]  # 4 and 8 bits only
    print(f"{'quantizer':<26}{'bits':>7}{'perplexity':>12}{'above float':>13}{'KL':>9}{'top-1':>8}")
    for name, make in rows.items():
        quantized, bits = make()
        found = evaluate(ModelRunner(quantized), reference, text_tokens=tokens, windows=options.windows)
        above = 100 * (found["ppl"] / found["ppl_reference"] - 1)
        print(f"{name:<26}{bits:>7.3f}{found['ppl']:>12.3f}{above:>12.2f}%{found['kl']:>9.5f}{found['top1']:>8.4f}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
