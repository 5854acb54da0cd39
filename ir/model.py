"""What a model is: an ``onnx_ir.Model`` plus the role of each input and output, its assets and its provenance.

Everything that qc knows about a model lives *in* the ONNX model, so that it survives any pass, ours or foreign,
and any save and load:

* the role of a graph input or output is the value's metadata property ``qc.role``;
* provenance (source, context length, ...) are model metadata properties that start with ``qc.``;
* only the assets (tokenizer and configuration files, by path) are held beside it, in ``model.meta``.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx_ir as ir

from qc.ir.errors import InputError

__all__ = [
    "ANY_SHAPE",
    "ASSET_NAMES",
    "IR_VERSION",
    "OPSET",
    "ROLES",
    "Model",
    "Port",
    "Signature",
    "port_of",
    "set_role",
]

OPSET = 23
"""The default-domain opset that the frontends produce: the first with Attention, RMSNormalization, RotaryEmbedding."""

IR_VERSION = 10
"""The lowest IR version of a model: weights that are no inputs need 4, functions 8, 4-bit types 10."""

ROLES = frozenset(
    {
        "tokens",
        "mask",
        "positions",
        "token_types",
        "pixels",
        "past_key",
        "past_value",
        "decoder_tokens",
        "decoder_mask",
        "logits",
        "hidden",
        "pooled",
        "embedding",
        "present_key",
        "present_value",
        "other",
    }
)
"""Legal roles. ``past_*`` and ``present_*`` carry a layer index: ``past_key.3``."""

ASSET_NAMES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "sample.txt",
)
"""File names that travel, byte for byte, from a model directory into its artifacts."""

ANY_SHAPE = ("...",)
"""The shape of a port of unknown rank."""

_ROLE = "qc.role"


@dataclasses.dataclass(frozen=True)
class Port:
    """One input or output of a model.

    Attributes:
        name: Its name in the graph.
        dtype: Element type.
        shape: One entry per axis: an int, or the name (or expression) of a symbolic dimension, or None if unknown.
            `ANY_SHAPE` if not even their number is known.
        role: What it means, one of `ROLES`.
        index: Layer index for the roles of a key-value cache, else None.
        kind: ``tensor``, ``sequence`` (of tensors of that type and shape) or ``optional``.
    """

    name: str
    dtype: ir.DataType
    shape: tuple[int | str | None, ...]
    role: str = "other"
    index: int | None = None
    kind: str = "tensor"


@dataclasses.dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a model, in graph order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def input(self, role: str) -> Port | None:
        """Returns the first input of that role, or None."""
        return next((p for p in self.inputs if p.role == role), None)

    def output(self, role: str) -> Port | None:
        """Returns the first output of that role, or None."""
        return next((p for p in self.outputs if p.role == role), None)

    @property
    def caches(self) -> tuple[tuple[Port, Port], ...]:
        """Each input that is part of a key-value cache, with the output that replaces it in the next step."""
        written = {(p.role, p.index): p for p in self.outputs if p.role.startswith("present_")}
        pairs = [(p, written.get((p.role.replace("past_", "present_", 1), p.index))) for p in self.inputs]
        return tuple((past, present) for past, present in pairs if present is not None)

    @property
    def is_decoder(self) -> bool:
        """Whether the model carries a key-value cache and yields logits."""
        return self.input("past_key") is not None and self.output("logits") is not None

    @property
    def generates(self) -> bool:
        """Whether the model generates text: a decoder, or an encoder-decoder with logits at each position."""
        logits = self.output("logits")
        answers = self.input("tokens") is not None and self.input("decoder_tokens") is not None
        return self.is_decoder or (answers and logits is not None and len(logits.shape) == 3)


class Model(ir.Model):
    """An ``onnx_ir.Model`` with a signature, assets and provenance. Build one with `Model.of`, `Model.load`.

    It *is* an ``onnx_ir.Model``: any onnx_ir pass accepts it. A foreign pass that returns a plain ``onnx_ir.Model``
    loses nothing but the assets; `Model.of(result, assets=...)` restores the type.
    """

    @classmethod
    def of(cls, model: ir.Model, *, assets: Mapping[str, Path] | None = None) -> Model:
        """Returns `model` as a `Model` that shares its graph; no tensor is read."""
        if isinstance(model, Model) and assets is None:
            return model
        held = cls(
            model.graph,
            ir_version=model.ir_version,
            producer_name=model.producer_name,
            producer_version=model.producer_version,
            domain=model.domain,
            model_version=model.model_version,
            doc_string=model.doc_string,
            functions=tuple(model.functions.values()),
            metadata_props=dict(model.metadata_props),
        )
        held.meta.update(model.meta)
        if assets is not None:
            held.meta["qc.assets"] = dict(assets)
        return held

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Model:
        """Reads an ``.onnx`` file, or a directory with ``model.onnx``. Weights stay on disk, memory-mapped when read.

        Raises:
            InputError: If the file is missing or is not a readable ONNX model.
        """
        path = Path(path)
        file = path / "model.onnx" if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"Expected an ONNX model at {file}, found no such file. Check the path.")
        try:
            loaded = ir.load(file)
        except Exception as error:
            raise InputError(
                f"{file} is not a readable ONNX model ({error}). It may be truncated; copy it again."
            ) from error
        assets = {name: file.parent / name for name in ASSET_NAMES if (file.parent / name).is_file()}
        return cls.of(loaded, assets=assets)

    def save(self, directory: str | os.PathLike[str], *, external_data: str | None = "model.onnx.data") -> Path:
        """Writes ``model.onnx``, its weights and its assets into an existing or new `directory`; returns the file.

        Weights stream through memory one tensor at a time. The directory is not written atomically; see
        `qc.backends.artifact` for that.

        Args:
            directory: Where to write.
            external_data: Name of the weights file beside ``model.onnx``; None keeps the weights where they are
                (they must already lie in `directory`).
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / "model.onnx"
        ir.save(self, file, external_data=external_data)
        for name, source in self.assets.items():
            if source.resolve() != (directory / name).resolve():
                shutil.copyfile(source, directory / name)
        return file

    def clone(self, *args: object, **kwargs: object) -> Model:
        """Returns a copy of graph and functions that shares the weights."""
        return Model.of(super().clone(*args, **kwargs), assets=self.assets)  # type: ignore[arg-type]

    @property
    def assets(self) -> dict[str, Path]:
        """Files that travel with the model, by the name they have in an artifact."""
        return self.meta.setdefault("qc.assets", {})

    @property
    def signature(self) -> Signature:
        """The inputs and outputs with their roles, read from the graph as it is now."""
        initializers = set(self.graph.initializers)
        return Signature(
            inputs=tuple(port_of(v) for v in self.graph.inputs if v.name not in initializers),
            outputs=tuple(port_of(v) for v in self.graph.outputs),
        )

    @property
    def provenance(self) -> dict[str, str]:
        """The model's metadata properties that start with ``qc.``, without that prefix."""
        return {k[3:]: v for k, v in self.metadata_props.items() if k.startswith("qc.")}

    def record(self, **facts: object) -> None:
        """Adds facts to the provenance, as strings."""
        self.metadata_props.update({f"qc.{k}": str(v) for k, v in facts.items()})


def port_of(value: ir.Value) -> Port:
    """Describes a graph input or output."""
    role, _, index = value.metadata_props.get(_ROLE, "other").partition(".")
    shape = tuple(_dim(d) for d in value.shape) if value.shape is not None else ANY_SHAPE
    dtype = value.dtype or ir.DataType.UNDEFINED
    return Port(value.name or "", dtype, shape, role, int(index) if index else None, _kind(value.type))


def set_role(values: Iterable[ir.Value] | ir.Value, role: str) -> None:
    """Sets the role of one value, or of several with a running index (``role.0``, ``role.1``, ...).

    Raises:
        ValueError: If `role` is not one of `ROLES`.
    """
    if role.partition(".")[0] not in ROLES:
        raise ValueError(f"Expected a role among {sorted(ROLES)}, found {role!r}.")
    if isinstance(values, ir.Value):
        values.metadata_props[_ROLE] = role
        return
    for i, value in enumerate(values):
        value.metadata_props[_ROLE] = f"{role}.{i}"


def _kind(type_: ir.TypeProtocol | None) -> str:
    if isinstance(type_, ir.SequenceType):
        return "sequence"
    return "optional" if isinstance(type_, ir.OptionalType) else "tensor"


def _dim(dim: int | ir.SymbolicDim) -> int | str | None:
    if isinstance(dim, int):
        return dim
    return None if dim.value is None else str(dim.value)
