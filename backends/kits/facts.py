"""What the code of a kit must know about a model beside its weights."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from qc.backends.decoding import context_limit
from qc.backends.target import Target
from qc.backends.tokenizer import Tokenizer
from qc.ir.model import Model, Port, Signature

__all__ = ["Facts", "facts_of"]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What the code of a kit must know.

    Attributes:
        title: Name of the architecture, for people.
        task: ``generate`` (text in, text out), ``embed`` (text in, vector out) or ``run`` (arrays).
        signature: Inputs and outputs with their roles.
        runtime: Package and lowest version.
        tokenizer: Whether a tokenizer travels with the model.
        bos: Token that a text to go on with starts with, or None.
        stop: Tokens that end a text.
        limit: Largest number of tokens, or None.
        pooling: How token vectors become one vector: ``mean``, ``max``, ``cls`` or ``lasttoken``.
        normalize: Whether that vector is scaled to length one.
    """

    title: str
    task: str
    signature: Signature
    runtime: tuple[str, str]
    tokenizer: bool
    bos: int | None
    stop: tuple[int, ...]
    limit: int | None
    pooling: str
    normalize: bool

    def to_json(self) -> dict[str, Any]:
        """The facts as plain data; caches as pairs of names."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "signature"}
        data["runtime"] = {"package": self.runtime[0], "minimum": self.runtime[1]}
        data["inputs"] = [_port(p) for p in self.signature.inputs]
        data["outputs"] = [_port(p) for p in self.signature.outputs]
        data["caches"] = [[past.name, present.name] for past, present in self.signature.caches]
        return json.loads(json.dumps(data))


def facts_of(model: Model, target: Target, directory: Path) -> Facts:
    """Collects the facts of a model whose files and assets lie in `directory`."""
    signature, provenance = model.signature, model.provenance
    held = (directory / "tokenizer.json").is_file()
    tokenizer = Tokenizer(directory) if held else None
    return Facts(
        title=provenance.get("architecture", "model"),
        task=_task(signature, provenance.get("pooling")),
        signature=signature,
        runtime=target.runtime,
        tokenizer=held,
        bos=tokenizer.bos if tokenizer is not None else None,
        stop=tokenizer.stop if tokenizer is not None else (),
        limit=_limit(context_limit(provenance), target, signature),
        pooling=provenance.get("pooling", "mean"),
        normalize=provenance.get("normalize", "true") == "true",
    )


def _limit(own: int | None, target: Target, signature: Signature) -> int | None:
    """The largest number of tokens, by the model and by the shapes of its graphs."""
    if target.longest is None:
        return own
    fixed = target.longest[0 if signature.caches else 1]
    return fixed if own is None else min(own, fixed)


def _task(signature: Signature, pooling: str | None) -> str:
    made = {"tokens", "mask", "positions", "token_types", "past_key", "past_value"}
    if signature.input("tokens") is None or any(p.role not in made for p in signature.inputs):
        return "run"
    if signature.output("logits") is not None and pooling is None:
        return "generate"
    return "embed" if signature.output("embedding") is not None or signature.output("hidden") is not None else "run"


def _port(port: Port) -> dict[str, Any]:
    return {"name": port.name, "dtype": port.dtype.name.lower(), "shape": list(port.shape), "role": port.role}
