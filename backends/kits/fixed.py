"""The files of an artifact whose graphs have fixed shapes, as kits load them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

__all__ = ["FixedFiles"]

_SUFFIXES = (".onnx", ".data", ".bin")


@dataclasses.dataclass(frozen=True)
class FixedFiles:
    """What a kit loads.

    Attributes:
        unit: What the graphs are for: ``qnn``, ``nnapi``, ``coreml``.
        graphs: Each graph and the number of tokens that it takes, the smallest first.
        names: All files that the runtime reads.
    """

    unit: str
    graphs: list[tuple[str, int]]
    names: list[str]

    @classmethod
    def of(cls, directory: Path) -> FixedFiles:
        """Reads them from an artifact; of graphs that are compiled already, only what they were compiled to."""
        facts = json.loads((directory / "npu.json").read_text("utf-8"))
        end = "_ctx.onnx" if facts.get("context") else ".onnx"
        plain = {g["file"]: g["file"].removesuffix(".onnx") + end for g in facts["graphs"]}
        names = sorted(f.name for f in directory.iterdir() if f.suffix in _SUFFIXES)
        left = {n for n, used in plain.items() if n != used}
        graphs = sorted(((plain[g["file"]], g["new"]) for g in facts["graphs"]), key=lambda g: g[1])
        return cls(facts["unit"], graphs, [n for n in names if n not in left])
