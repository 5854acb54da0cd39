"""What differs between models, as source code: the texts of the file ``Interface`` of the kits for phones."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence

from qc.backends.kits.facts import Facts
from qc.backends.kits.names import camel, constants, upper
from qc.ir.model import Port

__all__ = ["KOTLIN", "SWIFT", "Language"]

_UNLIMITED = 1 << 30
"""The largest number of tokens of a model that does not say."""


@dataclasses.dataclass(frozen=True)
class Language:
    """How a language spells what a kit must know.

    Attributes:
        nothing: The value of an optional that holds none.
        port: A port of ``name``, ``type``, ``shape`` and ``role``.
        pair: An input of a cache and the output that replaces it, ``a`` and ``b``.
        graph: A graph of fixed shapes ``a`` and the number of tokens ``b``.
        constant: A constant ``a`` with the text ``b``.
        spell: The name of a constant.
        quote: A text as a literal.
    """

    nothing: str
    port: str
    pair: str
    graph: str
    constant: str
    spell: Callable[[str], str]
    quote: Callable[[str], str]

    def texts(self, facts: Facts, graphs: Iterable[tuple[str, int]] = ()) -> dict[str, str]:
        """The texts of a model, which may be in graphs of fixed shapes."""
        signature = facts.signature
        return {
            "quoted_title": self.quote(facts.title),
            "task": facts.task,
            "has_tokenizer": str(facts.tokenizer).lower(),
            "bos": self.nothing if facts.bos is None else str(facts.bos),
            "stop": ", ".join(map(str, facts.stop)),
            "limit": str(facts.limit or _UNLIMITED),
            "pooling": facts.pooling,
            "normalize": str(facts.normalize).lower(),
            "inputs": self._ports(signature.inputs),
            "outputs": self._ports(signature.outputs),
            "caches": self._lines(self.pair.format(**self._texts(a=p.name, b=q.name)) for p, q in signature.caches),
            "graphs": self._lines(self.graph.format(a=self.quote(name), b=size) for name, size in graphs),
            "input_names": self._names(signature.inputs),
            "output_names": self._names(signature.outputs),
        }

    def _ports(self, ports: Sequence[Port]) -> str:
        return self._lines(
            self.port.format(
                **self._texts(name=p.name, type=p.dtype.name.lower(), role=p.role),
                shape=", ".join(str(d) if isinstance(d, int) else self.nothing for d in p.shape),
            )
            for p in ports
        )

    def _names(self, ports: Sequence[Port]) -> str:
        return "\n".join(f"    {self.constant.format(a=a, b=self.quote(b))}" for a, b in constants(ports, self.spell))

    def _lines(self, items: Iterable[str]) -> str:
        return ",\n".join(f"        {item}" for item in items)

    def _texts(self, **texts: str) -> Mapping[str, str]:
        return {key: self.quote(text) for key, text in texts.items()}


def _kotlin(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("$", "\\$")


def _swift(text: str) -> str:
    held = (f"\\u{{{ord(c):x}}}" if c in '"\\' or ord(c) < ord(" ") else c for c in text)
    return f'"{"".join(held)}"'


KOTLIN = Language(
    nothing="null",
    port="Port({name}, {type}, listOf({shape}), {role})",
    pair="{a} to {b}",
    graph="{a} to {b}",
    constant="const val {a} = {b}",
    spell=upper,
    quote=_kotlin,
)

SWIFT = Language(
    nothing="nil",
    port="Port(name: {name}, type: {type}, shape: [{shape}], role: {role})",
    pair="({a}, {b})",
    graph="({a}, {b})",
    constant="public static let {a} = {b}",
    spell=camel,
    quote=_swift,
)
