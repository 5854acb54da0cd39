"""A remembered runner yields what the runner did, and asks it once."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pytest

from qc.backends.reference import Remembered
from qc.ir.errors import InputError
from qc.ir.model import Signature
from qc.ir.store import Store


class _Counter:
    def __init__(self, size: int) -> None:
        self.signature, self.provenance = Signature((), ()), {}
        self.calls, self._size = 0, size

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.calls += 1
        return {"y": np.full(self._size, inputs["x"].sum(), np.float32), "text": np.array(["a"], object)}

    def generate(self, tokens: Sequence[int], max_tokens: int, stop: Sequence[int] = ()) -> Iterator[int]:
        return iter(tokens)


def test_the_same_inputs_are_run_once_and_yield_the_same() -> None:
    runner = _Counter(1 << 19)  # large enough to be written to the store
    remembered = Remembered(runner, Store())
    x = np.arange(4)
    first, second = remembered.run({"x": x}), remembered.run({"x": x.copy()})
    assert runner.calls == 1
    for found in (first, second):
        np.testing.assert_array_equal(found["y"], np.full(1 << 19, 6, np.float32))
        assert found["text"].tolist() == ["a"]


def test_other_values_types_or_shapes_are_other_inputs() -> None:
    runner = _Counter(1)
    remembered = Remembered(runner, Store())
    for x in (np.zeros(4, np.int64), np.ones(4, np.int64), np.zeros((2, 2), np.int64), np.zeros(8, np.int32)):
        remembered.run({"x": x})
    assert runner.calls == 4


def test_what_was_begun_is_run_in_order_and_not_again() -> None:
    runner = _Counter(1)
    remembered = Remembered(runner, Store())
    batches = [{"x": np.array([i])} for i in range(3)]
    begun = [remembered.begin(b) for b in batches]
    assert [remembered.run(b)["y"].item() for b in reversed(batches)] == [2, 1, 0]
    assert all(b.done() for b in begun)
    assert runner.calls == 3


def test_what_is_begun_ends_with_the_inputs_at_hand() -> None:
    started, let_go = threading.Event(), threading.Event()

    class Slow(_Counter):
        def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            started.set()
            assert let_go.wait(60)
            return super().run(inputs)

    runner = Slow(1)
    remembered = Remembered(runner, Store())
    first, second = (remembered.begin({"x": np.array([i])}) for i in range(2))
    assert started.wait(60)
    closing = threading.Thread(target=remembered.close)
    closing.start()
    while not second.cancelled():
        time.sleep(0.001)
    let_go.set()
    closing.join()
    assert first.done()
    assert runner.calls == 1


def test_an_error_is_raised_where_its_results_are_asked_for() -> None:
    class Broken(_Counter):
        def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            raise InputError("no such input")

    remembered = Remembered(Broken(1), Store())
    remembered.begin({"x": np.zeros(1)})
    with pytest.raises(InputError, match="no such input"):
        remembered.run({"x": np.zeros(1)})
