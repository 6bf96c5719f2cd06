"""Who may write to a record: one process at a time, until it lets go or dies."""

from __future__ import annotations

import contextlib
import os
import weakref

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class LockedFile:
    """A file that is open for appending, and locked for as long as it is.

    The lock is that of ``flock``, which belongs to the open file: reading the same file elsewhere in this process does
    not release it (as it would a POSIX lock), and the system does when the process dies, however it dies. Where the
    platform or the file system has no such lock, there is none.

    Attributes:
        descriptor: Of the open file.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool) -> None:
        """Open and lock the file.

        Args:
            path: The file.
            create: Whether to make a new file; else it must be there.

        Raises:
            BlockingIOError: If another holds the lock.
            FileExistsError: If it was to be made and is there.
            OSError: If it cannot be opened.
        """
        flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT | os.O_EXCL if create else 0)
        self.descriptor = os.open(path, flags, 0o644)
        self.close = weakref.finalize(self, os.close, self.descriptor)
        _OPEN.add(self)
        try:
            _lock(self.descriptor)
        except BlockingIOError:
            self.close()
            raise

    @property
    def is_open(self) -> bool:
        """Whether it is still open."""
        return bool(self.close.alive)

    def is_at(self, path: str | os.PathLike[str]) -> bool:
        """Whether this is still the file of that name: it may have been removed or replaced."""
        try:
            return os.path.samestat(os.stat(path), os.fstat(self.descriptor))
        except OSError:
            return False


def _lock(descriptor: int) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        pass  # some network file systems have no locks


_OPEN: weakref.WeakSet[LockedFile] = weakref.WeakSet()


def _let_go_in_child() -> None:
    """A fork, such as a worker of a DataLoader, would keep the file locked for as long as it outlives its parent."""
    for file in list(_OPEN):
        with contextlib.suppress(OSError):
            file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
