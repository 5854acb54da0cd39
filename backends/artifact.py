"""The artifact: a directory that appears complete or not at all, and that can prove that nobody changed it."""

from __future__ import annotations

import dataclasses
import errno
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import final

from qc.backends.manifest import MANIFEST, FileEntry, Manifest, digest, digest_tree
from qc.backends.target import Runner, backend_for
from qc.backends.workspace import HiddenDirectory, shielded, sweep
from qc.ir.errors import InputError, InternalError, QcError, UnsupportedError
from qc.ir.model import Signature

__all__ = ["Artifact", "ArtifactWriter"]

_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@final
class ArtifactWriter:
    """Writes an artifact into a hidden sibling of `out`, and moves it there when all is done.

    ```python
    with ArtifactWriter(out) as writer:
        backend.emit(model, writer.directory)
        writer.describe(Manifest.of(model, backend.target))
    ```

    If the block ends by an exception, an interrupt included, nothing remains of it, and what stood at `out` is
    untouched.
    """

    def __init__(self, out: str | os.PathLike[str], *, force: bool = False, resume: bool = False) -> None:
        """Checks that `out` may be written, before any work is done, and removes what killed compiles left there.

        Args:
            out: Where the artifact will stand. Missing parents are made.
            force: Whether an artifact that stands there is replaced. Never replaces anything else.
            resume: Whether what a killed compile has worked out stays, to go on with.

        Raises:
            InputError: If something stands there that may not be replaced, or the place is not writable.
        """
        self.out = Path(os.path.realpath(out))
        self._force = force
        self._manifest: Manifest | None = None
        sweep(self.out, resume=resume)
        _check_replaceable(self.out, force)

    def __enter__(self) -> ArtifactWriter:
        parent = self.out.parent
        self._made = [p for p in (parent, *parent.parents) if not p.exists()]
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._hidden = HiddenDirectory(parent, f".{self.out.name}.tmp-")
        except OSError as error:
            self._remove_made_parents()
            raise InputError(
                f"Cannot write beside {self.out}: {error.strerror}. Choose another output directory."
            ) from error
        self.directory = self._hidden.path
        return self

    def describe(self, manifest: Manifest) -> Manifest:
        """Adds the manifest, with digests of all files that lie in `directory` now; write nothing there afterwards.

        Returns:
            The manifest as written.
        """
        files = digest_tree(self.directory)
        sizes = {**manifest.sizes, "artifact": sum(f.bytes for f in files.values())}
        self._manifest = dataclasses.replace(manifest, files=files, sizes=sizes)
        (self.directory / MANIFEST).write_text(self._manifest.to_json(), "utf-8", newline="\n")
        return self._manifest

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._commit()
            elif not isinstance(error, QcError) and (full := _no_space(error)):
                raise self._out_of_space(full) from error
        except OSError as failure:
            full = _no_space(failure)
            raise (
                self._out_of_space(full)
                if full
                else InputError(
                    f"Could not put the artifact at {self.out}: {failure.strerror}. Choose another output directory."
                )
            ) from failure
        finally:
            self._hidden.remove()
            self._remove_made_parents()

    def _commit(self) -> None:
        if self._manifest is None:
            raise InternalError("an artifact was finished without a manifest; call describe() at its end.")
        # mkdtemp makes a private directory; the artifact gets what any new directory gets.
        os.chmod(self.directory, 0o777 & ~_umask())
        for path in _all_paths(self.directory):
            _sync(path)
        _check_replaceable(self.out, self._force)  # again: the work may have taken hours
        with shielded():
            old = None
            if self.out.exists():
                old = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.old-", dir=self.out.parent))
                os.replace(self.out, old)
            try:
                os.rename(self.directory, self.out)
            except BaseException:
                if old is not None:
                    os.rename(old, self.out)
                raise
            _sync(self.out.parent)
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)

    def _remove_made_parents(self) -> None:
        for parent in self._made:
            try:
                parent.rmdir()
            except OSError:  # not empty: the artifact, or somebody else's files, are in it
                return

    def _out_of_space(self, error: OSError) -> InputError:
        return InputError(
            f"No space to write the artifact at {self.out} ({error.strerror or error}). Nothing was changed. Free "
            "some space or choose another output directory."
        )


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A compiled model on disk. Make one with `Artifact.open`.

    Attributes:
        directory: Where it is.
        manifest: What it says about itself.
    """

    directory: Path
    manifest: Manifest

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> Artifact:
        """Reads the manifest; no other file is touched.

        Raises:
            InputError: If there is no valid artifact.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise InputError(f"Expected an artifact directory at {directory}, found none. Check the path.")
        return cls(directory, Manifest.load(directory / MANIFEST))

    @property
    def signature(self) -> Signature:
        """The inputs and outputs with their roles."""
        return self.manifest.signature

    def verify(self) -> None:
        """Reads every file and compares it with the manifest.

        Raises:
            InputError: With every file that is missing, extra, of another size or of other content.
        """
        present = {p.relative_to(self.directory).as_posix() for p in self.directory.rglob("*") if not p.is_dir()}
        present.discard(MANIFEST)
        problems = [f"{name}: not in the manifest" for name in sorted(present - set(self.manifest.files))]
        for name, entry in sorted(self.manifest.files.items()):
            problem = _problem(self.directory / name, entry) if name in present else "missing"
            if problem is not None:
                problems.append(f"{name}: {problem}")
        if problems:
            raise InputError(
                f"The artifact at {self.directory} is not as it was compiled:\n  "
                + "\n  ".join(problems)
                + "\nCopy it again from its origin, or compile the model again."
            )

    def runner(self, *, threads: int = 0, spinning: bool = True) -> Runner:
        """Loads the artifact in its own runtime.

        Args:
            threads: Threads within an operator; 0 for one per core.
            spinning: Whether idle threads may wait actively; off where two artifacts are compared in one process.

        Raises:
            UnsupportedError: If the runtime is missing or too old.
        """
        _check_runtime(*self.manifest.runtime)
        return backend_for(self.manifest.target).open(self.directory, threads=threads, spinning=spinning)


def _check_replaceable(out: Path, force: bool) -> None:
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise InputError(f"Expected a directory or nothing at {out}, found a file. Choose another output directory.")
    names = sorted(os.listdir(out))
    if not names:
        return
    if MANIFEST not in names:
        raise InputError(
            f"Expected an empty or missing directory at {out}, found files that are not an artifact of qc "
            f"({', '.join(names[:4])}{', ...' if len(names) > 4 else ''}). They are never removed, even with --force: "
            "choose another output directory."
        )
    if not force:
        raise InputError(f"An artifact already stands at {out}. Pass --force to replace it, or choose another place.")
    owned = set(Manifest.load(out / MANIFEST).files) | {MANIFEST}
    foreign = sorted({p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir()} - owned)
    if foreign:
        raise InputError(
            f"The artifact at {out} also holds files that qc did not write ({', '.join(foreign[:4])}). Move them away, "
            "or choose another output directory."
        )


def _check_runtime(package: str, minimum: str) -> None:
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedError(
            f"This artifact runs in {package} >= {minimum}, which is not installed. Run `pip install {package}`."
        ) from None
    if _numbers(found) < _numbers(minimum):
        raise UnsupportedError(
            f"This artifact needs {package} >= {minimum}, found {found}. Run `pip install -U {package}`."
        )


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numeric parts: all that an ordering of releases needs."""
    parts = []
    for part in version.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)


def _problem(file: Path, expected: FileEntry) -> str | None:
    if file.is_symlink():
        return "a link, expected a file"
    size = file.stat().st_size
    if size != expected.bytes:  # told apart from a digest: the usual cause is a copy that was cut short
        return f"expected {expected.bytes} bytes, found {size}"
    return None if digest(file).sha256 == expected.sha256 else "content differs from the manifest's SHA-256"


def _no_space(error: BaseException | None) -> OSError | None:
    """The error that says that a disk is full, looked for behind everything that was raised because of it."""
    while error is not None:
        # numpy reports a write that was cut short without a number.
        if isinstance(error, OSError) and (error.errno in _NO_SPACE or error.errno is None):
            return error
        error = error.__cause__ or error.__context__
    return None


def _all_paths(directory: Path) -> Iterator[Path]:
    """Files before the directories that hold them."""
    yield from sorted(directory.rglob("*"), reverse=True)
    yield directory


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():  # elsewhere directories cannot be opened
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
