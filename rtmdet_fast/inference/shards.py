"""What a shard of a prediction writes, and what a killed one left: files of a thousand images each, whole or not there.

A folder holds a shard: `shard.json` with what it was made with and, at its end, how many images it has, and parts,
`part-000000.jsonl`, … or `.parquet`. A row is an image: file_name, width, height and detections, as `Results.to_dict`
has them; of a file that could not be read, file_name and error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from rtmdet_fast.errors import UserError, shown
from rtmdet_fast.files import alone_with, write_atomically, write_json
from rtmdet_fast.inference.listing import KEY, key_of

Format = Literal["jsonl", "parquet"]
Row = dict[str, Any]
_FOLDER = re.compile(r"shard-(\d{5})-of-(\d{5})")
MOST = 99_999  # shards, by the digits of their names


@dataclass(frozen=True, slots=True)
class Shard:
    """The `index`-th of `count` shards, counted from 0."""

    index: int
    count: int

    @classmethod
    def parsed(cls, text: str, environment: dict[str, str]) -> Shard:
        """Of "i/n", or of "auto" what torchrun says of this process. Raises UserError."""
        if text == "auto":
            if "RANK" not in environment or "WORLD_SIZE" not in environment:
                raise UserError("--shard auto is for processes that torchrun starts; elsewhere give it as 0/8")
            text = f"{environment['RANK']}/{environment['WORLD_SIZE']}"
        match = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text)
        if not match or int(match[1]) >= int(match[2]):
            raise UserError(f"--shard is {shown(text)}; eight shards are 0/8, 1/8, … 7/8")
        return cls(int(match[1]), int(match[2]))

    def folder(self, out: Path) -> Path:
        return out / f"shard-{self.index:05d}-of-{self.count:05d}"

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class Keys:
    """A set of `key_of`s that grows no more, in sixteen bytes each."""

    def __init__(self, keys: Iterable[bytes]):
        self._sorted = np.sort(np.fromiter(keys, f"S{KEY}"))

    def __contains__(self, key: bytes) -> bool:
        bare = key.rstrip(b"\0")  # as NumPy has them
        at = int(np.searchsorted(self._sorted, np.array(bare, f"S{KEY}")))
        return at < len(self._sorted) and bytes(self._sorted[at]) == bare

    def __len__(self) -> int:
        return len(self._sorted)


class ShardWriter:
    """Takes the rows of a shard; `open_shard` makes it.

    done: keys of the images that the shard had before
    counts: of images, unreadable files and detections, in all parts written
    """

    def __init__(self, folder: Path, made_with: dict[str, Any], part_size: int, progress: bool):
        self.folder, self._made_with, self._part_size = folder, made_with, part_size
        parts = parts_of(folder, made_with["format"])
        self._next = int(parts[-1].stem.removeprefix("part-")) + 1 if parts else 0
        self._rows: list[Row] = []
        self.counts = {"images": 0, "unreadable": 0, "detections": 0}
        bar = tqdm(parts, desc="resume", unit="file", disable=not (progress and parts))
        self.done = Keys(self._keys(bar))

    def _keys(self, parts: Iterable[Path]) -> Iterator[bytes]:
        for part in parts:
            for row in read_part(part):
                self._count(row)
                yield key_of(row["file_name"])

    def _count(self, row: Row) -> None:
        for name, value in _counts(row).items():
            self.counts[name] += value

    def add(self, row: Row) -> None:
        self._rows.append(row)
        if len(self._rows) >= self._part_size:
            self.write_part()

    def write_part(self) -> None:
        """Writes what was added since the last part, if anything."""
        if not self._rows:
            return
        with row_writer(self.folder / f"part-{self._next:06d}.{self._made_with['format']}") as write:
            write(self._rows)
        for row in self._rows:
            self._count(row)
        self._next += 1
        self._rows = []

    def finish(self) -> None:
        self.write_part()
        write_json(self.folder / "shard.json", {**self._made_with, "complete": self.counts})


@contextmanager
def open_shard(
    out: Path, shard: Shard, made_with: dict[str, Any], *, resume: bool, part_size: int, progress: bool = False
) -> Iterator[ShardWriter]:
    """A shard that no other process writes, new or, with `resume`, as it was left.

    made_with: what must not change between the runs of a shard, `format` among it. Raises UserError where it did, where
    there is a shard already without `resume`, and where `out` holds those of another count.
    """
    others = {int(match[2]) for path in _entries(out) if (match := _FOLDER.fullmatch(path.name))} - {shard.count}
    if others:
        raise UserError(f"{out} holds shards of {min(others)}, not of {shard.count}: give another --out")
    folder = shard.folder(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "a file is in its way" if isinstance(error, FileExistsError) else error.strerror or error
        raise UserError(f"cannot write {folder}: {reason}") from None
    made_with = json.loads(json.dumps(made_with))  # as it is read again: tuples are lists
    with alone_with(folder / "lock", str(folder)):
        if (folder / "shard.json").exists():
            if not resume:
                raise UserError(f"{folder} holds results: --resume goes on with them, or give another --out")
            before = {name: value for name, value in read_shard(folder).items() if name != "complete"}
            check_same(folder, before, made_with, "--out elsewhere starts anew")
        else:
            write_json(folder / "shard.json", made_with)
        yield ShardWriter(folder, made_with, part_size, progress)


def check_same(name: object, before: dict[str, Any], now: dict[str, Any], hint: str) -> None:
    """Raises UserError where two shards, or runs of one, were not made with the same."""
    for field in {**before, **now}:
        old, new = before.get(field), now.get(field)
        if old != new:
            what = field.replace("_", " ")
            told = f"other {what}" if field in ("weights", "archives") else f"{what} {shown(old)}, not {shown(new)}"
            raise UserError(f"{name} was made with {told}: {hint}")


class Merged:
    """The rows of all shards in a folder, once it is sure that none lacks any.

    Raises UserError where a shard is missing, unfinished, damaged, or made with something else than the others.

    made_with: what the shards have in common; shards: how many there are; total: how many rows
    rows: each image once, shard by shard, in the order in which each found them; reads the files anew each time
    images, unreadable, detections: in these; repeated: rows left out, as an earlier one is of the same image
    """

    def __init__(self, out: Path, *, progress: bool = False):
        folders = _find_shards(out)
        told = [read_shard(folder) for folder in folders]
        complete = [one.pop("complete", None) for one in told]
        self.made_with = told[0]
        for folder, one in zip(folders, told, strict=True):
            check_same(folder, one, told[0], f"{folders[0].name} differs, and they cannot be joined")
        self._parts = [(i, part) for i, folder in enumerate(folders) for part in parts_of(folder, told[0]["format"])]
        counts = [{"images": 0, "unreadable": 0, "detections": 0} for _ in folders]
        bar = tqdm(self._parts, desc="check", unit="file", disable=not progress)
        keys = np.sort(np.fromiter(self._counted(bar, counts), f"S{KEY}"))
        for i, (counted, expected) in enumerate(zip(counts, complete, strict=True)):
            if counted != expected:
                shard = Shard(i, len(folders))
                raise UserError(
                    f"{folders[i]} is unfinished, or lacks files: `predict --shard {shard} --resume` goes on with it"
                )
        self.shards = len(folders)
        twice = keys[1:][keys[1:] == keys[:-1]]
        self._twice = {bytes(key).ljust(KEY, b"\0") for key in twice}
        self.repeated = len(twice)
        self.total = len(keys) - len(twice)
        totals = {name: sum(one[name] for one in counts) for name in counts[0]}
        if self._twice:
            totals = dict.fromkeys(totals, 0)
            for row in self.rows():
                for name, value in _counts(row).items():
                    totals[name] += value
        self.images, self.unreadable, self.detections = totals.values()

    def _counted(self, parts: Iterable[tuple[int, Path]], counts: list[dict[str, int]]) -> Iterator[bytes]:
        for i, part in parts:
            for row in read_part(part):
                for name, value in _counts(row).items():
                    counts[i][name] += value
                yield key_of(row["file_name"])

    def rows(self) -> Iterator[Row]:
        seen = set()
        for _, part in self._parts:
            for row in read_part(part):
                if self._twice and (key := key_of(row["file_name"])) in self._twice:
                    if key in seen:
                        continue
                    seen.add(key)
                yield row


def _counts(row: Row) -> dict[str, int]:
    bad = "error" in row
    return {"images": int(not bad), "unreadable": int(bad), "detections": len(row.get("detections", ()))}


def _find_shards(out: Path) -> list[Path]:
    """The folders of all shards, in order. Raises UserError where one is missing."""
    found = {Shard(int(m[1]), int(m[2])): path for path in _entries(out) if (m := _FOLDER.fullmatch(path.name))}
    if not found:
        raise UserError(f"{out} holds no shard: give the --out of `predict --shard`")
    counts = {shard.count for shard in found}
    if len(counts) > 1:
        raise UserError(f"{out} holds shards of {min(counts)} and of {max(counts)}: delete those that are not wanted")
    wanted = [Shard(index, max(counts)) for index in range(max(counts))]
    for shard in wanted:
        if shard not in found:
            raise UserError(f"{out} lacks shard {shard}: `predict --shard {shard}` makes it")
    return [found[shard] for shard in wanted]


def read_shard(folder: Path) -> dict[str, Any]:
    """Its shard.json. Raises UserError where that is missing or damaged."""
    try:
        found = json.loads((folder / "shard.json").read_text(encoding="utf-8"))
        if isinstance(found, dict) and found.get("format") in ("jsonl", "parquet"):
            return found
        reason = "it is not one"
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or "it is damaged"
    raise UserError(f"cannot read {folder / 'shard.json'}: {reason}")


def parts_of(folder: Path, file_format: str) -> list[Path]:
    """The files of a shard's rows, in their order."""
    found = [path for path in _entries(folder) if re.fullmatch(rf"part-\d{{6,}}\.{file_format}", path.name)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("part-")))


def read_part(path: Path) -> Iterator[Row]:
    """Its rows. Raises UserError where it is damaged."""
    try:
        if path.suffix == ".parquet":
            for batch in _parquet().ParquetFile(path).iter_batches():
                for row in batch.to_pylist():
                    yield _without_none(row)
        else:
            with open(path, encoding="utf-8") as file:
                for line in file:
                    row = json.loads(line)
                    row["file_name"].encode(errors="surrogatepass")
                    yield row
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}): delete it and run its shard with --resume"
        ) from None


@contextmanager
def row_writer(path: Path) -> Iterator[Any]:
    """A function that takes lists of rows; the file, .jsonl or .parquet, is whole at the block's end, or not there."""
    with write_atomically(path) as file:
        if path.suffix != ".parquet":
            yield lambda rows: file.write("".join(f"{json.dumps(row)}\n" for row in rows).encode())
            return
        import pyarrow

        schema = _schema()
        with _parquet().ParquetWriter(file, schema, compression="zstd") as writer:

            def write(rows: list[Row]) -> None:
                try:
                    writer.write_table(pyarrow.Table.from_pylist(rows, schema))
                except UnicodeEncodeError as error:
                    raise UserError(
                        f"{error.object!r} is not UTF-8, which Parquet's text is: rename it, or take --format jsonl"
                    ) from None

            yield write


def check_parquet() -> None:
    """Raises UserError where pyarrow is missing."""
    _parquet()


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror or error}") from None


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError("Parquet needs pyarrow: pip install 'rtmdet-fast[parquet]'") from None
    return pyarrow.parquet


def _schema() -> Any:
    """One for all tasks: what a model does not find is null."""
    import pyarrow as pa

    floats = pa.list_(pa.float64())
    detection = pa.struct(
        {
            "name": pa.string(),
            "label": pa.int32(),
            "score": pa.float64(),
            "box": floats,
            "rbox": floats,
            "corners": pa.list_(floats),
            "mask": pa.struct({"size": pa.list_(pa.int32()), "counts": pa.string()}),
        }
    )
    columns = {"file_name": pa.string(), "width": pa.int32(), "height": pa.int32()}
    return pa.schema({**columns, "detections": pa.list_(detection), "error": pa.string()})


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(inner) for name, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value
