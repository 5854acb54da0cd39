"""GPU kernels in which elements of an axis follow each other: the largest in order, running sums."""

from __future__ import annotations

from typing import Any

from qc.backends.tvm.gpu.threads import BLOCK, Threads

__all__ = ["cum_sum", "top_k"]


def top_k(name: str, kind: str, largest: bool) -> Any:
    """The first k of each row in order, with their places, the first of equals first.

    A block for each row takes the best of those that come behind the last one that it took, k times. A place of n
    stands for none.
    """
    with Threads(name, {"x": kind, "y": kind, "places": "int32"}, ("n", "k", "units")) as k:
        T, x, n = k.T, k.x, k.sizes["n"]

        def ahead(a: Any, i: Any, b: Any, j: Any) -> Any:
            """Whether number a at i comes before b at j."""
            return x.Or(a > b if largest else a < b, x.And(x.EQ(a, b), i < j))

        with k.blocks(k.sizes["units"]) as (row, thread):
            values, places = k.common(BLOCK, kind), k.common(BLOCK, "int32")
            best, at, last, behind = (k.own(1, d) for d in (kind, "int32", kind, "int32"))

            def take(value: Any, place: Any, allowed: Any) -> None:
                """Keeps a number instead of the best so far, if it comes before it."""
                better = x.Or(x.EQ(at[0], n), ahead(value, place, best[0], at[0]))
                with T.If(x.And(allowed, better)), T.Then():
                    k.set(best, 0, value)
                    k.set(at, 0, place)

            k.set(last, 0, x.const(0, kind))
            k.set(behind, 0, T.int32(-1))
            with T.serial(0, k.sizes["k"]) as turn:
                k.set(best, 0, x.const(0, kind))
                k.set(at, 0, n)
                with k.strided(thread, n) as i:
                    value = k.get("x", row * n + i)
                    take(value, i, x.Or(behind[0] < 0, ahead(last[0], behind[0], value, i)))
                step = BLOCK // 2
                while step:
                    k.set(values, thread, best[0])
                    k.set(places, thread, at[0])
                    k.wait()
                    other = T.bind(x.bitwise_xor(thread, T.int32(step)))
                    value, place = T.bind(values[other]), T.bind(places[other])
                    k.wait()
                    take(value, place, place < n)
                    step //= 2
                k.set(last, 0, best[0])
                k.set(behind, 0, at[0])
                with T.If(thread == 0), T.Then():
                    k.put("y", row * k.sizes["k"] + turn, best[0])
                    k.put("places", row * k.sizes["k"] + turn, at[0])
    return k.function()


def cum_sum(name: str, kind: str) -> Any:
    """Running sums along the middle axis; a thread for each of the others."""
    with Threads(name, {"x": kind, "y": kind}, ("outer", "n", "inner")) as k:
        T, s = k.T, k.sizes
        with k.elements(s["outer"] * s["inner"]) as i:
            o, c = k.split(i, [s["outer"], s["inner"]])
            total = k.own(1, kind)
            k.set(total, 0, k.x.const(0, kind))
            with T.serial(0, s["n"]) as j:
                at = T.bind((o * s["n"] + j) * s["inner"] + c)
                k.set(total, 0, total[0] + k.get("x", at))
                k.put("y", at, total[0])
    return k.function()
