"""Every supported architecture: the imported graph in ONNX Runtime agrees with the model in torch, at two sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qc.ir.model import Model

torch = pytest.importorskip("torch", reason="the reference is torch")
transformers = pytest.importorskip("transformers", reason="the reference is transformers")

from architectures import exported  # noqa: E402
from tiny_models import ARCHITECTURES, VOCAB  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the warnings of torch are not ours

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_imported_graph_agrees_with_torch(name: str, models: Path, tmp_path: Path) -> None:
    directory, model = exported(name, models)
    session = open_session(model, tmp_path / "saved")
    reference = reference_of(directory)
    for batch, seq, past in ((2, 5, 4), (1, 7, 0)):
        feeds = example_feeds(model, batch, seq, past, seed=seq)
        actual = session.run(None, feeds)
        expected = run_torch(reference, feeds, [p.name for p in model.signature.outputs])
        for port, a, e in zip(model.signature.outputs, actual, expected, strict=True):
            assert a.shape == e.shape, port.name
            np.testing.assert_allclose(a, e, rtol=0, atol=TOLERANCE * max(1.0, np.abs(e).max()), err_msg=port.name)


def open_session(model: Model, directory: Path) -> Any:
    """Saves a model with its weights and opens it in ONNX Runtime with default optimisation, on one thread."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(str(model.save(directory)), options, providers=["CPUExecutionProvider"])


def reference_of(directory: Path) -> Any:
    """Loads the directory with transformers, in float32."""
    config = transformers.AutoConfig.from_pretrained(directory)
    model_type = getattr(transformers, config.architectures[0])
    return model_type.from_pretrained(directory, dtype=torch.float32).eval()


def example_feeds(model: Model, batch: int, seq: int, past: int, seed: int) -> dict[str, np.ndarray]:
    """Inputs of the given sizes; the last row of a batch is padded on the left by one token where there is a mask."""
    rng = np.random.default_rng(seed)
    past = past if model.signature.is_decoder else 0
    sizes = {"batch": batch, "seq": seq, "past": past, "total": past + seq, "images": batch + 1, "target": seq + 2}
    feeds = {}
    for port in model.signature.inputs:
        shape = [d if isinstance(d, int) else sizes[d] for d in port.shape]
        if port.role in ("tokens", "decoder_tokens"):
            feeds[port.name] = rng.integers(2, VOCAB, shape)
        elif port.role == "mask":
            mask = np.ones(shape, np.int64)
            mask[-1, 0] = batch == 1
            feeds[port.name] = mask
        elif port.role == "positions":
            feeds[port.name] = np.broadcast_to(np.arange(past, past + seq), shape).copy()
        elif port.role == "token_types":
            feeds[port.name] = rng.integers(0, 2, shape)
        else:
            feeds[port.name] = rng.standard_normal(shape).astype(np.float32)
    return feeds


def run_torch(reference: Any, feeds: dict[str, np.ndarray], outputs: list[str]) -> list[np.ndarray]:
    """Runs the transformers model on the same feeds; returns the named outputs."""
    cached = sorted(n for n in feeds if n.startswith("past_key_values."))
    kwargs: dict[str, Any] = {n: torch.from_numpy(v) for n, v in feeds.items() if n not in cached}
    if cached:
        cache = transformers.DynamicCache()
        for i in range(len(cached) // 2):
            cache.update(*(torch.from_numpy(feeds[f"past_key_values.{i}.{part}"]) for part in ("key", "value")), i)
        kwargs |= {"past_key_values": cache, "use_cache": True}
    with torch.no_grad():
        out = reference(**kwargs, return_dict=True)
    results = []
    for name in outputs:
        if name.startswith("present."):
            _, layer, part = name.split(".")
            results.append(getattr(out.past_key_values.layers[int(layer)], f"{part}s").numpy())
        else:
            results.append(out[name].numpy())
    return results
