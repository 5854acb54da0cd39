"""Times the choices of ``backends/ort``: every alternative of a choice, alternating in one process, as a ratio.

Usage: ``python benchmarks/ort_kernels.py [CHOICE ...] [--threads 1] [--seconds 1.0]``

Each line is one choice at one number of rows: the time of its first alternative, which is what the backend emits, and
how many times as long each other one takes (above 1: the backend's choice is faster). Medians of alternating runs; idle
threads do not spin, so that one session cannot take another's core.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from onnx import helper, numpy_helper

K, N = 2048, 2048
_RNG = np.random.default_rng(0)


@dataclasses.dataclass
class Alternative:
    """One way to compute ``y`` from the inputs."""

    name: str
    nodes: list[onnx.NodeProto]
    constants: dict[str, np.ndarray]


@dataclasses.dataclass
class Choice:
    """Alternatives that compute the same; the first is the backend's."""

    name: str
    inputs: Callable[[int], dict[str, np.ndarray]]
    rows: Sequence[int]
    alternatives: list[Alternative]


def _ms(op_type: str, inputs: Sequence[str], outputs: Sequence[str], **attributes) -> onnx.NodeProto:
    return helper.make_node(op_type, inputs, outputs, domain="com.microsoft", **attributes)


def _x(columns: int) -> Callable[[int], dict[str, np.ndarray]]:
    return lambda rows: {"x": _RNG.standard_normal((1, rows, columns), np.float32)}


def _float() -> Iterator[Choice]:
    w = _RNG.standard_normal((N, K), np.float32)
    yield Choice(
        "float product",
        _x(K),
        (1, 64),
        [
            Alternative("FusedMatMul(transB)", [_ms("FusedMatMul", ["x", "w"], ["y"], transB=1)], {"w": w}),
            Alternative("MatMul", [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": w.T.copy()}),
        ],
    )


def _nbits(bits: int, block: int, level: int = 4, half: bool = False) -> Alternative:
    groups = K // block
    constants = {"b": _RNG.integers(0, 256, (N, groups, block * bits // 8)).astype(np.uint8)}
    scales = (_RNG.random((N, groups), np.float32) + 0.5) / 100
    constants["h" if half else "s"] = scales.astype(np.float16) if half else scales
    nodes = [helper.make_node("Cast", ["h"], ["s"], to=1)] if half else []
    attributes = {"K": K, "N": N, "bits": bits, "block_size": block, "accuracy_level": level}
    nodes.append(_ms("MatMulNBits", ["x", "b", "s"], ["y"], **attributes))
    return Alternative(f"{bits} bits, block {block}, level {level}{', f16' if half else ''}", nodes, constants)


def _quantized() -> Iterator[Choice]:
    w = _RNG.standard_normal((N, K), np.float32)
    product = Alternative("float", [_ms("FusedMatMul", ["x", "w"], ["y"], transB=1)], {"w": w})
    for bits, best in ((2, 128), (4, 256), (8, 256)):
        blocks = [_nbits(bits, b) for b in (256, 128, 64, 32, 16)]
        blocks.sort(key=lambda a: f"block {best}," not in a.name)
        half, level0 = _nbits(bits, best, half=True), _nbits(bits, best, level=0)
        yield Choice(f"{bits}-bit product", _x(K), (1, 64), [*blocks, half, level0, product])


def _rowwise() -> Iterator[Choice]:
    codes, scale = _RNG.integers(-127, 128, (K, N)).astype(np.int8), np.ones(N, np.float32)
    decoded = [
        helper.make_node("DequantizeLinear", ["q", "s"], ["w"], axis=1),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    chosen = _nbits(8, 256)
    yield Choice(
        "int8 per channel", _x(K), (1, 64), [chosen, Alternative("decode node", decoded, {"q": codes, "s": scale})]
    )


def _dynamic() -> Iterator[Choice]:
    """Three projections of one activation, as queries, keys and values are."""
    codes, scale = _RNG.integers(-127, 128, (K, 768)).astype(np.int8), np.ones(768, np.float32)
    constants = {f"q{i}": codes for i in range(3)} | {"s": scale}
    names = [f"p{i}" for i in range(3)]
    total = [helper.make_node("Sum", names, ["y"])]
    once = [helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "t", "z"])]
    shared = [_ms("MatMulIntegerToFloat", ["a", f"q{i}", "t", "s", "z"], [names[i]]) for i in range(3)]
    each = [_ms("DynamicQuantizeMatMul", ["x", f"q{i}", "s"], [names[i]]) for i in range(3)]
    quantizer = []  # what quantize_dynamic writes
    for i in range(3):
        quantizer += [
            helper.make_node("MatMulInteger", ["a", f"q{i}", "z"], [f"i{i}"]),
            helper.make_node("Cast", [f"i{i}"], [f"f{i}"], to=1),
            helper.make_node("Mul", ["t", "s"], [f"m{i}"]),
            helper.make_node("Mul", [f"f{i}", f"m{i}"], [names[i]]),
        ]
    yield Choice(
        "dynamic int8, three projections",
        _x(K),
        (1, 64),
        [
            Alternative("one DynamicQuantizeLinear", once + shared + total, constants),
            Alternative("DynamicQuantizeMatMul each", each + total, constants),
            Alternative("as quantize_dynamic", once + quantizer + total, constants),
        ],
    )


def _norms() -> Iterator[Choice]:
    for norm, fused in (
        ("LayerNormalization", "SkipLayerNormalization"),
        ("RMSNormalization", "SkipSimplifiedLayerNormalization"),
    ):
        parts: dict[str, list[onnx.NodeProto]] = {"Sum": [], "Add": [], fused: []}
        weights = ["g", "g"] if norm == "LayerNormalization" else ["g"]
        for kind, nodes in parts.items():
            last = "x"
            for i in range(8):
                out = "y" if i == 7 else f"n{i}"
                if kind == fused:
                    nodes.append(_ms(fused, [last, "r", *weights], [out], epsilon=1e-5))
                else:
                    nodes.append(helper.make_node(kind, [last, "r"], [f"s{i}"]))
                    nodes.append(helper.make_node(norm, [f"s{i}", *weights], [out], axis=-1, epsilon=1e-5))
                last = out
        order = ("Sum", "Add", fused) if norm == "LayerNormalization" else ("Add", "Sum", fused)
        gain = {"g": np.ones(768, np.float32)}

        def inputs(rows: int) -> dict[str, np.ndarray]:
            return {name: _RNG.standard_normal((1, rows, 768), np.float32) for name in ("x", "r")}

        yield Choice(
            f"residual + {norm}, 8 times", inputs, (1, 21, 128), [Alternative(k, parts[k], gain) for k in order]
        )


def _gates() -> Iterator[Choice]:
    width, deep = 768, 2048

    def product(out: str, source: str, rows: int, columns: int, constants: dict[str, np.ndarray]) -> onnx.NodeProto:
        constants[f"{out}b"] = _RNG.integers(0, 256, (rows, columns // 32, 16)).astype(np.uint8)
        constants[f"{out}s"] = (_RNG.random((rows, columns // 32), np.float32) + 0.5) / 100
        attributes = {"K": columns, "N": rows, "bits": 4, "block_size": 32, "accuracy_level": 4}
        return _ms("MatMulNBits", [source, f"{out}b", f"{out}s"], [out], **attributes)

    def network(packed: bool, gelu: bool) -> Alternative:
        constants: dict[str, np.ndarray] = {}
        if packed:
            nodes = [product("both", "x", 2 * deep, width, constants)]
            nodes.append(helper.make_node("Split", ["both"], ["g", "u"], axis=-1, num_outputs=2))
        else:
            nodes = [product("g", "x", deep, width, constants), product("u", "x", deep, width, constants)]
        if gelu:
            nodes.append(_ms("QuickGelu", ["g"], ["a"], alpha=1.0))
        else:
            nodes += [helper.make_node("Sigmoid", ["g"], ["t"]), helper.make_node("Mul", ["g", "t"], ["a"])]
        nodes += [helper.make_node("Mul", ["a", "u"], ["h"]), product("y", "h", width, deep, constants)]
        name = f"{'packed' if packed else 'two products'}, {'QuickGelu' if gelu else 'Sigmoid'}"
        return Alternative(name, nodes, constants)

    order = [(True, True), (False, True), (True, False), (False, False)]
    yield Choice("gated layer", _x(width), (1, 64), [network(*pair) for pair in order])


def _attention() -> Iterator[Choice]:
    heads, channels = 12, 32
    width = heads * channels
    constants = {"apart": np.array([0, 0, heads, channels]), "whole": np.array([0, 0, width])}
    apart = [helper.make_node("Reshape", [n, "apart"], [f"{n}r"]) for n in "qkv"]
    turned = [helper.make_node("Transpose", [f"{n}r"], [f"{n}t"], perm=[0, 2, 1, 3]) for n in "qkv"]
    back = [
        helper.make_node("Attention", ["qt", "kt", "vt"], ["o"]),
        helper.make_node("Transpose", ["o"], ["ot"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["ot", "whole"], ["y"]),
    ]
    merged = helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=heads, kv_num_heads=heads)

    def inputs(rows: int) -> dict[str, np.ndarray]:
        return {n: _RNG.standard_normal((1, rows, width), np.float32) for n in "qkv"}

    yield Choice(
        "attention of an encoder",
        inputs,
        (21, 128),
        [
            Alternative("Attention on merged heads", [merged], {}),
            Alternative("Attention on transposed heads", [*apart, *turned, *back], constants),
            Alternative("MultiHeadAttention", [_ms("MultiHeadAttention", ["q", "k", "v"], ["y"], num_heads=heads)], {}),
        ],
    )


CHOICES: dict[str, Callable[[], Iterator[Choice]]] = {
    "float": _float,
    "quantized": _quantized,
    "rowwise": _rowwise,
    "dynamic": _dynamic,
    "norms": _norms,
    "gates": _gates,
    "attention": _attention,
}


def session(alternative: Alternative, example: dict[str, np.ndarray], threads: int) -> ort.InferenceSession:
    """Loads one alternative as a model of its own."""
    inputs = [helper.make_tensor_value_info(k, 1, [1, "rows", v.shape[-1]]) for k, v in example.items()]
    constants = [numpy_helper.from_array(v, k) for k, v in alternative.constants.items()]
    outputs = [helper.make_tensor_value_info("y", 1, None)]
    graph = helper.make_graph(alternative.nodes, "choice", inputs, outputs, constants)
    imports = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    model = helper.make_model(graph, opset_imports=imports, ir_version=11)
    return ort.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])


def measure(choice: Choice, rows: int, threads: int, seconds: float) -> list[float]:
    """Median seconds of each alternative, run in turn until the time is over, at least five times each."""
    feed = choice.inputs(rows)
    sessions = [session(a, feed, threads) for a in choice.alternatives]
    times: list[list[float]] = [[] for _ in sessions]
    for runner in sessions:
        runner.run(None, feed)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for runner, held in zip(sessions, times, strict=True):
            started = time.perf_counter()
            runner.run(None, feed)
            held.append(time.perf_counter() - started)
    return [statistics.median(t) for t in times]


def main() -> None:
    """Prints one line per choice and number of rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("choices", nargs="*", help=f"of {', '.join(CHOICES)}; all if none is given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="per line")
    args = parser.parse_args()
    unknown = set(args.choices) - set(CHOICES)
    if unknown:
        parser.error(f"expected choices among {', '.join(CHOICES)}; found {', '.join(sorted(unknown))}")
    for name in args.choices or CHOICES:
        for choice in CHOICES[name]():
            for rows in choice.rows:
                times = measure(choice, rows, args.threads, args.seconds)
                others = zip(choice.alternatives[1:], times[1:], strict=True)
                ratios = ", ".join(f"{a.name} {t / times[0]:.2f}x" for a, t in others)
                print(
                    f"{choice.name}, {rows} rows: {choice.alternatives[0].name} {times[0] * 1e6:.0f} us; {ratios}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
