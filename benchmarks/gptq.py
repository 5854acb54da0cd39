"""Time of range search and GPTQ for one layer, against other implementations at equal settings.

    python benchmarks/gptq.py [--size 4096] [--rounds 2] [--peers PYTHON] [--memory]

4 bits, asymmetric, groups of 128 with static parameters, columns sorted by the diagonal, damping 0.01, blocks of 128
columns, one thread. Each implementation runs in a process of its own, in turn; the table has the least processor time
of all rounds, the ratio to ours, and the error of the layer's outputs relative to that of nearest codes in our search.

* ``paper``: the algorithm of GPTQ as its authors' code has it, in torch, with the search over 80 shrunk ranges;
* ``llm-compressor``: `quantize_weight` and the search of its MSE observer, if PYTHON is an interpreter that has it:

    python -m venv peers && peers/bin/pip install llmcompressor hqq auto-round onnxruntime

A second table has quantizers that choose ranges only, each beside our search in the same format: ONNX Runtime's default
(the range of each group, no search) and its ``k_quant``, and, if PYTHON has them, HQQ and the search of AutoRound.

`--memory` instead prints the peak of anonymous memory while one layer of 4096 x 11008 is quantized, two sweeps
included, its weight and second moments too. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import numpy as np

GROUP, BITS, DAMPING, BLOCK = 128, 4, 0.01, 128
Timed = tuple[np.ndarray, np.ndarray, float, float]
"""Decoded by search, decoded by GPTQ, seconds of each (that of GPTQ without the search)."""


def layer(size: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight, and the second moments of inputs with a few strong directions."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((size, size), dtype=np.float32)
    mix = rng.standard_normal((64, size), dtype=np.float32) * np.exp(rng.standard_normal(size, dtype=np.float32))
    x = rng.standard_normal((2 * size, 64), dtype=np.float32) @ mix / 8
    x += rng.standard_normal((2 * size, size), dtype=np.float32)
    return weight, (x.T @ x).astype(np.float64) / len(x)


def ours(weight: np.ndarray, gram: np.ndarray) -> Timed:
    """The library's own."""
    from qc.ir.quant import Format
    from qc.passes.quantize.assign import assign
    from qc.passes.quantize.gptq import Hessian, gptq

    format = Format.parse(f"uint{BITS}:g{GROUP}")
    started = time.process_time()
    nearest = assign(weight, format, np.diagonal(gram))
    searched = time.process_time()
    rounded = gptq(weight, format, Hessian(gram, damping=DAMPING))
    done = time.process_time()
    search = searched - started
    return nearest.decode(), rounded.decode(), search, done - searched - search  # gptq() searches too


def paper(weight: np.ndarray, gram: np.ndarray, bits: int = BITS, width: int = GROUP) -> Timed:
    """The published algorithm, blocked, on the inverse of the matrix; groups of `width` divide rows."""
    import torch

    w, h = torch.from_numpy(weight).clone(), torch.from_numpy(gram).float()
    started = time.process_time()
    grouped = w.reshape(-1, width)
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    top = 2**bits - 1
    best, scale, zero = torch.full_like(low, torch.inf), torch.ones_like(low), torch.zeros_like(low)
    for i in range(80):
        shrunk = 1 - i / 100
        s = shrunk * (high - low) / top
        z = torch.round(-shrunk * low / s)
        q = torch.clamp(torch.round(grouped / s[:, None]) + z[:, None], 0, top)
        error = ((s[:, None] * (q - z[:, None]) - grouped).abs_().pow_(2.4)).sum(1)
        better = error < best
        best, scale, zero = (torch.where(better, a, b) for a, b in ((error, best), (s, scale), (z, zero)))
    scale, zero = scale.reshape(len(w), -1), zero.reshape(len(w), -1)
    nearest = _decoded(w, scale.repeat_interleave(width, 1), zero.repeat_interleave(width, 1), top)
    searched = time.process_time()
    order = torch.argsort(torch.diagonal(h), descending=True)
    w, h = w[:, order], h[order][:, order]
    h += DAMPING * torch.diagonal(h).mean() * torch.eye(len(h))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.zeros_like(w)
    for a in range(0, len(h), BLOCK):
        block = slice(a, a + BLOCK)
        part, factor = w[:, block].clone(), inverse[block, block]
        errors = torch.zeros_like(part)
        for i in range(part.shape[1]):
            group = order[a + i] // width
            value = _decoded(part[:, i], scale[:, group], zero[:, group], top)
            q[:, a + i] = value
            errors[:, i] = (part[:, i] - value) / factor[i, i]
            part[:, i:] -= errors[:, i, None] @ factor[i, None, i:]
        w[:, a + BLOCK :] -= errors @ inverse[block, a + BLOCK :]
    result = q[:, torch.argsort(order)]
    return nearest.numpy(), result.numpy(), searched - started, time.process_time() - searched


def _decoded(w, scale, zero, top):
    return ((w / scale).round() + zero).clamp(0, top).sub(zero).mul(scale)


def llm_compressor(weight: np.ndarray, gram: np.ndarray, bits: int = BITS, width: int = GROUP) -> Timed:
    """llm-compressor, its public functions."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, fake_quantize
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import Observer

    arguments = QuantizationArgs(
        num_bits=bits, type="int", symmetric=False, strategy="group", group_size=width, actorder="static",
        observer="memoryless_mse",
    )  # fmt: skip
    w, h = torch.from_numpy(weight), torch.from_numpy(gram).float()
    observer = Observer.load_from_registry(arguments.observer, base_name="weight", args=arguments)
    started = time.process_time()
    observer(w)
    found = observer.get_qparams()
    scale, zero = found["scale"], found["zero_point"]
    nearest = fake_quantize(w, scale, zero, arguments)
    searched = time.process_time()
    done, _, _ = quantize_weight(
        w.clone()[None], h.clone()[None], scale[None], zero[None], None, arguments, BLOCK, DAMPING
    )
    return nearest.numpy(), done[0].numpy(), searched - started, time.process_time() - searched


IMPLEMENTATIONS: dict[str, Callable[[np.ndarray, np.ndarray], Timed]] = {
    "qc": ours,
    "paper": paper,
    "llm-compressor": llm_compressor,
}


def onnxruntime_default(weight: np.ndarray) -> tuple[np.ndarray, float]:
    """The range of each group, by the function in C++ that the runtime's tools call."""
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    rows, columns = weight.shape
    turned = np.ascontiguousarray(weight.T)
    blocks = columns // GROUP
    codes = np.zeros((rows, blocks, GROUP // 2), np.uint8)
    scale, zero = np.zeros(rows * blocks, np.float32), np.zeros((rows, blocks // 2), np.uint8)
    started = time.process_time()
    quantize_matmul_4bits(codes, turned, scale, zero.reshape(-1), GROUP, rows, columns, False)
    done = time.process_time() - started
    unpacked = np.stack([codes & 15, codes >> 4], -1).reshape(rows, blocks, GROUP).astype(np.float32)
    zeros = np.stack([zero & 15, zero >> 4], -1).reshape(rows, blocks, 1).astype(np.float32)
    return ((unpacked - zeros) * scale.reshape(rows, blocks, 1)).reshape(weight.shape), done


def onnxruntime_k_quant(weight: np.ndarray) -> tuple[np.ndarray, float]:
    """The search of the runtime's tools, in numpy."""
    from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu

    started = time.process_time()
    codes, scale, zero = quant_tensor_k_quant_cpu(weight, num_bits=BITS, group_size=GROUP)
    done = time.process_time() - started
    return ((codes.astype(np.float32) - zero) * scale).reshape(weight.shape), done


def hqq(weight: np.ndarray) -> tuple[np.ndarray, float]:
    """Half-quadratic quantization, with its own number of steps and its zero points in float."""
    import torch
    from hqq.core.quantize import Quantizer

    w = torch.from_numpy(weight)
    started = time.process_time()
    codes, facts = Quantizer.quantize(
        w, nbits=BITS, group_size=GROUP, axis=1, device="cpu", compute_dtype=torch.float32
    )  # fmt: skip
    done = time.process_time() - started
    return Quantizer.dequantize(codes, facts).numpy(), done


def auto_round(weight: np.ndarray) -> tuple[np.ndarray, float]:
    """The search of AutoRound before it learns, which is symmetric."""
    import torch
    from auto_round.data_type.int import quant_tensor_opt_rtn_sym

    w = torch.from_numpy(weight)
    started = time.process_time()
    found = quant_tensor_opt_rtn_sym(w, bits=BITS, group_size=GROUP)[0]
    return found.numpy(), time.process_time() - started


SEARCHES: dict[str, tuple[str, Callable[[np.ndarray], tuple[np.ndarray, float]]]] = {
    "onnxruntime": ("uint4:g128", onnxruntime_default),
    "k_quant": ("uint4:g128", onnxruntime_k_quant),
    "hqq": ("uint4:g128", hqq),
    "auto-round": ("int4:g128", auto_round),
}
"""The format of each, and what it decodes to with the seconds that it took."""

_OURS = "qc "
"""Before the format of our search, where workers are named."""


def our_search(weight: np.ndarray, spelling: str) -> tuple[np.ndarray, float]:
    """Our search in a format, without second moments."""
    from qc.ir.quant import Format
    from qc.passes.quantize.assign import assign

    started = time.process_time()
    tensor = assign(weight, Format.parse(spelling))
    done = time.process_time() - started
    return tensor.decode(), done


def search_only(name: str, size: int) -> None:
    """Runs one search and prints its figures."""
    weight = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    if name.startswith(_OURS):
        found, seconds = our_search(weight, name.removeprefix(_OURS))
    else:
        found, seconds = SEARCHES[name][1](weight)
    print(json.dumps({"search": seconds, "error": float(np.sum((weight - found) ** 2))}))


def memory() -> None:
    """Quantizes one large layer and prints the peak of anonymous memory."""
    from qc.ir.quant import Format
    from qc.passes.quantize.gptq import Hessian, gptq

    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4096, 11008), dtype=np.float32)
    gram = np.zeros((11008, 11008), np.float32)
    for _ in range(8):
        x = rng.standard_normal((1024, 11008), dtype=np.float32)
        gram += x.T @ x / len(x) / 8
    del x
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.02):
            with open("/proc/self/status", encoding="ascii") as status:
                held = next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
            peak = max(peak, held)

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.process_time()
    gptq(weight, Format.parse("uint4:g128"), Hessian(gram), sweeps=2)
    seconds = time.process_time() - started
    done.set()
    watcher.join()
    print(f"4096 x 11008 in groups of 128: {peak / (1 << 20):.2f} GiB of anonymous memory, {seconds:.0f} s")


def work(name: str, size: int) -> None:
    """Runs one implementation and prints its figures as JSON on the last line."""
    if name not in IMPLEMENTATIONS:
        return search_only(name, size)
    weight, gram = layer(size)
    nearest, rounded, search, gptq = IMPLEMENTATIONS[name](weight, gram)
    rows = slice(0, 64)
    losses = [float(np.einsum("nk,nk->", d @ gram, d)) for d in (weight[rows] - v[rows] for v in (nearest, rounded))]
    print(json.dumps({"search": search, "gptq": gptq, "nearest": losses[0], "rounded": losses[1]}))
    return None


def compare_searches(options: argparse.Namespace) -> None:
    """Prints the table of quantizers without feedback, each against our search in its format."""
    print(f"\n{'':<16}{'format':>12}{'search s':>10}{'ours':>7}{'ratio':>7}{'error to ours':>15}")
    for name, (spelling, _) in SEARCHES.items():
        python = sys.executable if name in ("onnxruntime", "k_quant") else options.peers
        if python is None:
            continue
        runs = {who: [] for who in (name, _OURS + spelling)}
        for _ in range(options.rounds):
            for who, found in runs.items():
                found.append(run_worker(sys.executable if who.startswith(_OURS) else python, who, options.size))
        theirs, ours_ = ({key: min(r[key] for r in found) for key in found[0]} for found in runs.values())
        ratio = theirs["search"] / ours_["search"]
        print(f"{name:<16}{spelling:>12}{theirs['search']:>10.2f}{ours_['search']:>7.2f}{ratio:>7.2f}"
              f"{theirs['error'] / ours_['error']:>15.3f}", flush=True)  # fmt: skip


def run_worker(python: str, name: str, size: int) -> dict[str, float]:
    """Runs an implementation in a process of its own, on one thread."""
    command = [python, __file__, "--worker", name, "--size", str(size)]
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, env=threads, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", help="an interpreter with llm-compressor")
    parser.add_argument("--memory", action="store_true", help="measure memory of a large layer instead")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory:
        return memory()
    if options.worker:
        return work(options.worker, options.size)
    interpreters = {"qc": sys.executable, "paper": sys.executable} | (
        {"llm-compressor": options.peers} if options.peers else {}
    )
    found: dict[str, list[dict[str, float]]] = {name: [] for name in interpreters}
    for _ in range(options.rounds):
        for name, python in interpreters.items():
            found[name].append(run_worker(python, name, options.size))
    best = {name: {key: min(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    base = best["qc"]
    print(f"{'':<16}{'search s':>10}{'ratio':>7}{'gptq s':>9}{'ratio':>7}{'both':>7}{'error: search':>15}{'gptq':>8}")
    for name, run in best.items():
        both = (run["search"] + run["gptq"]) / (base["search"] + base["gptq"])
        print(
            f"{name:<16}{run['search']:>10.1f}{run['search'] / base['search']:>7.2f}{run['gptq']:>9.1f}"
            f"{run['gptq'] / base['gptq']:>7.2f}{both:>7.2f}{run['nearest'] / base['nearest']:>15.3f}"
            f"{run['rounded'] / base['nearest']:>8.3f}"
        )
    return compare_searches(options)


if __name__ == "__main__":
    main()
