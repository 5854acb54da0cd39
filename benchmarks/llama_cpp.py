"""llama.cpp as a side of a comparison: decoders of `memory` as GGUF files, run by its own library.

What it needs is installed into the work directory: the library, compiled for each kind of processor, from a package of
``node-llama-cpp``; and ``gguf``, which writes its files. The library runs in this process, by its C interface.
"""

from __future__ import annotations

import ctypes
import json
import math
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import ml_dtypes
import numpy as np
from memory import Shape

from qc.ir.model import Signature

__all__ = ["LlamaCpp", "missing", "write_gguf"]

PACKAGES = {
    "x86_64": "@node-llama-cpp/linux-x64@3.22.1",
    "aarch64": "@node-llama-cpp/linux-arm64@3.22.1",
}


def missing(work: Path) -> str:
    """Installs what is needed below `work`; returns why that is not possible, or nothing."""
    place, package = work / "llama.cpp", PACKAGES.get(platform.machine(), "")
    if not place.is_dir():
        if shutil.which("npm") is None or not package or sys.platform != "linux":
            return "it needs npm, on Linux for x86-64 or arm64"
        place.mkdir(parents=True)
        command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", package]
        if subprocess.run(command, cwd=place, capture_output=True, check=False).returncode:
            place.rmdir()
            return f"npm cannot install {package}"
    if not (work / "gguf").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(work / "gguf"), "gguf"]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            return "pip cannot install gguf"
    if str(work / "gguf") not in sys.path:
        sys.path.append(str(work / "gguf"))
    return ""


def write_gguf(source: Path, shape: Shape, file: Path) -> None:
    """Writes a decoder of `memory.write_model` with its matrices in Q4_0, one at a time."""
    import gguf

    kind, part = gguf.GGMLQuantizationType.Q4_0, file.with_suffix(".part")
    head = shape.width // shape.heads
    writer = gguf.GGUFWriter(part, "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.width)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_tokenizer_model("none")
    weights = dict(_weights(source))
    for name, (_, dims, _) in weights.items():
        matrix = len(dims) == 2
        size = math.prod(dims) // 32 * 18 if matrix else 4 * math.prod(dims)
        stored = gguf.quant_shape_to_byte_shape(dims, kind) if matrix else dims
        dtype = np.dtype(np.uint8 if matrix else np.float32)
        writer.add_tensor_info(_name(name), stored, dtype, size, kind if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, (shard, dims, offset) in weights.items():
        stored = np.memmap(shard, ml_dtypes.bfloat16, "r", offset, dims)
        array = _interleaved(stored, head) if "q_proj" in name or "k_proj" in name else stored
        writer.write_tensor_data(
            gguf.quantize(np.ascontiguousarray(array, np.float32), kind) if len(dims) == 2 else array.astype(np.float32)
        )
    writer.close()
    part.rename(file)


def _weights(source: Path) -> Iterator[tuple[str, tuple[Path, tuple[int, ...], int]]]:
    """Where each weight of a directory lies: its file, shape and offset."""
    for shard in sorted(source.glob("*.safetensors")):
        with shard.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            for name, entry in json.loads(stream.read(length)).items():
                if name != "__metadata__":
                    yield name, (shard, tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])


def _interleaved(weight: np.ndarray, head: int) -> np.ndarray:
    """Rows in the order of llama.cpp, which rotates neighbours instead of halves."""
    return weight.reshape(-1, 2, head // 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers.": "blk.",
}  # fmt: skip


def _name(name: str) -> str:
    for old, new in _NAMES.items():
        name = name.replace(old, new)
    return name


class _Opaque(ctypes.Structure):
    """Parameters with their defaults, as the library yields and takes them: at least as large as what it reads."""

    _fields_ = (("content", ctypes.c_char * 4096),)


class _Batch(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int32), *((name, ctypes.c_void_p) for name in "abcdef"))


class LlamaCpp:
    """A GGUF file, run as artifacts are.

    Attributes:
        signature: That of the model it was made from.
        provenance: Facts about its source.
    """

    def __init__(self, file: Path, signature: Signature, work: Path, *, threads: int) -> None:
        """Loads `file`, with the library that `missing` has installed below `work`."""
        self.signature, self.provenance = signature, dict[str, str]()
        logits = signature.output("logits")
        assert logits is not None
        self._vocabulary = logits.shape[-1]
        binaries = next(work.glob("llama.cpp/node_modules/@node-llama-cpp/*/bins/*"))
        ggml, self._llama = (ctypes.CDLL(str(next(binaries.glob(f"lib{name}.v*")))) for name in ("ggml", "llama"))
        self._declare()
        self._quiet = _LOGGER(lambda level, text, user: None)
        self._llama.llama_log_set(self._quiet, None)
        ggml.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
        ggml.ggml_backend_load_all_from_path(str(binaries).encode())
        self._llama.llama_backend_init()
        self._model = self._llama.llama_model_load_from_file(
            str(file).encode(), self._llama.llama_model_default_params()
        )
        self._context = self._llama.llama_init_from_model(self._model, self._llama.llama_context_default_params())
        if not self._context:
            raise SystemExit(f"llama.cpp does not load {file}.")
        self._llama.llama_set_n_threads(self._context, threads, threads)

    def close(self) -> None:
        """Frees its memory."""
        self._llama.llama_free(self._context)
        self._llama.llama_model_free(self._model)

    def generate(self, tokens: Sequence[int], max_tokens: int) -> Iterator[int]:
        """Yields greedily chosen tokens after a prompt."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        new = tokens
        for _ in range(max_tokens):
            held = (ctypes.c_int32 * len(new))(*new)
            if self._llama.llama_decode(self._context, self._llama.llama_batch_get_one(held, len(new))):
                raise SystemExit("llama.cpp does not run.")
            logits = self._llama.llama_get_logits_ith(self._context, -1)
            new = (int(np.ctypeslib.as_array(logits, (self._vocabulary,)).argmax()),)
            yield new[0]

    def _declare(self) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int32
        functions = {
            "llama_log_set": (None, [_LOGGER, pointer]),
            "llama_model_default_params": (_Opaque, []),
            "llama_context_default_params": (_Opaque, []),
            "llama_model_load_from_file": (pointer, [ctypes.c_char_p, _Opaque]),
            "llama_init_from_model": (pointer, [pointer, _Opaque]),
            "llama_free": (None, [pointer]),
            "llama_model_free": (None, [pointer]),
            "llama_set_n_threads": (None, [pointer, number, number]),
            "llama_get_memory": (pointer, [pointer]),
            "llama_memory_clear": (None, [pointer, ctypes.c_bool]),
            "llama_batch_get_one": (_Batch, [ctypes.POINTER(number), number]),
            "llama_decode": (number, [pointer, _Batch]),
            "llama_get_logits_ith": (ctypes.POINTER(ctypes.c_float), [pointer, number]),
        }
        for name, (result, arguments) in functions.items():
            function = getattr(self._llama, name)
            function.restype, function.argtypes = result, arguments


_LOGGER = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
