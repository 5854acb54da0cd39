"""Bodies, in ONNX's own syntax, of operators that it defines by no function, or by one that kernels compute badly.

Its variance is a difference of squares, which loses digits where the mean is large; its ``ReduceLogSumExp`` takes
numbers of 64 bits.
"""

from __future__ import annotations

import collections
import string
from collections.abc import Callable, Iterable, Sequence

import onnx
import onnx_ir as ir

__all__ = ["own_body"]

_ARG_MIN = """ArgMin <axis, keepdims, select_last_index> (x) => (y) {
    negative = Neg (x)
    y = ArgMax <axis: int = @axis, keepdims: int = @keepdims, select_last_index: int = @select_last_index> (negative)
    }"""

_REDUCE_LOG_SUM_EXP = """ReduceLogSumExp <keepdims, noop_with_empty_axes> (x, axes) => (y) {
    low = Constant <value_float = -3.4028235e38> ()  high = Constant <value_float = 3.4028235e38> ()
    most = ReduceMax <keepdims = 1, noop_with_empty_axes: int = @noop_with_empty_axes> (x, axes)
    finite = Clip (most, low, high)  less = Sub (x, finite)  powers = Exp (less)
    sum = ReduceSum <keepdims: int = @keepdims, noop_with_empty_axes: int = @noop_with_empty_axes> (powers, axes)
    logarithm = Log (sum)
    back = ReduceMax <keepdims: int = @keepdims, noop_with_empty_axes: int = @noop_with_empty_axes> (x, axes)
    y = Add (logarithm, back) }"""


def own_body(node: ir.Node, opset: int) -> onnx.FunctionProto | None:
    """The function that computes a standard operator of an opset; None if there is none here.

    Args:
        node: All its attributes are there, those with a default too.
        opset: Of its model.
    """
    since, write = _BODIES.get(node.op_type, (0, None))
    text = write(node) if write is not None and opset >= since else None
    return None if text is None else onnx.parser.parse_function(f'<domain: "", opset_import: ["": {opset}]> {text}')


def _operands(node: ir.Node) -> list[str]:
    return [f"x{i}" for i in range(len(node.inputs))]


def _sum(node: ir.Node) -> str:
    """``x0 + x1 + ...``, one at a time."""
    first, *others = _operands(node)
    lines, total = [], first
    for other in others:
        lines.append(f"{other}_added = Add ({total}, {other})")
        total = f"{other}_added"
    return f"Sum ({', '.join(_operands(node))}) => (y) {{ {' '.join(lines)} y = Identity ({total}) }}"


def _mean(node: ir.Node) -> str:
    operands = ", ".join(_operands(node))
    return f"""Mean ({operands}) => (y) {{
        count = Constant <value_float = {len(node.inputs)}.0> ()  total = Sum ({operands})  y = Div (total, count) }}"""


def _group_normalization(node: ir.Node) -> str:
    """Each group of channels is a row; gain and bias are those of channels."""
    return f"""GroupNormalization <epsilon, num_groups> (x, scale, bias) => (y) {{
        grouped = Constant <value_ints = [0, {node.attributes["num_groups"].as_int()}, -1]> ()
        flat = Constant <value_ints = [0, 0, -1]> ()  one = Constant <value_ints = [1]> ()
        rows = Reshape (x, grouped)  length = Shape <start = 2> (rows)
        ones = ConstantOfShape <value = float[1] {{1.0}}> (length)
        normal = LayerNormalization <epsilon: float = @epsilon> (rows, ones)
        shape = Shape (x)  whole = Reshape (normal, shape)  channels = Reshape (whole, flat)
        gain = Unsqueeze (scale, one)  scaled = Mul (channels, gain)  shift = Unsqueeze (bias, one)
        moved = Add (scaled, shift)  y = Reshape (moved, shape) }}"""


def _mean_variance_normalization(node: ir.Node) -> str:
    axes = list(node.attributes["axes"].as_ints())
    return f"""MeanVarianceNormalization <axes> (x) => (y) {{
        axes = Constant <value_ints = {axes}> ()  small = Constant <value_float = 1e-9> ()  mean = ReduceMean (x, axes)
        apart = Sub (x, mean)  squares = Mul (apart, apart)  variance = ReduceMean (squares, axes)
        deviation = Sqrt (variance)  divisor = Add (deviation, small)  y = Div (apart, divisor) }}"""


def _arg_min(node: ir.Node) -> str | None:
    """Of floats: the lowest integer has no negative."""
    return _ARG_MIN if node.inputs[0].dtype == ir.DataType.FLOAT else None


def _gemm(node: ir.Node) -> str:
    """``alpha * a' @ b' + beta * c``, where nothing of it is a stored weight."""
    a, b = ("Transpose" if node.attributes[name].as_int() else "Identity" for name in ("transA", "transB"))
    alpha, beta = (node.attributes[name].as_float() for name in ("alpha", "beta"))
    last = (
        "added = Mul (x2, beta)  y = Add (scaled, added)"
        if any(v is not None for v in node.inputs[2:])
        else "y = Identity (scaled)"
    )
    return f"""Gemm <alpha, beta, transA, transB> ({", ".join(_operands(node))}) => (y) {{
        a = {a} (x0)  b = {b} (x1)  product = MatMul (a, b)  alpha = Constant <value_float = {alpha!r}> ()
        beta = Constant <value_float = {beta!r}> ()  scaled = Mul (product, alpha)  {last} }}"""


_APART = """
    zero = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()  last = Constant <value_ints = [1]> ()
    h = Shape <start = -2, end = -1> (x0)  height = Squeeze (h)  w = Shape <start = -1> (x0)  width = Squeeze (w)
    rows = Range (zero, height, one)  columns = Range (zero, width, one)  down = Unsqueeze (rows, last)
    apart = Sub (columns, down)"""
"""How far a column lies behind a row."""


def _trilu(node: ir.Node) -> str:
    """Zero where ``column - row`` is less than k, or more."""
    kept = "GreaterOrEqual" if node.attributes["upper"].as_int() else "LessOrEqual"
    border = "x1" if len(node.inputs) > 1 and node.inputs[1] is not None else "zero"
    return f"""Trilu <upper> ({", ".join(_operands(node))}) => (y) {{
        {_APART}  kept = {kept} (apart, {border})  nothing = CastLike (zero, x0)  y = Where (kept, x0, nothing) }}"""


def _eye_like(node: ir.Node) -> str | None:
    """One where ``column - row`` is k, else zero."""
    dtype = node.attributes["dtype"].as_int() if "dtype" in node.attributes else node.inputs[0].dtype
    if dtype is None:
        return None
    return f"""EyeLike <dtype, k> (x0) => (y) {{
        {_APART}  k = Constant <value_int = {node.attributes["k"].as_int()}> ()  kept = Equal (apart, k)
        y = Cast <to = {int(dtype)}> (kept) }}"""


def _one_hot(node: ir.Node) -> str | None:
    """One value where a running number is the index, which counts from the end if it is negative; else another."""
    axis, shape = node.attributes["axis"].as_int(), node.inputs[0].shape
    if axis >= 0 and shape is None:
        return None
    behind = -1 - axis if axis < 0 else len(shape) - axis
    return f"""OneHot <axis> (indices, depth, values) => (y) {{
        zero = Constant <value_int = 0> ()  one = Constant <value_int = 1> ()
        none = Constant <value = int64[0] {{}}> ()
        axis = Constant <value_ints = [{axis}]> ()  sizes = Constant <value_ints = {[-1] + [1] * behind}> ()
        wide = Cast <to = 7> (indices)  whole = Cast <to = 7> (depth)  count = Reshape (whole, none)
        first = Range (zero, count, one)  numbers = Reshape (first, sizes)
        negative = Less (wide, zero)  from_end = Add (wide, count)  at = Where (negative, from_end, wide)
        spread = Unsqueeze (at, axis)  hit = Equal (spread, numbers)
        off = Gather (values, zero)  on = Gather (values, one)  y = Where (hit, on, off) }}"""


def _hardmax(node: ir.Node) -> str:
    """One for the first of the largest elements of an axis, zero for others."""
    axis = node.attributes["axis"].as_int()
    end = f", end = {axis + 1}" if axis != -1 else ""
    return f"""Hardmax <axis> (x) => (y) {{
        place = ArgMax <axis = {axis}, keepdims = 0> (x)  depth = Shape <start = {axis}{end}> (x)
        numbers = Constant <value = int64[2] {{0, 1}}> ()  values = CastLike (numbers, x)
        y = OneHot <axis = {axis}> (place, depth, values) }}"""


def _lp_normalization(node: ir.Node) -> str:
    """``x / |x|`` along an axis; zero stays."""
    axis, p = node.attributes["axis"].as_int(), node.attributes["p"].as_int()
    return f"""LpNormalization <axis, p> (x) => (y) {{
        axes = Constant <value_ints = [{axis}]> ()  zero = Constant <value_float = 0.0> ()
        one = Constant <value_float = 1.0> ()  norm = ReduceL{p} (x, axes)
        nothing = Equal (norm, zero)  divisor = Where (nothing, one, norm)  y = Div (x, divisor) }}"""


def _depth_to_space(node: ir.Node) -> str:
    """Channels become blocks of ``b * b`` pixels: an axis of each is split off and moved behind height and width."""
    held = node.attributes
    b = held["blocksize"].as_int()
    outer = held["mode"].as_string() == "CRD"
    apart, order = (f"0, -1, {b}, {b}", [0, 1, 4, 2, 5, 3]) if outer else (f"0, {b}, {b}, -1", [0, 3, 4, 1, 5, 2])
    return f"""DepthToSpace <blocksize, mode> (x) => (y) {{
        front = Constant <value_ints = [{apart}]> ()  same = Constant <value_ints = [0, -1]> ()
        b = Constant <value_ints = [{b}]> ()  size = Shape <start = 2> (x)  split = Concat <axis = 0> (front, size)
        blocks = Reshape (x, split)  turned = Transpose <perm = {order}> (blocks)
        larger = Mul (size, b)  whole = Concat <axis = 0> (same, larger)  y = Reshape (turned, whole) }}"""


def _einsum(node: ir.Node) -> str | None:
    """A sum of products over letters: of one value, of two as a product of matrices, of more one after the other.

    None where an ellipsis stands for axes whose number is unknown, or that are summed.
    """
    terms, result = _letters(node)
    if result is None:
        return None
    operands, lines = _operands(node), []
    if len(terms) <= 2:
        named = [_diagonals(*operand, lines) for operand in zip(operands, terms, strict=True)]
        lines += _product(named, result) if len(named) > 1 else _moved(*named[0], result)
    else:
        kept = _only(dict.fromkeys(terms[0] + terms[1]), result + "".join(terms[2:]))
        rest = ",".join([kept, *terms[2:]])
        lines += [
            f'first = Einsum <equation = "{terms[0]},{terms[1]}->{kept}"> (x0, x1)',
            f'y = Einsum <equation = "{rest}->{result}"> ({", ".join(["first", *operands[2:]])})',
        ]
    return f"Einsum <equation> ({', '.join(operands)}) => (y) {{ {' '.join(lines)} }}"


def _letters(node: ir.Node) -> tuple[list[str], str | None]:
    """Letters of the operands and of the result, with one for each axis of an ellipsis, which is as long in all."""
    left, arrow, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    terms = left.split(",")
    if len(terms) != len(node.inputs):
        return terms, None
    lengths = {
        None if value is None or value.shape is None else len(value.shape) - len(term.replace("...", ""))
        for value, term in zip(node.inputs, terms, strict=True)
        if "..." in term
    } or {0}
    length = lengths.pop()
    if length is None or lengths or (arrow and "..." in left and "..." not in result):
        return terms, None
    if not arrow:
        counts = collections.Counter(left)
        result = "..." + "".join(sorted(letter for letter, n in counts.items() if n == 1 and letter.isalpha()))
    more = _except(string.ascii_letters, left)[:length]
    return [term.replace("...", more) for term in terms], result.replace("...", more)


def _diagonals(name: str, term: str, lines: list[str]) -> tuple[str, str]:
    """An operand in which no letter comes twice: what is off a diagonal becomes zero, and one of its axes is summed."""
    for letter in dict.fromkeys(term):
        while term.count(letter) > 1:
            axes = [i for i, other in enumerate(term) if other == letter][:2]
            rest = [i for i in range(len(term)) if i not in axes]
            turned, made = f"{name}t", f"{name}d"
            lines.append(f"""
                {turned} = Transpose <perm = {[*rest, *axes]}> ({name})  {made}_size = Shape <start = -1> ({turned})
                {made}_one = Constant <value_int = 1> ()  {made}_zero = Constant <value_int = 0> ()
                {made}_last = Constant <value_ints = [-1]> ()  {made}_n = Squeeze ({made}_size)
                {made}_columns = Range ({made}_zero, {made}_n, {made}_one)
                {made}_rows = Unsqueeze ({made}_columns, {made}_last)  {made}_on = Equal ({made}_rows, {made}_columns)
                {made}_off = CastLike ({made}_zero, {name})  {made}_kept = Where ({made}_on, {turned}, {made}_off)
                {made} = ReduceSum <keepdims = 0> ({made}_kept, {made}_last)""")
            name, term = made, "".join(term[i] for i in rest) + letter
    return name, term


def _moved(name: str, term: str, result: str) -> list[str]:
    """The sum over the letters that the result lacks, in its order."""
    return [*_reduced(name, term, result, "kept"), _turned("kept", _only(term, result), result, "y")]


def _only(letters: Iterable[str], others: str) -> str:
    return "".join(letter for letter in letters if letter in others)


def _except(letters: str, others: str) -> str:
    return "".join(letter for letter in letters if letter not in others)


def _constant(name: str, numbers: Sequence[int]) -> str:
    """A list of integers, which may be empty."""
    return f"{name} = Constant <value = int64[{len(numbers)}] {{{', '.join(map(str, numbers))}}}> ()"


def _reduced(name: str, term: str, others: str, made: str) -> list[str]:
    """The sum over the letters that nothing else has."""
    gone = [axis for axis, letter in enumerate(term) if letter not in others]
    if not gone:
        return [f"{made} = Identity ({name})"]
    axes = f"{made}_axes = Constant <value_ints = {gone}> ()"
    return [axes, f"{made} = ReduceSum <keepdims = 0> ({name}, {made}_axes)"]


def _turned(name: str, term: str, order: str, made: str) -> str:
    perm = [term.index(letter) for letter in order]
    return f"{made} = Transpose <perm = {perm}> ({name})" if perm else f"{made} = Identity ({name})"


def _product(operands: Sequence[tuple[str, str]], result: str) -> list[str]:
    """``[batch, rows, inner] @ [batch, inner, columns]``: letters of a kind are one axis, but those of a batch.

    Without inner letters, axes are only put beside each other and multiplied.
    """
    (x, a), (y, b) = operands
    lines = [*_reduced(x, a, b + result, "a"), *_reduced(y, b, a + result, "b")]
    a, b = _only(a, b + result), _only(b, a + result)
    shared = _only(a, b)
    batch, inner, rows, columns = _only(shared, result), _except(shared, result), _except(a, shared), _except(b, shared)
    whole = batch + rows + columns
    if not inner:
        for made, term, gone in (("a", a, columns), ("b", b, rows)):
            lines += [
                _turned(made, term, _except(whole, gone), f"{made}_turned"),
                _constant(f"{made}_gone", [whole.index(letter) for letter in gone]),
                f"{made}_wide = Unsqueeze ({made}_turned, {made}_gone)",
            ]
        return [*lines, "apart = Mul (a_wide, b_wide)", _turned("apart", whole, result, "y")]
    lines += [_turned("a", a, batch + rows + inner, "left"), _turned("b", b, batch + inner + columns, "right")]
    lines += ["one = Constant <value_ints = [1]> ()", _constant("same", [0] * len(batch))]
    for name, skipped, letters in (("left", len(batch), rows + inner), ("right", len(batch + inner), columns)):
        sizes = enumerate(letters, skipped)
        lines += [f"size_{x} = Shape <start = {i}, end = {i + 1}> ({name})" for i, x in sizes]
    for made, letters in (("m", rows), ("k", inner), ("n", columns)):
        lines.append(f"{made}0 = Identity (one)")
        lines += [f"{made}{i} = Mul ({made}{i - 1}, size_{x})" for i, x in enumerate(letters, 1)]
    m, k, n = f"m{len(rows)}", f"k{len(inner)}", f"n{len(columns)}"
    return [
        *lines,
        _shaped("left", [m, k], "matrix"),
        _shaped("right", [k, n], "other"),
        "products = MatMul (matrix, other)",
        _shaped("products", [f"size_{x}" for x in rows + columns], "apart"),
        _turned("apart", whole, result, "y"),
    ]


def _shaped(name: str, sizes: list[str], made: str) -> str:
    """A value with other sizes behind those of a batch, which stay: operands may differ where one of them is 1."""
    return f"{made}_sizes = Concat <axis = 0> ({', '.join(['same', *sizes])})  {made} = Reshape ({name}, {made}_sizes)"


_BODIES: dict[str, tuple[int, Callable[[ir.Node], str | None]]] = {
    "ArgMin": (13, _arg_min),
    "DepthToSpace": (15, _depth_to_space),
    "Einsum": (15, _einsum),
    "EyeLike": (15, _eye_like),
    "Gemm": (7, _gemm),
    "GroupNormalization": (21, _group_normalization),
    "Hardmax": (18, _hardmax),
    "LpNormalization": (18, _lp_normalization),
    "Mean": (7, _mean),
    "MeanVarianceNormalization": (18, _mean_variance_normalization),
    "OneHot": (15, _one_hot),
    "ReduceLogSumExp": (18, lambda _: _REDUCE_LOG_SUM_EXP),
    "Sum": (7, _sum),
    "Trilu": (16, _trilu),
}
"""What writes a body, and the first opset in which its operators mean that."""
