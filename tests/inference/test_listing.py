"""Images of folders, patterns and archives: what glob finds, once each, in little memory; hostile archives."""

import bz2
import glob
import gzip
import io
import lzma
import os
import random
import re
import sys
import tarfile
import tracemalloc
from collections import Counter
from contextlib import suppress

import numpy as np
import pytest

from rtmdet_fast import images as images_module
from rtmdet_fast.errors import UserError
from rtmdet_fast.inference.listing import Listing, archive_images, key_of, shard_of

FILES = (
    "1.jpg", "2.PNG", "note.txt", ".hidden.jpg", "[x].jpg", "t.tar", "a/1.jpg", "a/b/1.jpg", "a/b/c/3.tgz",
    "a/x.jpg/4.jpg", ".dark/5.jpg", "b/1.jpg", "b/a/6.jpeg", "b/a/a/7.jpg",
)  # fmt: skip


def refuse(name, error):
    raise error


@pytest.fixture
def tree(tmp_path):
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    ["*", "*.jpg", "**/*.jpg", "**", "a/**/*.jpg", "**/a/**/*.jpg", "**/**", "*/*.jpg", "[!a]/*", "**/[[]x].jpg", ".*",
     "**/b/*", "*/x.jpg/*", ".d*/*", "?/?/*", "a/[b]/*.jpg", "**/*.t*"],
)  # fmt: skip
def test_patterns_are_those_of_glob(tree, pattern, monkeypatch):
    expected = {path for path in glob.glob(f"{tree}/{pattern}", recursive=True) if os.path.isfile(path)}
    expected -= {str(tree / "note.txt")}
    assert expected
    found = list(Listing([f"{tree}/{pattern}"], refuse))
    assert sorted(found) == sorted(expected)
    monkeypatch.chdir(tree)
    assert sorted(Listing([pattern], refuse)) == sorted(expected)


def test_each_file_once_by_its_name_from_what_the_sources_share(tree):
    sources = [tree / "a", tree / "a/1.jpg", f"{tree}/a/**/*.jpg", tree / "a", f"{tree}/a/*/*", tree / "b/1.jpg"]
    listing = Listing(sources, refuse)
    names = [listing.name_of(path) for path in listing]
    assert sorted(names) == ["a/1.jpg", "a/b/1.jpg", "a/x.jpg/4.jpg", "b/1.jpg"]
    assert list(map(listing.name_of, listing)) == names
    listing = Listing([tree], refuse)
    assert sorted(map(listing.name_of, listing)) == [".hidden.jpg", "1.jpg", "2.PNG", "[x].jpg", "t.tar"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_are_followed_and_circles_left(tree):
    (tree / "a/up").symlink_to(tree)
    (tree / "a/self.jpg").symlink_to("self.jpg")
    (tree / "gone.jpg").symlink_to("nowhere.jpg")
    (tree / "other").symlink_to(tree / "b")
    found = Counter(os.path.relpath(path, tree) for path in Listing([f"{tree}/**/*.jpg"], refuse))
    assert found["other/1.jpg"] == found["b/1.jpg"] == found["a/1.jpg"] == 1
    assert not [path for path in found if "up" in path or "self" in path or "gone" in path]


@pytest.mark.parametrize(
    ("source", "told"),
    [("nowhere", "does not exist"), ("nowhere/*.jpg", "no folder"), ("note.txt", "neither an image nor a tar")],
)
def test_a_source_that_is_none_is_told_by_its_name(tree, source, told):
    with pytest.raises(UserError, match=told) as caught:
        Listing([tree / source], refuse)
    assert source.split("/")[0] in str(caught.value)


def test_a_folder_that_cannot_be_listed_is_told(tree, monkeypatch):
    scandir = os.scandir

    def forbidden(path):
        if str(path).endswith("b"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(UserError, match=r"b: cannot list this folder: Permission denied"):
        list(Listing([f"{tree}/**/*.jpg"], refuse))
    told = []
    found = list(Listing([f"{tree}/**/*.jpg"], lambda name, error: told.append(name)))
    assert sorted(told) == ["a/b", "b"] and str(tree / "a/1.jpg") in found


class Entry:
    """Of a folder that only seems to be there."""

    def __init__(self, folder, name):
        self.name, self.path = name, f"{folder}/{name}"

    def is_file(self):
        return True


class Entries:
    def __init__(self, folder, count):
        self.folder, self.count = folder, count

    def __enter__(self):
        return (Entry(self.folder, f"{i:07d}.jpg") for i in range(self.count))

    def __exit__(self, *exc):
        pass


def test_a_folder_of_many_names_is_streamed(tmp_path, monkeypatch):
    count = 20_000
    monkeypatch.setattr(os, "scandir", lambda folder: Entries(folder, count))
    listing = Listing([tmp_path], refuse)
    tracemalloc.start()
    try:
        assert sum(1 for _ in listing) == count
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200_000  # a list of the names has two megabytes


@pytest.mark.slow
def test_a_million_names_on_the_disk(tmp_path, record_property):
    """In one folder, in eight shards: each name in one of them, and no memory for them."""
    for i in range(1_000_000):
        os.close(os.open(f"{tmp_path}/{i:07d}.jpg", os.O_CREAT | os.O_WRONLY))
    resource = pytest.importorskip("resource")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    listing = Listing([tmp_path], refuse)
    seen = np.zeros(1_000_000, np.uint8)
    shards: Counter[int] = Counter()
    for path in listing:
        name = listing.name_of(path)
        seen[int(name[:7])] += 1
        shards[shard_of(key_of(name), 8)] += 1
    assert (seen == 1).all() and sum(shards.values()) == 1_000_000
    assert min(shards.values()) > 124_000 and max(shards.values()) < 126_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kilobytes
    record_property("names listed", 1_000_000)


def test_to_which_shard_an_image_belongs_hangs_on_its_name_alone():
    """The numbers hold shards that are resumed by another version, on another system, to those that went before."""
    names = ["000001.jpg", "a/ü.png", "t.tar/0.jpg", "\udcff.jpg"]
    assert [shard_of(key_of(name), 8) for name in names] == [4, 6, 2, 1]


def add(archive, name, content=b"", **fields):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for field, value in fields.items():
        setattr(member, field, value)
    archive.addfile(member, io.BytesIO(content))


def packed(names, form=tarfile.PAX_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name in names:
            add(archive, name, name.encode() * 50)
    return file.getvalue()


WEBDATASET = ["0001.jpg", "0001.json", "0001.cls", "deep/0002.PNG", "0002.txt", "long" * 60 + "ü.jpg", "0003.left.jpg"]
IMAGES = [name for name in WEBDATASET if name.lower().endswith((".jpg", ".png"))]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_the_images_of_a_webdataset_are_found_in_their_order(tmp_path, compress, form):
    (tmp_path / "a.tar").write_bytes(compress(packed(WEBDATASET, form)))
    found = [(member.name, member.read()) for member in archive_images(str(tmp_path / "a.tar"))]
    assert found == [(name, name.encode() * 50) for name in IMAGES]
    assert [member.name for member in archive_images(str(tmp_path / "a.tar"))] == IMAGES  # none of them read


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_an_archive_that_is_cut_off_is_told_wherever_that_is(tmp_path, compress):
    """tarfile takes an end between two members for the archive's."""
    whole, expected = compress(packed(WEBDATASET)), [(name, name.encode() * 50) for name in IMAGES]
    refused = 0
    for size in range(0, len(whole), 256 if compress is bytes else 16):
        path = tmp_path / "a.tar"
        path.write_bytes(whole[:size])
        found = []
        try:
            found.extend((member.name, member.read()) for member in archive_images(str(path)))
            assert found == expected  # what is cut off is of the zeros behind them
        except UserError as error:
            assert re.search(r"a\.tar(/\S+)?: this tar archive is damaged, cut off or none", str(error))
            refused += 1
        assert found == expected[: len(found)]
    assert refused > (20 if compress is bytes else 5)


def test_what_is_no_plain_file_is_no_image(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.FIFOTYPE,
            tarfile.CHRTYPE,
            tarfile.BLKTYPE,
            tarfile.DIRTYPE,
        ):
            add(archive, f"{kind.decode()}.jpg", type=kind, linkname="/etc/passwd")
        add(archive, "../../up.jpg", b"up")
    assert [(member.name, member.read()) for member in archive_images(str(tmp_path / "a.tar"))] == [
        ("../../up.jpg", b"up")
    ]


def number(value):
    """A size as GNU's tar writes what has no place in octal digits, negative ones too."""
    return (b"\x80" if value >= 0 else b"\xff") + value.to_bytes(11, "big", signed=True)


def header(kind, size):
    block = bytearray(tarfile.TarInfo("x.jpg").tobuf())
    block[124:136], block[156:157], block[148:156] = number(size), kind, b" " * 8
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block)


@pytest.mark.parametrize("size", [-512, -1024, 1 << 40, 1 << 80])
@pytest.mark.parametrize("kind", [b"0", b"L", b"K", b"x", b"g", b"S"])
def test_sizes_that_lie_end_in_an_error_without_memory_for_them(tmp_path, kind, size):
    (tmp_path / "a.tar").write_bytes(packed(["1.jpg"])[:1024] + header(kind, size) + packed(["2.jpg"]))
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=r"a\.tar"):
            for member in archive_images(str(tmp_path / "a.tar")):
                member.read()
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_an_image_above_the_limit_is_passed_over_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(images_module, "most_bytes", lambda max_pixels: 400)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, size in (("1.jpg", 300), ("2.jpg", 500), ("3.jpg", 300)):
            add(archive, name, bytes(size))
    found = {}
    for member in archive_images(str(tmp_path / "a.tar")):
        with suppress(UserError):
            found[member.name] = len(member.read())
    assert found == {"1.jpg": 300, "3.jpg": 300}


def test_an_archive_of_many_members_is_streamed(tmp_path):
    (tmp_path / "a.tar").write_bytes(packed([f"{i:05d}.jpg" for i in range(1000)]))
    tracemalloc.start()
    try:
        assert sum(len(member.read()) == 450 for member in archive_images(str(tmp_path / "a.tar"))) == 1000
        assert tracemalloc.get_traced_memory()[1] < 300_000  # the members have one megabyte
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_mutated_archives_are_read_or_refused(tmp_path, compress, record_property):
    """And never read for longer, or to other names and sizes, than a file of that size can hold."""
    rng, whole, outcomes = random.Random(0), compress(packed(WEBDATASET)), Counter()
    count = 300
    for _ in range(count):
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3, 20])):
            at = rng.randrange(len(content))
            content[at : at + rng.choice([0, 1, 1, 8])] = rng.randbytes(rng.choice([0, 1, 1, 12]))
        (tmp_path / "a.tar").write_bytes(content)
        try:
            for member in archive_images(str(tmp_path / "a.tar")):
                with suppress(UserError):
                    assert len(member.read()) < 20_000
            outcomes["read"] += 1
        except UserError as error:
            assert str(error).isprintable()
            outcomes["refused"] += 1
    assert outcomes["refused"] > 25
    record_property("archives fuzzed", count)
