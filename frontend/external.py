"""External data of a loaded graph: where the bytes are, checked before anything reads them.

A location comes from a file that somebody else wrote, so it may only name a file inside the directory of the model.
Model directories of download caches are links into a blob store; therefore the *name* must stay inside the
directory, and for files that we did not place ourselves the link's target must stay inside the model's logical or
real directory. A file with several hard links could be any file of this machine, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import onnx_ir as ir

from qc.ir.errors import InputError
from qc.ir.simplify import all_graphs

__all__ = ["check_external", "external_tensors", "rebase"]


def external_tensors(model: ir.Model) -> Iterator[tuple[ir.ExternalTensor, Callable[[ir.ExternalTensor], None]]]:
    """Yields every external tensor, of initializers and of ``Constant`` nodes, with a function that replaces it."""
    for graph in all_graphs(model):
        if isinstance(graph, ir.Graph):
            for value in graph.initializers.values():
                if isinstance(value.const_value, ir.ExternalTensor):
                    yield value.const_value, lambda t, value=value: setattr(value, "const_value", t)
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if isinstance(attribute.value, ir.ExternalTensor):
                    yield (
                        attribute.value,
                        lambda t, node=node, name=name: node.attributes.add(ir.AttrTensor(name, t)),
                    )


def rebase(model: ir.Model, place: Callable[[str], Path]) -> None:
    """Points every external tensor at the real file that `place` gives for its location.

    For files that the user named himself, or that passed `check_external`.
    """
    for tensor, replace in external_tensors(model):
        file = place(str(tensor.location)).resolve()
        # onnx_ir refuses hard links inside a base directory; package managers make them. The user chose this file.
        linked = file.stat().st_nlink > 1
        moved = ir.ExternalTensor(
            str(file) if linked else file.name, tensor.offset, tensor.length, tensor.dtype,
            shape=tensor.shape, name=tensor.name or "", base_dir="" if linked else file.parent,
        )  # fmt: skip
        replace(moved)


def check_external(model: ir.Model, file: Path) -> None:
    """Checks that all external data exist beside the model and are as long as they must be; follows allowed links.

    Args:
        model: Read from `file`.
        file: The ``.onnx`` file, as the user named it.

    Raises:
        InputError: If a data file is missing, lies outside the directory of the model, has several names, or is too
            short.
    """
    directory = file.parent
    sizes: dict[str, int] = {}
    for tensor, _ in external_tensors(model):
        location = str(tensor.location)
        if location not in sizes:
            sizes[location] = _size(file, location)
        begin = tensor.offset or 0
        length = tensor.nbytes if tensor.length is None else tensor.length
        if begin < 0 or length < tensor.nbytes or begin + length > sizes[location]:
            raise InputError(
                f"{directory / location} is too short: {tensor.name!r} needs bytes {begin:,} to "
                f"{begin + tensor.nbytes:,}, the file has {sizes[location]:,}. It may be truncated; copy it again."
            )
    if any((directory / location).is_symlink() for location in sizes):
        rebase(model, lambda location: directory / location)


def _size(model_file: Path, location: str) -> int:
    directory, path = model_file.parent, Path(location)
    if path.is_absolute() or ".." in path.parts or not location:
        raise InputError(
            f"The model in {directory} places weights at {location!r}, outside its own directory, which is not "
            "allowed. Move the weights beside the model and save it again."
        )
    file = directory / path
    if not file.is_file():
        raise InputError(f"Expected the weights file {file}, found no such file. Copy it beside the model.")
    real = file.resolve()
    if not any(real.is_relative_to(root) for root in (directory.resolve(), model_file.resolve().parent)):
        raise InputError(
            f"{file} is a link to {real}, outside the directory of the model, which is not allowed. "
            "Copy the file itself beside the model."
        )
    status = real.stat()
    if status.st_nlink > 1:
        raise InputError(
            f"{file} has {status.st_nlink} hard links, so it may be a file from elsewhere. Copy it beside the model."
        )
    return status.st_size
