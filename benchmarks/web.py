"""Times what ``ort-web`` chooses in WebAssembly, in Node: kernels of one product, and whole artifacts.

Usage: ``python benchmarks/web.py [kernels] [MODEL ...] [--rounds 60] [--json]``

Needs the packages that ``.ci/tools`` installs. Sessions alternate in one process on one thread; printed is the smallest
processor time of a run in milliseconds, and its ratio to the first line's. For a model (``builtin:tiny-llama`` or a
directory) it compiles ``float``, ``w4`` and ``w8a8-dynamic`` for ``ort-web``, and ``w4`` for ``ort-cpu``, and times
64 tokens at once and, for a decoder, one token after 64.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import qc
from qc.backends.artifact import Artifact

ROOT = Path(__file__).resolve().parent.parent
K, N = 384, 1536

Plan = dict[str, dict[str, Any]]


def _kernels(work: Path, rows: int) -> Plan:
    """One product ``[rows, K] x [K, N]``, in the ways that a model can ask for it."""
    rng = np.random.default_rng(0)
    signed = rng.integers(-127, 128, (K, N)).astype(np.int8)
    packed = rng.integers(0, 256, (N, K // 32, 16)).astype(np.uint8)
    constants = {
        "weight": rng.standard_normal((K, N)).astype(np.float32),
        "codes": signed,
        "rows": np.ascontiguousarray(signed.T),
        "packed": packed,
        "bytes": packed.reshape(N, -1).repeat(2, 1).reshape(N, K // 32, 32),
        "blocks": np.full(N * K // 32, 0.01, np.float32),
        "grid": np.full((N, K // 32), 0.01, np.float32),
        "scales": np.full(N, 0.01, np.float32),
        "scale": np.array(0.02, np.float32),
        "zero": np.array(128, np.uint8),
        "centre": np.array(0, np.int8),
    }

    def own(op: str, inputs: list[str], **attributes: int) -> onnx.NodeProto:
        return helper.make_node(op, inputs, ["y"], domain="com.microsoft", **attributes)

    unsigned = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"])
    centred = helper.make_node("QuantizeLinear", ["x", "scale", "centre"], ["q"])
    decode = helper.make_node("DequantizeLinear", ["rows", "grid"], ["w"], axis=1, block_size=32)
    ways = {
        "float": [helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "u8 x s8": [unsigned, own("MatMulIntegerToFloat", ["q", "codes", "scale", "scales", "zero"])],
        "s8 x s8": [centred, own("MatMulIntegerToFloat", ["q", "codes", "scale", "scales", "centre"])],
        "MatMulNBits, 4 bits": [
            own("MatMulNBits", ["x", "packed", "blocks"], K=K, N=N, bits=4, block_size=32, accuracy_level=4)
        ],
        "MatMulNBits, 8 bits": [
            own("MatMulNBits", ["x", "bytes", "blocks"], K=K, N=N, bits=8, block_size=32, accuracy_level=4)
        ],
        "DequantizeLinear on each call": [decode, own("FusedMatMul", ["x", "w"], transB=1)],
    }
    plan: Plan = {}
    for name, nodes in ways.items():
        used = {i for n in nodes for i in n.input}
        held = [numpy_helper.from_array(a, k) for k, a in constants.items() if k in used]
        ports = [helper.make_tensor_value_info(v, TensorProto.FLOAT, ["m", d]) for v, d in (("x", K), ("y", N))]
        graph = helper.make_graph(nodes, "product", ports[:1], ports[1:], held)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        file = work / f"{len(plan)}.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), file)
        plan[name] = {"model": str(file), "data": [], "inputs": {"x": _input("float32", [rows, K], None)}}
    return plan


def _input(dtype: str, dims: list[int], value: int | None) -> dict[str, Any]:
    return {"dtype": dtype, "dims": dims, "value": value}


def _artifact(directory: Path, fresh: int, past: int) -> dict[str, Any]:
    artifact = Artifact.open(directory)
    inputs = {}
    for port in artifact.signature.inputs:
        if port.role in ("past_key", "past_value"):
            dims = [d if isinstance(d, int) else (past if axis else 1) for axis, d in enumerate(port.shape)]
            inputs[port.name] = _input("float32", dims, None)
        else:
            length = past + fresh if port.role == "mask" else fresh
            inputs[port.name] = _input("int64", [1, length], {"tokens": 5, "mask": 1}.get(port.role, 0))
    data = sorted(str(f) for f in directory.glob("model*.data"))
    return {"model": str(directory / "model.onnx"), "data": data, "inputs": inputs}


def _models(source: str, work: Path) -> Mapping[str, Path]:
    made = {}
    for recipe, target in (("float", "ort-web"), ("w8a8-dynamic", "ort-web"), ("w4", "ort-web"), ("w4", "ort-cpu")):
        made[f"{recipe} for {target}"] = work / f"{recipe}-{target}"
        qc.compile(source, work / f"{recipe}-{target}", recipe=recipe, target=target, force=True)
    return made


def _time(plan: Plan, rounds: int, work: Path) -> dict[str, float]:
    file = work / "plan.json"
    file.write_text(json.dumps(plan))
    script = ROOT / "build" / "node" / "web.mjs"
    script.write_text((ROOT / "benchmarks" / "web.mjs").read_text())  # beside node_modules, where it finds the runtime
    done = subprocess.run(["node", script, file, str(rounds)], capture_output=True, text=True, check=True)
    return {name: min(times) for name, times in json.loads(done.stdout.splitlines()[-1]).items()}


def _size(directory: Path) -> str:
    files = [directory / "model.onnx", *directory.glob("model*.data")]
    return f"{sum(f.stat().st_size for f in files) / 2**20:.1f} MiB"


def main() -> None:
    """Times what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=["kernels"])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for what in arguments.what:
            if what == "kernels":
                for rows in (1, 16, 64):
                    found[f"{rows} x {K} x {N}"] = _time(_kernels(work, rows), arguments.rounds, work)
                continue
            made = _models(what, work)
            decoder = Artifact.open(next(iter(made.values()))).signature.is_decoder
            for fresh, past in ((64, 0), (1, 64))[: 1 + decoder]:
                plan = {f"{name} ({_size(d)})": _artifact(d, fresh, past) for name, d in made.items()}
                found[f"{what}, {fresh} tokens after {past}"] = _time(plan, arguments.rounds, work)
    if arguments.json:
        print(json.dumps(found))
        return
    for title, times in found.items():
        print(f"\n{title}")
        first = next(iter(times.values()))
        for name, best in times.items():
            print(f"  {name:45} {best:9.3f} ms {best / first:8.2f}")


if __name__ == "__main__":
    main()
