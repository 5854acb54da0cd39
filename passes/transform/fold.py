"""The one place where an action on a channel group is carried out.

Weights are rewritten such that the function of the network stays the same, exactly in real arithmetic: with
``z' = z A + c``,

    producer  W' = A^T W,  b' = b A + c        consumer  W' = W A^-T,  b' = b - c A^-1 W^T

computed in float64 and cast once to float32. Nothing runs additionally unless asked for (`runtime`).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir

from qc.ir import dialect
from qc.ir.channels import ChannelGroup
from qc.ir.errors import UnsupportedError
from qc.ir.store import Store
from qc.passes.transform._edits import Edits, on_channels, positions, require_float
from qc.passes.transform._rotate import rotate
from qc.passes.transform._runtime import insert, lift_factors
from qc.passes.transform._shift import shift
from qc.passes.transform.actions import Action, Lift, Permute, Rotation, Scale, Shift

__all__ = ["Folded", "apply", "fold"]


@dataclasses.dataclass(frozen=True)
class Folded:
    """What a fold did.

    Attributes:
        weights: Names of the rewritten weights; empty if nothing changed.
        added: Operators that now run additionally, with their arithmetic operations per token.
        state: Cache inputs whose content is now in other coordinates.
    """

    weights: tuple[str, ...] = ()
    added: tuple[tuple[str, int], ...] = ()
    state: tuple[str, ...] = ()

    @property
    def modified(self) -> bool:
        """Whether the model changed."""
        return bool(self.weights or self.added)


def fold(
    model: ir.Model,
    group: ChannelGroup,
    action: Action,
    store: Store,
    *,
    runtime: bool = False,
    dtype: type[np.floating] = np.float32,
) -> Folded:
    """Carries out `action` on `group`.

    Permutations, rotations, splits and merges act on the whole family of the group. The groups of the model stay valid,
    except after a rotation, a split or a merge, and where an operator was added.

    Args:
        model: The model that the group was found in.
        group: The channels.
        action: What to do.
        store: Where the new weights are written.
        runtime: If weights cannot take up the action, whether to insert an operator in front of the consumers instead.
        dtype: Element type of the new weights. With float64 a run in float64 shows that nothing but rounding changed.

    Raises:
        InputError: If the numbers of the action do not fit the group.
        UnsupportedError: If the group does not admit the action and `runtime` cannot or may not help, or if a weight is
            quantized. Nothing was changed.
    """
    action.check(group)
    if action.is_identity():
        return Folded()
    missing = [a for a in action.needs() if a not in group.admits]
    if not missing:
        return apply(model, group, action, store, dtype=dtype)
    if runtime and group.consumers:
        return _insert(model, group, action, store, dtype)
    raise UnsupportedError(
        f"Channel group {group.id} ({group.kind}, {group.width} channels) does not admit {missing[0]!r}: "
        f"{group.forbids[missing[0]]}."
    )


def _insert(model: ir.Model, group: ChannelGroup, action: Action, store: Store, dtype: type[np.floating]) -> Folded:
    edits, scaled = Edits(dtype), False
    if isinstance(action, Lift):  # what makes the channels may take up the factors
        untied = len(np.unique(group.cells)) == group.width
        scaled = "scale" in group.admits and untied and all(u.power == -1.0 for u in group.consumers)
    require_float(group.uses if scaled else group.consumers)
    if scaled:
        _scale(group, lift_factors(action), edits)
    weights, added = insert(group, action, edits, store, dtype, scaled=scaled)
    dialect.sync_functions(model)
    return Folded(tuple(weights), tuple(added), group.family.state if scaled else ())


def apply(
    model: ir.Model, group: ChannelGroup, action: Action, store: Store, *, dtype: type[np.floating] = np.float32
) -> Folded:
    """Carries out `action` without asking whether the group admits it: the function may change."""
    family = group.family
    require_float(group.uses if isinstance(action, (Scale, Shift)) else family.uses)
    edits = Edits(dtype)
    match action:
        case Permute():
            _permute(group, np.asarray(action.order), edits)
        case Scale():
            _scale(group, np.asarray(action.factors, np.float64), edits)
        case Shift():
            shift(model, group, np.asarray(action.offsets, np.float64), edits)
        case Rotation():
            rotate(model, family, action, edits)
        case Lift():
            _lift(group, action, edits)
    weights = edits.commit(store)
    dialect.sync_functions(model)
    return Folded(tuple(weights), state=family.state)


def _scale(group: ChannelGroup, factors: np.ndarray, edits: Edits) -> None:
    sizes, signs = np.abs(factors), np.sign(factors)
    for use in group.uses:
        if use.value is None or (use.power == 0.0 and use.parity == 0):
            continue
        own = sizes**use.power * signs**use.parity
        inside = use.index >= 0
        by_position = np.where(inside, own[use.index], 1.0)[:, None]
        key = ("scale", use.power, use.parity, use.axes, use.index.tobytes())
        edits.rows(use, key, lambda rows, f=by_position: rows * f)


def _permute(group: ChannelGroup, order: np.ndarray, edits: Edits) -> None:
    for use in group.family.uses:
        if use.value is None:
            continue
        places = positions(use, group.width)
        source = np.arange(len(use.index))
        source[places] = places[order]
        key = ("permute", use.axes, use.index.tobytes())
        edits.rows(use, key, lambda rows, s=source: rows[s])


def _lift(group: ChannelGroup, action: Lift, edits: Edits) -> None:
    """Copies and joins channels throughout the family; the factor 1 / copies goes where the group's factors go."""
    powers = {(u.node, u.slot, u.role): u.power for u in group.uses}
    for use in _resizable(group):
        change = action.read if use.role == "consumer" else action.made
        power = powers.get((use.node, use.slot, use.role), 0.0)
        edits.add(
            use.node,
            use.slot,
            (action.name, use.role, power, use.axes),
            lambda w, u=use, f=change, p=power: on_channels(w, u, lambda rows: f(rows[np.argsort(u.index)], p)),
        )
    _resize(group, len(action.sizes))


def _resizable(group: ChannelGroup) -> list:
    """The weights of the family, each of which must hold its channels once, on an axis of their own."""
    uses = [u for u in group.family.uses if u.value is not None]
    for use in uses:
        if len(use.axes) != 1 or not np.array_equal(np.sort(use.index), np.arange(group.width)):
            raise UnsupportedError(
                f"The number of channels cannot change in {use.name}: other channels lie beside them."
            )
    return uses


def _resize(group: ChannelGroup, width: int) -> None:
    for value, axes in group.family.carriers.items():
        dims = list(value.shape.dims)
        dims[axes[0]] = width
        value.shape = ir.Shape(dims)
    for use in group.family.uses:
        if use.role == "gain" and use.node.op_type == "Conv":
            use.node.attributes["group"] = ir.AttrInt64("group", width)
