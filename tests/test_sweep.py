"""Decoders, encoders, both together and vision models can be worked on part by part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qc.ir.model import Model
from qc.ir.probe import find_inputs
from qc.ir.runtime import Session
from qc.passes._partition import Partition

pytest.importorskip("torch", reason="the models are exported by torch")
pytest.importorskip("transformers", reason="the models are those of transformers")

from architectures import canonical

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the warnings of torch are not ours

BLOCKS = {"llama": 2, "gemma3": 2, "gpt2": 2, "mixtral": 2, "bert": 2, "vit": 2, "t5": 4, "clip": 4, "resnet": 0}


@pytest.mark.parametrize("name", sorted(BLOCKS))
def test_the_parts_one_after_the_other_compute_what_the_network_computes(name: str, models: Path) -> None:
    model = canonical(name, models)
    whole = Session(model)
    found = find_inputs(model, whole.run)
    assert found.batches, found.obstacle
    partition = Partition(model)
    assert sum(label.startswith("block") for label in partition.labels) == BLOCKS[name]
    for batch in found.batches:
        outputs = _run_parts(partition, batch)
        for output, value in whole.run(batch).items():
            np.testing.assert_array_equal(outputs[output], value, err_msg=output)


def _run_parts(partition: Partition, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    values, outputs = dict(batch), {}
    for k in range(len(partition.labels)):
        part: Model = partition.cut(k, to_the_end=True)
        found = Session(part).run(values)
        outputs |= found
        values = {n: v for n, v in (values | found).items() if n in partition.needed_after(k)}
    return outputs
