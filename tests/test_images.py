"""Decoding of every kind of image, and of none."""

import io
import os
import re
import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest

from rtmdet_fast import images
from rtmdet_fast.errors import UserError
from rtmdet_fast.images import CUT, SEVERAL, as_bgr, check_image, read_image, read_size, write_image

Image = pytest.importorskip("PIL.Image", reason="writes its odd images with Pillow")

# what EXIF orientation k does to stored pixels, as a function to the upright image
UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.fixture
def pixels():
    """[20, 32, 3] BGR, smooth, so that JPEG keeps it, and different in every corner and channel."""
    y, x = np.mgrid[:20, :32]
    return np.stack([4 * x, 10 * y, 250 - 3 * x - 6 * y], -1).clip(0, 255).astype(np.uint8)


def write(path, array, *args):
    path.write_bytes(cv2.imencode(path.suffix, array, *args)[1].tobytes())
    return path


def exif_jpeg(path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels[:, :, ::-1]).save(path, quality=98, subsampling=0, exif=exif)
    return path


def close(a, b, tolerance=6):
    return a.shape == b.shape and np.abs(a.astype(int) - b).max() <= tolerance


def test_colour(tmp_path, pixels):
    for suffix in (".png", ".bmp", ".ppm", ".tiff"):
        image = read_image(write(tmp_path / f"a{suffix}", pixels))
        assert image.dtype == np.uint8 and np.array_equal(image, pixels)
    assert close(read_image(write(tmp_path / "a.jpg", pixels)), pixels, 30)


def test_unicode_path(tmp_path, pixels):
    path = tmp_path / "фото 写真.png"
    assert np.array_equal(read_image(write(path, pixels)), pixels)
    assert np.array_equal(read_image(str(path)), pixels)


def test_grey(tmp_path, pixels):
    image = read_image(write(tmp_path / "a.png", pixels[:, :, 0]))
    assert np.array_equal(image, np.repeat(pixels[:, :, :1], 3, 2))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bit(tmp_path, pixels, suffix, channels):
    deep = (pixels.astype(np.uint16) * 256 + 200)[:, :, :channels].squeeze()
    expected = np.repeat(pixels[:, :, :1], 3, 2) if channels == 1 else pixels
    assert close(read_image(write(tmp_path / f"a{suffix}", deep)), expected, 1)  # some decoders round


def test_rgba_and_palette(tmp_path, pixels):
    alpha = np.dstack([pixels, np.arange(20 * 32, dtype=np.uint8).reshape(20, 32)])
    assert np.array_equal(read_image(write(tmp_path / "a.png", alpha)), pixels)
    palette = Image.fromarray(pixels[:, :, ::-1]).quantize(16)
    palette.save(tmp_path / "p.png")
    assert np.array_equal(read_image(tmp_path / "p.png"), np.asarray(palette.convert("RGB"))[:, :, ::-1])
    Image.fromarray(np.eye(9, dtype=bool)).save(tmp_path / "b.png")
    assert np.array_equal(read_image(tmp_path / "b.png")[:, :, 0], np.eye(9, dtype=np.uint8) * 255)


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(tmp_path, pixels, orientation):
    path = exif_jpeg(tmp_path / "a.jpg", pixels, orientation)
    upright = UPRIGHT[orientation](pixels)
    assert close(read_image(path), upright)
    assert close(as_bgr(Image.open(path)), upright)
    assert close(read_image(path, upright.shape[1::-1]), upright)


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_exif_is_ignored_where_the_annotated_size_says_so(tmp_path, pixels, orientation):
    path = exif_jpeg(tmp_path / "a.jpg", pixels, orientation)
    assert close(read_image(path, (32, 20)), pixels)
    assert read_image(path, (99, 98)).shape == (32, 20, 3)  # neither: the upright one


def test_exchanged_size_without_exif_is_no_reason_to_turn(tmp_path, pixels):
    assert np.array_equal(read_image(write(tmp_path / "a.png", pixels), (20, 32)), pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tiff", ".webp"])
@pytest.mark.parametrize("kept", [0.999, 0.9, 0.5, 0.1])
@pytest.mark.filterwarnings("ignore:(Corrupt EXIF|Truncated File):UserWarning")  # Pillow's, of a TIFF's header
def test_truncated(tmp_path, suffix, kept):
    noise = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (200, 240, 3), np.uint8), (0, 0), 2)
    path = write(tmp_path / f"cut{suffix}", noise)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(UserError, match=rf"cut\{suffix}.*truncated"):
        read_image(path)


def test_truncated_progressive_jpeg(tmp_path, pixels):
    path = write(tmp_path / "cut.jpg", np.tile(pixels, (9, 9, 1)), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    data = path.read_bytes()
    for missing in (1, 2, 10, len(data) // 3):
        path.write_bytes(data[:-missing])
        with pytest.raises(UserError, match=r"cut\.jpg"):
            read_image(path)


def test_not_an_image(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("<html>404</html>")
    (tmp_path / "folder.jpg").mkdir()
    for name, message in [
        ("missing.jpg", "No such file"),
        ("empty.jpg", "empty"),
        ("text.jpg", "not an image"),
        ("folder.jpg", "directory"),
        ("null\0.jpg", "null"),
        ("line\nbreak.jpg", "No such file"),
    ]:
        with pytest.raises(UserError, match=rf"{re.escape(repr(name)[1:-1])}.*{message}"):
            read_image(tmp_path / name)


def test_a_whole_image_is_not_decoded(tmp_path, pixels, monkeypatch):
    paths = [write(tmp_path / name, pixels) for name in ("a.jpg", "a.png")]
    paths.append(write(tmp_path / "video.jpg", pixels))
    with paths[-1].open("ab") as file:  # as phones append it
        file.write(b"ftyp\xff\xda\xff\x00" * 100)
    thumbnail = Image.Exif()
    thumbnail[0x9286] = "\xff\xd9" * 20  # a comment
    Image.fromarray(pixels).save(tmp_path / "exif.jpg", exif=thumbnail, progressive=True)
    with (tmp_path / "exif.jpg").open("ab") as file:
        file.write(b"\0")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    assert not any(check_image(path) for path in [*paths, tmp_path / "exif.jpg"])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, of the TIFF
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tiff", ".webp"])
@pytest.mark.filterwarnings("ignore:(Corrupt EXIF|Truncated File):UserWarning")  # Pillow's, of a TIFF's header
def test_a_check_finds_what_cannot_be_read(tmp_path, pixels, suffix):
    path = write(tmp_path / f"a{suffix}", np.tile(pixels, (5, 5, 1)))
    assert check_image(path) == ()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"a\{suffix}: cannot decode"):
        check_image(path)


def test_a_jpeg_whose_end_is_overwritten(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3)).astype(np.uint8)
    path = write(tmp_path / "a.jpg", noise)
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    assert read_image(path).shape == (48, 64, 3) and check_image(path) == (CUT,)


@pytest.mark.parametrize("length", range(1, 8))
def test_a_file_of_a_few_bytes(tmp_path, length):
    (tmp_path / "a.bmp").write_bytes(b"x" * length)
    assert read_size(tmp_path / "a.bmp") == (0, 0)
    with pytest.raises(UserError, match=r"a\.bmp: cannot decode"):
        read_image(tmp_path / "a.bmp")


def test_a_check_of_no_image(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "bomb.png").write_bytes(png_of_zeros(20_000, 10_000))
    for name, message in (("empty.jpg", "empty"), ("none.jpg", "No such file"), ("bomb.png", "limit")):
        with pytest.raises(UserError, match=message):
            check_image(tmp_path / name)


def png_of_zeros(width, height):
    """A grey PNG of any size, which takes a thousandth of its pixels' memory to make."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows, packer = bytes(width + 1), zlib.compressobj()
    data = b"".join(packer.compress(rows) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def test_a_decompression_bomb_is_told_by_its_header(tmp_path, monkeypatch):
    (tmp_path / "bomb.png").write_bytes(png_of_zeros(20_000, 10_000))
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"bomb\.png.*20000x10000 pixels.*RTMDET_FAST_MAX_PIXELS=200000000 "):
        read_image(tmp_path / "bomb.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow's own of large images
        assert read_size(tmp_path / "bomb.png") == (20_000, 10_000)


def test_the_limit_of_pixels_can_be_set(tmp_path, pixels, monkeypatch):
    path = write(tmp_path / "a.png", pixels)
    with pytest.raises(UserError, match="limit of 639"):
        read_image(path, max_pixels=639)
    monkeypatch.setenv("RTMDET_FAST_MAX_PIXELS", "640")
    assert read_image(path, max_pixels=639).shape == (20, 32, 3)
    monkeypatch.setenv("RTMDET_FAST_MAX_PIXELS", "639")
    with pytest.raises(UserError, match="limit of 639"):
        read_image(path)
    for wrong in ("1e9", "-1", "9" * 5000):
        monkeypatch.setenv("RTMDET_FAST_MAX_PIXELS", wrong)
        with pytest.raises(UserError, match=r"RTMDET_FAST_MAX_PIXELS is .* whole number"):
            read_image(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff"])
def test_a_bomb_that_pillow_refuses_is_told_by_its_header(tmp_path, monkeypatch, suffix):
    path = write(tmp_path / f"bomb{suffix}", np.zeros((30, 50, 3), np.uint8))
    monkeypatch.setattr(images, "_open_header", lambda _: None)
    assert read_size(path) == (50, 30)
    with pytest.raises(UserError, match=rf"bomb\{suffix}: this image has 50x30 pixels, more than the limit of 1,499"):
        read_image(path, max_pixels=1499)
    assert read_image(path, max_pixels=1500).shape == (30, 50, 3)


@pytest.mark.parametrize("suffix", [".hdr", ".pam"])
def test_formats_without_a_header_that_tells_the_size_are_not_decoded(tmp_path, pixels, monkeypatch, suffix):
    """OpenCV decodes them up to 2^30 pixels, of four bytes a channel, out of a few kilobytes."""
    write(tmp_path / f"a{suffix}", pixels).rename(tmp_path / "a.jpg")
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"a\.jpg: cannot decode this image"):
        read_image(tmp_path / "a.jpg")


def test_a_file_of_more_bytes_than_an_image_can_have_is_not_read(tmp_path, monkeypatch):
    with (tmp_path / "a.jpg").open("wb") as file:
        file.truncate(2**40)  # takes no room on the disk
    with pytest.raises(
        UserError, match=r"a\.jpg: this file has 1,099,511,627,776 bytes, more than an image of 178,956,970"
    ):
        read_image(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="this file has"):
        check_image(tmp_path / "a.jpg")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_pipes_and_devices_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "gone.jpg").symlink_to("nothing.jpg")
    told = {"pipe": "pipe or device", "zero": "pipe or device", "loop": "symbolic links", "gone": "No such file"}
    for name, message in told.items():
        for read in (read_image, check_image):
            with pytest.raises(UserError, match=rf"{name}\.jpg: cannot read this image: .*{message}"):
                read(tmp_path / f"{name}.jpg")
        assert read_size(tmp_path / f"{name}.jpg") == (0, 0)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_several_pictures_the_first_is_used_and_that_is_told(tmp_path, pixels, form):
    first, other = (Image.fromarray(array[:, :, ::-1].copy()) for array in (pixels, 255 - pixels))
    path = tmp_path / f"a.{form.lower()}"
    first.save(
        path, form, save_all=True, append_images=[other, first], **({"lossless": True} if form == "WEBP" else {})
    )
    assert close(read_image(path), pixels, 6) and check_image(path) == (SEVERAL,)
    first.save(path, form)
    assert check_image(path) == ()


def test_a_png_chunk_that_ends_behind_its_file_is_refused_before_it_is_read(tmp_path, pixels, monkeypatch):
    """OpenCV takes the four gigabytes first that such a chunk of a small file may tell of."""
    path = write(tmp_path / "a.png", pixels)
    whole = path.read_bytes()
    at = whole.index(b"IDAT")
    for chunk, length in ((b"IDAT", b"\xff\xff\xff\x7f"), (b"PLTE", b"\x7f\xff\xff\xff")):
        path.write_bytes(whole[: at - 4] + length + chunk + whole[at + 4 :])
        with monkeypatch.context() as patch:
            patch.setattr(cv2, "imdecode", None)
            with pytest.raises(UserError, match="cannot decode this image: it is truncated, damaged"):
                read_image(path)
    # what comes after the end does not matter
    for content in (whole + b"\0\0\0\x09more", whole + whole[8:]):
        path.write_bytes(content)
        assert np.array_equal(read_image(path), pixels)


@pytest.mark.parametrize("form", ["GIF", "AVIF"])
def test_pillow_decodes_what_opencv_was_built_without(tmp_path, pixels, form, monkeypatch):
    path = tmp_path / f"a.{form.lower()}"
    if Image.registered_extensions().get(path.suffix) not in Image.SAVE:
        pytest.skip(f"this Pillow writes no {form}")
    Image.fromarray(pixels[:, :, ::-1].copy()).save(path)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: None)
    monkeypatch.setattr(cv2, "getBuildInformation", lambda: f"\n    PNG:     png.so\n    {form}:      NO\n")
    monkeypatch.setattr(images, "_opencv_lacks", images._opencv_lacks.__wrapped__)
    with Image.open(path) as by_pillow:
        assert np.array_equal(read_image(path), np.asarray(by_pillow.convert("RGB"))[:, :, ::-1])
    assert close(read_image(path), pixels, 30)
    path.write_bytes(path.read_bytes()[:-200])
    write(tmp_path / "a.png", pixels)
    for damaged in (path, tmp_path / "a.png"):
        with pytest.raises(UserError, match="cannot decode this image: it is truncated"):
            read_image(damaged)


@pytest.mark.parametrize("suffix", [".jpg", ".tiff"])
def test_cmyk(tmp_path, pixels, suffix):
    cmyk = Image.fromarray(pixels[:, :, ::-1]).convert("CMYK")
    path = tmp_path / f"a{suffix}"
    cmyk.save(path, **({"quality": 98, "subsampling": 0} if suffix == ".jpg" else {}))
    assert close(read_image(path), np.asarray(Image.open(path).convert("RGB"))[:, :, ::-1], 8)


def test_a_name_tells_nothing_of_the_format(tmp_path, pixels):
    for suffix, name in ((".png", "a.jpg"), (".jpg", "a.png"), (".bmp", "a.webp"), (".tiff", "a.bmp")):
        write(tmp_path / f"a{suffix}", pixels).rename(tmp_path / name)
        assert close(read_image(tmp_path / name), pixels, 30) and check_image(tmp_path / name) == ()
        assert read_size(tmp_path / name) == (32, 20)


def test_arrays(pixels):
    assert np.shares_memory(as_bgr(pixels), pixels)  # no copy that is not needed
    grey = np.repeat(pixels[:, :, :1], 3, 2)
    assert np.array_equal(as_bgr(pixels[:, :, 0]), grey)
    assert np.array_equal(as_bgr(pixels[:, :, :1]), grey)
    assert np.array_equal(as_bgr(np.dstack([pixels, pixels[:, :, 0]])), pixels)
    assert np.array_equal(as_bgr(pixels.astype(np.uint16) * 256 + 255), pixels)
    assert as_bgr(pixels[::2, ::-1]).flags.c_contiguous


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3)), "float64"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((4, 4), bool), "bool"),
        (np.zeros((3, 8, 8), np.uint8), r"\[3, 8, 8\]"),
        (np.zeros((1, 8, 8, 3), np.uint8), r"\[1, 8, 8, 3\]"),
        (np.zeros((0, 8, 3), np.uint8), r"\[0, 8, 3\]"),
        ([[1, 2], [3, 4]], "list"),
        (None, "NoneType"),
    ],
)
def test_refused(image, message):
    with pytest.raises(UserError, match=message):
        as_bgr(image)


def test_truncated_pil_image(pixels):
    for form in ("png", "jpeg"):
        file = io.BytesIO()
        Image.fromarray(np.tile(pixels, (9, 9, 1))).save(file, form)
        image = Image.open(io.BytesIO(file.getvalue()[: len(file.getvalue()) // 2]))
        with pytest.raises(UserError, match=r"PIL image.*truncated"):
            as_bgr(image)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_pil_modes(pixels, mode):
    image = Image.fromarray(pixels[:, :, ::-1]).convert(mode)
    assert np.array_equal(as_bgr(image), np.asarray(image.convert("RGB"))[:, :, ::-1])


def test_pil_deep_modes(pixels):
    grey = pixels[:, :, 0]
    expected = np.repeat(grey[:, :, None], 3, 2)
    assert np.array_equal(as_bgr(Image.fromarray(grey.astype(np.uint16) * 256 + 9)), expected)
    assert np.array_equal(as_bgr(Image.fromarray(grey.astype(np.int32) * 256 + 9)), expected)
    with pytest.raises(UserError, match="65535"):
        as_bgr(Image.fromarray(np.array([[70000]], np.int32)))
    with pytest.raises(UserError, match="F"):
        as_bgr(Image.fromarray(grey.astype(np.float32)))


def test_a_full_disk_leaves_the_old_picture(tmp_path, pixels):
    from full_disk import room_for

    path = write_image(tmp_path / "out/a.png", pixels)
    for size in (0, 1000):
        with room_for(size), pytest.raises(UserError, match=r"^cannot write .*a\.png: File too large$"):
            write_image(path, np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))
    assert (read_image(path) == pixels).all() and [p.name for p in path.parent.iterdir()] == ["a.png"]
