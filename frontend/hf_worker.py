"""The worker process: ``python -m qc.frontend.hf_worker DIR WORK`` exports a Hugging Face directory into WORK.

The graph, ``model.onnx``, holds no weights: its external data name the safetensors files of DIR. torch and its memory
leave with the process. The outcome is ``outcome.json``: ``{}``, or ``{"error": class name, "message": text}``.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qc.frontend.prequantized import Packed, split_checkpoint
from qc.frontend.roles import assign_roles
from qc.frontend.safetensors_file import Entry, open_checkpoint
from qc.frontend.weights import bind, bind_quantized
from qc.ir.errors import InputError, QcError, UnsupportedError
from qc.ir.model import Model
from qc.ir.simplify import infer_shapes
from qc.ir.store import Store

__all__ = ["export", "main"]

_INLINE = 64 * 1024
"""Bytes. A computed buffer up to this size is stored in the graph itself; rotary frequencies have a few hundred."""


def main(argv: list[str]) -> int:
    """Runs `export` and writes its outcome where the parent looks for it."""
    directory, work = Path(argv[0]), Path(argv[1])
    outcome: dict[str, str] = {}
    try:
        export(directory, work)
    except QcError as error:
        outcome = {"error": type(error).__name__, "message": str(error)}
    except ImportError as error:
        outcome = {
            "error": "InputError",
            "message": f"Importing {directory} needs PyTorch and transformers, found no {error.name!r}. "
            "Install them: pip install 'qc-compiler[torch]'.",
        }
    (work / "outcome.json").write_text(json.dumps(outcome), "utf-8")
    return 1 if outcome else 0


def export(directory: Path, work: Path) -> None:
    """Traces the model of `directory` and writes ``model.onnx`` and, if needed, a leftovers file into `work`.

    Raises:
        InputError: If the configuration or the checkpoint cannot be used.
        UnsupportedError: If the architecture cannot be traced.
    """
    checkpoint = open_checkpoint(directory)

    from torch._subclasses.fake_tensor import FakeTensor

    from qc.frontend import hf_checkpoint, hf_trace
    from qc.frontend.torch_export import exporter_versions

    config = _read_config(directory)
    checkpoint, packed = _split(config, checkpoint)
    model = hf_trace.build(config)
    graph_model = hf_trace.plan(model, _image_size(directory, config)).export()
    graph = graph_model.graph

    found = hf_checkpoint.match(model, checkpoint | {name: p.entry() for name, p in packed.items()})
    stored = model.state_dict()
    unmatched = [name for name in graph.initializers if name in stored and name not in found]
    computed = {}
    for name, value in graph.initializers.items():
        if name in stored or value.const_value is None:
            continue
        if isinstance(value.const_value.raw, FakeTensor):
            raise UnsupportedError(
                f"{type(model).__name__} computes {name!r} of its weights when it first runs, and keeps it: the export "
                "would miss its numbers. Export it to ONNX by other means and give that file."
            )
        if value.const_value.nbytes > _INLINE:
            computed[name] = value.const_value.raw.contiguous()
        else:
            value.const_value = ir.tensor(value.const_value.numpy().copy(), dtype=value.dtype, name=name)
    if unmatched and packed:
        raise UnsupportedError(
            f"{directory} holds no tensor for {unmatched[0]!r} that can be read without the library that quantized it. "
            "Give the float checkpoint it was made from."
        )
    found |= hf_checkpoint.write_leftovers(directory, work, type(model), unmatched, computed)
    quantized = {name: packed[e.key] for name, e in found.items() if e.key in packed and name in graph.initializers}
    bind(graph, {name: entry for name, entry in found.items() if name not in quantized})
    bind_quantized(graph_model, quantized, Store(work))
    infer_shapes(graph_model)

    result = Model.of(graph_model)
    assign_roles(result)
    result.record(
        source="huggingface",
        architecture=type(model).__name__,
        exporter=exporter_versions("transformers"),
        **_facts(config),
        **_pooling(directory),
    )
    result.producer_name, result.producer_version = "qc", None
    ir.save(result, work / "model.onnx")


def _read_config(directory: Path) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{directory / 'config.json'} is not a usable configuration: {error}") from error
    return config


def _split(config: Any, checkpoint: dict[str, Entry]) -> tuple[dict[str, Entry], dict[str, Packed]]:
    """Separates quantized weights from the other tensors; the configuration then is that of the float model."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return checkpoint, {}
    del config.quantization_config
    return split_checkpoint(found if isinstance(found, dict) else found.to_dict(), checkpoint)


def _image_size(directory: Path, config: Any) -> tuple[int, int]:
    """Height and width in pixels: from the configuration, else from the image processor's file, else 224."""
    size = getattr(getattr(config, "vision_config", config), "image_size", None)
    if size is None:
        size = _read_json(directory / "preprocessor_config.json").get("crop_size")
    if size is None:
        size = _read_json(directory / "preprocessor_config.json").get("size", 224)
    if isinstance(size, dict):
        size = (size.get("height", size.get("shortest_edge", 224)), size.get("width", size.get("shortest_edge", 224)))
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def _facts(config: Any) -> dict[str, Any]:
    text = config.get_text_config()
    facts = {
        "model_type": config.model_type,
        "max_positions": getattr(text, "max_position_embeddings", None),
        "vocab_size": getattr(text, "vocab_size", None),
        "bos": getattr(text, "bos_token_id", None),
        "eos": getattr(text, "eos_token_id", None),
        "decoder_start": getattr(config, "decoder_start_token_id", None),
    }
    return {key: value for key, value in facts.items() if value is not None}


def _pooling(directory: Path) -> dict[str, str]:
    """What a sentence encoder does after its transformer, from the module files beside it (or above it)."""
    root = next((d for d in (directory, directory.parent) if (d / "modules.json").is_file()), None)
    if root is None:
        return {}
    facts: dict[str, str] = {}
    for module in _read_json(root / "modules.json", []):
        if not isinstance(module, dict):
            continue
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind == "Pooling":
            modes = _read_json(root / str(module.get("path", "")) / "config.json")
            chosen = [k.removeprefix("pooling_mode_").removesuffix("_tokens").removesuffix("_token")
                      for k, on in modes.items() if k.startswith("pooling_mode_") and on is True]  # fmt: skip
            facts["pooling"] = chosen[0] if chosen else str(modes.get("pooling_mode", "mean"))
        if kind == "Normalize":
            facts["normalize"] = "true"
    return facts


def _read_json(file: Path, default: Any = None) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {} if default is None else default


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main(sys.argv[1:]))
