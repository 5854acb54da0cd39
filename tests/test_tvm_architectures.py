"""Libraries of whole architectures against ONNX Runtime: decoders, encoders, experts, images, encoder and decoder."""

from __future__ import annotations

from pathlib import Path

import pytest

from qc.backends.reference import ModelRunner
from qc.backends.tvm.backend import TvmCpu
from qc.ir.model import Model
from qc.ir.probe import probe_inputs
from qc.ir.verify import compare
from qc.passes.manager import PassManager

pytest.importorskip("tvm", reason="kernels are compiled by TVM")
pytest.importorskip("torch", reason="models are made with torch")
pytest.importorskip("transformers", reason="models are made with transformers")

from architectures import canonical

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the warnings of torch are not ours


@pytest.mark.parametrize("name", ["gemma3", "mixtral", "clip", "resnet", "t5"])
def test_a_library_computes_what_the_model_says(name: str, models: Path, tmp_path: Path) -> None:
    model = canonical(name, models)
    batches = [*probe_inputs(model, 1)]
    if model.signature.is_decoder:
        batches.append(probe_inputs(model, 2, {"batch": 1, "seq": 5, "past": 3})[0])
    backend = TvmCpu()
    lowered, _ = PassManager(list(backend.lowering()), stage="lowering", verify=False).run(model.clone())
    backend.emit(Model.of(lowered), tmp_path)
    library, reference = backend.open(tmp_path, threads=1), ModelRunner(model)
    for batch in batches:
        for difference in compare(reference.run(batch), library.run(batch)):
            assert difference.max_abs <= 1e-4 * difference.scale
