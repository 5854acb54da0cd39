"""The torch executor against the ONNX operator tests.

``tests/data/torch_executor_node_tests.txt`` lists the cases that pass, and must stay true in both directions: a listed
case that fails is a regression, and an unlisted case that passes belongs in the list. After a change that is meant to
change it (a new operator, a new version of onnx), write it anew and read the difference before committing it::

    python -m tests.test_node_conformance
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

LIST = Path(__file__).parent / "data" / "torch_executor_node_tests.txt"

HEADER = f"""\
# ONNX operator tests (onnx.backend.test, kind "node") that the torch executor passes, sorted.
# Written by `python -m tests.test_node_conformance` with onnx {onnx.__version__}; what another onnx lacks is not run.
"""


def listed() -> set[str]:
    """Names in the expected-pass list."""
    return {line for line in LIST.read_text().splitlines() if line and not line.startswith("#")}


def cases() -> dict[str, object]:
    """The operator tests of the installed onnx whose operators are all in the executor's table."""
    from onnx.backend.test.loader import load_model_tests

    from qc.ir.execute import supported_ops

    known = set(supported_ops())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tests = load_model_tests(kind="node")
    return {c.name: c for c in tests if all(_name(n) in known for n in c.model.graph.node)}


def failure(case) -> str | None:
    """Runs one operator test; returns what went wrong, or None."""
    from qc.ir.execute import Executor

    try:
        executor = Executor(ir.serde.deserialize_model(case.model))
        for inputs, expected in case.data_sets:
            given = {v.name: _array(x) for v, x in zip(case.model.graph.input, inputs, strict=False)}
            found = list(executor(given).values())
            for actual, wanted in zip(found, expected, strict=True):
                _compare(actual, _array(wanted), case.rtol, case.atol)
    except Exception as error:  # noqa: BLE001 (whatever it raises is a failure of the case)
        return f"{type(error).__name__}: {error}"
    return None


def _name(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


def _array(value) -> np.ndarray:
    if isinstance(value, onnx.TensorProto):
        return ir.serde.deserialize_tensor(value).numpy()
    return np.asarray(value)


def _compare(actual, wanted: np.ndarray, rtol: float, atol: float) -> None:
    """Values must agree within the case's tolerance, or two units in the last place of a half-precision type."""
    import torch

    floating = "float" in wanted.dtype.name
    assert actual.dtype.is_floating_point == floating, f"expected {wanted.dtype}, found {actual.dtype}"
    wide = np.float64 if floating else np.int64
    found = actual.detach().to(torch.float64 if floating else torch.int64).numpy()
    rtol = max(rtol, 2 * torch.finfo(actual.dtype).eps) if actual.dtype in (torch.float16, torch.bfloat16) else rtol
    np.testing.assert_equal(found.shape, wanted.shape)
    np.testing.assert_allclose(found, wanted.astype(wide), rtol=rtol, atol=atol)


def outcomes() -> dict[str, str | None]:
    """What went wrong in each case, by name; None where nothing did."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: failure(case) for name, case in cases().items()}


@pytest.mark.slow
def test_exactly_the_listed_operator_tests_pass():
    pytest.importorskip("torch", reason="the torch executor needs torch")
    found, expected = outcomes(), listed()
    broken = {n: found[n] for n in sorted(expected & set(found)) if found[n] is not None}
    unlisted = sorted(n for n, problem in found.items() if problem is None and n not in expected)
    assert not broken, "Listed cases that fail:\n" + "\n".join(f"  {n}: {problem}" for n, problem in broken.items())
    assert not unlisted, (
        f"These cases pass but are not listed: {unlisted}. "
        "Run `python -m tests.test_node_conformance` to write the list anew."
    )


def main() -> None:
    """Writes the list anew and prints why the other cases are not in it."""
    found = outcomes()
    passing = sorted(n for n, problem in found.items() if problem is None)
    LIST.write_text(HEADER + "".join(f"{n}\n" for n in passing))
    for name, problem in sorted(found.items()):
        if problem is not None:
            print(f"{name}: {' '.join(problem.split())[:300]}")
    print(f"{len(passing)} of {len(found)} cases pass; see {LIST}")


if __name__ == "__main__":
    main()
