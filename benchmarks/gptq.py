"""Time of range search and GPTQ for one layer, against other implementations at equal settings.

    python benchmarks/gptq.py [--size 4096] [--rounds 2] [--peers PYTHON]

4 bits, asymmetric, groups of 128 with static parameters, columns sorted by the diagonal, damping 0.01, blocks of 128
columns, one thread. Each implementation runs in a process of its own, in turn; the table has the least processor time
of all rounds, the ratio to ours, and the error of the layer's outputs relative to that of nearest codes in our search.

* ``paper``: the algorithm of GPTQ as its authors' code has it, in torch, with the search over 80 shrunk ranges;
* ``llm-compressor``: `quantize_weight` and the search of its MSE observer, if PYTHON is an interpreter that has it:

    python -m venv peers && peers/bin/pip install llmcompressor
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
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


def paper(weight: np.ndarray, gram: np.ndarray) -> Timed:
    """The published algorithm, blocked, on the inverse of the matrix."""
    import torch

    w, h = torch.from_numpy(weight).clone(), torch.from_numpy(gram).float()
    started = time.process_time()
    grouped = w.reshape(-1, GROUP)
    low, high = grouped.amin(1).clamp(max=0), grouped.amax(1).clamp(min=0)
    top = 2**BITS - 1
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
    nearest = _decoded(w, scale.repeat_interleave(GROUP, 1), zero.repeat_interleave(GROUP, 1), top)
    searched = time.process_time()
    order = torch.argsort(torch.diagonal(h), descending=True)
    w, h = w[:, order], h[order][:, order]
    h += DAMPING * torch.diagonal(h).mean() * torch.eye(len(h))
    inverse = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    q = torch.zeros_like(w)
    for a in range(0, len(h), BLOCK):
        block = slice(a, a + BLOCK)
        part, errors, factor = w[:, block].clone(), torch.zeros(len(w), BLOCK), inverse[block, block]
        for i in range(BLOCK):
            group = order[a + i] // GROUP
            value = _decoded(part[:, i], scale[:, group], zero[:, group], top)
            q[:, a + i] = value
            errors[:, i] = (part[:, i] - value) / factor[i, i]
            part[:, i:] -= errors[:, i, None] @ factor[i, None, i:]
        w[:, a + BLOCK :] -= errors @ inverse[block, a + BLOCK :]
    result = q[:, torch.argsort(order)]
    return nearest.numpy(), result.numpy(), searched - started, time.process_time() - searched


def _decoded(w, scale, zero, top):
    return ((w / scale).round() + zero).clamp(0, top).sub(zero).mul(scale)


def llm_compressor(weight: np.ndarray, gram: np.ndarray) -> Timed:
    """llm-compressor, its public functions."""
    import torch
    from compressed_tensors.quantization import QuantizationArgs, fake_quantize
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import Observer

    arguments = QuantizationArgs(
        num_bits=BITS, type="int", symmetric=False, strategy="group", group_size=GROUP, actorder="static",
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


def work(name: str, size: int) -> None:
    """Runs one implementation and prints its figures as JSON on the last line."""
    weight, gram = layer(size)
    nearest, rounded, search, gptq = IMPLEMENTATIONS[name](weight, gram)
    rows = slice(0, 64)
    losses = [float(np.einsum("nk,nk->", d @ gram, d)) for d in (weight[rows] - v[rows] for v in (nearest, rounded))]
    print(json.dumps({"search": search, "gptq": gptq, "nearest": losses[0], "rounded": losses[1]}))


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", help="an interpreter with llm-compressor")
    parser.add_argument("--worker", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return work(options.worker, options.size)
    interpreters = {"qc": sys.executable, "paper": sys.executable} | (
        {"llm-compressor": options.peers} if options.peers else {}
    )
    found: dict[str, list[dict[str, float]]] = {name: [] for name in interpreters}
    for _ in range(options.rounds):
        for name, python in interpreters.items():
            command = [python, __file__, "--worker", name, "--size", str(options.size)]
            threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            done = subprocess.run(command, env=threads, capture_output=True, text=True, check=True)
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
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
    return None


if __name__ == "__main__":
    main()
