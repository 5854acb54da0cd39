"""Rotates a family of channels: what stands in the way of a rotation is moved into neighbouring weights first."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from qc.ir.channels import ChannelGroup, Family, Use, find_groups
from qc.ir.errors import UnsupportedError
from qc.passes.transform._edits import Edits, positions, read
from qc.passes.transform._shift import shift
from qc.passes.transform.actions import Rotation

__all__ = ["rotate"]


def rotate(model: ir.Model, family: Family, rotation: Rotation, edits: Edits) -> None:
    """Plans ``z' = z @ Q`` for all channels of the family.

    1. ``LayerNormalization(z) = RMSNormalization(z P) gain + bias`` with ``P = 1 - 11^T / width``: biases move into the
       consumers, P into all producers of z, and the operator becomes RMSNormalization with the same epsilon.
    2. ``RMSNormalization`` commutes with rotations once its gain is one: gains move into the consumers.
    3. Producers and consumers are rotated.

    Raises:
        UnsupportedError: If a bias or gain cannot be moved. Nothing was changed.
    """
    gains = [u for u in family.uses if u.role == "gain"]
    groups = list(find_groups(model)) if gains else []
    centred = set(family.centred)
    taken: set[int] = set()
    for gain in gains:
        group = _group_of(groups, gain, taken)
        taken.add(group.id)
        if gain.node in centred:
            _drop_bias(model, group, gain, edits)
        _absorb(group, gain, edits)
    for use in family.uses:
        if use.value is None or use.role == "gain" or (use.role == "bias" and use.node in centred):
            continue
        _turn(use, rotation, family.width, use.centred and bool(centred), edits)
    for node in family.centred:
        edits.finally_(lambda n=node: _to_rms(n))


def _group_of(groups: list[ChannelGroup], gain: Use, taken: set[int]) -> ChannelGroup:
    """The first group whose factors the gain follows, in the order in which the analysis promised them."""
    for group in groups:
        for use in group.uses:
            if use.node is gain.node and use.slot == gain.slot and use.power and group.id not in taken:
                return group
    raise UnsupportedError(f"The gain {gain.name} cannot be moved into what reads it, so nothing here can be rotated.")


def _drop_bias(model: ir.Model, group: ChannelGroup, gain: Use, edits: Edits) -> None:
    bias = next((u for u in group.uses if u.role == "bias" and u.node is gain.node), None)
    if bias is None or bias.value is None:
        return
    numbers = read(bias.value)
    if not numbers.any():
        return
    if "shift" not in group.admits:
        raise UnsupportedError(f"The bias {bias.name} cannot be moved into what reads it: {group.forbids['shift']}.")
    offsets = np.zeros(group.width)
    offsets[bias.index] = -numbers
    shift(model, group, offsets, edits)


def _absorb(group: ChannelGroup, gain: Use, edits: Edits) -> None:
    """Sets a gain to one: what else follows the factors of its group takes it up."""
    numbers = read(gain.value).reshape(-1)
    if len(numbers) != len(gain.index):
        raise UnsupportedError(f"{gain.name} is a filter per channel, which no other weight takes up.")
    own = next(u for u in group.uses if u.node is gain.node and u.slot == gain.slot and u.power)
    by_channel = np.ones(group.width)
    by_channel[own.index[own.index >= 0]] = numbers[own.index >= 0]
    for use in group.uses:
        if use.value is None or not use.power:
            continue
        if use is own:
            edits.add(use.node, use.slot, "one", np.ones_like)
            continue
        power = -use.power / own.power
        if use.role == "bias" and use.node is gain.node:
            continue  # moved before
        if power < 0 and not by_channel.all():
            raise UnsupportedError(f"The gain {gain.name} is zero at some channels, so {use.name} cannot take it up.")
        factors = np.where(use.index >= 0, (np.sign(by_channel) * np.abs(by_channel) ** power)[use.index], 1.0)[:, None]
        key = ("absorb", use.axes, factors.tobytes())
        edits.rows(use, key, lambda rows, f=factors: rows * f)


def _turn(use: Use, rotation: Rotation, width: int, centred: bool, edits: Edits) -> None:
    places = positions(use, width)

    def change(rows: np.ndarray) -> np.ndarray:
        turned = rows.copy()
        for column in places.T:
            held = rows[column]
            turned[column] = rotation.turn(held - held.mean(axis=0) if centred else held)
        return turned

    key = ("turn", use.axes, use.index.tobytes(), centred)
    edits.rows(use, key, change)


def _to_rms(node: ir.Node) -> None:
    node.op_type = "RMSNormalization"
    if len(node.inputs) > 2:
        bias = node.inputs[2]
        node.resize_inputs(2)
        if bias is not None and not bias.uses() and bias.is_initializer():
            del bias.graph.initializers[bias.name]
