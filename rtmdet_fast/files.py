"""Writing files so that a crash or a full disk leaves the old file or the new one, whole."""

from __future__ import annotations

import glob
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from rtmdet_fast.errors import UserError

if sys.platform != "win32":
    import fcntl

STREAMS = {"/dev/stdout": 1, "/dev/stderr": 2}  # their file descriptors


@contextmanager
def write_atomically(path: str | Path) -> Iterator[IO[bytes]]:
    """A file open for bytes that becomes `path`, whose folder is made, where the block ends without an exception.

    It is a temporary file beside `path`, synced and renamed. What is no regular file (a pipe) is written directly, and
    so is /dev/stdout, wherever that leads. Raises UserError where the system refuses: a full disk, a folder that cannot
    be written.
    """
    try:
        if os.fspath(path) in STREAMS:  # opened by its name, a file that it leads to would be emptied
            sys.stdout.flush()
            with os.fdopen(os.dup(STREAMS[os.fspath(path)]), "wb") as file:
                yield file
            return
        if os.path.exists(path) and not os.path.isfile(path):
            with open(path, "wb") as file:
                yield file
            return
        target = Path(os.path.realpath(path))  # what a link leads to is replaced, not the link
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_unfinished(target)
        descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                with suppress(OSError):  # where there are no locks, what a killed process leaves stays
                    _lock(file)
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)  # there no more where an interrupt came after the renaming
            raise
    except OSError as error:
        raise _refusal(path, error) from error


@contextmanager
def folder_beside(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path`, whose folder is made; for what others write and has to be looked at first.

    Raises UserError where the system refuses, in the block too.
    """
    try:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp") as folder:
            yield Path(folder)
    except OSError as error:
        raise _refusal(path, error) from error


def write_json(path: str | Path, content: Any, indent: int | None = 1) -> None:
    """Write JSON, in ASCII, by `write_atomically`."""
    with write_atomically(path) as file:
        file.write(json.dumps(content, indent=indent).encode())


def write_one_of_many(path: str | Path, content: bytes) -> None:
    """Write a file that is whole or as before, whenever the process may be stopped, making its folder.

    For folders of many: the sync of `write_atomically` and its look through the folder would take longer than writing
    a picture. Raises UserError where the system refuses.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _refusal(path, error) from error


@contextmanager
def alone_with(path: str | Path, what: str) -> Iterator[None]:
    """In the block no other process is in such a block for this file, which is made, and stays, as a mark.

    Raises UserError, naming `what`, where another one is. Where there are no locks (Windows, some network file
    systems) nothing is held.
    """
    try:
        file = open(path, "ab")  # noqa: SIM115  # what fails in the block is not this file's
    except OSError as error:
        raise _refusal(path, error) from error
    with file:
        try:
            _lock(file)
        except BlockingIOError:
            raise UserError(f"{what} is being written by another process: end that first") from None
        except OSError:
            pass
        yield


def _refusal(path: str | Path, error: OSError) -> UserError:
    reason = "its folder is a file" if isinstance(error, FileExistsError) else error.strerror or error
    return UserError(f"cannot write {path}: {reason}")


def _remove_unfinished(path: Path) -> None:
    """Delete the temporary files for `path` that killed processes left: those that hold data and no lock."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with suppress(OSError):  # another process writes it
            if sys.platform == "win32":
                left.unlink()  # which fails for a file that is open
            elif left.stat().st_size:  # an empty one may wait for its lock
                with left.open("rb+") as file:
                    _lock(file)
                    left.unlink()


def _lock(file: IO[bytes]) -> None:
    """Raises OSError where another process holds the lock; it ends with the process, however that ends."""
    if sys.platform != "win32":
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
