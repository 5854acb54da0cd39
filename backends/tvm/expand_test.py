"""Operators that have no kernel of their own against ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qc.backends.tvm.backend import TvmCpu, fused
from qc.backends.tvm.expand import ExpandFunctions
from qc.ir.errors import UnsupportedError
from qc.ir.model import Model
from qc.ir.runtime import Session
from qc.ir.text import parse, to_text
from qc.passes.base import Outcome

pytest.importorskip("tvm", reason="kernels are compiled by TVM")

RNG = np.random.default_rng(0)


def values(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


ONE = "one = Constant <value = int64[1] {1}> ()"
CASES = {
    "functions of ONNX": (
        f"""f (float[n,4] x, int64[n] t) => (float[n,4] a, float[n,4] b, float[n,4] c, float[n,4] d,
            float[n,4] e, float[n,4] f, float[n,4] g, float[1,4] h, float[n] i, float[n,1] j, float k) {{
            {ONE}  zero = Constant <value = int64[1] {{0}}> ()
            a = LogSoftmax (x)  b = Celu <alpha = 0.5> (x)  c = Selu (x)  d = Mish (x)
            e = Shrink <lambd = 0.3, bias = 0.1> (x)  f = ThresholdedRelu (x)  g = LogSoftmax <axis = 0> (x)
            h = ReduceL1 (x, zero)  i = ReduceSumSquare <keepdims = 0> (x, one)
            squares = Mul (x, x)  j = ReduceLogSum (squares, one)
            k = SoftmaxCrossEntropyLoss (x, t) }}""",
        [{"x": values(3, 4), "t": np.array([3, 0, 2])}],
    ),
    "images": (
        """f (float[n,8,h,w] x) => (float[n,2,i,j] a, float[n,2,i,j] b, float[n,8,1,1] c) {
            a = DepthToSpace <blocksize = 2> (x)  b = DepthToSpace <blocksize = 2, mode = "CRD"> (x)
            c = GlobalMaxPool (x) }""",
        [{"x": values(2, 8, 3, 5)}],
    ),
    "triangles, also of sizes known in a run only": (
        """f (float[2,n,5] x, int64[n,m] i) => (float[2,n,5] a, float[2,n,5] b, int64[n,m] c) {
            two = Constant <value_int = 2> ()  a = Trilu (x)  b = Trilu <upper = 0> (x, two)  c = Trilu (i, two) }""",
        [{"x": values(2, 4, 5), "i": np.arange(12).reshape(4, 3)}],
    ),
    "products of what is computed": (
        """f (float[k,n] a, float[4,k] b, float[4] c) => (float[n,4] y, float[n,k] z, int64[n] i) {
            y = Gemm <transA = 1, transB = 1, alpha = 0.5, beta = 2.0> (a, b, c)  z = Gemm (y, b)
            i = ArgMin <axis = 1, keepdims = 0> (z) }""",
        [{"a": values(3, 2), "b": values(4, 3), "c": values(4)}],
    ),
    "places in words of zeros and ones": (
        """f (int64[m,2] i, int64[m] j, float[n,4] x, float[k,m] z) => (float[m,2,5] a, int64[5,m] b, float[m,d] c,
            float[n,4] d, float[k,m] e, int64[n,4] f) {
            five = Constant <value = int64 {5}> ()  values = Constant <value = float[2] {-1.0, 2.0}> ()
            numbers = Constant <value = int64[2] {0, 1}> ()  count = Shape <start = 0, end = 1> (x)
            a = OneHot (i, five, values)  b = OneHot <axis = 0> (j, five, numbers)
            c = OneHot <axis = 1> (j, count, values)
            d = Hardmax (x)  e = Hardmax <axis = 0> (z)  f = EyeLike <dtype = 7, k = -1> (x) }""",
        [
            {
                "i": np.array([[4, -5], [5, -6], [0, 1]])[:m],
                "j": np.arange(m),
                "x": values(3, 4),
                "z": np.ones((2, m), np.float32),
            }
            for m in (3, 0)
        ],
    ),
    "lengths": (
        """f (float[n,k] x, float[2,2,m] z) => (float[n,k] a, float[n,k] b, float[2,2,m] c) {
            a = LpNormalization (x)  b = LpNormalization <axis = 0, p = 1> (x)  c = LpNormalization <axis = 1> (z) }""",
        [{"x": x, "z": values(2, 2, m)} for x, m in ((np.array([[1, -2], [0, 0]], np.float32), 3), (values(0, 2), 0))],
    ),
    "several operands": (
        """f (float[n,4] x, float[4] y, float[n,1] z) => (float[n,4] a, float[n,4] b, float[n,4] c) {
            a = Sum (x, y, z)  b = Mean (x, y, z)  c = Sum (x) }""",
        [{"x": values(3, 4), "y": values(4), "z": values(3, 1)}],
    ),
    "normalization of several axes": (
        """f (float[n,3,4] x, float[3,4] s, float[3,4] t) => (float[n,3,4] a) {
            a = LayerNormalization <axis = 1> (x, s, t) }""",
        [{"x": values(2, 3, 4), "s": values(3, 4), "t": values(3, 4)}],
    ),
    "functions that a model brings along": (
        """<ir_version: 10, opset_import: ["" : 23, "my.own" : 1]>
            f (float[n,4] x) => (float[n,4] y) { y = my.own.Outer <by = 0.5> (x) }
            <domain: "my.own", opset_import: ["" : 23, "my.own" : 1]>
            Outer <by: float> (a) => (d) {
                b = my.own.Inner (a)  c = Constant <value_float: float = @by> ()  d = Mul (b, c) }
            <domain: "my.own", opset_import: ["" : 23]>
            Inner (a) => (b) { b = LogSoftmax (a) }""",
        [{"x": values(3, 4)}],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_what_other_operators_compute_is_that_of_onnx_runtime(name: str, tmp_path: Path) -> None:
    text, batches = CASES[name]
    compare(parse(text), batches, tmp_path)


def test_normalization_keeps_its_digits_where_means_are_large(tmp_path: Path) -> None:
    """What is normalized does not depend on the mean; the runtime, which takes a difference of squares, does."""
    model = parse("""f (float[n,4,h,5] x, float[4] s, float[4] t) => (float[n,4,h,5] a, float[n,4,h,5] b) {
            a = GroupNormalization <num_groups = 2> (x, s, t)  b = MeanVarianceNormalization (x) }""")
    batch = {"x": values(2, 4, 3, 5), "s": values(4), "t": values(4)}
    compare(model, [batch], tmp_path)
    found = TvmCpu().open(tmp_path, threads=1).run({**batch, "x": batch["x"] + 100})
    for name, expected in Session(model).run(batch).items():
        np.testing.assert_allclose(found[name], expected, rtol=5e-5, atol=5e-5, err_msg=name)


EINSUMS = {
    "bqhd,bkhd->bhqk": ([2, 3, 2, 4], [2, 5, 2, 4]),  # scores of attention
    "abc,dcb->da": ([2, 3, 4], [5, 4, 3]),
    "i,j->ji": ([2], [3]),
    "i,i->": ([4], [4]),
    "aib,ci": ([2, 4, 3], [5, 4]),  # the letters of the result in order
    "abx,yb->a": ([2, 3, 2], [4, 3]),
    "abc->ca": ([2, 3, 4],),
    "ij,jk,kl->il": ([2, 3], [3, 4], [4, 5]),
    "ab,ab->ab": ([2, 3], [2, 3]),
    "...ij,...jk": ([2, 1, 3, 4], [2, 3, 4, 5]),  # axes along which an operand is repeated
    "b...j,j->...b": ([2, 3, 4], [4]),
    "...->...": ([2, 3],),
    "a...,...->a...": ([2, 3], [3]),
    "...a,...b,c->...bc": ([3, 1, 3], [1, 2, 4], [2]),
    "i...i": ([3, 2, 3],),  # diagonals
    "iiji->ji": ([3, 3, 2, 3],),
    "ii,kkj->jik": ([3, 3], [2, 2, 4]),
}


def test_sums_of_products_over_letters_are_those_of_onnx_runtime(tmp_path: Path) -> None:
    """All in one library; axes as long as the first of each are known in a run only."""
    inputs, outputs, lines, batch = [], [], [], {}
    for i, (equation, shapes) in enumerate(EINSUMS.items()):
        names = [f"x{i}_{j}" for j in range(len(shapes))]
        for name, shape in zip(names, shapes, strict=True):
            sizes = [f"n{i}" if n == shapes[0][0] else str(n) for n in shape]
            inputs.append(f"float[{','.join(sizes)}] {name}")
            batch[name] = values(*shape)
        rank = np.einsum(equation, *(batch[n] for n in names)).ndim
        outputs.append(f"float[{','.join(f'm{i}_{j}' for j in range(rank))}] y{i}")
        lines.append(f'y{i} = Einsum <equation = "{equation}"> ({", ".join(names)})')
    text = f"f ({', '.join(inputs)}) => ({', '.join(outputs)}) {{ {' '.join(lines)} }}"
    compare(parse(text), [batch], tmp_path)


def compare(model: Model, batches: list[dict[str, np.ndarray]], directory: Path) -> None:
    lowered, backend, session = fused(model), TvmCpu(), Session(model)
    backend.emit(lowered, directory)
    runner = backend.open(directory, threads=1)
    for batch in batches:
        found = runner.run(batch)
        for name, expected in session.run(batch).items():
            assert found[name].shape == expected.shape, name
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-5, err_msg=name)


STAY = {
    "a body with branches": (
        """f (float[1,2,3] x) => (float[1,3,3,2] y) {
            size = Constant <value = int64[4] {1, 1, 3, 3}> ()  y = AffineGrid (x, size) }""",
        "AffineGrid",
    ),
    "no body": ("f (float[2,2] x) => (float y) { y = Det (x) }", "Det"),
    "a body of other types": ("f (float[n] x) => (float[n] y) { y = Bernoulli (x) }", "Bernoulli"),
    "an ellipsis that is summed": (
        'f (float[2,2] x) => (float[2] y) { y = Einsum <equation = "...j->j"> (x) }',
        "Einsum",
    ),
}


@pytest.mark.parametrize("name", STAY)
def test_what_no_operators_with_kernels_compute_stays(name: str) -> None:
    text, op = STAY[name]
    model = parse(text)
    before = to_text(model)
    result = ExpandFunctions()(model)
    assert not result.modified
    assert [s.outcome for s in result.sites] == [Outcome.SKIPPED]
    assert to_text(model) == before
    with pytest.raises(UnsupportedError, match=rf"no kernel for {op} \(at "):
        TvmCpu().check(model)


def test_what_a_kernel_refuses_is_named_after_the_operator_that_it_comes_from() -> None:
    model = parse("f (float[n,m] x, int64[1] axis) => (float[a,b] y) { y = ReduceL1 (x, axis) }")
    with pytest.raises(UnsupportedError, match=r"no kernel for ReduceSum at ReduceL1/ReduceSum: its axes are computed"):
        TvmCpu().check(model)
