"""Blocks of networks as torch exports them: tiny random models, cleaned as an importer would."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import common
from onnxscript import optimizer

from qc.ir.blocks import extract, find_blocks
from qc.ir.model import Model
from qc.ir.runtime import Session

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

_SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
_LAYERS = {**_SIZES, "num_hidden_layers": 3, "max_position_embeddings": 64}
_GQA = {**_LAYERS, "num_key_value_heads": 2}


class _Call(torch.nn.Module):
    """Calls a model with positional inputs and returns one field of its result."""

    def __init__(self, model: Any, names: Sequence[str], field: str) -> None:
        super().__init__()
        self.model, self.names, self.field = model, names, field

    def forward(self, *inputs: Any) -> Any:
        return getattr(self.model(**dict(zip(self.names, inputs, strict=True))), self.field)


class _Cached(torch.nn.Module):
    """Calls a decoder with its key-value cache as a flat list of tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Any, mask: Any, positions: Any, past: list[Any]) -> tuple[Any, ...]:
        cache = transformers.DynamicCache()
        for i in range(len(past) // 2):
            cache.update(past[2 * i], past[2 * i + 1], i)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        return (out.logits, *(t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)))


def _export(module: Any, inputs: tuple[Any, ...], dynamic: tuple[Any, ...]) -> tuple[Model, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    exported = torch.onnx.export(
        module.eval(), inputs, dynamo=True, opset_version=23, optimize=False, verbose=False, dynamic_shapes=dynamic
    ).model
    for step in (common.IdentityEliminationPass(), common.CommonSubexpressionEliminationPass()):
        exported = step(exported).model
    optimizer.fold_constants_ir(exported, onnx_shape_inference=False, should_fold=_keep_weights)
    exported = common.ShapeInferencePass()(common.RemoveUnusedNodesPass()(exported).model).model
    flat = [t for x in inputs for t in (x if isinstance(x, list) else [x])]
    feeds = {v.name: t.numpy() for v, t in zip(exported.graph.inputs, flat, strict=True) if v.name is not None}
    return Model.of(exported), feeds


def _keep_weights(node: ir.Node) -> bool | None:
    return False if node.op_type == "Transpose" else None


def _build(name: str, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config_name = name.replace("ForCausalLM", "Config").replace("ForConditionalGeneration", "Config")
    config_name = {"Gemma3Config": "Gemma3TextConfig", "GPT2LMHeadModel": "GPT2Config"}.get(config_name, config_name)
    config = getattr(transformers, config_name.replace("Model", "Config"))(**options)
    return getattr(transformers, name)(config)


def _decoder(name: str, heads: int = 2, **options: Any) -> tuple[Model, dict[str, np.ndarray]]:
    model = _build(name, options)
    count = 2 * model.config.num_hidden_layers
    inputs = (
        torch.tensor([[3, 1, 4], [1, 5, 9]]),
        torch.ones(2, 8, dtype=torch.long),
        torch.arange(5, 8)[None].repeat(2, 1),
        [torch.randn(2, heads, 5, 8) for _ in range(count)],
    )
    dynamic = ({0: "b", 1: "s"}, {0: "b", 1: "t"}, {0: "b", 1: "s"}, [{0: "b", 2: "p"}] * count)
    return _export(_Cached(model), inputs, dynamic)


def _tokens(name: str, **options: Any) -> tuple[Model, dict[str, np.ndarray]]:
    module = _Call(_build(name, options), ("input_ids", "attention_mask"), "last_hidden_state")
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    return _export(module, (ids, torch.ones_like(ids)), (({0: "b", 1: "s"}, {0: "b", 1: "s"}),))


def _pixels(name: str, size: int, **options: Any) -> tuple[Model, dict[str, np.ndarray]]:
    module = _Call(_build(name, options), ("pixel_values",), "last_hidden_state")
    return _export(module, (torch.randn(2, 3, size, size),), (({0: "b"},),))


def _translator(name: str, **options: Any) -> tuple[Model, dict[str, np.ndarray]]:
    module = _Call(_build(name, options), ("input_ids", "attention_mask", "decoder_input_ids"), "logits")
    ids = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    dynamic = (({0: "b", 1: "s"}, {0: "b", 1: "s"}, {0: "b", 1: "t"}),)
    return _export(module, (ids, torch.ones_like(ids), ids[:, :3]), dynamic)


_T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4}

_NETWORKS: dict[str, tuple[Callable[[], tuple[Model, dict[str, np.ndarray]]], list[int]]] = {
    "llama": (lambda: _decoder("LlamaForCausalLM", **_GQA), [3]),
    "gemma3": (
        lambda: _decoder(
            "Gemma3ForCausalLM",
            **_GQA | {"num_hidden_layers": 4, "head_dim": 8, "sliding_window": 4, "sliding_window_pattern": 2},
        ),
        [4],
    ),
    "mixtral": (
        lambda: _decoder("MixtralForCausalLM", **_GQA, num_local_experts=4, experts_implementation="batched_mm"),
        [3],
    ),
    "gpt2": (
        lambda: _decoder("GPT2LMHeadModel", 4, vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64),
        [3],
    ),
    "bert": (lambda: _tokens("BertModel", **_LAYERS), [3]),
    "t5": (lambda: _translator("T5ForConditionalGeneration", **_T5, attn_implementation="eager"), [3, 2]),
    "vit": (
        lambda: _pixels(
            "ViTModel", 16, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=3,
            image_size=16, patch_size=4,
        ),
        [3],
    ),
    "resnet": (lambda: _pixels("ResNetModel", 32, embedding_size=8, hidden_sizes=[16, 32], depths=[3, 3]), [2, 2]),
    "convnext": (lambda: _pixels("ConvNextModel", 32, hidden_sizes=[8, 16], depths=[2, 3], num_stages=2), [2, 3]),
}  # fmt: skip


@pytest.mark.parametrize("name", _NETWORKS)
def test_layers_of_an_exported_network_are_blocks_that_run_alone(name: str) -> None:
    make, runs = _NETWORKS[name]
    model, feeds = make()
    blocks = find_blocks(model.graph)
    assert [len(r) for r in blocks.runs] == runs
    assert len({n for s in blocks.segments for n in s.nodes}) == len(model.graph)
    for run in blocks.runs:
        assert len({len(s.nodes) for s in run}) == 1
        assert {len(s.carried) for s in run} == {1}
    if name in ("llama", "gemma3", "mixtral", "gpt2"):
        assert {len(s.own) for s in blocks.runs[0]} == {2}  # the keys and values of the layer
    expected = Session(model).run(feeds)
    values: dict[str, np.ndarray] = dict(feeds)
    for segment in blocks.segments:
        if segment.outputs:
            values.update(Session(extract(model, segment)).run(values))
    for output, value in expected.items():
        np.testing.assert_allclose(values[output], value, rtol=1e-4, atol=1e-5)
