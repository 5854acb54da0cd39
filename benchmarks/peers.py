"""Weight quantizers of others, each in an environment of its own: matrices in, what they decode to out.

    python benchmarks/peers.py --make DIR [NAME ...]     # makes the environments DIR/NAME with pip
    python benchmarks/accuracy.py ... --peers DIR        # runs what is there

Each environment has the torch of this one, and nothing of qc is imported there. What they get of the calibration text
are the second moments of each product's inputs; where a tool wants inputs, it gets as many as channels, with these
moments.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

Decoded = tuple[np.ndarray, float]
"""What a weight decodes to, and its stored bits."""

PACKAGES = {
    "hqq": ["hqq"],
    "llama.cpp": ["gguf"],
    "auto-round": ["auto-round"],
    "llm-compressor": ["llmcompressor"],
    "torchao": ["torchao"],
    "nncf": ["nncf"],
    "olive": ["olive-ai", "transformers"],
}
"""What each environment needs beside torch."""


def affine_bits(weight: np.ndarray, bits: int, group: int, scale: int = 32, zero: int | None = None) -> float:
    """Codes, and a scale and a zero point (of as many bits as codes) per group."""
    rows, columns = weight.shape
    return rows * (columns * bits + -(-columns // group) * (scale + (bits if zero is None else zero)))


def by_hqq(weight: np.ndarray, gram: np.ndarray, bits: int, group: int) -> Decoded:
    """Half-quadratic quantization; scale and zero point in half precision."""
    import torch
    from hqq.core.quantize import Quantizer

    codes, facts = Quantizer.quantize(
        torch.from_numpy(weight), nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
    )
    return Quantizer.dequantize(codes, facts).numpy(), affine_bits(weight, bits, group, 16, 16)


def by_llama_cpp(name: str) -> Callable[[np.ndarray, np.ndarray, int, int], Decoded]:
    """A format that the Python package can write."""

    def run(weight: np.ndarray, gram: np.ndarray, bits: int, group: int) -> Decoded:
        import gguf

        kind = gguf.GGMLQuantizationType[name]
        stored = gguf.quantize(weight, kind)
        return gguf.dequantize(stored, kind), 8 * stored.nbytes

    return run


def by_auto_round(weight: np.ndarray, gram: np.ndarray, bits: int, group: int) -> Decoded:
    """The search of AutoRound before it learns: symmetric."""
    import torch
    from auto_round.data_type.int import quant_tensor_opt_rtn_sym

    found = quant_tensor_opt_rtn_sym(torch.from_numpy(weight), bits=bits, group_size=group)[0]
    return found.numpy(), affine_bits(weight, bits, group, zero=0)


def by_llm_compressor(weight: np.ndarray, gram: np.ndarray, bits: int, group: int) -> Decoded:
    """GPTQ with its search over ranges and sorted columns."""
    from gptq import llm_compressor

    return llm_compressor(weight, gram, bits, group)[1], affine_bits(weight, bits, group)


def by_torchao(algorithm: str) -> Callable[[np.ndarray, np.ndarray, int, int], Decoded]:
    """Weight-only integers: ``affine`` takes the range of each group, ``hqq_scale_only`` searches symmetric scales."""

    def run(weight: np.ndarray, gram: np.ndarray, bits: int, group: int) -> Decoded:
        import torch
        from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerGroup, quantize_

        symmetric = algorithm != "affine"
        config = IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{bits}"),
            granularity=PerGroup(group),
            mapping_type=MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC,
            intx_choose_qparams_algorithm=algorithm,
        )
        layer = _linear(weight)
        quantize_(layer, config)
        decoded = layer.linear.weight.dequantize().detach().numpy()
        return decoded, affine_bits(weight, bits, group, zero=0 if symmetric else None)

    return run


def by_nncf(*, estimate: bool) -> Callable[[np.ndarray, np.ndarray, int, int], Decoded]:
    """``compress_weights``, 4 bits, without data or with its estimation of scales on inputs."""

    def run(weight: np.ndarray, gram: np.ndarray, bits: int, group: int) -> Decoded:
        import nncf
        import torch

        samples = _inputs(gram)
        rows = [torch.from_numpy(samples[i : i + 1]) for i in range(len(samples))]
        layer = nncf.compress_weights(
            _linear(weight),
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            group_size=group,
            all_layers=True,
            dataset=nncf.Dataset(rows),
            subset_size=len(rows),
            scale_estimation=estimate,
        )
        with torch.no_grad():
            decoded = layer(torch.eye(weight.shape[1])).numpy().T
        return decoded, affine_bits(weight, bits, group, 16)

    return run


def by_olive(*, feedback: bool) -> Callable[[np.ndarray, np.ndarray, int, int], Decoded]:
    """Olive's own round to nearest, or its GPTQ."""

    def run(weight: np.ndarray, gram: np.ndarray, bits: int, group: int) -> Decoded:
        from types import SimpleNamespace

        import torch
        from olive.common.quant.utils import WeightQuantizer
        from olive.passes.pytorch.gptq import Gptq

        quantizer, layer = WeightQuantizer(bits=bits, symmetric=False, group_size=group), _linear(weight).linear
        if feedback:
            data = {"H": torch.from_numpy(2 * gram).float(), "N": 1}
            layer.quant_info = SimpleNamespace(quantizer=quantizer, data=data)
            Gptq.process_module(layer)
            decoded = layer.weight.data
        else:
            w = torch.from_numpy(weight)
            decoded = quantizer.fake_quantize(w, *quantizer.find_qparams(w))
        return decoded.float().numpy(), affine_bits(weight, bits, group)

    return run


def _linear(weight: np.ndarray):
    """A module with one product."""
    import torch

    class Product(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            self.linear.weight.data = torch.from_numpy(np.array(weight))
            self.linear.weight.requires_grad_(False)

        def forward(self, x):
            return self.linear(x)

    return Product()


def _inputs(gram: np.ndarray) -> np.ndarray:
    """As many inputs as channels, with these second moments."""
    values, vectors = np.linalg.eigh(gram)
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal(gram.shape))[0]
    root = vectors * np.sqrt(np.maximum(values, 0))
    return (np.sqrt(len(gram)) * turn @ root.T).astype(np.float32)


QUANTIZERS: dict[str, tuple[str, tuple[int, ...], Callable[[np.ndarray, np.ndarray, int, int], Decoded]]] = {
    "hqq": ("hqq", (2, 3, 4), by_hqq),
    "llama.cpp, Q4_0": ("llama.cpp", (4,), by_llama_cpp("Q4_0")),
    "llama.cpp, Q4_1": ("llama.cpp", (4,), by_llama_cpp("Q4_1")),
    "auto-round, without learning": ("auto-round", (2, 3, 4), by_auto_round),
    "llm-compressor, gptq": ("llm-compressor", (2, 3, 4), by_llm_compressor),
    "torchao": ("torchao", (2, 3, 4), by_torchao("affine")),
    "torchao, hqq": ("torchao", (2, 3, 4), by_torchao("hqq_scale_only")),
    "nncf": ("nncf", (4,), by_nncf(estimate=False)),
    "nncf, scale estimation": ("nncf", (4,), by_nncf(estimate=True)),
    "olive": ("olive", (2, 4), by_olive(feedback=False)),
    "olive, gptq": ("olive", (2, 4), by_olive(feedback=True)),
}
"""By name: the environment, the widths that it has, and the function."""


def make(directory: Path, names: Sequence[str]) -> None:
    """Makes environments; one that cannot be made is reported, and the others follow."""
    torch = f"torch=={importlib.metadata.version('torch').partition('+')[0]}"
    for name in names or PACKAGES:
        home = directory / name
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        extra = [] if name == "llama.cpp" else [torch]
        command = [home / "bin" / "python", "-m", "pip", "install", "--quiet", *extra, *PACKAGES[name]]
        failed = subprocess.run(command, check=False).returncode
        print(f"{name}: {'pip failed' if failed else 'ready'}", flush=True)


def work(name: str, source: Path, target: Path) -> None:
    """Quantizes all matrices of a file by one quantizer, in this process."""
    data, found = np.load(source), {}
    bits, group = (int(n) for n in data["settings"])
    for key in [k for k in data.files if k.startswith("weight")]:
        decoded, stored = QUANTIZERS[name][2](data[key], data[key.replace("weight", "gram")], bits, group)
        found |= {key: np.asarray(decoded, np.float32), key.replace("weight", "bits"): np.float64(stored)}
    np.savez(target, **found)


def run(
    directory: Path, name: str, weights: Sequence[np.ndarray], grams: Sequence[np.ndarray], bits: int, group: int
) -> Iterator[Decoded]:
    """Quantizes matrices by one quantizer, in its environment.

    Raises:
        ImportError: If the environment is not there, or the quantizer failed.
    """
    python = directory / QUANTIZERS[name][0] / "bin" / "python"
    if not python.exists():
        raise ImportError(f"no environment {python.parent.parent}")
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "in.npz"), Path(folder, "out.npz")
        arrays = {f"weight{i}": w for i, w in enumerate(weights)} | {f"gram{i}": g for i, g in enumerate(grams)}
        np.savez(source, settings=np.array([bits, group]), **arrays)
        command = [python, __file__, "--run", name, source, target]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ImportError((done.stderr.strip().splitlines() or ["failed without a message"])[-1])
        with np.load(target) as found:
            yield from [(found[f"weight{i}"], float(found[f"bits{i}"])) for i in range(len(weights))]


def main() -> None:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--make", type=Path, metavar="DIR", help="make environments there")
    parser.add_argument("--run", nargs=3, metavar=("NAME", "IN", "OUT"), help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help=f"environments to make, of {', '.join(PACKAGES)}; all by default")
    options = parser.parse_args()
    if options.run:
        name, source, target = options.run
        work(name, Path(source), Path(target))
    elif options.make:
        make(options.make.absolute(), options.names)
    else:
        parser.error("expected --make DIR")


if __name__ == "__main__":
    main()
