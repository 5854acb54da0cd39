"""GPU kernels of images: convolutions, pooling, other sizes and places."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from qc.backends.tvm.gpu.expressions import activate
from qc.backends.tvm.gpu.threads import BLOCK, Threads
from qc.backends.tvm.gpu.weights import Words
from qc.backends.tvm.kernels.vectors import LOWEST
from qc.backends.tvm.windows import Numbers, Window

__all__ = ["convolve", "grid_sample", "pool", "resize"]

_IMAGE, _PLACES = ("n0", "n1", "n2"), ("m0", "m1", "m2")
_SIZES = ("batch", *_IMAGE, *_PLACES)
_CHANNELS, _STEP = 16, 32


def convolve(
    name: str, window: Window, apart: Numbers, groups: int, words: Words | None, rows: int, columns: int, bias: bool,
    residual: bool, kind: str,
) -> Any:  # fmt: skip
    """``y[b, o, p] = activation(sum_c x[b, c at p] w[o, c] + bias[o] + r[b, o, p])``, c an element of the window.

    A thread computes `_CHANNELS` output channels of a group at one place, and reads what lies under its window once for
    them. The threads of a block, at neighbouring places, share the weight, `_STEP` columns of it at a time. The window
    moves over images whose elements lie `apart`, with nothing in between: so a convolution is transposed.
    """
    out, size = rows // groups, math.prod(window.sizes)
    each, count = columns // size, min(out, _CHANNELS)
    parts = -(-out // count)
    pointers = {"x": "float32", **({"w": "float32"} if words is None else words.pointers), "y": "float32"}
    pointers |= {n: "float32" for n, used in (("bias", bias), ("r", residual)) if used}
    with Threads(name, pointers, _SIZES) as k:
        T, s = k.T, k.sizes
        places = T.bind(s["m0"] * s["m1"] * s["m2"])
        tiles = T.truncdiv(places + (BLOCK - 1), BLOCK)

        def weight(row: Any, column: Any) -> Any:
            return k.get("w", row * columns + column)

        weight = weight if words is None else words.flat(k.get, rows, columns)
        with k.blocks(s["batch"] * (groups * parts) * tiles) as (block, thread):
            batch, group, part, tile = k.split(block, [s["batch"], T.int32(groups), T.int32(parts), tiles])
            place = T.bind(tile * BLOCK + thread)
            starts = _starts(window, k.split(place, [s[m] for m in _PLACES]))
            first, image = T.bind(part * count), T.bind((batch * groups + group) * each)
            weights, sums, x = k.common(count * _STEP), k.own(count), k.own(1)
            for o in range(count):
                k.set(sums, o, T.float32(0))
            with T.serial(0, -(-columns // _STEP)) as step:
                start = T.bind(step * _STEP)
                k.wait()
                with k.strided(thread, T.int32(count * _STEP)) as i:
                    o, c = (T.bind(f(i, _STEP)) for f in (T.truncdiv, T.truncmod))
                    row = T.bind(group * out + T.min(first + o, out - 1))
                    column = T.bind(T.min(start + c, columns - 1))
                    k.set(weights, i, weight(row, column))
                k.wait()
                with T.serial(0, T.min(columns - start, _STEP)) as c:
                    column = T.bind(start + c)
                    channel, *element = k.split(column, [T.int32(each), *map(T.int32, window.sizes)])
                    k.set(x, 0, T.float32(0))
                    with _inside(k, window, starts, element, apart) as pixel:
                        k.set(x, 0, _read(k, image + channel, pixel))
                    for o in range(count):
                        k.set(sums, o, sums[o] + x[0] * weights[c + o * _STEP])
            for o in range(count):
                with T.If(k.x.And(place < places, first + o < out)), T.Then():
                    row = T.bind(group * out + first + o)
                    at = T.bind((batch * rows + row) * places + place)
                    value = sums[o]
                    value = value + k.get("bias", row) if bias else value
                    value = value + k.get("r", at) if residual else value
                    k.put("y", at, activate(kind, T.bind(value)))
    return k.function()


def pool(name: str, kind: str, window: Window) -> Any:
    """One number of each window: the ``largest``, or the mean of what is ``inside`` or ``padded`` with zeros."""
    with Threads(name, {"x": "float32", "y": "float32"}, _SIZES) as k:
        T, s = k.T, k.sizes
        places = [s[m] for m in _PLACES]
        with k.elements(s["batch"] * places[0] * places[1] * places[2]) as e:
            image, *place = k.split(e, [s["batch"], *places])
            starts = _starts(window, place)
            total, count = k.own(1), k.own(1, "int32")
            k.set(total, 0, T.float32(LOWEST if kind == "largest" else 0))
            k.set(count, 0, T.int32(0))
            with T.grid(*window.sizes) as element, _inside(k, window, starts, element) as pixel:
                x = _read(k, image, pixel)
                k.set(total, 0, T.max(total[0], x) if kind == "largest" else total[0] + x)
                k.set(count, 0, count[0] + 1)
            if kind == "padded":
                k.set(count, 0, _counted(k, window, starts))
            k.put("y", e, total[0] if kind == "largest" else total[0] / T.cast(count[0], "float32"))
    return k.function()


def resize(name: str, scale: float | None, place: str, value: str) -> Any:
    """An axis of n elements as one of m, by the rules of ``host/resize.c``; a thread for each element."""
    with Threads(name, {"x": "float32", "y": "float32"}, ("outer", "n", "m", "inner")) as k:
        T, s, floor = k.T, k.sizes, k.x.floor
        with k.elements(s["outer"] * s["m"] * s["inner"]) as e:
            o, j, i = k.split(e, [s["outer"], s["m"], s["inner"]])
            n, m, number = (T.cast(v, "float32") for v in (s["n"], s["m"], j))
            factor = m / n if scale is None else T.float32(scale)
            at = {
                "asymmetric": number / factor,
                "align_corners": number * (n - 1) / T.max(m - 1, T.float32(1)),
            }.get(place, (number + 0.5) / factor - 0.5)
            at = T.if_then_else(s["m"] == 1, T.float32(0), at) if place == "pytorch_half_pixel" else at
            at = T.bind(T.max(T.min(at, n - 1), T.float32(0)))
            below = T.bind(floor(at))
            at = {
                "linear": at,
                "floor": below,
                "ceil": k.x.ceil(at),
                "round_prefer_floor": T.if_then_else(at - below > 0.5, below + 1, below),
                "round_prefer_ceil": T.if_then_else(at - below >= 0.5, below + 1, below),
            }[value]
            first = T.bind(T.min(T.cast(at, "int32"), s["n"] - 1))
            second = T.min(first + 1, s["n"] - 1)
            a, b = (k.get("x", (o * s["n"] + index) * s["inner"] + i) for index in (first, second))
            rest = T.bind(at - T.cast(first, "float32"))
            k.put("y", e, a * (T.float32(1) - rest) + b * rest if value == "linear" else a)
    return k.function()


def grid_sample(name: str, nearest: bool, padding: str, aligned: bool) -> Any:
    """Images at the places of a grid, by the rules of ``host/grid_sample.c``; a thread for each element."""
    with Threads(name, dict.fromkeys(("x", "grid", "y"), "float32"), ("batch", "channels", "h", "w", "places")) as k:
        T, s, floor = k.T, k.sizes, k.x.floor

        def place(g: Any, n: Any) -> Any:
            size = T.bind(T.cast(n, "float32"))
            low, span = T.float32(0 if aligned else -0.5), size - 1 if aligned else size
            at = T.bind((g + 1) / 2 * (size - 1) if aligned else ((g + 1) * size - 1) / 2)
            at = T.bind(k.x.nearbyint(at)) if nearest else at
            if padding == "zeros":
                return T.bind(T.min(T.max(at, T.float32(-2)), size + 1))
            if padding == "reflection":
                beyond = T.bind(T.max(T.max(low - at, at - low - span), T.float32(0)))
                times = T.bind(floor(beyond / T.max(span, T.float32(1))))
                rest = T.bind(beyond - times * span)
                even = k.x.EQ(times - 2 * floor(times / 2), T.float32(0))
                front = k.x.EQ(T.cast(at < low, "int32"), T.cast(even, "int32"))
                at = T.if_then_else(beyond > 0, T.if_then_else(front, low + rest, low + span - rest), at)
            return T.bind(T.min(T.max(at, T.float32(0)), size - 1))

        with k.elements(s["batch"] * s["channels"] * s["places"]) as e:
            image, p = k.split(e, [e, s["places"]])
            at = T.bind(2 * (T.truncdiv(image, s["channels"]) * s["places"] + p))
            column, row = place(k.get("grid", at), s["w"]), place(k.get("grid", at + 1), s["h"])
            total = k.own(1)
            k.set(total, 0, T.float32(0))
            for down, right in itertools.product(range(2), repeat=2):
                i, j = (T.bind(T.cast(floor(v), "int32") + more) for v, more in ((row, down), (column, right)))
                with T.If(k.x.all(i >= 0, i < s["h"], j >= 0, j < s["w"])), T.Then():
                    parts = (1 - T.abs(v - T.cast(n, "float32")) for v, n in ((row, i), (column, j)))
                    value = k.get("x", (image * s["h"] + i) * s["w"] + j)
                    k.set(total, 0, total[0] + value * math.prod(parts))
            k.put("y", e, total[0])
    return k.function()


def _starts(window: Window, place: Sequence[Any]) -> list[Any]:
    """Where the first element of a window lies."""
    return [p * stride - before for p, stride, before in zip(place, window.strides, window.before, strict=True)]


@contextlib.contextmanager
def _inside(
    k: Threads, window: Window, starts: Sequence[Any], element: Sequence[Any], apart: Numbers = (1, 1, 1)
) -> Iterator[list[Any]]:
    """What is done if an element of a window lies on an element of its image: yields where."""
    T, found, holds = k.T, [], []
    for start, i, dilation, step, n in zip(starts, element, window.dilations, apart, _IMAGE, strict=True):
        at = T.bind(start + i * dilation)
        found.append(at if step == 1 else T.bind(T.truncdiv(at, step)))
        holds += [at >= 0, found[-1] < k.sizes[n], *([k.x.EQ(T.truncmod(at, step), 0)] if step > 1 else [])]
    with T.If(k.x.all(*holds)), T.Then():
        yield found


def _read(k: Threads, image: Any, pixel: Sequence[Any]) -> Any:
    at = image
    for n, index in zip(_IMAGE, pixel, strict=True):
        at = at * k.sizes[n] + index
    return k.get("x", at)


def _counted(k: Threads, window: Window, starts: Sequence[Any]) -> Any:
    """The elements of a window that lie on an image or its padding."""
    found: Any = 1
    for axis, n in enumerate(_IMAGE):
        left, step = k.sizes[n] + window.behind[axis] - starts[axis], window.dilations[axis]
        found = found * k.T.min(k.T.truncdiv(left + (step - 1), step), window.sizes[axis])
    return found
