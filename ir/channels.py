"""Channel groups: which channels of a network move together, and what may act on them without changing its function.

A *family* is a set of channels of weights and activations that must keep one index: the residual stream with the outputs
of all norms that read it, the hidden channels of a gated layer. Permutations, rotations, copies and merges act on a
family. A *group* is one degree of freedom of scale within a family: a vector of factors that some weights take up and
others undo. `qc.passes.transform.fold` carries out an action.

The analysis reads the graph alone. What an operator lets through is one line of `qc.ir._channels_table`; a channel
that meets an operator without a line is left as it is, and the operator is named.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from qc.ir import _channels_ops, _channels_shapes  # noqa: F401  they register the tracers
from qc.ir._channels_solve import Solution, solve
from qc.ir._channels_table import OPERATORS
from qc.ir._channels_trace import Limit, Member, Trace, operator_name

__all__ = ["ACTIONS", "ChannelGroup", "ChannelGroups", "Family", "Forbidden", "Use", "find_groups"]

ACTIONS = ("permute", "scale", "sign", "shift", "orthogonal", "split", "merge")
"""What may act on a group. ``scale`` is by positive factors, ``sign`` by -1 and 1; a signed scale needs both."""

_FAMILY_ACTIONS = {"permute": ("permute",), "orthogonal": ("mix",), "split": ("lift",), "merge": ("lift", "mix")}
_SIGN_OF_ROLE = {"producer": 1.0, "bias": 1.0, "gain": 1.0, "mean": 1.0, "deviation": 1.0, "consumer": -1.0}


@dataclasses.dataclass(frozen=True)
class Forbidden:
    """Why an action is not admitted.

    Attributes:
        operator: The operator that forbids it (as in the table of the analysis).
        node: Name of one such node; empty at the boundary of the graph.
        why: The reason.
    """

    operator: str
    node: str
    why: str

    def __str__(self) -> str:
        return f"{self.operator} forbids it: {self.why}"


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """A weight, at one place where it is read, as a member of a group or family.

    Attributes:
        node: The reader.
        slot: Which of its inputs; the input may be absent (a bias that could be added).
        role: ``producer`` (its rows make the channels), ``consumer``, ``gain`` (multiplies), ``bias`` (adds), ``mean``,
            ``deviation`` (of a batch normalization).
        shape: The shape in which the weight must be viewed.
        axes: Its axes that carry channels, in that view.
        index: Index in the group of each position along those axes, flattened; -1 for positions of other groups.
        power: The weight is multiplied by this power of the group's positive factors.
        parity: And by this power of its signs.
        lead: Whether it is tied to the channels themselves, and not to those of a product with others: what a shift
            changes.
        centred: Whether it makes channels whose mean a LayerNormalization removes.
    """

    node: ir.Node
    slot: int
    role: str
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    index: np.ndarray
    power: float = 0.0
    parity: int = 0
    lead: bool = False
    centred: bool = False

    @property
    def value(self) -> ir.Value | None:
        """The weight; None if absent."""
        return self.node.inputs[self.slot] if self.slot < len(self.node.inputs) else None

    @property
    def name(self) -> str:
        """Name of the weight, or of the reader if it is absent."""
        value = self.value
        return str(value.name if value is not None else self.node.name)


@dataclasses.dataclass(frozen=True, eq=False)
class Family:
    """Channels that keep one index.

    Attributes:
        id: Number in the graph.
        width: Number of channels.
        uses: Every weight in it; what is permuted, rotated or copied.
        blocks: Block of each channel: permutations and rotations stay within blocks. One block if all zero.
        forbids: The actions on families that are not admitted.
        centred: LayerNormalization nodes whose mean a rotation must first move into the producers.
        carriers: The activations, with the axes that carry channels.
        state: Names of cache inputs whose content an action changes.
    """

    id: int
    width: int
    uses: tuple[Use, ...]
    blocks: np.ndarray
    forbids: Mapping[str, Forbidden]
    centred: tuple[ir.Node, ...]
    carriers: Mapping[ir.Value, tuple[int, ...]]
    state: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
    """One degree of freedom.

    Attributes:
        id: Number in the graph.
        kind: ``stream`` (read by norms), ``normalized`` (written by one), ``key``, ``value``, ``features`` (of a
            convolution), ``hidden``, ``output``.
        family: What it is part of.
        uses: The weights that a scale or shift changes.
        cells: Cell of each channel: factors are equal within a cell. All different if there is no such tie.
        admits: The admitted actions, of `ACTIONS`.
        forbids: The others, with the reason.
        carriers: The activations that carry it.
        interior: Operators that the carriers pass, by name.
    """

    id: int
    kind: str
    family: Family
    uses: tuple[Use, ...]
    cells: np.ndarray
    admits: frozenset[str]
    forbids: Mapping[str, Forbidden]
    carriers: tuple[ir.Value, ...]
    interior: tuple[str, ...]

    @property
    def width(self) -> int:
        """Number of channels."""
        return self.family.width

    @property
    def producers(self) -> tuple[Use, ...]:
        """Weights whose output channels these are."""
        return self._of("producer")

    @property
    def consumers(self) -> tuple[Use, ...]:
        """Weights whose input channels these are."""
        return self._of("consumer")

    @property
    def parameters(self) -> tuple[Use, ...]:
        """Vectors: gains, biases, statistics."""
        return self._of("gain", "bias", "mean", "deviation")

    def _of(self, *roles: str) -> tuple[Use, ...]:
        return tuple(u for u in self.uses if u.role in roles and u.value is not None)


class ChannelGroups(Sequence[ChannelGroup]):
    """All groups of a graph, in the order of their first producer. Valid until the graph changes."""

    def __init__(self, groups: Sequence[ChannelGroup], families: Sequence[Family], inputs: Sequence[_Input]) -> None:
        self._groups = tuple(groups)
        self.families = tuple(families)
        self._inputs = tuple(inputs)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, position):  # type: ignore[override]  # noqa: ANN001, ANN204
        return self._groups[position]

    def of(self, node: ir.Node) -> tuple[ChannelGroup, ...]:
        """The groups of the input channels of a matrix product or convolution."""
        return tuple(g for g in self._groups if any(u.node is node for u in g.consumers))

    def describe(self) -> list[dict]:
        """One row per group, in JSON values; see the command ``qc inspect --groups``."""
        from qc.ir._channels_report import describe

        return describe(self)

    def coverage(self) -> dict:
        """How many weights of matrix products read channels that admit positive factors, and what forbids the others."""
        from qc.ir._channels_report import coverage

        return coverage(self._inputs)

    def drawing(self) -> str:
        """The groups and the weights between them as a Mermaid flowchart."""
        from qc.ir._channels_report import drawing

        return drawing(self)


@dataclasses.dataclass(frozen=True, eq=False)
class _Input:
    """Some input channels of one product, for the coverage."""

    use: Use
    share: float
    forbidden: Forbidden | None


def find_groups(model: ir.Model) -> ChannelGroups:
    """Finds the channel groups of the main graph of a canonical model with shapes. No weight is read.

    A key-value cache (inputs of role ``past_*`` with an output ``present_*``) belongs to the model: actions may change
    what it holds, as long as a cache written by the model is only read by the same model.

    Time grows linearly with the nodes.
    """
    trace = Trace(model.graph)
    return _Builder(trace, solve(trace)).groups()


class _Builder:
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

    def groups(self) -> ChannelGroups:
        sheets: dict[int, list[int]] = {}
        for sheet in self._members:
            sheets.setdefault(int(self._family_of[sheet]), []).append(sheet)
        by_family: dict[int, list[int]] = {}
        for sheet, family in enumerate(self._family_of.tolist()):
            by_family.setdefault(family, []).append(sheet)
            for lead in {sheet, *self._scale[sheet], *self._sign[sheet]}:
                self._support.setdefault(lead, []).append(sheet)
        families, groups = [], []
        for number in sorted(sheets):
            family = self._family(len(families), number, by_family[number])
            families.append(family)
            for lead, held in self._leads(sorted(sheets[number])):
                groups.append(self._group(len(groups), family, lead, held))
        return ChannelGroups(groups, families, list(self._inputs()))

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
        limits = list({id(x): x for s in sheets for x in self._limits.get(s, ())}.values())
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
        return Family(number, width, uses, blocks, forbids, centred, values, state)

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

    def _inputs(self) -> Iterable[_Input]:
        for member in self._trace.members:
            if member.role != "consumer":
                continue
            sheets = self._solution.sheet[member.ids]
            for sheet in self._sheets(member.ids):
                mask = sheets == sheet
                forbidden = None if self._scale[sheet] else self._reason(sheet, "scale")
                yield _Input(self._use(member, mask), float(mask.mean()), forbidden)


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
