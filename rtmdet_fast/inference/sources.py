"""Where `predict` reads from: files, folders, glob patterns, videos, a camera or stream; and a video writer.

The address of a stream may hold a password, in its user, its path or its query: nothing but `shown_address` is told.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np

from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.images import IMAGE_SUFFIXES, check_pixels, has_several, most_bytes, read_image
from rtmdet_fast.inference.listing import is_archive

# What a drawn, coloured picture can be written as.
WRITABLE_SUFFIXES = IMAGE_SUFFIXES - {".pgm"}
VIDEO_SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm", ".wmv"})

# Cameras and some containers tell no frame rate, and the writer needs one.
DEFAULT_FPS = 25.0

MOST_NAMES = 20
"""Of one file, by links, that a pattern may match."""
STREAM_TIMEOUT = 10.0
"""Seconds that a stream may take to open, and for a frame."""
RECONNECT_AFTER = (1.0, 2.0, 5.0)
"""Seconds before each try to open a stream again that broke off; any frame starts them anew."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Frame:
    """One picture of a source.

    name: a relative file name, unique in its source, to write the answer under
    image: [H, W, 3] uint8 BGR
    path: the image or video file, None for a camera or stream; index: runs from 0 over the whole source
    is_video: True for frames of videos and cameras; fps: of the video, 0.0 for images
    """

    name: str
    image: np.ndarray
    path: str | None
    index: int
    is_video: bool
    fps: float = 0.0

    @property
    def video(self) -> str | None:
        """Of a video's frame the name that all its frames have, without suffix; None for images."""
        return self.name.rsplit("_", 1)[0] if self.is_video else None


class Source:
    """Iterates over the frames of files, or of one camera or stream; `iter_sources` makes it.

    camera: its number, or the address of a stream
    total: the number of frames as the files tell it (a video's header may be wrong), None where unknown
    skipped: entries of the folder, or matches of the pattern, that are neither image nor video
    unreadable: files that the last iteration passed over with `skip_bad`
    """

    def __init__(
        self, paths: list[Path], *, skipped: int = 0, camera: str | None = None, skip_bad: bool = False
    ) -> None:
        self.paths = paths
        self.skipped = skipped
        self.camera = camera
        self.skip_bad = skip_bad
        self.unreadable: list[str] = []
        self.total = None if camera is not None else _count_frames(paths)

    def __iter__(self) -> Iterator[Frame]:
        if self.camera is not None:
            if not is_address(self.camera):
                yield from _video_frames(self.camera, "camera")
            elif _is_image(self.camera):
                yield Frame("stream.jpg", _download_image(self.camera), None, 0, is_video=False)
            else:
                yield from _stream_frames(self.camera)
            return
        # Names are relative to what the files have in common, so that a/1.jpg and b/1.jpg stay apart.
        base = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in self.paths])
        names = [os.path.relpath(path, base) for path in self.paths]
        # So do clip.avi and clip.mp4.
        stems = Counter(os.path.splitext(name)[0] for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES)
        self.unreadable = []
        index = 0
        for path, name in zip(self.paths, names, strict=True):
            stem = os.path.splitext(name)[0]
            frames = _file_frames(path, name, stem if stems[stem] < 2 else name, index)
            while True:
                try:
                    frame = next(frames, None)
                except UserError as error:
                    if not self.skip_bad:
                        raise UserError(f"{error}; --skip-bad goes on over such files") from error
                    log.warning("%s", error)
                    self.unreadable.append(str(path))
                    break
                if frame is None:
                    break
                yield frame
                index += 1


def iter_sources(sources: str | Path | Sequence[str | Path], *, skip_bad: bool = False) -> Source:
    """The frames of one source, or of several in their order: an image, a video, a folder (without its sub-folders), a
    glob pattern such as "photos/**/*.jpg"; or of a camera's number ("0") or the address of a stream ("rtsp://…",
    "http://…"), which is opened again where it breaks off, and ends where that fails.

    A file that several name is read once. Raises UserError at once where there is nothing to read, and in the
    iteration, naming the file, where one cannot be decoded; with `skip_bad` the iteration goes on and counts it as
    `unreadable`.
    """
    texts = [str(source) for source in ([sources] if isinstance(sources, (str, Path)) else sources)]
    if not texts:
        raise UserError("give an image, folder, glob pattern, video or camera number")
    paths: dict[str, Path] = {}
    skipped = 0
    for text in texts:
        if is_address(text) or (text.isdecimal() and not Path(text).exists()):
            if len(texts) > 1:
                name = shown_address(text) if is_address(text) else text
                raise UserError(f"{name} is a camera or stream, which cannot be read beside other sources")
            return Source([], camera=text)
        files, others = _find_files(text)
        paths |= {os.path.abspath(path): path for path in files}
        skipped += others
    return Source(list(paths.values()), skipped=skipped, skip_bad=skip_bad)


def is_address(text: str) -> bool:
    """Whether a source is a stream's address, not a file or a camera's number."""
    return "://" in text


def shown_address(address: str) -> str:
    """Scheme, host and port of an address: what can be told of it, as passwords stand in all other parts."""
    try:
        parts = urlsplit(address)
        host, port = parts.hostname or "", parts.port
    except ValueError:  # a port that is none, half a bracket
        return f"{address.partition('://')[0]}://…"
    if _at_behind_host(address):  # what looks like the host is a user
        return f"{parts.scheme}://…"
    return f"{parts.scheme}://{f'[{host}]' if ':' in host else host}{f':{port}' if port else ''}/…"


def _at_behind_host(address: str) -> bool:
    return re.search("[/?#].*@", address.partition("://")[2]) is not None


def _find_files(text: str) -> tuple[list[Path], int]:
    """The images and videos that a path or pattern names, and the number of other entries."""
    path = Path(text).expanduser()
    if path.is_file() and is_archive(text):
        raise UserError(f"{shown(text)} is a tar archive: --shard 0/1 reads them, and writes no pictures")
    if path.is_file():
        return [path], 0
    if path.is_dir():
        found = sorted(path.iterdir())
    elif glob.has_magic(text):
        found = [Path(name) for name in sorted(_matching(str(path)))]
        if not found:
            raise UserError(f"no file matches {text}")
    else:
        raise UserError(f"{text} does not exist: give an image, folder, glob pattern, video or camera number")
    # a link to what is not there is told as an image that cannot be read
    wanted = [
        p
        for p in found
        if p.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES and (p.is_file() or (p.is_symlink() and not p.exists()))
    ]
    if not wanted:
        raise UserError(f"{text} holds no image or video ({len(found)} other entries)")
    skipped = len(found) - len(wanted)
    if skipped:
        log.warning("%s: %d of %d entries are neither image nor video and are skipped", text, skipped, len(found))
    return wanted, skipped


def _matching(pattern: str) -> Iterator[str]:
    """What a pattern matches. UserError where links that lead back to folders above make a file match without end."""
    names: Counter[str] = Counter()
    for name in glob.iglob(pattern, recursive=True):
        real = os.path.realpath(name)
        names[real] += 1
        if names[real] > MOST_NAMES:
            raise UserError(
                f"{pattern} matches {shown(real)} by {MOST_NAMES} names, as links lead back to folders above"
            )
        yield name


class VideoWriter:
    """`with VideoWriter("out.mp4", fps) as video: video.write(image)`; the first image sets the size.

    Raises UserError where OpenCV has no encoder for the suffix (.mp4 and .avi are always there), and at the end where
    frames are missing: OpenCV does not tell of a disk that is full.
    """

    def __init__(self, path: str | Path, fps: float = DEFAULT_FPS) -> None:
        self.path = Path(path)
        self.fps = fps
        self._writer: Any = None
        self._size = (0, 0)
        self._written = 0

    def write(self, image: np.ndarray) -> None:
        """image: [H, W, 3] uint8 BGR, of the same size each time."""
        import cv2

        size = (image.shape[1], image.shape[0])
        if self._writer is None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot write {self.path}: {error.strerror}") from None
            name = _utf8(str(self.path))
            codec = "MJPG" if self.path.suffix.lower() == ".avi" else "mp4v"
            self._writer = cv2.VideoWriter(name, cv2.VideoWriter.fourcc(*codec), self.fps, size)
            self._size = size
            if not self._writer.isOpened():
                self._writer = None
                raise UserError(
                    f"cannot write a video to {self.path}: take a name that ends in .mp4 or .avi, in a folder that can "
                    "be written and has room"
                )
        if size != self._size:
            before = f"{self._size[0]}x{self._size[1]}"
            raise UserError(f"{self.path}: a frame is {size[0]}x{size[1]} pixels, but those before it {before}")
        self._writer.write(image)
        self._written += 1

    def close(self) -> None:
        import cv2

        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        capture = cv2.VideoCapture(str(self.path))
        capture.set(cv2.CAP_PROP_POS_FRAMES, self._written - 1)
        whole = capture.get(cv2.CAP_PROP_FRAME_COUNT) == self._written and capture.read()[0]
        capture.release()
        if not whole:
            raise UserError(f"{self.path} lacks some of its {self._written} frames: the disk may be full")

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _file_frames(path: Path, name: str, stem: str, first: int) -> Iterator[Frame]:
    if path.suffix.lower() in VIDEO_SUFFIXES:
        yield from _video_frames(str(path), stem, str(path), first)
    else:
        if path.suffix.lower() not in WRITABLE_SUFFIXES:
            name += ".png"
        image = read_image(path)
        if has_several(path):
            log.warning("%s: holds several pictures, of which the first is looked at", shown(str(path)))
        yield Frame(name, image, str(path), first, is_video=False)


def _video_frames(address: str, stem: str, path: str | None = None, first: int = 0) -> Iterator[Frame]:
    """Of a video file, or of a camera by its number."""
    import cv2

    capture = _open_video(address)
    try:
        number = 0
        for number, (image, fps) in enumerate(_frames_of(capture, address), start=1):
            yield Frame(f"{stem}_{number - 1:06d}.jpg", image, path, first + number - 1, is_video=True, fps=fps)
        if number == 0:
            raise UserError(f"no frame can be read from {address}: it is damaged or of a codec OpenCV does not know")
        told = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if path is not None else 0
        if number < told:
            text = (
                "%s: %d of the %d frames that it tells of could be read: it is cut off or damaged, or tells of too many"
            )
            log.warning(text, shown(address), number, told)
    finally:
        capture.release()


def _stream_frames(address: str) -> Iterator[Frame]:
    """Of a stream by its address, for as long as it can be opened again; of a file behind an address, to its end."""
    import cv2

    name, number, tries = shown_address(address), 0, 0
    while True:
        capture = _open_stream(address)
        ends = capture.get(cv2.CAP_PROP_FRAME_COUNT) > 0  # which live streams do not tell
        opened = capture.isOpened()
        try:
            for image, fps in _frames_of(capture, name) if opened else ():
                yield Frame(f"stream_{number:06d}.jpg", image, None, number, is_video=True, fps=fps)
                number, tries = number + 1, 0
        finally:
            capture.release()
        if number == 0:
            what = "no frame can be read from" if opened else "cannot open"
            raise UserError(f"{what} the stream {name}: it is not there, refuses its user or is of an unknown format")
        if ends:
            return
        if tries == len(RECONNECT_AFTER):
            log.warning("%s: the stream broke off after %d frames and cannot be opened again", name, number)
            return
        log.warning("%s: the stream broke off after %d frames; opening it again", name, number)
        time.sleep(RECONNECT_AFTER[tries])
        tries += 1


def _frames_of(capture: Any, name: str) -> Iterator[tuple[np.ndarray, float]]:
    """The images that a capture still has, each with the frame rate that it tells.

    Raises UserError, with that name, where they have more pixels than an image may have.
    """
    import cv2

    check_pixels(name, (int(capture.get(cv2.CAP_PROP_FRAME_WIDTH)), int(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))))
    fps = capture.get(cv2.CAP_PROP_FPS)
    fps = fps if 0 < fps < 1000 else DEFAULT_FPS
    while True:
        ok, image = capture.read()
        if not ok:
            return
        check_pixels(name, image.shape[1::-1])  # some change their size
        yield image, fps


def _open_video(address: str) -> Any:
    import cv2

    capture = cv2.VideoCapture(int(address) if address.isdecimal() else _utf8(address))
    if not capture.isOpened():
        kind = "camera" if address.isdecimal() else "video"
        raise UserError(f"cannot open the {kind} {address}: it is missing, in use, damaged or of an unknown format")
    return capture


def _is_image(address: str) -> bool:
    path = re.split("[?#]", address, maxsplit=1)[0]
    return address.lower().startswith(("http://", "https://")) and Path(path).suffix.lower() in IMAGE_SUFFIXES


def _download_image(address: str) -> np.ndarray:
    """[H, W, 3] uint8 BGR."""
    import base64
    from http.client import HTTPException
    from urllib.request import Request, urlopen

    from rtmdet_fast.images import decode_image

    _check_address(address)
    name = f"the image at {shown_address(address)}"
    parts = urlsplit(address)
    user, _, host = parts.netloc.rpartition("@")
    request = Request(urlunsplit(parts._replace(netloc=host)))
    if user:
        request.add_header("Authorization", f"Basic {base64.b64encode(unquote(user).encode()).decode()}")
    limit = most_bytes()
    try:
        with urlopen(request, timeout=STREAM_TIMEOUT) as answer:
            content = answer.read(limit + 1)
    except (OSError, HTTPException, ValueError) as error:
        status = getattr(error, "code", None)
        raise UserError(f"cannot read {name}: {f'HTTP status {status}' if status else 'no answer'}") from None
    return decode_image(content, name)


def _open_stream(address: str) -> Any:
    """By FFmpeg alone: OpenCV's other ways print the address when they fail."""
    import cv2

    _check_address(address)
    limit = round(STREAM_TIMEOUT * 1000)
    timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, limit, cv2.CAP_PROP_READ_TIMEOUT_MSEC, limit]
    return cv2.VideoCapture(address, cv2.CAP_FFMPEG, timeouts)


def _check_address(address: str) -> None:
    """UserError where an address is none, or could be printed in parts that tell a password."""
    name = shown_address(address)
    if not (address.isprintable() and address.isascii()) or " " in address:
        raise UserError(f"the address of the stream {name} has characters that none may have: write them as %20 is")
    if _at_behind_host(address):  # FFmpeg would take a user for the host, and print it
        raise UserError(
            f"the address of the stream {name} has an @ behind its host: in a password write @ as %40, / as %2F, ? as "
            "%3F and # as %23, elsewhere @ as %40"
        )


def _utf8(name: str) -> str:
    """`name` itself; UserError where it is not UTF-8, on which OpenCV crashes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UserError(f"{name!r}: OpenCV takes no video whose name is not UTF-8; rename it") from None
    return name


def _count_frames(paths: list[Path]) -> int | None:
    import cv2

    total = 0
    for path in paths:
        if path.suffix.lower() not in VIDEO_SUFFIXES:
            total += 1
            continue
        try:
            capture = cv2.VideoCapture(_utf8(str(path)))
        except UserError:  # which the iteration tells
            return None
        frames = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        if frames <= 0:
            return None
        total += frames
    return total
