"""Which checkpoint tensor is which parameter, by transformers' own loading rules. Runs in the worker only.

In order: the same name; transformers' rename mapping where it *only* renames; another name of a tied parameter. What
is still open (several checkpoint tensors merged into one parameter) is loaded for real and written beside the graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers

from qc.frontend.huggingface import LEFTOVERS
from qc.frontend.safetensors_file import Entry, read_header
from qc.ir.errors import InputError

__all__ = ["match", "write_leftovers"]


def match(model: transformers.PreTrainedModel, checkpoint: Mapping[str, Entry]) -> dict[str, Entry]:
    """Returns the checkpoint entry of every parameter and persistent buffer that has one, by its name in the model."""
    wanted = model.state_dict(keep_vars=True)
    found = {name: checkpoint[name] for name in wanted if name in checkpoint}
    if len(found) < len(wanted):
        for name, key in _renamed(model, checkpoint, wanted):
            found.setdefault(name, checkpoint[key])
    by_identity = {id(wanted[name]): entry for name, entry in found.items()}
    for name, tensor in wanted.items():
        if id(tensor) in by_identity:
            found.setdefault(name, by_identity[id(tensor)])
    return found


def write_leftovers(
    directory: Path, work: Path, model_type: type[transformers.PreTrainedModel], names: list[str],
    computed: dict[str, torch.Tensor],
) -> dict[str, Entry]:  # fmt: skip
    """Writes tensors that are not in the checkpoint to `LEFTOVERS` in `work`; returns their entries by name.

    Args:
        directory: The model directory, from which `names` are loaded by transformers, in their stored type.
        work: Where to write.
        model_type: The class to load.
        names: Parameters that `match` did not find.
        computed: Tensors that need no loading (buffers).

    Raises:
        InputError: If a parameter is not in the checkpoint at all.
    """
    from safetensors.torch import save_file

    tensors = dict(computed)
    if names:
        model, info = model_type.from_pretrained(
            directory, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        lost = sorted(set(names) & set(info["missing_keys"]))
        if lost:
            raise InputError(
                f"{directory} holds no weight for {lost[0]!r}"
                + (f" and {len(lost) - 1} more" if len(lost) > 1 else "")
                + f", which {model_type.__name__} needs. Check the architecture that config.json names."
            )
        state = model.state_dict()
        tensors |= {name: state[name].contiguous() for name in names}
    if not tensors:
        return {}
    save_file(tensors, work / LEFTOVERS)
    return read_header(work / LEFTOVERS)


def _renamed(
    model: transformers.PreTrainedModel, checkpoint: Mapping[str, Entry], wanted: Mapping[str, torch.Tensor]
) -> list[tuple[str, str]]:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    pairs, names = [], dict(wanted)
    for key in checkpoint:
        name, converter = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
        if converter is None and name in wanted:
            pairs.append((name, key))
    return pairs
