"""Writes a lowered model as graphs of fixed shapes that share one file of weights, and what a runner must know."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qc.backends.kits.write import write_kits
from qc.backends.manifest import dump_json
from qc.backends.ort.emit import WEIGHTS, stripped_copy
from qc.backends.ort.npu.fitting import cache_graphs
from qc.backends.ort.npu.fixed import FixedShapes
from qc.backends.ort.npu.shapes import Dimensions, graph_sizes
from qc.backends.ort.npu.split import cache_grids, inside, outside
from qc.ir.errors import UnsupportedError
from qc.ir.model import Model, Port

__all__ = ["FACTS", "OUTER", "emit", "emit_kits"]

FACTS, OUTER = "npu.json", "inputs.onnx"

_CACHES = ("empty.onnx", "append.onnx")

_LARGEST = (1 << 31) - (64 << 20)
"""Bytes of weights in one file, which may not reach 2 GiB, with room for the graph."""


def emit(
    model: Model, directory: Path, shapes: FixedShapes, facts: Mapping[str, Any], *, whole: bool = False
) -> list[Path]:
    """Writes everything into an existing directory.

    Args:
        model: A lowered model; unchanged.
        directory: Where to.
        shapes: The target, which says how long texts are.
        facts: What the runner must know about the unit.
        whole: Whether each graph holds its weights, instead of one file beside them.

    Returns:
        The graphs.
    """
    written = stripped_copy(model, directory)
    signature = written.signature
    dimensions = Dimensions(signature, shapes.sizes)
    graphs = graph_sizes(signature, length=shapes.length, prefill=shapes.prefill, cache=shapes.cache)
    if whole:
        _require_small(directory / WEIGHTS)
    for graph in graphs:
        fixed = inside(written, dimensions.sizes(graph))
        fixed.graph.name = graph.file.removesuffix(".onnx")
        held = {str(v.name): v for v in fixed.graph.inputs}
        _save(fixed, directory / graph.file, whole)
    outer = outside(written, dimensions, graphs)
    if outer is not None:
        _save(outer, directory / OUTER, whole)
    axes = {p.name: dimensions.of(p.shape, p.name) for p in signature.inputs}
    caches = {past.name: present.name for past, present in signature.caches}
    if caches:
        along = {n: axes[n].index("past") for n in caches}
        for name, small in zip(_CACHES, cache_graphs(caches, held, along), strict=True):
            ir.save(small, directory / name)
    made = [str(v.name) for v in outer.graph.outputs] if outer is not None else []
    found = {
        "unit": shapes.kind,
        **facts,
        "inputs": [_port(p) for p in signature.inputs],
        "outputs": [_port(p) for p in signature.outputs],
        "provenance": written.provenance,
        "graphs": [dataclasses.asdict(g) for g in graphs],
        "axes": axes,
        "outside": made,
        "direct": [n for n in held if n not in caches and n not in made],
        "caches": cache_grids(written),
    }
    (directory / FACTS).write_text(dump_json(found), "utf-8", newline="\n")
    if whole:
        (directory / WEIGHTS).unlink(missing_ok=True)
    for name, source in sorted(model.assets.items()):
        shutil.copyfile(source, directory / name)
    return [directory / g.file for g in graphs]


def emit_kits(model: Model, directory: Path, shapes: FixedShapes) -> None:
    """Writes code for apps, if that must pad no more than the ends of tokens and the like.

    Args:
        model: The lowered model.
        directory: The artifact, whose other files are there.
        shapes: The target.
    """
    facts = json.loads((directory / FACTS).read_text("utf-8"))
    if model.signature.input("tokens") is None or all(facts["axes"][n][-1] == "new" for n in facts["direct"]):
        write_kits(shapes.kits, model, shapes.target, directory)


def _save(model: Model, file: Path, whole: bool) -> None:
    if whole:
        ir.external_data.load_to_model(model)
    ir.save(model, file)


def _require_small(weights: Path) -> None:
    size = weights.stat().st_size if weights.is_file() else 0
    if size > _LARGEST:
        raise UnsupportedError(
            f"Expected less than 2 GiB of weights, which each graph holds itself, found {size} bytes. Choose fewer "
            "bits."
        )


def _port(port: Port) -> dict[str, Any]:
    return {**dataclasses.asdict(port), "dtype": port.dtype.name, "shape": list(port.shape)}
