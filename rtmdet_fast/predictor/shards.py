"""A shard of a prediction over more images than one run, or one machine, looks at."""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from rtmdet_fast.errors import UserError
from rtmdet_fast.images import decode_image, read_image
from rtmdet_fast.inference.listing import Listing, Member, archive_images, is_archive, key_of, shard_of
from rtmdet_fast.inference.results import Results
from rtmdet_fast.inference.shards import Format, Row, Shard, ShardWriter, check_parquet, open_shard
from rtmdet_fast.inference.sources import Frame
from rtmdet_fast.predictor.predictor import Predictor

log = logging.getLogger(__name__)


class ShardSummary(NamedTuple):
    """Of all runs of a shard: images looked at, files that could not be read, detections; images of runs before."""

    folder: Path
    images: int
    unreadable: int
    detections: int
    before: int


def predict_shard(
    predictor: Predictor,
    sources: Sequence[str | Path],
    out: Path,
    shard: Shard,
    *,
    resume: bool = False,
    file_format: Format = "jsonl",
    part_size: int = 1000,
    classes: Sequence[str] | None = None,
    skip_bad: bool = False,
    made_with: dict[str, Any] | None = None,
    progress: bool = False,
) -> ShardSummary:
    """Looks at those images of the sources that are the shard's, and writes what is found into a folder in `out`.

    Where it is stopped, whenever that is, the images of the parts written count, and with `resume` the next run looks
    at the others. To which shard an image belongs its name says; an archive its place among the archives' sorted names.

    Args:
        predictor: what looks at them.
        sources: as `Listing` takes them.
        out: folder of all shards.
        shard: which, of how many.
        resume: goes on where there is something, and starts where there is nothing.
        file_format: of the parts.
        part_size: images of a part; so many at most are looked at again after a kill.
        classes: names of those to find, all where not given.
        skip_bad: goes on over unreadable files; each has a row with its error, and is not tried again.
        made_with: what else must be the same in all shards, and in all runs of one, such as the weights' digest.
        progress: shows a bar.

    Raises:
        UserError: where something is wrong with the arguments; where a file cannot be read, after what was found before
            was written.
    """
    if part_size < 1:
        raise UserError(f"part_size is {part_size}; it must be at least 1")
    if file_format == "parquet":
        check_parquet()  # before the first image, not behind the thousandth
    unreadable: deque[Row] = deque()

    def give_up(name: str, error: UserError) -> None:
        if not skip_bad:
            raise UserError(f"{error}; --skip-bad goes on over such files") from error

    def refused(name: str, error: UserError) -> None:
        """In the thread that reads."""
        give_up(name, error)
        log.warning("%s", error)
        if key_of(name) not in writer.done:
            unreadable.append({"file_name": name, "error": str(error)})

    listing = Listing(sources, refused)
    archives, total = _survey(Listing(sources, give_up), shard)
    settings = {
        "format": file_format,
        "sources": [str(source) for source in sources],
        "task": predictor.task,
        "class_names": predictor.class_names,
        "classes": classes,
        "archives": hashlib.sha256("\n".join(archives).encode(errors="surrogatepass")).hexdigest(),
        **(made_with or {}),
    }
    own = set(archives[shard.index :: shard.count])
    with open_shard(out, shard, settings, resume=resume, part_size=part_size, progress=progress) as writer:
        before = writer.counts["images"]

        def keep(frame: Frame, results: Results) -> None:
            """In a thread of its own."""
            _drain(unreadable, writer)
            found = results.to_dict()
            found.pop("path")
            writer.add({"file_name": frame.name, **found})

        frames = _frames(listing, shard, own, writer, refused)
        remaining = None if own else max(total - len(writer.done), 0)
        stream = predictor.stream(frames, classes=classes, write=keep, total=remaining, progress=progress)
        try:
            with closing(iter(stream)) as results:
                for _ in results:
                    pass
        except BaseException as error:  # an unreadable file, a full disk, Ctrl-C
            _drain(unreadable, writer)
            writer.write_part()
            if isinstance(error, UserError):
                raise UserError(f"{error}; what was found is in {writer.folder}, and --resume goes on") from error
            raise
        _drain(unreadable, writer)
        writer.finish()
        return ShardSummary(writer.folder, before=before, **writer.counts)


def _survey(listing: Listing, shard: Shard) -> tuple[list[str], int]:
    """Names of all archives, sorted, and the number of the shard's other images."""
    archives, total = [], 0
    empty = True
    for path in listing:
        name = listing.name_of(path)
        empty = False
        if is_archive(path):
            archives.append(name)
        elif shard_of(key_of(name), shard.count) == shard.index:
            total += 1
    if empty:
        raise UserError("the sources hold no image and no tar archive")
    return sorted(archives), total


def _frames(
    listing: Listing,
    shard: Shard,
    own: set[str],
    writer: ShardWriter,
    refused: Callable[[str, UserError], object],
) -> Iterator[Frame]:
    """Of the images that the shard lacks, archives one after the other as they are found."""
    index = 0

    def frame_of(name: str, path: str, member: Member | None = None) -> Iterator[Frame]:
        nonlocal index
        try:
            image = read_image(path) if member is None else decode_image(member.read(), f"{path}/{member.name}")
        except UserError as error:
            refused(name, error)
            return
        index += 1
        yield Frame(name, image, path, index - 1, is_video=False)

    for path in listing:
        name = listing.name_of(path)
        if not is_archive(path):
            key = key_of(name)
            if shard_of(key, shard.count) == shard.index and key not in writer.done:
                yield from frame_of(name, path)
        elif name in own:
            members = archive_images(path)
            while True:
                try:
                    member = next(members, None)
                except UserError as error:
                    refused(name, error)
                    break
                if member is None:
                    break
                inside = f"{name}/{member.name}"
                if key_of(inside) not in writer.done:
                    yield from frame_of(inside, path, member)


def _drain(rows: deque[Row], writer: ShardWriter) -> None:
    while rows:
        writer.add(rows.popleft())
