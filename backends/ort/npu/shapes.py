"""The meaning of each symbolic dimension of a text model, and its size in a graph of fixed shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from qc.ir.errors import UnsupportedError
from qc.ir.model import Signature

__all__ = ["Dimensions", "GraphSizes", "graph_sizes"]


@dataclasses.dataclass(frozen=True)
class GraphSizes:
    """One graph of fixed shapes.

    Attributes:
        file: Its name in the artifact.
        new: Positions that one run takes.
        past: Positions that the cache holds; 0 if there is none.
    """

    file: str
    new: int
    past: int = 0


def graph_sizes(signature: Signature, *, length: int, prefill: int, cache: int) -> list[GraphSizes]:
    """The graphs that a model becomes: one of a fixed length, or prefill and decode on one cache."""
    if signature.caches:
        return [GraphSizes("prefill.onnx", prefill, cache), GraphSizes("decode.onnx", 1, cache)]
    return [GraphSizes("encoder.onnx" if signature.input("tokens") is not None else "network.onnx", length)]


class Dimensions:
    """What symbolic dimensions stand for.

    Attributes:
        meaning: ``batch``, ``new`` (positions of this run), ``past`` (positions in the cache), ``all`` of them, or
            ``fixed``, by spelling.
    """

    def __init__(self, signature: Signature, others: Mapping[str, int]) -> None:
        """Reads them from the token ids, the caches and the mask.

        Args:
            signature: The model's.
            others: Sizes of dimensions that have nothing to do with text.

        Raises:
            UnsupportedError: If the token ids are no matrix.
        """
        self.meaning: dict[str, str] = dict.fromkeys(others, "fixed")
        self._others = others
        tokens, mask = signature.input("tokens"), signature.input("mask")
        if tokens is None:
            for port in signature.inputs:
                if port.shape and isinstance(port.shape[0], str):
                    self.meaning[port.shape[0]] = "batch"
            return
        if len(tokens.shape) != 2:
            raise UnsupportedError(f"Expected token ids [batch, sequence] for an NPU, found {list(tokens.shape)}.")
        self._say(tokens.shape[0], "batch")
        self._say(tokens.shape[1], "new")
        for past, present in signature.caches:
            for before, after in zip(past.shape, present.shape, strict=True):
                self._say(before, "past" if before != after else "batch")
                self._say(after, "all" if before != after else "batch")
        if mask is not None:
            self._say(mask.shape[-1], "all" if signature.caches else "new")

    def _say(self, dim: int | str | None, meaning: str) -> None:
        if isinstance(dim, str):
            self.meaning.setdefault(dim, meaning)

    def sizes(self, graph: GraphSizes) -> dict[str, int]:
        """The size of each symbolic dimension in a graph."""
        size = {"batch": 1, "new": graph.new, "past": graph.past, "all": graph.past + graph.new}
        return {name: self._others[name] if name in self._others else size[m] for name, m in self.meaning.items()}

    def of(self, shape: tuple[int | str | None, ...], name: str) -> list[str]:
        """What each axis of a value is: a meaning, or ``fixed``.

        Raises:
            UnsupportedError: If nothing is known about a symbolic axis.
        """
        axes = []
        for dim in shape:
            if isinstance(dim, int):
                axes.append("fixed")
            elif dim in self.meaning:
                axes.append(self.meaning[dim])
            else:
                raise UnsupportedError(
                    f"Expected {name!r} to vary with the number of tokens or the cache only, found an axis {dim!r}. "
                    "Compile for another target."
                )
        return axes
