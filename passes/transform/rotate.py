"""Rotates channels, so that no single one stands out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.channels import ChannelGroup, Family, Use, find_groups
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.quant import read_weight
from qc.passes.base import Context, Contract, Exact, Outcome, Pass, Result, Site, check_patterns, site_name
from qc.passes.transform._edits import Edits, require_float
from qc.passes.transform._online import Constants, rotated
from qc.passes.transform.actions import Kronecker
from qc.passes.transform.fold import fold
from qc.passes.transform.hadamard import factors_of

__all__ = ["Rotate"]


@dataclasses.dataclass(frozen=True)
class Rotate(Pass):
    """Multiplies channels by Hadamard matrices with random signs, and undoes it in the weights that read them.

    ``x' = x Q`` and ``W' = W Q`` with ``Q.T Q = 1``, so that ``x' W'.T = x W.T``. A channel of size M among d others
    becomes ``M / sqrt(d)`` in all of them: nothing stands out that a quantizer would have to make room for. Q is a
    Kronecker product of small matrices (`qc.passes.transform.hadamard`); it is random, but for a seed always the same.

    Folded into weights, at no cost: every family of channels that admits rotations and that a linear layer reads. These
    are the residual stream with the outputs of all norms (first their gains move into the weights behind them, and the
    mean of a LayerNormalization into those before it) and, head by head, the values of attention: a cache holds rotated
    ones. A table that embeds tokens and yields logits is stored twice afterwards, because a gain between the two moved
    into one of them; the report says what that costs.

    At run time, if asked for, as products with small matrices, ``O(d log d)`` multiplications for d channels:

    * ``online_hidden``: in front of linear layers whose input admits no rotation, such as the second projection of a
      gated layer;
    * ``online_heads``: across the heads of attention, in front of its output projection;
    * ``online_keys``: of queries and keys, behind their rotary embedding. The cache then holds rotated keys.

    Left alone, with the reason: families that something on the way does not let rotate, and quantized weights.

    Source: QuaRot, arXiv 2404.00456, section 4. There, rotations across heads and in front of the second projection
    always run; a mean is removed from the embeddings of models without LayerNormalization too, which changes them.

    Attributes:
        online_hidden: Whether to rotate at run time what admits no folded rotation.
        online_heads: Whether to rotate across heads at run time.
        online_keys: Whether to rotate queries and keys at run time.
        exclude: Regular expressions of layers or weights; a family with one of them is left as it is.
    """

    contract: ClassVar[Contract] = Exact(cache=False)

    online_hidden: bool = False
    online_heads: bool = False
    online_keys: bool = False
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_patterns(self.exclude)

    def call(self, model: ir.Model, context: Context | None = None) -> Result:
        context = Context() if context is None else context
        work = _Work(model, dataclasses.replace(context, exclude=self.exclude))
        families = _families(model)
        for done, (group, readers) in enumerate(families):
            context.progress(done, len(families), _name(readers[0]))
            if "orthogonal" in group.admits:
                folded = work.fold(group, readers)
                if folded and self.online_heads and group.kind == "value":
                    work.across_heads(group, readers)
            elif self.online_hidden and group.forbids["orthogonal"].operator != "input":
                work.in_front(readers, work.factors)
            else:
                work.skip(_name(readers[0]), str(group.forbids["orthogonal"]))
        if self.online_keys:
            work.keys()
        dialect.sync_functions(model)
        return Result.of(model, work.sites, work.notes)


def _families(model: ir.Model) -> list[tuple[ChannelGroup, list[Use]]]:
    """A group of each family that linear layers read, with the weights of these layers."""
    found: dict[int, tuple[ChannelGroup, list[Use]]] = {}
    for group in find_groups(model):
        readers = [u for u in group.consumers if dialect.is_op(u.node, "Linear") and 0 not in u.axes]
        if readers and group.kind != "heads" and group.width > 1:
            found.setdefault(group.family.id, (group, []))[1].extend(readers)
    return list(found.values())


def _name(use: Use) -> str:
    return use.node.metadata_props.get("qc.scope") or use.name


class _Work:
    """Rotates in one model, and keeps the report."""

    def __init__(self, model: ir.Model, context: Context) -> None:
        self.sites: list[Site] = []
        self.notes: list[str] = []
        self._model, self._context = model, context
        self._constants: Constants = {}
        self._factors: dict[int, tuple[np.ndarray, ...]] = {}

    def skip(self, name: str, reason: str) -> None:
        self.sites.append(Site(name, Outcome.SKIPPED, reason))

    def factors(self, width: int) -> tuple[np.ndarray, ...]:
        """The factors for so many channels, always the same."""
        if width not in self._factors:
            self._factors[width], drawn = factors_of(width, np.random.default_rng([self._context.seed, width]))
            if drawn > 1:
                self.notes.append(
                    f"{width} channels: no Hadamard matrix with a factor {drawn} is known here, so that factor is a "
                    "random orthogonal matrix."
                )
        return self._factors[width]

    def fold(self, group: ChannelGroup, readers: Sequence[Use]) -> bool:
        """Rotates a family in its weights; returns whether it did."""
        family, name = group.family, _name(readers[0])
        pattern = self._context.excluded(*map(_name, readers), *(u.name for u in family.uses))
        if pattern is not None:
            self.skip(name, f"excluded by {pattern}")
            return False
        if family.turns:
            self.skip(name, "a rotary embedding lets pairs of its channels turn, which spreads nothing")
            return False
        size = int(np.count_nonzero(family.blocks == family.blocks[0]))
        signs = np.random.default_rng([self._context.seed, family.id]).choice([-1.0, 1.0], family.width)
        shared = _shared(family)
        try:
            action = Kronecker(signs, self.factors(size), family.blocks)
            folded = fold(self._model, group, action, self._context.store)
        except (InputError, UnsupportedError) as error:
            self.skip(name, str(error))
            return False
        facts: dict[str, object] = {
            "group": group.id, "kind": group.kind, "width": family.width, "products": [_name(u) for u in readers],
            "factors": [len(f) for f in action.factors],
        }  # fmt: skip
        if folded.state:
            facts["state"] = list(folded.state)
        self.sites.append(Site(name, Outcome.CHANGED, "", facts))
        self.notes.extend(_untied(shared))
        return True

    def across_heads(self, group: ChannelGroup, readers: Sequence[Use]) -> None:
        """Rotates the heads of attention among each other, each channel of a head with the same one of the others."""
        size = group.width // len(np.unique(group.family.blocks))
        self.in_front(readers, lambda width: (*self.factors(width // size), np.eye(size)))

    def in_front(self, readers: Sequence[Use], factors: Callable[[int], tuple[np.ndarray, ...]]) -> None:
        """Rotates, once for each activation, what linear layers read."""
        for value in dict.fromkeys(u.node.inputs[0] for u in readers):
            uses = [u for u in readers if u.node.inputs[0] is value]
            name, width = _name(uses[0]), uses[0].shape[1]
            pattern = self._context.excluded(*(n for u in uses for n in (_name(u), u.name)))
            if pattern is not None:
                self.skip(name, f"excluded by {pattern}")
                continue
            if any(u.index.min() < 0 for u in uses):
                self.skip(name, "it reads other channels beside these")
                continue
            try:
                require_float(tuple(uses))
                rotation = Kronecker(np.ones(width), factors(width), np.zeros(width, int))
                turned, added = rotated(value, rotation.factors, self._context.store, self._constants)
            except UnsupportedError as error:
                self.skip(name, str(error))
                continue
            edits = Edits()
            for use in uses:
                edits.rows(use, "in front", rotation.turn)
            edits.commit(self._context.store)
            for use in uses:
                use.node.replace_input_with(0, turned)
            self.sites.append(Site(name, Outcome.CHANGED, "", {"products": [_name(u) for u in uses]} | _cost(added)))

    def keys(self) -> None:
        """Rotates new keys, which a cache takes up, and the queries of every attention that reads them."""
        readers: dict[tuple[ir.Node, int], list[ir.Node]] = {}
        for node in self._model.graph:
            if node.op_type == "Attention" and node.domain == "":
                readers.setdefault(_new_keys(node), []).append(node)
        for (node, slot), attentions in readers.items():
            name, key = site_name(attentions[0]), node.inputs[slot]
            sizes = {v.shape[-1] if v.shape is not None else None for v in (key, *(a.inputs[0] for a in attentions))}
            others = {u.node for v in node.outputs for u in v.uses()} - set(attentions)
            size = sizes.pop()
            appended = node not in attentions
            if sizes or not isinstance(size, int) or (appended and any(n.op_type != "Shape" for n in others)):
                self.skip(name, "its keys are read elsewhere, or the size of its heads is not known")
                continue
            added = []
            for reader, where in ((node, slot), *((a, 0) for a in attentions)):
                value = reader.inputs[where]
                turned, operators = rotated(value, self.factors(size), self._context.store, self._constants)
                reader.replace_input_with(where, turned)
                added += operators
            self.sites.append(Site(name, Outcome.CHANGED, "", {"kind": "key"} | _cost(added)))


def _new_keys(attention: ir.Node) -> tuple[ir.Node, int]:
    """Where the keys of the tokens at hand are read: by the attention, or by what appends them to a cache."""
    node = attention.inputs[1].producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return attention, 1
    role = node.inputs[0].metadata_props.get("qc.role", "")
    return (node, 1) if node.inputs[0].is_graph_input() and role.startswith("past_") else (attention, 1)


def _cost(added: Sequence[tuple[str, int]]) -> dict[str, object]:
    return {"added": [operator for operator, _ in added], "multiplications": sum(cost for _, cost in added)}


def _shared(family: Family) -> list[tuple[str, list[tuple[ir.Node, int]]]]:
    """The weights of a family with several readers, and these."""
    found = {}
    for use in family.uses:
        weight = read_weight(use.value)
        if weight is not None and weight.data not in found:
            pairs = [(u.node, u.idx) for v in (weight.data, weight.value) for u in v.uses()]
            readers = [(n, i) for n, i in dict.fromkeys(pairs) if n is not weight.value.producer()]
            if len(readers) > 1:
                found[weight.data] = (weight.name, readers)
    return list(found.values())


def _untied(shared: Sequence[tuple[str, list[tuple[ir.Node, int]]]]) -> Iterator[str]:
    """A remark for each weight that its readers no longer share."""
    for name, readers in shared:
        stored = {w.data: w.stored_bytes for n, i in readers if (w := read_weight(n.inputs[i])) is not None}
        if len(stored) > 1:
            extra = sum(stored.values()) - max(stored.values())
            yield f"{name} is stored {len(stored)} times, for readers that are rotated differently: {extra} bytes more."
