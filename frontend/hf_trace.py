"""From a transformers configuration to a traced graph: which inputs a model takes is read from its signature.

Runs in the worker only. The model is built from its configuration with real buffers (they are small and computed)
and fake parameters (they have a shape and no storage), so tracing costs no weight memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_map_only

from qc.frontend.hf_rewrites import explicit_attention_heads, use_static_experts
from qc.frontend.torch_export import export_graph
from qc.ir.errors import InputError, UnsupportedError

__all__ = ["Trace", "build", "model_class", "plan"]

# Example sizes differ from each other and from 1: tracing specialises on sizes that are equal or one.
_BATCH, _SEQ, _PAST, _IMAGES, _TARGET = 2, 3, 5, 4, 7

_WRAPPED = "net"


@dataclasses.dataclass
class Trace:
    """What to trace: a model and its flat inputs.

    Attributes:
        model: The transformers model.
        tensors: Example inputs by keyword of ``forward``.
        dims: Names of the dynamic axes of each of `tensors`.
        past: Example keys and values ``k0, v0, k1, v1, ...``, each [batch, heads, past, head size]; empty if none.
        fields: Which fields of the model's output become graph outputs.
    """

    model: transformers.PreTrainedModel
    tensors: dict[str, torch.Tensor]
    dims: dict[str, dict[int, str]]
    past: list[torch.Tensor] = dataclasses.field(default_factory=list)
    fields: list[str] = dataclasses.field(default_factory=list)

    def export(self) -> ir.Model:
        """Returns the cleaned graph; its weights are fake tensors under their parameter names."""
        layers = range(len(self.past) // 2)
        inputs = [*self.tensors, *(f"past_key_values.{i}.{part}" for i in layers for part in ("key", "value"))]
        outputs = [*self.fields, *(f"present.{i}.{part}" for i in layers for part in ("key", "value"))]
        dims = [self.dims[name] for name in self.tensors]
        past_dims = [{0: "batch", 2: "past"}] * len(self.past)
        with explicit_attention_heads():
            graph_model = export_graph(
                _Flat(self).eval(),
                (list(self.tensors.values()), self.past),
                dynamic_shapes=(dims, past_dims),
                input_names=inputs,
                output_names=outputs,
                prefix=_WRAPPED,
            )
        _name_dimensions(graph_model.graph, [*dims, *past_dims])
        return graph_model


class _Flat(torch.nn.Module):
    """The model with tensors in and tensors out: keyword arguments, cache objects and output classes stay inside."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.net = trace.model
        self._names = tuple(trace.tensors)
        self._fields = tuple(trace.fields)
        self._accepts_cache_flag = "use_cache" in inspect.signature(trace.model.forward).parameters

    def forward(self, tensors: list[torch.Tensor], past: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        kwargs: dict[str, Any] = dict(zip(self._names, tensors, strict=True))
        if past:
            kwargs["past_key_values"] = _cache(past)
        if self._accepts_cache_flag:
            kwargs["use_cache"] = bool(past)
        out = self.net(**kwargs, return_dict=True)
        present = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)] if past else []
        return (*(out[field] for field in self._fields), *present)


def _cache(past: list[torch.Tensor]) -> transformers.DynamicCache:
    # Built without a configuration, so that every layer is a plain growing one and all past lengths agree, also in
    # models with sliding windows: there the attention mask alone limits what is seen.
    cache = transformers.DynamicCache()
    for i in range(len(past) // 2):
        cache.update(past[2 * i], past[2 * i + 1], i)
    return cache


def _name_dimensions(graph: ir.Graph, dims: list[dict[int, str]]) -> None:
    """Gives the symbols of the exporter (``s95``) the names we asked for, in every shape of the graph."""
    names: dict[str, str] = {}
    for value, axes in zip(graph.inputs, dims, strict=True):
        for axis, name in axes.items():
            symbol = value.shape[axis] if value.shape is not None else None
            if isinstance(symbol, ir.SymbolicDim) and symbol.value is not None:
                names.setdefault(str(symbol.value), name)
    values = [*graph.inputs, *graph.outputs, *(v for node in graph for v in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), str(dim.value))


def model_class(config: transformers.PretrainedConfig) -> type[transformers.PreTrainedModel]:
    """Returns the class that the configuration names, if transformers has it, else the base class of its model type."""
    name = (config.architectures or [""])[0]
    named = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(named, type) and issubclass(named, transformers.PreTrainedModel):
        return named
    try:
        return transformers.MODEL_MAPPING[type(config)]
    except KeyError:
        raise UnsupportedError(
            f"transformers {transformers.__version__} has no model class for architecture {name!r} "
            f"(model type {config.model_type!r}). Update transformers, or export the model to ONNX and give that file."
        ) from None


def build(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """Returns the model in float32 with fake parameters and real buffers."""
    with _parameters_on_meta():
        model = model_class(config)._from_config(config, dtype=torch.float32)
    fakes: dict[int, torch.nn.Parameter] = {}
    kept = []  # holds the replaced parameters alive, so that an id is never reused
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in fakes:
                    kept.append(parameter)
                    fakes[id(parameter)] = torch.nn.Parameter(
                        torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False
                    )
                module._parameters[name] = fakes[id(parameter)]
    use_static_experts(model)
    return model.eval()


def plan(model: transformers.PreTrainedModel, image_size: tuple[int, int]) -> Trace:
    """Decides the inputs and outputs of a model from its signature, its configuration and one run on fake tensors.

    Args:
        model: As `build` returns it.
        image_size: Height and width of an image in pixels, for a model that takes images.

    Raises:
        UnsupportedError: If the model's main input is neither tokens nor an image, or it generates text from images.
    """
    takes = inspect.signature(model.forward).parameters
    config = model.config
    if model.main_input_name not in ("input_ids", "pixel_values"):
        raise UnsupportedError(
            f"{type(model).__name__} takes {model.main_input_name!r}; only text and image models are imported from "
            "Hugging Face directories. Export it to ONNX and give that file."
        )
    trace = Trace(model, {}, {})
    text = "input_ids" in takes
    image = "pixel_values" in takes
    if text and image and model.can_generate():
        raise UnsupportedError(
            f"{type(model).__name__} generates text from images, which has no importer. "
            "Give its language model alone, or an .onnx file."
        )
    decoder = text and model.can_generate() and not config.is_encoder_decoder and "past_key_values" in takes
    with _real_constants(model), _fake_mode(model):
        if text:
            _add_text(trace, takes, past=_PAST if decoder else 0)
        if image:
            _add_image(trace, image_size, "images" if text else "batch")
        if config.is_encoder_decoder:
            trace.tensors["decoder_input_ids"] = torch.ones(_BATCH, _TARGET, dtype=torch.int64)
            trace.dims["decoder_input_ids"] = {0: "batch", 1: "target"}
        if decoder:
            trace.past = _example_past(model)
        trace.fields = _tensor_fields(trace)
    return trace


def _add_text(trace: Trace, takes: Any, *, past: int) -> None:
    trace.tensors["input_ids"] = torch.ones(_BATCH, _SEQ, dtype=torch.int64)
    trace.tensors["attention_mask"] = torch.ones(_BATCH, past + _SEQ, dtype=torch.int64)
    trace.dims["input_ids"] = {0: "batch", 1: "seq"}
    trace.dims["attention_mask"] = {0: "batch", 1: "total" if past else "seq"}
    if past and "position_ids" in takes:
        trace.tensors["position_ids"] = torch.arange(past, past + _SEQ).expand(_BATCH, _SEQ).contiguous()
        trace.dims["position_ids"] = {0: "batch", 1: "seq"}
    if "token_type_ids" in takes and getattr(trace.model.config, "type_vocab_size", 0) > 1:
        trace.tensors["token_type_ids"] = torch.zeros(_BATCH, _SEQ, dtype=torch.int64)
        trace.dims["token_type_ids"] = {0: "batch", 1: "seq"}


def _add_image(trace: Trace, size: tuple[int, int], batch: str) -> None:
    config = trace.model.config
    channels = getattr(getattr(config, "vision_config", config), "num_channels", 3)
    trace.tensors["pixel_values"] = torch.ones(_IMAGES, channels, *size)
    trace.dims["pixel_values"] = {0: batch}


def _example_past(model: transformers.PreTrainedModel) -> list[torch.Tensor]:
    # The shape of the cache is asked from the model, not from its configuration: every family names heads differently.
    cache = transformers.DynamicCache()
    _run(model, input_ids=torch.ones(_BATCH, _SEQ, dtype=torch.int64), past_key_values=cache, use_cache=True)
    if not all(getattr(layer, "keys", None) is not None for layer in cache.layers):
        raise UnsupportedError(
            f"{type(model).__name__} keeps a state other than keys and values, which is not imported yet. "
            "Export it to ONNX and give that file."
        )
    shapes = [t.shape for layer in cache.layers for t in (layer.keys, layer.values)]
    return [torch.ones(s[0], s[1], _PAST, s[3]) for s in shapes]


def _tensor_fields(trace: Trace) -> list[str]:
    takes = inspect.signature(trace.model.forward).parameters
    kwargs: dict[str, Any] = dict(trace.tensors)
    if trace.past:
        kwargs["past_key_values"] = _cache(trace.past)
    if "use_cache" in takes:
        kwargs["use_cache"] = bool(trace.past)
    out = _run(trace.model, **kwargs, return_dict=True)
    # What an encoder-decoder reports of its encoder is an intermediate value of this graph, not a result.
    fields = [k for k, v in out.items() if isinstance(v, torch.Tensor) and not k.startswith("encoder_")]
    if trace.past and "logits" in fields:
        fields = ["logits"]
    if not fields:
        raise InputError(f"{type(trace.model).__name__} returns no tensor. Give a model with an output.")
    return fields


def _run(model: transformers.PreTrainedModel, **inputs: Any) -> Any:
    try:
        return model(**inputs)
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "")
        raise UnsupportedError(
            f"{type(model).__name__} does not run on the inputs that its signature asks for "
            f"({type(error).__name__}: {reason}). Check its configuration, or export it to ONNX and give that file."
        ) from error


@contextlib.contextmanager
def _fake_mode(model: torch.nn.Module) -> Iterator[None]:
    """The fake mode that the model's parameters live in."""
    mode = next((p.fake_mode for p in model.parameters() if hasattr(p, "fake_mode")), FakeTensorMode())
    with mode, torch.no_grad():
        yield


@contextlib.contextmanager
def _real_constants(model: torch.nn.Module) -> Iterator[None]:
    """What modules without parameters compute and keep of a run on fake tensors is computed again, on real ones.

    So are frequencies of rotary embeddings that hold for long texts: they become constants of the graph.
    """
    calls: dict[torch.nn.Module, tuple[Any, Any]] = {}

    def note(module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        calls[module] = (args, kwargs)

    modules = [m for m in model.modules() if next(m.parameters(), None) is None]
    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in modules]
    yield
    for hook in hooks:
        hook.remove()
    for module, given in calls.items():
        fakes = [name for name, value in vars(module).items() if isinstance(value, FakeTensor)]
        for name in fakes:
            delattr(module, name)
        if fakes:
            args, kwargs = tree_map_only(torch.Tensor, lambda t: torch.ones(t.shape, dtype=t.dtype), given)
            module(*args, **kwargs)


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While active, a parameter loses its storage the moment a module registers it; buffers stay real."""
    register = torch.nn.Module.register_parameter

    def on_meta(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            module._parameters[name] = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    torch.nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register
