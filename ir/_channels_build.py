"""Turns a solution, whose terms are single channels, into groups, whose terms are weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir._channels_heads import head_groups
from qc.ir._channels_solve import Solution
from qc.ir._channels_table import OPERATORS
from qc.ir._channels_trace import Limit, Member, Trace, operator_name
from qc.ir._channels_types import ACTIONS, ChannelGroup, Family, Forbidden, Input, Use

__all__ = ["Builder"]

_FAMILY_ACTIONS = {"permute": ("permute",), "orthogonal": ("mix",), "split": ("lift",), "merge": ("lift", "mix")}
_SIGN_OF_ROLE = {"producer": 1.0, "bias": 1.0, "gain": 1.0, "mean": 1.0, "deviation": 1.0, "consumer": -1.0}


class Builder:
    """Turns a solution into groups."""

    def __init__(self, trace: Trace, solution: Solution) -> None:
        self._trace = trace
        self._solution = solution
        count = int(solution.sheet.max()) + 1 if trace.count else 0
        self._family_of = np.zeros(count, int)
        self._family_of[solution.sheet] = solution.family
        self._sheets_of_ids: dict[int, tuple[int, ...]] = {}
        self._support: dict[int, list[int]] = {}
        self._members = self._by_sheet((m, m.ids) for m in trace.members)
        self._limits = self._by_sheet((limit, limit.ids) for limit in trace.limits)
        self._cells = self._by_sheet((c, c.ids) for c in trace.cells)
        self._values = self._by_sheet((v, view.ids) for v, view in trace.views.items())
        self._states = self._by_sheet((v, view.ids) for v, view in trace.states)
        self._scale, self._sign = solution.factors["scale"], solution.factors["sign"]

    def groups(self) -> tuple[list[ChannelGroup], list[Family], list[Input]]:
        sheets: dict[int, list[int]] = {}
        for sheet in self._members:
            sheets.setdefault(int(self._family_of[sheet]), []).append(sheet)
        by_family: dict[int, list[int]] = {}
        for sheet, family in enumerate(self._family_of.tolist()):
            by_family.setdefault(family, []).append(sheet)
            for lead in {sheet, *self._scale[sheet], *self._sign[sheet]}:
                self._support.setdefault(lead, []).append(sheet)
        families, groups, numbered = [], [], {}
        for number in sorted(sheets):
            family = self._family(len(families), number, by_family[number])
            families.append(family)
            numbered[number] = family
            for lead, held in self._leads(sorted(sheets[number])):
                groups.append(self._group(len(groups), family, lead, held))

        def limits(number: int) -> list[Limit]:
            return self._limits_of(by_family[number])

        free = (len(families), len(groups))
        heads = list(head_groups(self._trace.attentions, self._solution, numbered, limits, free))
        return [*groups, *heads], [*families, *(g.family for g in heads)], list(self._inputs())

    def _limits_of(self, sheets: Iterable[int]) -> list[Limit]:
        return list({id(x): x for s in sheets for x in self._limits.get(s, ())}.values())

    def _by_sheet(self, pairs: Iterable[tuple[object, np.ndarray]]) -> dict[int, list]:
        found: dict[int, list] = {}
        for item, ids in pairs:
            for sheet in self._sheets(ids):
                found.setdefault(sheet, []).append(item)
        return found

    def _sheets(self, ids: np.ndarray) -> tuple[int, ...]:
        # Most values share the array of their producer, which lives as long as the trace.
        if id(ids) not in self._sheets_of_ids:
            self._sheets_of_ids[id(ids)] = self._solution.sheets_of(ids)
        return self._sheets_of_ids[id(ids)]

    def _leads(self, sheets: Sequence[int]) -> list[tuple[int, list[int]]]:
        """The sheets that lead a group, with the sheets that it is made of; one more group for all that is fixed."""
        held: dict[int, list[int]] = {}
        fixed = []
        for sheet in sheets:
            free = {**self._scale[sheet], **self._sign[sheet]}
            for lead in free:
                held.setdefault(lead, []).append(sheet)
            if not free:
                fixed.append(sheet)
        if fixed:
            held[fixed[0]] = fixed
        return sorted(held.items())

    def _use(self, member: Member, mask: np.ndarray, **options: object) -> Use:
        index = np.where(mask, self._solution.index[member.ids], -1).ravel()
        return Use(member.node, member.slot, member.role, member.shape, member.axes, index, **options)  # type: ignore[arg-type]

    def _is_centred(self, sheet: int) -> bool:
        return any(x.key == "LayerNormalization:input" for x in self._limits.get(sheet, ()))

    def _family(self, number: int, raw: int, sheets: Sequence[int]) -> Family:
        width = int(self._solution.widths[raw])
        members = list({id(m): m for s in sheets for m in self._members.get(s, ())}.values())
        limits = self._limits_of(sheets)
        forbids = {}
        for action, words in _FAMILY_ACTIONS.items():
            limit = next((x for x in limits if x.rule.forbids & set(words)), None)
            if limit is not None:
                forbids[action] = _forbidden(limit)
        blocks = self._labels(raw, width, sheets, uniform=False)
        centred, obstacle = self._rotation(sheets)
        streams = {id(m) for s in sheets if self._is_centred(s) for m in self._members.get(s, ())}
        uses = tuple(self._use(m, self._solution.family[m.ids] == raw, centred=id(m) in streams) for m in members)
        if centred and blocks.any():
            centred, obstacle = (), Forbidden("LayerNormalization", "", "it removes the mean of each block of its own")
        if obstacle is not None:
            forbids.setdefault("orthogonal", obstacle)
            forbids.setdefault("merge", obstacle)
        gain = next((m for m in members if m.role == "gain"), None)
        if gain is not None:
            why = "its factors differ from channel to channel"
            forbids.setdefault("merge", Forbidden(operator_name(gain.node), str(gain.node.name), why))
        values = {v: self._trace.views[v].axes for s in sheets for v in self._values.get(s, ())}
        state = tuple(dict.fromkeys(str(v.name) for s in sheets for v in self._states.get(s, ())))
        turns = any(x.key == "RotaryEmbedding:rotated" for x in limits)
        return Family(number, width, uses, blocks, forbids, turns, centred, values, state)

    def _labels(self, raw: int, width: int, sheets: Iterable[int], *, uniform: bool) -> np.ndarray:
        """The cells that all divisions of some sheets agree on: joined if uniform, intersected if not."""
        labels = np.arange(width) if uniform else np.zeros(width, int)
        seen = set()
        for sheet in sheets:
            for cells in self._cells.get(sheet, ()):
                if cells.uniform != uniform or id(cells) in seen:
                    continue
                seen.add(id(cells))
                mask = self._solution.family[cells.ids] == raw
                index, label = (
                    self._solution.index[cells.ids][mask],
                    np.broadcast_to(cells.labels, cells.ids.shape)[mask],
                )
                if uniform:
                    labels = _joined(labels, index, label)
                else:
                    own = np.zeros(width, int)
                    # Where one index has several positions (a gain that all heads share), any stands for all.
                    own[index[::-1]] = label[::-1] if len(index) == width else 0
                    labels = np.unique(np.stack([labels, own]), axis=1, return_inverse=True)[1].reshape(-1)
        return labels

    def _rotation(self, sheets: Sequence[int]) -> tuple[tuple[ir.Node, ...], Forbidden | None]:
        """What a rotation needs: gains that can be moved away, and norms that can be centred.

        Returns:
            The LayerNormalization nodes to centre, and the obstacle if there is one.
        """
        taken: set[int] = set()
        for sheet in sheets:
            for member in self._members.get(sheet, ()):
                if member.role != "gain":
                    continue
                free = [s for s in sorted(self._scale[sheet]) if s not in taken and s in self._sign[sheet]]
                if not free:
                    fixed = self._scale.fixed.get(sheet)
                    because = f" ({OPERATORS[fixed.key].why})" if fixed is not None else ""
                    why = f"its gain cannot be moved into what reads it{because}"
                    return (), Forbidden(operator_name(member.node), str(member.node.name), why)
                taken.add(free[0])
        centred = []
        for sheet in sheets:
            here = self._limits.get(sheet, ())
            norms = [x.node for x in here if x.key == "LayerNormalization:input"]
            if not norms:
                continue
            others = [x for x in here if x.key != "LayerNormalization:input" and "mix" not in x.rule.forbids]
            readers = [m for m in self._members.get(sheet, ()) if m.role == "consumer"]
            spoilt = [x for x in others if x.key == "RMSNormalization:input"]
            if readers or spoilt:
                node = readers[0].node if readers else spoilt[0].node
                why = "it reads the mean of the stream, which a rotation in front of LayerNormalization removes"
                return (), Forbidden(node.op_type, str(node.name), why)
            centred.extend(n for n in norms if n is not None)
        return tuple(dict.fromkeys(centred)), None

    def _group(self, number: int, family: Family, lead: int, held: Sequence[int]) -> ChannelGroup:
        raw = int(self._family_of[lead])
        members = list({id(m): m for s in held for m in self._members.get(s, ())}.values())
        uses = tuple(u for m in members for u in self._shares(m, lead, held))
        support = self._support[lead]
        forbids = dict(family.forbids)
        for action, factors in (("scale", self._scale), ("sign", self._sign)):
            if lead not in factors[lead]:
                forbids[action] = self._reason(lead, action)
        shift = self._shift_obstacle(lead)
        if shift is not None:
            forbids["shift"] = shift
        values = tuple(dict.fromkeys(v for s in support for v in self._values.get(s, ())))
        interior = tuple(dict.fromkeys(v.producer().op_type for v in values if v.producer() is not None))
        return ChannelGroup(
            number,
            self._kind(lead),
            family,
            uses,
            self._labels(raw, family.width, support, uniform=True),
            frozenset(ACTIONS) - frozenset(forbids),
            {a: forbids[a] for a in ACTIONS if a in forbids},
            values,
            interior,
        )

    def _shares(self, member: Member, lead: int, held: Sequence[int]) -> Iterable[Use]:
        """The parts of a member that follow the group's factors with one power each."""
        sheets = self._solution.sheet[member.ids]
        powers: dict[tuple[float, int, bool], list[int]] = {}
        for sheet in self._sheets(member.ids):
            if sheet not in held:
                continue
            sign = _SIGN_OF_ROLE[member.role]
            power = sign * self._scale[sheet].get(lead, 0.0)
            parity = round(self._sign[sheet].get(lead, 0.0)) % 2
            powers.setdefault((power, parity, sheet == lead), []).append(sheet)
        for (power, parity, leads), own in powers.items():
            yield self._use(member, np.isin(sheets, own), power=power, parity=parity, lead=leads)

    def _reason(self, sheet: int, kind: str) -> Forbidden:
        limit = self._solution.factors[kind].fixed.get(sheet)
        if limit is None:
            limit = next((x for x in self._limits.get(sheet, ()) if kind in x.rule.forbids), None)
        if limit is None:
            return Forbidden("", "", "another group has these factors")
        return _forbidden(limit)

    def _shift_obstacle(self, sheet: int) -> Forbidden | None:
        limit = next((x for x in self._limits.get(sheet, ()) if "shift" in x.rule.forbids), None)
        if limit is not None:
            return _forbidden(limit)
        members = self._members.get(sheet, ())
        mute = next((m for m in members if m.role == "consumer" and m.node.op_type == "MatMul"), None)
        if mute is not None:
            return Forbidden("MatMul", str(mute.node.name), "it has no bias that could undo a shift")
        if not any(m.role == "bias" or (m.role == "producer" and m.node.op_type == "Gather") for m in members):
            return Forbidden("", "", "no producer has a bias that could take up a shift")
        return None

    def _kind(self, sheet: int) -> str:
        keys = {x.key for x in self._limits.get(sheet, ())}
        for kind, marks in _KINDS.items():
            if keys & marks:
                return kind
        return "features" if any(m.node.op_type == "Conv" for m in self._members.get(sheet, ())) else "hidden"

    def _inputs(self) -> Iterable[Input]:
        for member in self._trace.members:
            if member.role != "consumer":
                continue
            sheets = self._solution.sheet[member.ids]
            for sheet in self._sheets(member.ids):
                mask = sheets == sheet
                forbidden = None if self._scale[sheet] else self._reason(sheet, "scale")
                yield Input(self._use(member, mask), float(mask.mean()), forbidden)


_KINDS = {
    "output": {"output"},
    "stream": {"RMSNormalization:input", "LayerNormalization:input"},
    "normalized": {"RMSNormalization:output", "LayerNormalization:output"},
    "key": {"Attention:key", "Attention:query"},
    "value": {"Attention:value"},
}
"""Kinds of groups by the lines of the table that their channels met, the first that applies."""


def _forbidden(limit: Limit) -> Forbidden:
    node = limit.node
    at_boundary = node is None or limit.key in ("input", "output")
    operator = limit.key if at_boundary else operator_name(node)
    return Forbidden(operator, str(node.name) if node is not None else "", OPERATORS[limit.key].why)


def _joined(labels: np.ndarray, index: np.ndarray, cells: np.ndarray) -> np.ndarray:
    """Joins the labels of indices that lie in one cell."""
    while True:
        low = np.full(int(cells.max()) + 1, len(labels))
        np.minimum.at(low, cells, labels[index])
        joined = labels.copy()
        np.minimum.at(joined, labels[index], low[cells])
        joined = joined[labels]
        if np.array_equal(joined, labels):
            return labels
        labels = joined
