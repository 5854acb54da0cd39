"""What all targets ``ort-npu`` share: graphs of fixed shapes, options in words, and a runner."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from qc.backends.target import PreparedRunner, Runner, Target
from qc.ir.errors import InputError
from qc.ir.model import Model

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["FixedShapes"]


@dataclasses.dataclass(frozen=True)
class FixedShapes(abc.ABC):
    """Lowers to graphs of fixed shapes.

    Attributes:
        kind: What stands behind the colon of the target.
        kits: Names of the kits that travel with an artifact.
        words: Options that are one word, with the fields that they set.
        numbers: Options that are a number; the names of their fields.
        length: Tokens that an encoder takes.
        prefill: Tokens that a decoder takes at once.
        cache: Tokens that its cache holds, and with it the longest text.
        sizes: Sizes of further symbolic dimensions, by name.
    """

    kind: ClassVar[str]
    kits: ClassVar[tuple[str, ...]] = ("python-fixed",)
    words: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    numbers: ClassVar[tuple[str, ...]] = ("length", "prefill", "cache")

    length: int = 128
    prefill: int = 64
    cache: int = 256
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    @abc.abstractmethod
    def target(self) -> Target:
        """What the unit can run."""

    @classmethod
    def parse(cls, words: list[str]) -> Self:
        """Reads options: words, and numbers as ``NAME=N``.

        Raises:
            InputError: If there is no such option.
        """
        chosen: dict[str, object] = {}
        sizes: dict[str, int] = {}
        for word in words:
            name, _, number = word.partition("=")
            if word in cls.words:
                chosen |= cls.words[word]
            elif number.isascii() and number.isdigit() and int(number) > 0:
                (chosen if name in cls.numbers else sizes)[name] = int(number)
            else:
                known = ", ".join((*cls.words, *(f"{n}=N" for n in cls.numbers)))
                raise InputError(
                    f"Expected an option of ort-npu:{cls.kind} among {known} and NAME=N for another open size; found "
                    f"{word!r}."
                )
        return cls(**chosen, sizes=sizes)  # type: ignore[arg-type]

    def check(self, model: Model) -> None:  # noqa: B027 - a default, not a duty
        """Nothing: what a unit does not take stays off it, and the report says so."""

    def first_graph(self, model: Model) -> Model:
        """The first of the graphs of a lowered model, at its fixed shapes."""
        from qc.backends.ort.npu.shapes import Dimensions, graph_sizes
        from qc.backends.ort.npu.split import inside

        graphs = graph_sizes(model.signature, length=self.length, prefill=self.prefill, cache=self.cache)
        return inside(model, Dimensions(model.signature, self.sizes).sizes(graphs[0]))

    def streamed_bytes(self, directory: Path) -> int:
        """Bytes of weights that are read to yield one token."""
        from qc.backends.ort.npu.runner import read_facts
        from qc.backends.traffic import streamed_bytes

        graphs = read_facts(directory)["graphs"]
        return streamed_bytes(Model.load(directory / graphs[-1]["file"]))

    def open(self, directory: Path, *, threads: int = 0, spinning: bool = True) -> Runner:
        """Loads an emitted directory."""
        from qc.backends.ort.npu.runner import FixedRunner

        return FixedRunner(directory, threads=threads)

    def open_in_parts(self, directory: Path, work: Path) -> PreparedRunner:
        """Loads an emitted directory as a whole: what is compiled for a unit is one piece."""
        from qc.backends.ort.npu.runner import FixedRunner

        return FixedRunner(directory)
