"""Images of folders, patterns and tar archives as they are found: a folder of a million names is never listed.

They come in the order in which the file system tells them, which is not that of the alphabet. Nothing hangs on it: to
which shard an image belongs its name alone says, and an archive its place among the archives' sorted names.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.images import IMAGE_SUFFIXES, check_bytes

ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_HEADER = 1 << 16
"""Bytes of a member's long name or attributes, which tarfile reads into memory at once."""
KEY = 16
"""Bytes of `key_of`."""


def key_of(name: str) -> bytes:
    """What stands for an image's name where millions are remembered; two that are equal are not to be expected."""
    return hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=KEY).digest()


def shard_of(key: bytes, count: int) -> int:
    """The one of `count` shards that an image belongs to."""
    return int.from_bytes(key[:8], "big") % count


def is_archive(path: str) -> bool:
    return path.lower().endswith(ARCHIVE_SUFFIXES)


class Listing:
    """The images and archives of several sources; each `iter` goes through the folders anew, and gives a file once.

    Raises UserError at once where a source is not there. What a folder holds beside is passed over.

    Args:
        sources: images, tar archives, folders (without their sub-folders) and patterns such as "photos/**/*.jpg".
        refused: is called with the name and the error of a folder that cannot be read; it may raise.
    """

    def __init__(self, sources: Sequence[str | Path], refused: Callable[[str, UserError], object]):
        self.refused = refused
        self._files: dict[str, None] = {}
        self._patterns: list[_Pattern] = []
        for source in sources:
            text = os.path.expanduser(source)
            path = os.path.abspath(text)
            if os.path.isfile(path):
                if not (is_archive(path) or _suffix(path) in IMAGE_SUFFIXES):
                    raise UserError(f"{shown(text)} is neither an image nor a tar archive; --shard takes nothing else")
                self._files[path] = None
            elif os.path.isdir(path):
                self._patterns.append(_Pattern(path, [ANY]))
            elif glob.has_magic(text):
                parts = text.replace("/", os.sep).split(os.sep)
                fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
                root = os.path.abspath(os.sep.join([*parts[:fixed], ""]))
                if not os.path.isdir(root):
                    raise UserError(f"no file matches {shown(text)}: there is no folder {shown(root)}")
                self._patterns.append(_Pattern(root, [part for part in parts[fixed:] if part]))
            else:
                raise UserError(f"{shown(text)} does not exist: give images, tar archives, folders or patterns")
        roots = [*map(os.path.dirname, self._files), *(pattern.root for pattern in self._patterns)]
        try:
            self._base = os.path.join(os.path.commonpath(roots), "")
        except ValueError:  # none, or two drives
            raise UserError("give an image, tar archive, folder or pattern, all on one drive") from None

    def name_of(self, path: str) -> str:
        """The path from the folder that all sources have in common, with slashes."""
        return path[len(self._base) :].replace(os.sep, "/")

    def __iter__(self) -> Iterator[str]:
        """Absolute paths."""
        yield from self._files
        earlier: dict[str, list[_Pattern]] = {}
        for pattern in self._patterns:
            for path in self._walk(pattern.root, pattern, pattern.start, frozenset()):
                if path not in self._files and not any(other.matches(path) for other in _above(path, earlier)):
                    yield path
            earlier.setdefault(pattern.root, []).append(pattern)

    def _walk(
        self, folder: str, pattern: _Pattern, states: frozenset[int], above: frozenset[tuple[int, int]]
    ) -> Iterator[str]:
        """`above`: the folders that lead here, as a link may lead to one of them."""
        try:
            told = os.stat(folder)
            if (told.st_dev, told.st_ino) in above:
                return
            above |= {(told.st_dev, told.st_ino)}
            with os.scandir(folder) as entries:
                for entry in entries:
                    wanted = _suffix(entry.name) in IMAGE_SUFFIXES or is_archive(entry.name)
                    if wanted and _is(entry.is_file):
                        if pattern.end in pattern.step(states, entry.name):
                            yield entry.path
                        continue
                    further = pattern.step(states, entry.name) - {pattern.end}
                    if further and _is(entry.is_dir):
                        yield from self._walk(entry.path, pattern, further, above)
        except OSError as error:
            reason = f"{shown(folder)}: cannot list this folder: {error.strerror or error}"
            self.refused(self.name_of(folder) or ".", UserError(reason))


ANY = ""
"""The part of a folder's own pattern, which hidden files match too."""


class _Pattern:
    """A pattern in the manner of `glob`, as a machine whose states are places in it; `end` is behind its last part."""

    def __init__(self, root: str, parts: list[str]):
        self.root, self.parts, self.end = root, parts, len(parts)
        self._matches = [re.compile(fnmatch.translate(os.path.normcase(part or "*"))).match for part in parts]
        self.start = self._closed({0})

    def step(self, states: frozenset[int], name: str) -> frozenset[int]:
        """Where a name leads from there."""
        found = set()
        hidden, plain = name.startswith("."), os.path.normcase(name)
        for at in states - {self.end}:
            part = self.parts[at]
            if hidden and part != ANY and not part.startswith("."):
                continue
            if part == "**":
                found.add(at)
            elif self._matches[at](plain):
                found.add(at + 1)
        return self._closed(found)

    def matches(self, path: str) -> bool:
        """Whether a path below the root is one of those."""
        states = self.start
        for name in os.path.relpath(path, self.root).split(os.sep):
            states = self.step(states, name)
        return self.end in states

    def _closed(self, states: set[int]) -> frozenset[int]:
        """With those that are reached by passing over a `**`."""
        for at, part in enumerate(self.parts):
            if at in states and part == "**":
                states.add(at + 1)
        return frozenset(states)


def _above(path: str, patterns: dict[str, list[_Pattern]]) -> Iterator[_Pattern]:
    """The patterns whose root is a folder above the path."""
    while patterns and (folder := os.path.dirname(path)) != path:
        yield from patterns.get(folder, ())
        path = folder


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _is(kind: Callable[[], bool]) -> bool:
    """Of an entry; links may lead in a circle."""
    with suppress(OSError):
        return kind()
    return False


@dataclass(frozen=True, slots=True)
class Member:
    """An image in an archive; `read` gives its bytes, before the next member is asked for, or raises UserError."""

    name: str
    read: Callable[[], bytes]


def archive_images(path: str) -> Iterator[Member]:
    """The images of a tar archive, compressed or not, in its order, one in memory at a time; nothing is unpacked.

    Links, devices and files of other kinds, such as a webdataset's labels, are passed over. Raises UserError where the
    archive is damaged, after all members before that, and where it lacks its end: it may then lack images.
    """
    try:
        with tarfile.open(path, "r:*", tarinfo=_Member) as archive:
            behind = -1
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # which would grow with every member
                if member.size < 0 or archive.offset <= behind:  # around and around
                    raise tarfile.ReadError("the size of a member is negative")
                behind = archive.offset
                if member.isreg() and _suffix(member.name) in IMAGE_SUFFIXES:
                    yield Member(member.name, partial(_content, path, archive, member))
    except _DAMAGE as error:
        raise _damaged(path, error) from None


_DAMAGE: tuple[type[Exception], ...] = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    RecursionError,
    zlib.error,
)
with suppress(ImportError):  # a Python built without it
    from lzma import LZMAError

    _DAMAGE += (LZMAError,)


def _content(path: str, archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    check_bytes(f"{path}/{member.name}", member.size)
    try:
        file = archive.extractfile(member)
        assert file is not None
        return file.read()
    except _DAMAGE as error:
        raise _damaged(f"{path}/{member.name}", error) from None


def _damaged(path: str, error: BaseException) -> UserError:
    reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "") or type(error).__name__
    return UserError(f"{shown(path)}: this tar archive is damaged, cut off or none: {shown(reason)}")


class _Member(tarfile.TarInfo):
    """tarfile takes a header that is none for the archive's end, and reads whatever size it tells of a long name."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: Any, errors: Any) -> Any:
        member = super().frombuf(buf, encoding, errors)
        named = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE)
        if member.type in (*named, tarfile.SOLARIS_XHDTYPE) and not 0 <= member.size <= MAX_HEADER:
            raise tarfile.ReadError(f"a member's name or attributes have {member.size:,} bytes")
        return member

    @classmethod
    def fromtarfile(cls, tarfile_: Any) -> Any:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"no member and no end of the archive where one has to be ({error})") from None
