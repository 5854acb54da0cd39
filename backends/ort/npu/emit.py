"""Writes a lowered model as graphs of fixed shapes that share one file of weights, and what a runner must know."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qc.backends.manifest import dump_json
from qc.backends.ort.emit import stripped_copy
from qc.backends.ort.npu.device import write_context
from qc.backends.ort.npu.shapes import Dimensions, graph_sizes
from qc.backends.ort.npu.split import PAST, cache_grids, inside, outside
from qc.ir.model import Model, Port, port_of

__all__ = ["FACTS", "OUTER", "emit"]

FACTS, OUTER = "npu.json", "inputs.onnx"


def emit(
    model: Model,
    directory: Path,
    *,
    soc: int,
    length: int,
    prefill: int,
    cache: int,
    context: bool,
    sizes: Mapping[str, int],
) -> None:
    """Writes everything into an existing directory.

    Args:
        model: A lowered model; unchanged.
        directory: Where to.
        soc: The chip.
        length: Positions of an encoder.
        prefill: Positions that a decoder takes at once.
        cache: Positions that its cache holds.
        context: Whether to write what the graphs are compiled to.
        sizes: Sizes of further symbolic dimensions.
    """
    written = stripped_copy(model, directory)
    signature = written.signature
    dimensions = Dimensions(signature, sizes)
    graphs = graph_sizes(signature, length=length, prefill=prefill, cache=cache)
    for graph in graphs:
        fixed = inside(written, dimensions.sizes(graph))
        fixed.graph.name = graph.file.removesuffix(".onnx")
        ir.save(fixed, directory / graph.file)
        if context:
            write_context(directory / graph.file, soc)
    outer = outside(written)
    if outer is not None:
        ir.save(outer, directory / OUTER)
    made = [port_of(v) for v in outer.graph.outputs] if outer is not None else []
    facts = {
        "soc": soc,
        "context": context,
        "inputs": [_port(p) for p in signature.inputs],
        "outputs": [_port(p) for p in signature.outputs],
        "provenance": written.provenance,
        "graphs": [dataclasses.asdict(g) for g in graphs],
        "axes": {p.name: dimensions.of(p.shape, p.name) for p in (*signature.inputs, *made)},
        "outside": [p.name for p in made],
        "past_length": PAST,
        "caches": cache_grids(written),
    }
    (directory / FACTS).write_text(dump_json(facts), "utf-8", newline="\n")
    for name, source in sorted(model.assets.items()):
        shutil.copyfile(source, directory / name)


def _port(port: Port) -> dict[str, Any]:
    return {**dataclasses.asdict(port), "dtype": port.dtype.name, "shape": list(port.shape)}
