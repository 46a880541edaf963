"""Reading, detecting and writing of frames side by side: a thread each, with bounded queues between them."""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

from tqdm import tqdm

from rtmdet_fast.inference.results import Results
from rtmdet_fast.inference.sources import Frame

Pair = tuple[Frame, Results]


class Stream:
    """Iterates over the results of a source, in order; `Predictor.stream` makes it.

    An error of any stage is raised where the results are taken, after all results before it. However the iteration ends
    (at the source's end, by an error, by Ctrl-C, by `break`), its threads end with it, once what they do is done.

    waited: share of the time, so far or of the last iteration, that each stage waited for another: the one that hardly
        does is the one that the others wait for
    """

    def __init__(
        self,
        frames: Iterable[Frame],
        detect: Callable[[list[Any]], list[Results]],
        *,
        batch_size: int = 1,
        finish: Callable[[Frame, Results], Results] | None = None,
        write: Callable[[Frame, Results], object] | None = None,
        limit: int | None = None,
        total: int | None = None,
        progress: bool = False,
    ):
        """detect: of images. finish: what becomes of a frame's results, in order. write: is called with each frame and
        its results, in order, beside the other stages."""
        self.frames, self.detect, self.write, self.batch_size = frames, detect, write, batch_size
        self.finish = finish
        self.limit, self.progress = limit, progress
        self.total = total if limit is None else min(total or limit, limit)
        self.waited: dict[str, float] = {}

    def __iter__(self) -> Generator[Results, None, None]:
        stages: dict[str, Callable[[Iterator[Any]], Iterator[Any]]] = {"read": self._read, "detect": self._detect}
        if self.write is not None:
            stages["write"] = self._write
        queues = [_Queue(2 * self.batch_size) for _ in stages]
        clocks = {name: _Clock() for name in stages}
        threads = []
        before = None
        for (name, stage), after in zip(stages.items(), queues, strict=True):
            arguments = stage, clocks[name], before, after
            threads.append(threading.Thread(target=_work, args=arguments, name=f"stream: {name}", daemon=True))
            before = after
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        try:
            with tqdm(total=self.total, desc="predict", unit="frame", disable=not self.progress) as bar:
                for _, results in _taken(queues[-1], _Clock()):
                    seconds = time.perf_counter() - started
                    self.waited = {name: clock.seconds / seconds for name, clock in clocks.items()}
                    bar.set_postfix_str(
                        "waits: " + ", ".join(f"{name} {share:.0%}" for name, share in self.waited.items()),
                        refresh=False,
                    )
                    bar.update()
                    yield results
        finally:
            for queue in queues:
                queue.close()
            for thread in threads:
                thread.join()

    def _read(self, _: Iterator[Any]) -> Iterator[Frame]:
        frames = iter(self.frames)
        try:
            yield from itertools.islice(frames, self.limit)
        finally:
            if isinstance(frames, Generator):  # which may hold a camera
                frames.close()

    def _detect(self, frames: Iterator[Frame]) -> Iterator[Pair]:
        for batch in _batches(frames, self.batch_size):
            for frame, results in zip(batch, self.detect([frame.image for frame in batch]), strict=True):
                found = replace(results, path=frame.path)
                yield frame, found if self.finish is None else self.finish(frame, found)

    def _write(self, pairs: Iterator[Pair]) -> Iterator[Pair]:
        assert self.write is not None
        for pair in pairs:
            self.write(*pair)
            yield pair


def _batches(frames: Iterator[Frame], size: int) -> Iterator[list[Frame]]:
    """Lists of `size` frames; of fewer at the end, and before an error."""
    batch: list[Frame] = []
    try:
        for frame in frames:
            batch.append(frame)
            if len(batch) == size:
                yield batch
                batch = []
    except (Exception, KeyboardInterrupt):
        if batch:
            yield batch
        raise
    if batch:
        yield batch


class _Closed(BaseException):
    """Nobody takes any more; no stage is to catch it as an error of its own."""


class _Failed(NamedTuple):
    error: BaseException


_END = object()


class _Clock:
    """Seconds waited."""

    seconds = 0.0


class _Queue:
    """Items from one thread to another, `size` at most, until it is closed."""

    def __init__(self, size: int):
        self._size, self._closed = size, False
        self._items: deque[Any] = deque()
        self._changed = threading.Condition()

    def put(self, item: Any, clock: _Clock) -> None:
        with self._changed:
            self._wait(lambda: len(self._items) < self._size, clock)
            self._items.append(item)
            self._changed.notify_all()

    def get(self, clock: _Clock) -> Any:
        with self._changed:
            self._wait(lambda: bool(self._items), clock)
            self._changed.notify_all()
            return self._items.popleft()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], clock: _Clock) -> None:
        started = time.perf_counter()
        while not self._closed and not ready():
            self._changed.wait()
        clock.seconds += time.perf_counter() - started
        if self._closed:
            raise _Closed


def _taken(queue: _Queue, clock: _Clock) -> Iterator[Any]:
    while (item := queue.get(clock)) is not _END:
        if isinstance(item, _Failed):
            raise item.error
        yield item


def _work(
    stage: Callable[[Iterator[Any]], Iterator[Any]],
    clock: _Clock,
    before: _Queue | None,
    after: _Queue,
) -> None:
    """A stage, in its thread: what it makes of the queue `before` goes into the queue `after`."""
    try:
        last: Any = _END
        try:
            with closing(stage(_taken(before, clock) if before else iter(()))) as made:  # type: ignore[type-var]
                for item in made:
                    after.put(item, clock)
        except (Exception, KeyboardInterrupt) as error:
            last = _Failed(error)
        after.put(last, clock)
    except _Closed:
        pass
