"""Hidden directories beside an artifact in which a compile works, and what happens to them when it is killed.

Each is locked by the process that made it (``flock`` on the directory itself, so that the lock leaves no file and dies
with its process). The next compile to the same place removes those that nobody holds, or goes on in one of them.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from qc.ir.errors import InputError

__all__ = ["HiddenDirectory", "shielded", "sweep", "work_directory"]

_JOURNAL = "journal"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_YOUNG = 5.0  # seconds; a directory this new may be about to be locked


class HiddenDirectory:
    """A new hidden directory that this process holds.

    Attributes:
        path: Where it is.
        held: Whether this process still has it.
    """

    def __init__(self, parent: Path, prefix: str) -> None:
        """Makes and locks it.

        Raises:
            OSError: If `parent` is not writable.
        """
        self._lock: int | None = None
        self.held = True
        with shielded():
            self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
            self._lock = _lock(self.path)

    @classmethod
    def adopt(cls, path: Path) -> HiddenDirectory | None:
        """Takes over a directory that a killed process left; None if somebody holds it."""
        handle = _lock(path)
        if handle is None:
            return None
        found = cls.__new__(cls)
        found.path, found._lock, found.held = path, handle, True
        return found

    def leave(self) -> None:
        """Lets go and leaves the directory to a later process."""
        self.held = False
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Removes it, if it has not been moved away, and lets go."""
        with shielded():
            shutil.rmtree(self.path, ignore_errors=True)
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
            self.held = False


@contextlib.contextmanager
def work_directory(out: Path, *, resume: bool = False) -> Iterator[Path]:
    """A directory for intermediate files on the disk where `out` will stand; removed at the end, come what may.

    Args:
        out: Where the artifact will stand.
        resume: Whether to take over the directory of a killed compile to the same place, if it has a journal in it, and
            to leave the directory behind if this compile fails or is interrupted.

    Raises:
        InputError: If the nearest existing directory above `out` is not writable.
    """
    parent = next(p for p in out.absolute().parents if p.is_dir())
    hidden = _left_behind(parent, out) if resume else None
    try:
        hidden = hidden or HiddenDirectory(parent, _work(out))
    except OSError as error:
        raise InputError(
            f"Expected a writable directory at {parent} to put {out} in, but cannot write there ({error.strerror}). "
            "Choose another output directory."
        ) from error
    try:
        yield hidden.path
    except BaseException:
        if resume and (hidden.path / _JOURNAL).is_dir():
            hidden.leave()
        raise
    finally:
        if hidden.held:
            hidden.remove()


def sweep(out: Path, *, resume: bool = False) -> None:
    """Removes what killed compiles left beside `out`.

    An artifact that was about to be replaced, and whose successor never arrived, goes back to its place.

    Args:
        out: Where an artifact will stand.
        resume: Whether to leave work directories alone that have a journal.
    """
    parent = next(p for p in out.absolute().parents if p.is_dir())
    for prefix in (_work(out), f".{out.name}.tmp-"):
        for path in parent.glob(f"{glob.escape(prefix)}*"):
            wanted = resume and prefix == _work(out) and (path / _JOURNAL).is_dir()
            if not wanted and _abandoned(path):
                shutil.rmtree(path, ignore_errors=True)
    for path in sorted(parent.glob(f"{glob.escape(f'.{out.name}.old-')}*")):
        if not os.path.lexists(out) and any(path.iterdir()):
            os.rename(path, out)
        elif _abandoned(path):
            shutil.rmtree(path, ignore_errors=True)


def _work(out: Path) -> str:
    return f".{out.name}.work-"


def _left_behind(parent: Path, out: Path) -> HiddenDirectory | None:
    """The work directory with the newest journal that nobody holds."""
    journals = parent.glob(f"{glob.escape(_work(out))}*/{_JOURNAL}")
    for path in sorted(journals, key=lambda p: p.stat().st_mtime, reverse=True):
        hidden = HiddenDirectory.adopt(path.parent)
        if hidden is not None:
            return hidden
    return None


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Holds back Ctrl-C and SIGTERM while a few file operations run that must not stop halfway."""
    if threading.current_thread() is not threading.main_thread():  # handlers only ever run in the main thread
        yield
        return
    # A signal mask would not do: other threads take the signal, and Python runs its handler all the same.
    received: list[int] = []
    handlers = {s: signal.signal(s, lambda number, _: received.append(number)) for s in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for number in received:
            signal.raise_signal(number)


def _lock(directory: Path) -> int | None:
    """Locks a directory; None where the system or the file system cannot, or somebody else holds it."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        handle = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _abandoned(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    if path.is_symlink() or not path.is_dir() or status.st_uid != os.getuid() or time.time() - status.st_mtime < _YOUNG:
        return False
    handle = _lock(path)
    if handle is None:
        return False
    os.close(handle)
    return True
