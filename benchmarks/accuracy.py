"""Accuracy of weight quantizers at equal stored bits: one model, one text, one evaluator.

    python benchmarks/accuracy.py TEXT --calib TEXT [--windows 64] [--bits 4] [--group 32] [--rows REGEX] [--peers DIR]

Every row is the same canonical ``builtin:tiny-llama`` with the same float embedding and head; its other products are
quantized to 4, 3 or 2 bits, by others or by qc. It runs in ONNX Runtime with float activations, so that only the
weights differ. Seconds are processor time of one thread. Bits are those stored per quantized weight: scales in float32
in all rows but those of HQQ (scale and zero point in half precision), of NNCF (scales in half precision) and of
llama.cpp, whose formats fix them.

* ``onnxruntime``: the quantizers of its tools, default and HQQ as a whole, k_quant by its function;
* those of `benchmarks/peers.py`, without gradients, each in its own environment below ``--peers``;
* ``auto-round``: its package with its own defaults (200 steps of 8 samples for each block), on 128 windows of 256
  tokens; ``qc, learned`` is ours on the same windows;
* ``gptq as published``: the algorithm of `benchmarks/gptq.py`, columns sorted, on the inputs of the float network;
  ``qc, gptq on float inputs`` is ours on the same matrices, in the other rows of qc quantized layers feed the next;
* ``--ours OPTIONS``: a further row of qc, such as ``format=lut3,metric=fisher`` or ``format=vq8x4:in,assign=gptq``.
"""

from __future__ import annotations

import argparse
import functools
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import peers
from peers import affine_bits

from qc.backends.evaluate import evaluate
from qc.backends.inputs import text_inputs
from qc.backends.reference import ModelRunner
from qc.backends.tokenizer import Tokenizer
from qc.data import read_data
from qc.frontend import load
from qc.ir.model import Model
from qc.passes.base import Context, Pass
from qc.passes.canonicalize import canonicalize_passes
from qc.passes.manager import PassManager
from qc.passes.pipeline import Step, parse_pipeline
from qc.passes.quantize._sites import Kind, Use, weight_uses
from qc.passes.quantize.weights import QuantizeWeights
from qc.passes.statistics import Statistic, collect

Decoded = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float]]
"""From a weight ``[N, K]`` and the second moments ``[K, K]`` of its input to what it decodes to, and its bits."""


LEARNED, WINDOW = 128, 256
"""What learning calibrates on."""

LEARNING = (
    "quantize-weights{{format=uint{bits},group={group},embedding=float,head=float,assign=gptq,sweeps=4}},tune-network"
)
"""Our pipeline that learns."""


def products(model: Model) -> list[Use]:
    """The products that every tool quantizes."""
    return [u for u in weight_uses(model) if u.kind in (Kind.LINEAR, Kind.VALUE, Kind.CACHED_VALUE) and not u.reason]


def by_onnxruntime(config: str, bits: int, group: int) -> Decoded:
    """The quantizer of ``onnxruntime.quantization.matmul_nbits_quantizer``, a weight at a time."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import matmul_nbits_quantizer as tool

    logging.getLogger(tool.__name__).setLevel(logging.WARNING)

    def run(weight: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, float]:
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
            algorithm = tool.HQQWeightOnlyQuantConfig(block_size=group, bits=bits)
        else:
            algorithm = tool.DefaultWeightOnlyQuantConfig(
                block_size=group, is_symmetric=config == "symmetric", bits=bits, accuracy_level=0
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


def by_k_quant(bits: int, group: int) -> Decoded:
    """The function behind ONNX Runtime's ``KQuantWeightOnlyQuantConfig``."""
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    def run(weight: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, float]:
        codes, scale, zero = quant_tensor_k_quant_cpu(weight, num_bits=bits, group_size=group)
        decoded = ((codes - zero) * scale.astype(np.float32)).reshape(weight.shape).astype(np.float32)
        return decoded, affine_bits(weight, bits, group)

    return run


def by_published_gptq(bits: int, group: int) -> Decoded:
    """The algorithm as its authors' code has it."""
    from gptq import paper

    def run(weight: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, float]:
        return paper(weight, gram, bits, group)[1], affine_bits(weight, bits, group)

    return run


def by_our_gptq(bits: int, group: int) -> Decoded:
    """Ours on the same matrices."""
    from qc.ir.quant import Format
    from qc.passes.quantize.gptq import Hessian, gptq

    def run(weight: np.ndarray, gram: np.ndarray) -> tuple[np.ndarray, float]:
        tensor = gptq(weight, Format.parse(f"uint{bits}:g{group}"), Hessian(gram))
        return tensor.decode(), tensor.stored_bits

    return run


def by_auto_round(directory: Path, windows: np.ndarray, bits: int, group: int) -> dict[str, np.ndarray]:
    """The weights of AutoRound by module path, learned with its defaults on rows of token ids."""
    import auto_round
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tool = auto_round.AutoRound(
        model,
        tokenizer=AutoTokenizer.from_pretrained(directory),
        bits=bits,
        group_size=group,
        sym=False,
        dataset=[torch.from_numpy(row.reshape(1, -1).astype(np.int64)) for row in windows],
        nsamples=len(windows),
        seqlen=windows.shape[-1],
        device_map="cpu",
    )
    done, _ = tool.quantize()
    return {
        name: module.weight.detach().float().numpy()
        for name, module in done.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def replaced(model: Model, decode: Callable[[Use], tuple[np.ndarray, float]]) -> tuple[Model, float]:
    """The model with its products' weights replaced by what they decode to, and their bits per weight."""
    import onnx_ir as ir

    copy, bits, elements = model.clone(), 0.0, 0
    for use in products(copy):
        decoded, stored = decode(use)
        name = f"{use.name}.replaced"
        value = ir.Value(name=name, const_value=ir.tensor(decoded, name=name), shape=ir.Shape(decoded.shape))
        value.dtype = ir.DataType.FLOAT
        copy.graph.register_initializer(value)
        use.node.replace_input_with(use.slot, value)
        bits, elements = bits + stored, elements + decoded.size
    return copy, bits / elements


def by_qc(model: Model, calibration: Sequence, steps: Sequence[Pass | Step]) -> tuple[Model, float]:
    """The model quantized by passes of ours, and the bits per weight of its products."""
    manager = PassManager(steps, verify=False)
    done, _ = manager.run(model.clone(), calibration=calibration, context=Context(threads=1))
    weights = [u.weight for u in products(done) if u.weight is not None]
    return done, 8 * sum(w.stored_bytes for w in weights) / sum(w.shape[0] * w.shape[1] for w in weights)


def _float(use: Use) -> np.ndarray:
    assert use.weight is not None
    return use.weight.numpy()


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text", type=Path, help="UTF-8 text to measure on")
    parser.add_argument("--calib", type=Path, required=True, help="another text to calibrate on")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--bits", type=int, choices=(2, 3, 4), default=4)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--rows", default="", help="a regular expression: only rows whose name it matches")
    parser.add_argument("--peers", type=Path, help="where benchmarks/peers.py has made environments")
    parser.add_argument("--ours", nargs="*", default=[], help="further rows: options of quantize-weights, with commas")
    options = parser.parse_args()
    model = load("builtin:tiny-llama")
    model, _ = PassManager(canonicalize_passes(), verify=False).run(model)
    directory = model.assets["tokenizer.json"].parent
    tokenizer = Tokenizer(directory)
    tokens, calibration = (tokenizer.encode(p.read_text(encoding="utf-8")) for p in (options.text, options.calib))
    reference, bits, group = ModelRunner(model), options.bits, options.group
    data = read_data(model, options.calib, tokens=QuantizeWeights(assign="gptq").calibration_tokens)
    requests = {use.name: use.statistic(Statistic.GRAM) for use in products(model)}
    moments = collect(model, [r for r in requests.values() if r is not None], data.calibration or (), 0)
    grams = {name: moments[request] for name, request in requests.items() if request is not None}

    def ours(**choices: object) -> Callable[[], tuple[Model, float]]:
        action = QuantizeWeights(format=f"uint{bits}", group=group, embedding="float", head="float", **choices)  # type: ignore[arg-type]
        return lambda: by_qc(model, data.calibration or (), [action])

    def theirs(make: Callable[..., Decoded], *arguments: object) -> Callable[[], tuple[Model, float]]:
        def run() -> tuple[Model, float]:
            decode = make(*arguments)
            return replaced(model, lambda use: decode(_float(use), grams[use.name]))

        return run

    def by_peer(name: str) -> tuple[Model, float]:
        uses = products(model)
        matrices = [_float(u) for u in uses], [grams[u.name] for u in uses]
        found = dict(zip([u.name for u in uses], peers.run(options.peers, name, *matrices, bits, group), strict=True))
        return replaced(model, lambda use: found[use.name])

    def learned_by_others() -> tuple[Model, float]:
        windows = np.array(calibration[: LEARNED * WINDOW]).reshape(LEARNED, WINDOW)
        weights = by_auto_round(directory, windows, bits, group)
        return replaced(model, lambda use: (weights[use.name], affine_bits(_float(use), bits, group)))

    def learned_by_us() -> tuple[Model, float]:
        windows = np.array(calibration[: LEARNED * WINDOW]).reshape(LEARNED, 1, WINDOW)
        steps = parse_pipeline(LEARNING.format(bits=bits, group=group))
        return by_qc(model, [text_inputs(model.signature, window) for window in windows], steps)

    rows: dict[str, Callable[[], tuple[Model, float]]] = {}
    if bits != 3:
        rows |= {f"onnxruntime, {c}": theirs(by_onnxruntime, c, bits, group) for c in ("symmetric", "asymmetric")}
    if bits == 4:
        rows["onnxruntime, hqq"] = theirs(by_onnxruntime, "hqq", bits, group)
    rows |= {
        "onnxruntime, k_quant": theirs(by_k_quant, bits, group),
        "gptq as published": theirs(by_published_gptq, bits, group),
        "qc, search without data": ours(metric="none"),
        "qc, search": ours(),
        "qc, gptq on float inputs": theirs(by_our_gptq, bits, group),
        "qc, gptq": ours(assign="gptq"),
        "qc, gptq with 4 sweeps": ours(assign="gptq", sweeps=4),
        "auto-round": learned_by_others,
        "qc, learned": learned_by_us,
    }
    plain = "quantize-weights{{embedding=float,head=float,{}}}"
    rows |= {
        f"qc, {text}": functools.partial(by_qc, model, data.calibration or (), parse_pipeline(plain.format(text)))
        for text in options.ours
    }
    if options.peers is not None:
        widths = {name: quantizer[1] for name, quantizer in peers.QUANTIZERS.items()}
        rows |= {name: functools.partial(by_peer, name) for name in widths if bits in widths[name]}
    print(f"{'quantizer':<42}{'bits':>7}{'perplexity':>12}{'above float':>13}{'KL':>9}{'top-1':>8}{'seconds':>9}")
    for name in (n for n in rows if re.search(options.rows, n)):
        began = time.process_time()
        try:
            quantized, stored = rows[name]()
        except ImportError as error:
            print(f"{name:<42}not measured: {error}")
            continue
        seconds = time.process_time() - began
        found = evaluate(ModelRunner(quantized), reference, text_tokens=tokens, windows=options.windows)
        above = 100 * (found["ppl"] / found["ppl_reference"] - 1)
        figures = f"{above:>12.2f}%{found['kl']:>9.5f}{found['top1']:>8.4f}{seconds:>9.0f}"
        print(f"{name:<42}{stored:>7.3f}{found['ppl']:>12.3f}{figures}")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
