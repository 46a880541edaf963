"""Images of every kind that a file or a caller may hold, as [H, W, 3] uint8 BGR."""

from __future__ import annotations

import errno
import io
import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

import numpy as np

from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.files import write_one_of_many

IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
ORIENTATION = 0x0112  # the EXIF tag; its values 5 to 8 exchange width and height
MAX_PIXELS = 178_956_970  # Pillow's limit too: a file of 3 MB may hold so many that decoding it takes gigabytes
OPENCV_MAX_PIXELS = 1 << 30  # which OpenCV itself refuses to pass
OPENCV_MAX_SIDE = 1 << 20
PNG_START = b"\x89PNG\r\n\x1a\n"
PNG_END = b"IEND\xaeB`\x82"
JPEG_END = b"\xff\xd9"
CUT = "image file without its end"
"""Of a JPEG that OpenCV reads all the same: the lower part of its image is then grey, or that of an older file."""
SEVERAL = "image file of several pictures, of which the first is used"
MOST_BYTES = 8
"""Of a file for each pixel that an image may have: 16 bits of four channels."""
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "PPM", "TIFF", "WEBP", "GIF", "JPEG2000", "AVIF", "SUN")
"""Pillow's names of what OpenCV decodes. Of other formats no header is read, and so nothing decoded."""
_JPEG_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd8\xff])", re.DOTALL)  # but those that have no length


def read_image(
    path: str | Path, expected_size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """Decodes an image file to [H, W, 3] uint8 BGR.

    Grey becomes three equal channels, 16 bits lose the lower 8, transparency is dropped. The EXIF orientation is
    applied, unless `expected_size` (width, height), which an annotation was made for, is that of the pixels as stored.
    Raises UserError where the file is missing, no file (a folder, a pipe), empty, truncated or not an image, where its
    header tells of more than `max_pixels`, or where it has more bytes than such an image can have; the environment
    variable RTMDET_FAST_MAX_PIXELS takes precedence. Of several pictures in a file the first is read.
    """
    try:
        with open_regular(path) as file:
            check_bytes(path, os.fstat(file.fileno()).st_size, max_pixels)
            content = file.read()
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shown(str(path))}: cannot read this image: {reason}") from None
    return decode_image(content, path, expected_size, max_pixels)


def decode_image(
    content: bytes, path: str | Path, expected_size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> np.ndarray:
    """`read_image` of what a file holds; `path` is what errors call it."""
    import cv2

    name = shown(str(path))
    if not content:
        raise UserError(f"{name}: this image file is empty")
    check_bytes(path, len(content), max_pixels)
    header = _open_header(io.BytesIO(content))
    size = header.size if header else _told_size(content)
    if size is None or not _png_has_its_chunks(content):
        raise UserError(f"{name}: cannot decode this image: it is truncated, damaged or not an image")
    check_pixels(path, size, max_pixels)
    data = np.frombuffer(content, np.uint8)
    # From memory OpenCV refuses truncated data; its imread would fill the missing part with grey.
    image = _decode(data, cv2.IMREAD_COLOR)
    if image is None and header and _opencv_lacks(header.format):
        with suppress(Exception):  # a damaged file raises anything
            image = _from_pil(header)
    if image is None:
        raise UserError(f"{name}: cannot decode this image: it is truncated, damaged or not an image")
    if image.shape[:2] == expected_size:  # height and width exchanged
        stored = _decode(data, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if stored is not None and stored.shape[1::-1] == expected_size:
            return stored
    return image


def check_image(path: str | Path) -> tuple[str, ...]:
    """What is odd about an image file, of CUT and SEVERAL. Raises UserError where `read_image` does.

    A file whose header and end are those of a JPEG or PNG is not decoded.
    """
    size = (0, 0)
    whole: bool | None = None
    odd: tuple[str, ...] = ()
    with suppress(OSError, ValueError), open_regular(path) as file:
        header = _open_header(file)
        odd = (SEVERAL,) if _is_several(header) else ()
        if header and header.format in ("JPEG", "MPO", "PNG"):
            size = header.size
            file.seek(-min(len(PNG_END), os.fstat(file.fileno()).st_size), os.SEEK_END)
            whole = file.read().endswith(PNG_END if header.format == "PNG" else JPEG_END) or None
            if header.format != "PNG" and not whole:
                file.seek(0)
                whole = _jpeg_ends(file.read())
    check_pixels(path, size)
    if not whole:
        read_image(path)
    return odd if whole is not False else (CUT, *odd)


def has_several(path: str | Path) -> bool:
    """Whether a file holds several pictures, as of an animation, so far as its header tells."""
    with suppress(OSError, ValueError), open_regular(path) as file:
        return _is_several(_open_header(file))
    return False


def _is_several(header: Any) -> bool:
    with suppress(Exception):  # a GIF is read further for it, and a damaged one raises anything
        # the other pictures of an MPO are views of the same, as phones write them
        return bool(header and header.format != "MPO" and getattr(header, "is_animated", False))
    return False


def open_regular(path: str | Path) -> IO[bytes]:
    """A file open for bytes. Raises OSError also for what may be read without end, or never: a pipe, a device."""
    if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):
        raise OSError(errno.EINVAL, "it is a pipe or device, and no file", str(path))
    return open(path, "rb")


def read_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of the upright image as its header tells it, or (0, 0) where it does not."""
    try:
        with open_regular(path) as file:
            image = _open_header(file)
            if image is None:
                file.seek(0)
                return _told_size(file.read()) or (0, 0)
            width, height = image.size
            turned = False
            if image.format in ("JPEG", "MPO", "TIFF"):  # a PNG would be decoded to look for it
                with suppress(Exception):  # damaged EXIF raises anything, and OpenCV passes over it
                    turned = 5 <= image.getexif().get(ORIENTATION, 1) <= 8
    except (OSError, ValueError):
        return 0, 0
    return (height, width) if turned else (width, height)


def check_pixels(path: str | Path, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> None:
    """Raises UserError where an image of (width, height) has more than RTMDET_FAST_MAX_PIXELS, or else `max_pixels`."""
    limit, pixels = _most_pixels(max_pixels), size[0] * size[1]
    if pixels > limit:
        hint = f"{f'OPENCV_IO_MAX_IMAGE_PIXELS={pixels} and ' if pixels > OPENCV_MAX_PIXELS else ''}"
        raise UserError(
            f"{shown(str(path))}: this image has {size[0]}x{size[1]} pixels, more than the limit of {limit:,}; where "
            f"that is no mistake, set {hint}RTMDET_FAST_MAX_PIXELS={pixels} in the environment"
        )


def most_bytes(max_pixels: int = MAX_PIXELS) -> int:
    """How many bytes an image file may have; none is larger than its pixels, but for its metadata."""
    return MOST_BYTES * _most_pixels(max_pixels) + (1 << 26)


def check_bytes(path: str | Path, size: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raises UserError where a file of `size` bytes is larger than an image of so many pixels."""
    if size > most_bytes(max_pixels):
        raise UserError(
            f"{shown(str(path))}: this file has {size:,} bytes, more than an image of {_most_pixels(max_pixels):,} "
            "pixels; where that is no mistake, set RTMDET_FAST_MAX_PIXELS in the environment to a greater number"
        )


def _most_pixels(max_pixels: int) -> int:
    text = os.environ.get("RTMDET_FAST_MAX_PIXELS", "")
    if text and not (text.isascii() and text.isdecimal() and len(text) < 19):
        raise UserError(f"RTMDET_FAST_MAX_PIXELS is {text!r:.40}: give a whole number of pixels")
    return int(text or max_pixels)


def as_bgr(image: Any, color: str = "bgr") -> np.ndarray:
    """[H, W, 3] uint8 BGR from an array or a PIL image.

    Arrays are [H, W] grey, [H, W, 1] grey, [H, W, 3] BGR or [H, W, 4] BGRA, with the color "rgb" RGB or RGBA, of uint8
    or uint16 (the upper 8 bits are kept). PIL images, which know their colors, may have any mode but "F"; their EXIF
    orientation is applied. UserError for anything else.
    """
    if hasattr(image, "convert") and hasattr(image, "mode"):  # PIL, which is not a dependency
        return _from_pil(image)
    if not isinstance(image, np.ndarray):
        raise UserError(f"an image is an array or a PIL image, not {type(image).__name__}")
    if image.dtype not in (np.uint8, np.uint16):
        raise UserError(f"an image array has dtype uint8 or uint16, not {image.dtype}; scale it to 0..255 first")
    if not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))) or image.size == 0:
        raise UserError(f"an image array has shape [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], not {list(image.shape)}")
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.ndim == 2 or image.shape[2] == 1:
        image = np.repeat(image.reshape(*image.shape[:2], 1), 3, axis=2)
    return np.ascontiguousarray(image[:, :, 2::-1] if color == "rgb" else image[:, :, :3])


def _open_header(file: IO[bytes]) -> Any:
    """A PIL image of which nothing was decoded, or None where Pillow knows no such format."""
    from PIL import Image

    # What Image.open does, but for its limit of pixels, which is the process's, not ours, and hides the size.
    Image.init()
    prefix = file.read(16)
    for name in FORMATS:
        if name not in Image.OPEN:  # of an older Pillow
            continue
        factory, accept = Image.OPEN[name]
        try:
            accepted = accept is None or accept(prefix)
            if not accepted or isinstance(accepted, str):  # which tells why not
                continue
            file.seek(0)
            return factory(file, "")
        except Exception:  # a damaged file raises anything
            continue
    return None


def _png_has_its_chunks(content: bytes) -> bool:
    """False of a PNG with a chunk that ends behind the file: OpenCV takes as much memory as it says, up to 4 GB."""
    at = len(PNG_START)
    while content.startswith(PNG_START) and at + 8 <= len(content):
        (length,) = struct.unpack_from(">I", content, at)
        if at + 8 + length > len(content):
            return False
        if content[at + 4 : at + 8] == PNG_END[:4]:
            break
        at += 12 + length
    return True


def _told_size(content: bytes) -> tuple[int, int] | None:
    """(width, height) of a PNG, JPEG or TIFF, whose other parts may be such that Pillow refuses it."""
    if content.startswith(PNG_START) and content[12:16] == b"IHDR":
        return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")
    if content.startswith(b"\xff\xd8"):
        for marker, at in _jpeg_segments(content):
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                height, width = struct.unpack(">HH", content[at + 3 : at + 7].ljust(4, b"\0"))
                return width, height
    if content[:4] in (b"II*\0", b"MM\0*"):
        order = "<" if content[:2] == b"II" else ">"
        told: dict[int, int] = {}
        with suppress(struct.error):
            (at,) = struct.unpack_from(f"{order}I", content, 4)
            for i in range(struct.unpack_from(f"{order}H", content, at)[0]):
                tag, kind = struct.unpack_from(f"{order}HH", content, at + 2 + 12 * i)
                value = struct.unpack_from(f"{order}{'H' if kind == 3 else 'I'}", content, at + 10 + 12 * i)[0]
                told[tag] = max(value, told.get(tag, 0))
        if told.keys() >= {256, 257}:
            return told[256], told[257]
    return None


def _jpeg_ends(content: bytes) -> bool:
    """Whether the markers of a JPEG lead to that of its end; what may follow that, such as a video, does not matter."""
    return any(marker == JPEG_END[1] for marker, _ in _jpeg_segments(content))


def _jpeg_segments(content: bytes) -> Iterator[tuple[int, int]]:
    """The markers of a JPEG, but for those that have no length, and where their segments begin."""
    at = 2  # behind that of its start
    while found := _JPEG_MARKER.search(content, at):
        yield found[1][0], found.end()
        at = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")


def _decode(data: np.ndarray, flags: int) -> np.ndarray | None:
    import cv2

    try:
        return cv2.imdecode(data, flags)
    except cv2.error:  # for instance more pixels than OpenCV is willing to hold
        return None


@cache
def _opencv_lacks(form: str) -> bool:
    """Whether OpenCV was built without a format, as its wheels before 4.12 were without GIF and AVIF."""
    import cv2

    return re.search(rf"^ *{form}: +NO$", cv2.getBuildInformation(), re.MULTILINE) is not None


def _from_pil(image: Any) -> np.ndarray:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot decode this PIL image: {error}") from None
    if image.mode == "F":
        raise UserError('a PIL image of mode "F" has no fixed range; scale it to 0..255 first')
    if image.mode.startswith("I"):  # 16 bits, which convert("RGB") would clip at 255
        pixels = np.asarray(image)
        if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 65535:
            raise UserError(f'a PIL image of mode "{image.mode}" must keep to 0..65535')
        bgr = as_bgr(pixels.astype(np.uint16))
    else:
        bgr = as_bgr(np.asarray(image.convert("RGB"))[:, :, ::-1])
    orientation = image.getexif().get(ORIENTATION, 1) if hasattr(image, "getexif") else 1
    if orientation in (5, 6, 7, 8):
        bgr = bgr.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        bgr = bgr[:, ::-1]
    if orientation in (3, 4, 7, 8):
        bgr = bgr[::-1]
    return np.ascontiguousarray(bgr)


def write_image(path: str | Path, image: np.ndarray) -> Path:
    """Writes a [H, W, 3] uint8 BGR picture in the format of the suffix, whole or not at all, making its folder.

    Raises UserError where OpenCV has no encoder for the suffix or the file cannot be written.
    """
    import cv2

    path = Path(path)
    # OpenCV crashes on a name that is not UTF-8
    known = path.suffix and path.suffix.isascii() and cv2.haveImageWriter(f"x{path.suffix}")
    done, encoded = cv2.imencode(path.suffix, image) if known else (False, np.empty(0))
    if not done:
        raise UserError(f"cannot write an image to {path}: use a name that ends in .jpg or .png")
    write_one_of_many(path, encoded.tobytes())
    return path
