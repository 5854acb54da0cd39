"""Operators by themselves against ONNX Runtime: their rarer options, sizes known only in a run, and what is refused."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from qc.backends.tvm.backend import TvmCpu
from qc.backends.tvm.c_loops import UPDATES
from qc.backends.tvm.isa import best_for_host
from qc.backends.tvm.kernels.caches import CELLS
from qc.backends.tvm.local import LocalLibrary
from qc.backends.tvm.lower import lower_to_program
from qc.ir.errors import InputError, UnsupportedError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.text import parse

pytest.importorskip("tvm", reason="kernels are compiled by TVM")

RNG = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


RESIZED = [
    ("linear", "half_pixel", "floor", "scales"),
    ("linear", "pytorch_half_pixel", "floor", "less"),
    ("linear", "align_corners", "floor", "scales"),
    ("linear", "asymmetric", "floor", "less"),
    ("nearest", "half_pixel", "round_prefer_floor", "scales"),
    ("nearest", "half_pixel", "round_prefer_ceil", "less"),
    ("nearest", "pytorch_half_pixel", "floor", "less"),
    ("nearest", "pytorch_half_pixel", "ceil", "scales"),
    ("nearest", "align_corners", "round_prefer_floor", "less"),
    ("nearest", "align_corners", "ceil", "scales"),
    ("nearest", "asymmetric", "floor", "scales"),
    ("nearest", "asymmetric", "round_prefer_ceil", "less"),
]
"""Modes, where an element lies, which is the nearest, and scales."""

CASES = {
    "axes of a reduction that are empty": (
        """f (float[n,3] x) => (float[1,1] y, float[n,3] z) {
            none = Constant <value = int64[0] {}> ()  y = ReduceSum (x, none)
            z = ReduceSum <noop_with_empty_axes = 1> (x, none) }""",
        [{"x": values(4, 3)}],
    ),
    "what lies between two sizes, of which the smaller is nothing": (
        """f (float[n] x, float[m] less) => (float[k] y) {
            from = Shape (less)  to = Shape (x)  zero = Constant <value = int64[1] {0}> ()
            part = Slice (x, from, to, zero)  half = Elu (part)  y = Softsign (half) }""",
        [{"x": values(9), "less": values(0)}, {"x": values(9), "less": values(7)}],
    ),
    "a mask that is filled with infinity": (
        """f (float[n,3] x) => (float[n,3] y, bool[n,3] z) {
            s = Shape (x)  m = ConstantOfShape <value = float[1] {-inf}> (s)  y = Add (x, m)
            z = ConstantOfShape <value = bool[1] {1}> (s) }""",
        [{"x": values(4, 3)}],
    ),
    "extremes of nothing": (
        """f (float[n,3] x) => (float[3] high, float[3] low) {
            first = Constant <value = int64[1] {0}> ()
            high = ReduceMax <keepdims = 0> (x, first)  low = ReduceMin <keepdims = 0> (x, first) }""",
        [{"x": values(2, 3)}, {"x": values(0, 3)}],
    ),
    "means and lengths of integers": (
        """f (int64[n,2] x) => (int64[n] mean, int64[n] length) {
            last = Constant <value = int64[1] {1}> ()
            mean = ReduceMean <keepdims = 0> (x, last)  length = ReduceL2 <keepdims = 0> (x, last) }""",
        [{"x": np.array([[3 << 27, -4 << 27], [1 << 27, (1 << 27) + 3], [-3, 0]])}],
    ),
    "windows rounded up, of which none begins in the padding": (
        """f (float[1,2,h,w] x) => (float[1,2,i,j] y) {
            y = MaxPool <kernel_shape = [1,1], strides = [2,2], ceil_mode = 1> (x) }""",
        [{"x": values(1, 2, h, w)} for h, w in ((1, 2), (4, 5))],
    ),
    "slices that reach beyond both ends": (
        """f (float[n,3] x) => (float[a,3] last, float[b,3] rest, float[c,3] middle, float[d,3] second) {
            first = Constant <value = int64[1] {0}> ()  minus4 = Constant <value = int64[1] {-4}> ()
            minus1 = Constant <value = int64[1] {-1}> ()  far = Constant <value = int64[1] {9223372036854775807}> ()
            two = Constant <value = int64[1] {2}> ()
            last = Slice (x, minus4, far, first)  rest = Slice (x, first, minus1, first)
            middle = Slice (x, two, minus1, first)  second = Slice (x, minus4, minus1, first, two) }""",
        [{"x": values(n, 3)} for n in (0, 1, 2, 3, 4, 7)],
    ),
    "running sums from both ends, with and without an element": (
        """f (float[n,3] x, int64[2,m] i) => (float[n,3] a, float[n,3] b, int64[2,m] c, float[n,3] d) {
            zero = Constant <value = int64 {0}> ()  last = Constant <value = int64 {-1}> ()
            a = CumSum <reverse = 1> (x, zero)  b = CumSum <exclusive = 1> (x, zero)
            c = CumSum <exclusive = 1, reverse = 1> (i, last)  d = CumSum (x, last) }""",
        [{"x": values(n, 3), "i": np.arange(2 * m).reshape(2, m)} for n, m in ((4, 5), (1, 1), (0, 0))],
    ),
    "the largest of any axis": (
        """f (float[n,m,2] x, int64[4,n] i) => (float[a,m,2] y, int64[a,m,2] at, int64[3,n] low, int64[3,n] where) {
            two = Constant <value = int64[1] {2}> ()  three = Constant <value = int64[1] {3}> ()
            y, at = TopK <axis = 0> (x, two)  low, where = TopK <axis = -2, largest = 0> (i, three) }""",
        [{"x": values(n, m, 2), "i": RNG.integers(0, 3, (4, n))} for n, m in ((3, 4), (2, 0))],
    ),
    "products with vectors": (
        """f (float[k] v, float[n,k,3] b, float[n,m,k] a) => (float[n,3] y, float[n,m] z, float w) {
            y = MatMul (v, b)  z = MatMul (a, v)  w = MatMul (v, v) }""",
        [{"v": values(k), "b": values(n, k, 3), "a": values(n, 2, k)} for n, k in ((2, 5), (1, 1))],
    ),
    "slices that go backwards": (
        """f (float[n,3,k] x) => (float[n,3,k] all, float[a,2,k] some, float[n,c,k] none, float[n,3,b] last) {
            axes = Constant <value = int64[2] {0, 1}> ()  back = Constant <value = int64[2] {-1, -1}> ()
            far = Constant <value = int64[2] {-9223372036854775807, -9223372036854775807}> ()
            all = Slice (x, back, far, axes, back)
            from = Constant <value = int64[2] {3, 9}> ()  to = Constant <value = int64[2] {0, -4}> ()
            two = Constant <value = int64[2] {-2, -2}> ()  some = Slice (x, from, to, axes, two)
            one = Constant <value = int64[1] {1}> ()  minus = Constant <value = int64[1] {-1}> ()
            none = Slice (x, one, minus, one, minus)
            axis = Constant <value = int64[1] {2}> ()  third = Constant <value = int64[1] {-3}> ()
            limit = Constant <value = int64[1] {-2147483648}> ()  last = Slice (x, third, limit, axis, minus) }""",
        [{"x": values(n, 3, k)} for n, k in ((1, 2), (3, 5), (5, 3), (0, 4))],
    ),
    "frames of what is in them": (
        """f (float[n,2,h,w] x, int64[n,k] i) => (float[n,2,a,b] edge, float[n,2,c,d] mirror, float[n,2,e,f] wrapped,
                int64[n,l] all, float[n,2,g,m] cut, float[n,2,h,o] wider) {
            pads = Constant <value = int64[8] {0, 0, 1, 3, 0, 0, 0, 2}> ()  edge = Pad <mode = "edge"> (x, pads)
            axes = Constant <value = int64[2] {-1, 2}> ()  two = Constant <value = int64[4] {2, 1, 1, 0}> ()
            mirror = Pad <mode = "reflect"> (x, two, , axes)
            mixed = Constant <value = int64[4] {-1, 1, 1, -1}> ()  wrapped = Pad <mode = "wrap"> (x, mixed, , axes)
            one = Constant <value = int64[1] {1}> ()  both = Constant <value = int64[2] {2, 1}> ()
            all = Pad <mode = "reflect"> (i, both, , one)
            less = Constant <value = int64[8] {0, 0, -1, 1, 0, 0, 2, -1}> ()  cut = Pad (x, less)
            last = Constant <value = int64[1] {3}> ()  size = Shape <start = 3> (x)
            eight = Constant <value = int64[1] {8}> ()  rest = Mod (size, eight)
            zero = Constant <value = int64[1] {0}> ()  more = Concat <axis = 0> (zero, rest)
            wider = Pad (x, more, , last) }""",
        [{"x": values(n, 2, h, w), "i": np.arange(3 * n).reshape(n, 3)} for n, h, w in ((1, 2, 3), (2, 4, 9))],
    ),
    "sizes that broadcast in a run only": (
        """f (float[n,3] a, float[m,3] b, float[n,k,2] p, float[m,2,k] q) => (float[w,3] y, float[w,k,k] z) {
            y = Add (a, b)  z = MatMul (p, q) }""",
        [
            {"a": values(n, 3), "b": values(m, 3), "p": values(n, 4, 2), "q": values(m, 2, 4)}
            for n, m in ((1, 3), (3, 1), (2, 2), (0, 1))
        ],
    ),
    "products of as many matrices as a product of dimensions says": (
        """f (float[n,m,2,3] a, float[n,m,3,2] b) => (float[w,2,2] y) {
            s = Constant <value = int64[3] {-1, 2, 3}> ()  t = Constant <value = int64[3] {-1, 3, 2}> ()
            p = Reshape (a, s)  q = Reshape (b, t)  y = MatMul (p, q) }""",
        [{"a": values(2, 3, 2, 3), "b": values(2, 3, 3, 2)}],
    ),
    "names of dimensions that differ in case or signs only": (
        """f (float[n,N] x, float["a-b","a+b"] z) => (float[n,N] y, float["a-b","a+b"] w) {
            y = Relu (x)  w = Relu (z) }""",
        [{"x": values(2, 3), "z": values(4, 5)}],
    ),
    "all axes flattened into rows": (
        "f (float[n,3] x) => (float[m,1] y) { y = Flatten <axis = 2> (x) }",
        [{"x": values(2, 3)}],
    ),
    "a softmax of rows that a mask of the lowest number takes whole": (
        "f (float[2,n] x) => (float[2,n] y) { y = Softmax (x) }",
        [{"x": np.stack([values(n), np.full(n, np.finfo(np.float32).min)])} for n in (3, 19)],
    ),
    "remainders, also of sizes": (
        """f (int64[n] a, int64[n] b, float[m,2] x) => (int64[n] y, float[p,2] z) {
            three = Constant <value = int64[1] {3}> ()  zero = Constant <value = int64[1] {0}> ()
            m = Shape <start = 0, end = 1> (x)  rest = Mod (m, three)
            y = Mod (a, b)  z = Slice (x, zero, rest, zero) }""",
        [{"a": np.array([7, -7, 7, -7, 6]), "b": np.array([3, 3, -3, -3, -1]), "x": values(8, 2)}],
    ),
    "a softplus of large numbers": (
        "f (float[n] x) => (float[n] y) { y = Softplus (x) }",
        [{"x": np.array([-200, -1, 0, 1, 200], np.float32)}],
    ),
    "images of other sizes, by scales": (
        f"""f (float[n,2,h,w] x) => ({", ".join(f"float[a{i},b{i},c{i},d{i}] y{i}" for i in range(len(RESIZED)))}) {{
            scales = Constant <value = float[4] {{1.0, 1.0, 2.0, 1.4}}> ()
            less = Constant <value = float[4] {{1.0, 1.0, 0.6, 0.5}}> () {
            " ".join(
                f'y{i} = Resize <mode = "{mode}", coordinate_transformation_mode = "{place}", '
                f'nearest_mode = "{nearest}"> (x, , {scales})'
                for i, (mode, place, nearest, scales) in enumerate(RESIZED)
            )
        } }}""",
        [{"x": values(n, 2, h, w)} for n, h, w in ((1, 5, 7), (2, 2, 3))],
    ),
    "images of other sizes, by sizes and axes": (
        """f (float[n,2,h,w] x, float[n,2,a,b] other, float[n,2,k] z, float[n,2,3,2] p)
             => (float[n,2,a,b] y, float[n,2,3,4] small, float[n,2,5] v, float[n,2,m] u, float[n,2,3,4] q) {
            sizes = Shape (other)  y = Resize <mode = "linear"> (x, , , sizes)
            held = Constant <value = int64[2] {3, 4}> ()
            small = Resize <mode = "nearest", axes = [2, 3]> (x, , , held)
            five = Constant <value = int64[1] {5}> ()
            v = Resize <mode = "linear", axes = [2]> (z, , , five)
            thrice = Constant <value = float[3] {1.0, 1.0, 3.0}> ()  u = Resize <mode = "nearest"> (z, , thrice)
            more = Constant <value = float[4] {1.0, 1.0, 1.3, 2.0}> ()  q = Resize <mode = "linear"> (p, , more) }""",
        [
            {"x": values(n, 2, h, w), "other": values(n, 2, 4, 1), "z": values(n, 2, 4), "p": values(n, 2, 3, 2)}
            for n, h, w in ((1, 5, 7), (2, 1, 4))
        ],
    ),
    "images of other sizes, before opset 10": (
        """<ir_version: 7, opset_import: ["": 9]>
        f (float[n,2,h,w] x) => (float[n,2,a,b] y, float[n,2,c,d] z) {
            s = Constant <value = float[4] {1.0, 1.0, 2.0, 1.5}> ()
            y = Upsample <mode = "nearest"> (x, s)  z = Upsample <mode = "linear"> (x, s) }""",
        [{"x": values(n, 2, h, w)} for n, h, w in ((1, 5, 7), (2, 1, 3))],
    ),
    "channels of images that are normalized": (
        """f (float[n,2,h,w] x, float[n,2,k] z, float[2] s, float[2] b) => (float[n,2,h,w] y, float[n,2,k] v) {
            y = InstanceNormalization <epsilon = 0.01> (x, s, b)  v = InstanceNormalization (z, s, b) }""",
        [
            {"x": 3 + values(n, 2, h, w), "z": values(n, 2, 19), "s": values(2), "b": values(2)}
            for n, h, w in ((1, 3, 5), (2, 4, 8))
        ],
    ),
    "elements that others replace or change, by indices": (
        f"""f (float[n,k] x, int64[m,2] i, float[m,2] u, int32[n,2] j, int64[p] w, int64[q] l, int64[q] v)
            => ({", ".join(f"float[n,k] y{s}" for s in UPDATES)}, float[n,k] last, int64[p] count, float[n,2] back) {{
            {" ".join(f'y{s} = ScatterElements <reduction = "{s}"> (x, i, u)' for s in UPDATES)}
            back = GatherElements <axis = 1> (x, j)  last = ScatterElements <axis = -1> (x, j, back)
            count = ScatterElements <reduction = "add"> (w, l, v) }}""",
        [
            {
                "x": values(n, k),
                "i": np.array([[1, -1], [-2, 0]])[:m],
                "u": values(m, 2),
                "w": np.arange(p),
                "j": np.resize(np.array([2, -3], np.int32), (n, 2)),
                "l": np.resize([1, -1, 0], q),
                "v": np.arange(q),
            }
            for n, k, m, p, q in ((2, 3, 2, 3, 7), (3, 4, 0, 0, 0))
        ],
    ),
    "slices that others replace or change, by tuples of indices": (
        f"""f (float[n,k,4] x, int64[m,1] i, float[m,k,4] u, int64[m,2,2] j, float[m,2,4] v, int32[p,3] l, float[p] w)
            => ({", ".join(f"float[n,k,4] y{s}" for s in UPDATES)}, float[n,k,4] pairs, float[n,k,4] single,
                float[p] back) {{
            {" ".join(f'y{s} = ScatterND <reduction = "{s}"> (x, i, u)' for s in UPDATES)}
            pairs = ScatterND (x, j, v)  wide = Cast <to = 7> (l)
            single = ScatterND <reduction = "add"> (x, wide, w)  back = GatherND (single, wide) }}""",
        [
            {
                "x": values(3, 2, 4),
                "i": np.array([[-1], [1]])[:m],
                "u": values(m, 2, 4),
                "v": values(m, 2, 4),
                "j": np.array([[[0, 1], [-1, -1]], [[1, 0], [1, 1]]])[:m],
                "w": values(p),
                "l": np.resize(np.array([1, -1, 2, 0, 1, -3], np.int32), (p, 3)),
            }
            for m, p in ((2, 5), (0, 0))
        ],
    ),
}
TRANSPOSED = """
f (float[n,4,h,w] x, float[n,4,k] z)
  => (float[n,3,a,b] y, float[n,6,c,d] grouped, float[n,4,e,f] each, float[n,2,m] v, float[n,2,i] upper,
      float[n,2,j] lower, float[n,3,p,q] sized) {
  y = ConvTranspose <strides = [2, 3], pads = [1, 0, 2, 1], dilations = [1, 2], output_padding = [1, 2]> (x, w1, b1)
  grouped = ConvTranspose <group = 2, strides = [2, 1]> (x, w2, b2)
  each = ConvTranspose <group = 4, kernel_shape = [2, 2], strides = [2, 2], auto_pad = "VALID"> (x, w3)
  v = ConvTranspose <strides = [3], pads = [0, 1]> (z, w4)
  upper = ConvTranspose <strides = [2], auto_pad = "SAME_UPPER"> (z, w4)
  lower = ConvTranspose <strides = [2], auto_pad = "SAME_LOWER"> (z, w4)
  three = Constant <value = int64[2] {3, 3}> ()
  fixed = Resize <axes = [2, 3]> (x, , , three)
  sized = ConvTranspose <strides = [2, 3], output_shape = [6, 7]> (fixed, w1)
}
"""
WEIGHTS = {"w1": (4, 3, 3, 2), "b1": (3,), "w2": (4, 3, 1, 3), "b2": (6,), "w3": (4, 1, 2, 2), "w4": (4, 2, 5)}


def library(model: Model, directory: Path):
    backend = TvmCpu()
    backend.emit(model, directory)
    return backend.open(directory, threads=1)


@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_that_of_onnx_runtime(name: str, tmp_path: Path) -> None:
    text, batches = CASES[name]
    agree(parse(text), batches, tmp_path)


def agree(model: Model, batches: Sequence[dict[str, np.ndarray]], directory: Path) -> None:
    runner, session = library(model, directory), Session(model)
    for batch in batches:
        found = runner.run(batch)
        for output, expected in session.run(batch).items():
            assert found[output].shape == expected.shape
            np.testing.assert_allclose(found[output], expected, rtol=1e-5, atol=1e-6)


def test_a_transposed_convolution_is_that_of_onnx_runtime(tmp_path: Path) -> None:
    model = parse(TRANSPOSED, weights={n: values(*shape) for n, shape in WEIGHTS.items()})
    batches = [{"x": values(n, 4, h, w), "z": values(n, 4, k)} for n, h, w, k in ((1, 3, 5, 4), (2, 4, 1, 1))]
    agree(model, batches, tmp_path)


def test_an_output_that_is_listed_twice_is_written_twice(tmp_path: Path) -> None:
    """Its name, which a comment in the header tells, looks like the end of one."""
    model = parse("f (float[n,4] x) => (float[n,4] y) { y = Relu (x) }")
    model.graph.outputs[0].name = "a*/b"
    model.graph.outputs.append(model.graph.outputs[0])
    agree(Model.of(model), [{"x": values(3, 4)}], tmp_path)


REFUSED = {
    "a window of attention": (
        "f (float[1,2,n,8] q) => (float[1,2,n,8] y) { y = Attention <left_window_size = 2> (q, q, q) }",
        "no kernel for Attention at .*: its queries see a window",
    ),
    "a pool of bytes": (
        "f (uint8[1,1,4,4] x) => (uint8[1,1,2,2] y) { y = MaxPool <kernel_shape = [2,2], strides = [2,2]> (x) }",
        "no kernel for MaxPool at .*: it is not over one to three axes of float32",
    ),
    "indices of a pool": (
        "f (float[1,1,4,4] x) => (float[1,1,3,3] y, int64[1,1,3,3] i) { y, i = MaxPool <kernel_shape = [2,2]> (x) }",
        "no kernel for MaxPool at .*: its output 'i' is read",
    ),
    "a cubic line": (
        """f (float[1,1,4,4] x) => (float[1,1,8,8] y) {
            s = Constant <value = float[4] {1.0, 1.0, 2.0, 2.0}> ()  y = Resize <mode = "cubic"> (x, , s) }""",
        "no kernel for Resize at .*: it resizes FLOAT by the rules 'cubic' and 'half_pixel'",
    ),
    "a transposed convolution whose result has a given size": (
        """f (float[1,1,h] z) => (float[1,1,4] y) <float[1,1,2] w = {1.0, 2.0}> {
            y = ConvTranspose <output_shape = [4]> (z, w) }""",
        "no kernel for ConvTranspose at .*: its padding follows",
    ),
    "truth values that are added": (
        """f (bool[3] x, int64[1] i, bool[1] u) => (bool[3] y) {
            y = ScatterElements <reduction = "add"> (x, i, u) }""",
        "no kernel for ScatterElements at .*: it reduces BOOL by 'add'",
    ),
    "an output of another type": (
        "f (float[n] x) => (float[n] y, double z) { y = Relu (x)  z = Constant <value = double {1.0}> () }",
        "found DOUBLE at 'z'",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_kernel_computes_is_refused(name: str, tmp_path: Path) -> None:
    text, reason = REFUSED[name]
    with pytest.raises(UnsupportedError, match=reason):
        TvmCpu().emit(parse(text), tmp_path)


UNFIT = {
    "two sizes of an axis": (
        "f (float[n] a, float[m] b) => (float[n] y) { y = Add (a, b) }",
        {"a": values(3), "b": values(5)},
    ),
    "an axis and a constant": (
        "f (float[n] a) => (float[4] y) { b = Constant <value = float[4] {1.0, 2.0, 3.0, 4.0}> ()  y = Add (a, b) }",
        {"a": values(3)},
    ),
    "columns and rows": (
        "f (float[2,n] a, float[m,2] b) => (float[2,2] y) { y = MatMul (a, b) }",
        {"a": values(2, 3), "b": values(4, 2)},
    ),
    "another number of elements": (
        "f (float[n] a) => (float[2,m] y) { s = Constant <value = int64[2] {2, -1}> ()  y = Reshape (a, s) }",
        {"a": values(3)},
    ),
    "parts of different widths": (
        "f (float[2,n] a, float[2,m] b) => (float[4,n] y) { y = Concat <axis = 0> (a, b) }",
        {"a": values(2, 3), "b": values(2, 4)},
    ),
    "an axis that is not one": (
        "f (float[n,2] a) => (float[2] y) { z = Constant <value = int64[1] {0}> ()  y = Squeeze (a, z) }",
        {"a": values(3, 2)},
    ),
    "an image smaller than a window": (
        "f (float[1,1,h,w] a) => (float[1,1,i,j] y) { y = MaxPool <kernel_shape = [5,5]> (a) }",
        {"a": values(1, 1, 2, 2)},
    ),
    "a mirror image and what it is of": (
        """f (float[n] x) => (float[m] y) {
            s = Constant <value = int64[2] {0, 3}> ()  y = Pad <mode = "reflect"> (x, s) }""",
        {"x": values(3)},
    ),
    "a channel and its gain": (
        "f (float[1,n,4] x, float[m] s) => (float[1,n,4] y) { y = InstanceNormalization (x, s, s) }",
        {"x": values(1, 2, 4), "s": values(3)},
    ),
    "an image of nothing that is made larger": (
        """f (float[1,1,h] a) => (float[1,1,4] y) {
            s = Constant <value = int64[3] {1, 1, 4}> ()  y = Resize (a, , , s) }""",
        {"a": values(1, 1, 0)},
    ),
}


@pytest.mark.parametrize("name", UNFIT)
def test_sizes_that_do_not_fit_together_are_refused_in_a_run(name: str, tmp_path: Path) -> None:
    text, batch = UNFIT[name]
    runner = library(parse(text), tmp_path)
    with pytest.raises(InputError, match="do not fit together"):
        runner.run(batch)


@pytest.mark.parametrize("sizes", [(2**31 - 1, 2**31 - 1), (2**31 - 1, 2**30), (2**20, 2**20)])
def test_products_of_sizes_that_overflow_are_refused(sizes: tuple[int, int], tmp_path: Path) -> None:
    """64 times the first two is negative or zero in 64 bits, once bytes are counted."""
    model = parse("f (float[n,m,64] x) => (float[n,m,64] y) { h = Relu (x)  y = Sqrt (h) }")
    TvmCpu().emit(model, tmp_path)
    held = LocalLibrary(tmp_path / "libmodel.so", 2)
    assert held.open(tmp_path / "model.weights") == 0
    assert held.error(held.create(sizes, 1)) == "larger than the limits of the instance"


def test_dimensions_whose_usual_limits_are_too_large_together_are_no_obstacle(tmp_path: Path) -> None:
    model, x = parse("f (float[a,b,c,d,e,f,g] x) => (float[a,b,c,d,e,f,g] y) { y = Abs (x) }"), values(7)
    runner = library(model, tmp_path)
    assert np.array_equal(runner.run({"x": x.reshape(1, 1, 7, 1, 1, 1, 1)})["y"].ravel(), abs(x))


def test_sizes_do_not_grow_from_layer_to_layer() -> None:
    """Positions are cut from a table: only shape inference knows that there are as many as tokens."""
    layers = " ".join(f"a{i} = Add (h{i}, p)  h{i + 1} = Add (a{i}, h{i})" for i in range(30))
    model = parse(f"""f (float[n,4] h0, float[64,4] table) => (float[n,4] y) {{
        zero = Constant <value = int64[1] {{0}}> ()  n = Shape <start = 0, end = 1> (h0)
        p = Slice (table, zero, n, zero) {layers} y = Relu (h30) }}""")
    program, _ = lower_to_program(model, best_for_host(), exact=False, cells=CELLS["float32"])
    assert sum(map(len, program.conditions)) < 1000


@pytest.mark.parametrize("index", [3, -4])
def test_an_index_outside_of_an_axis_is_refused_in_a_run(index: int, tmp_path: Path) -> None:
    model = parse("""f (float[n] x, int64[1] i, int64[1,1] j, float[1] u) => (float[n] y, float[n] z) {
        y = ScatterElements (x, i, u)  z = ScatterND <reduction = "add"> (x, j, u) }""")
    runner, x = library(model, tmp_path), {"x": values(3), "u": values(1)}
    for i, j in ((index, 0), (0, index)):
        with pytest.raises(InputError, match="outside of its table"):
            runner.run({**x, "i": np.array([i]), "j": np.array([[j]])})


def test_integers_are_divided_by_zero_without_harm(tmp_path: Path) -> None:
    model = parse("f (int64[n] a, int64[n] b) => (int64[n] y) { y = Div (a, b) }")
    a, b = np.array([7, -7, 7, np.iinfo(np.int64).min]), np.array([2, 2, 0, -1])
    found = library(model, tmp_path).run({"a": a, "b": b})["y"]
    assert found[:2].tolist() == [3, -3]


def test_an_input_that_nothing_reads_may_have_any_type(tmp_path: Path) -> None:
    model = parse("f (string[n,k] s, float[n] x, double[k] d) => (float[n] y) { y = Relu (x) }")
    batch = {"s": np.array([["a"], ["b"]], object), "x": np.array([-1, 2], np.float32), "d": np.ones(1)}
    assert library(model, tmp_path).run(batch)["y"].tolist() == [0, 2]


def test_a_library_without_kernels_compiles_without_warnings(tmp_path: Path) -> None:
    TvmCpu().emit(parse("f (float[n] x) => (float[n] y) { y = Identity (x) }"), tmp_path)
    command = ["cc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-c", "model.c", "-o", "model.o"]
    subprocess.run(command, cwd=tmp_path, check=True)
