"""On a GPU: from the bytes of frames to their detections in one CUDA graph, and one copy to the host."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtmdet_fast.inference.detections import Detections, DetectSettings
from rtmdet_fast.models.detector import Detector

MAX_GRAPHS = 8
"""Kept at once, by batch size, image size and settings; the one that was not used for longest goes first."""
MIN_CAPACITY = 2**21
"""Bytes of a frame that there is room for from the start: 830 x 830 pixels."""


class GraphDetector(Detector):
    """A folded model as `predict` runs it fastest: the host copies frames in, starts one graph, and waits once.

    The network's input is made on the device, and a pixel of it may differ by a grey level from `to_canvas`'s.
    """

    def __init__(self, model: Detector, batch_size: int):
        """batch_size: the most images of a call; where there are fewer, the next power of two is run."""
        super().__init__()
        self.model, self.batch_size = model, batch_size
        for name in ("size", "task", "class_names", "image_size", "patch_size", "has_masks", "test_settings"):
            setattr(self, name, getattr(model, name))
        self.score_thresholds = model.score_thresholds
        self._graphs: OrderedDict[tuple[Any, ...], FrameGraph] = OrderedDict()
        self._room = MIN_CAPACITY
        self._pool: Any = None
        self._lock = threading.Lock()  # the buffers are one caller's at a time

    @torch.no_grad()
    def detect_whole(
        self, images: Sequence[np.ndarray], image_size: int, settings: DetectSettings | None
    ) -> list[Detections]:
        settings = settings or self.test_settings
        found: list[Detections] = []
        with self._lock:
            for start in range(0, len(images), self.batch_size):
                part = images[start : start + self.batch_size]
                found += self._graph(part, image_size, settings).detect(part)
        return found

    def _graph(self, images: Sequence[np.ndarray], image_size: int, settings: DetectSettings) -> FrameGraph:
        most = max(image.nbytes for image in images)
        if most > self._room:  # one graph is for frames of all sizes
            self._graphs.clear()
            self._room = 1 << (most - 1).bit_length()
        batch = min(1 << (len(images) - 1).bit_length(), self.batch_size)
        key = batch, image_size, settings
        if key not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                self._graphs.popitem(last=False)
            graph = FrameGraph(self.model, batch, self._room, image_size, settings)
            if graph.frames.is_cuda:
                self._pool = graph.capture(self._pool)
            self._graphs[key] = graph
        self._graphs.move_to_end(key)
        return self._graphs[key]


class FrameGraph:
    """`run` of one batch size, on tensors that stay where they are; once it is captured, a replay of it."""

    def __init__(self, model: Detector, batch: int, capacity: int, image_size: int, settings: DetectSettings):
        parameter = next(model.parameters())
        self.model, self.dtype = model, parameter.dtype
        self.image_size, self.settings = image_size, settings
        pinned = parameter.is_cuda  # page-locked memory, which a GPU reads by itself
        self._host_frames = torch.zeros(batch, capacity, dtype=torch.uint8, pin_memory=pinned)
        self._host_sizes = torch.zeros(batch, 2, dtype=torch.int32, pin_memory=pinned)
        self.frames = torch.zeros_like(self._host_frames, device=parameter.device)
        self.sizes = torch.zeros_like(self._host_sizes, device=parameter.device)
        self.output: Any = None
        self.packed: Tensor
        self._host_packed: Tensor | None = None
        self._replay: Any = self.run

    def run(self) -> None:
        """From `frames` and `sizes` to `packed`: nothing in it makes the host wait for the device."""
        images = self.model.to_canvases(self.frames, self.sizes, self.image_size, self.dtype)
        self.output = self.model(images)
        self.packed = self.model.pack(self.output, (self.image_size, self.image_size), self.settings)

    def capture(self, pool: Any) -> Any:
        """Makes a CUDA graph of `run`, in the memory of `pool` where there is one → its pool.

        Graphs of one pool write over each other's intermediate results, which is well as they run one after another.
        """
        with torch.cuda.device(self.frames.device):
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # where libraries choose algorithms and kernels are compiled
                for _ in range(3):
                    self.run()
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # other threads may go on with what they do
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self.run()
        self._replay = graph.replay
        return graph.pool()

    def detect(self, images: Sequence[np.ndarray]) -> list[Detections]:
        """Detections in BGR images [H, W, 3] uint8, as many as there is room for or fewer, in their pixels, clipped."""
        self._host_sizes.zero_()
        for i, image in enumerate(images):
            there, here = self.frames[i, : image.nbytes], self._host_frames[i, : image.nbytes]
            here.copy_(torch.from_numpy(image.reshape(-1)))
            there.copy_(here, non_blocking=True)
            self._host_sizes[i, 0], self._host_sizes[i, 1] = image.shape[0], image.shape[1]
        self.sizes.copy_(self._host_sizes, non_blocking=True)
        self._replay()
        if self._host_packed is None:
            self._host_packed = torch.empty(self.packed.shape, pin_memory=self.frames.is_cuda)
        self._host_packed.copy_(self.packed, non_blocking=True)
        if self.frames.is_cuda:
            torch.cuda.current_stream(self.frames.device).synchronize()
        size = self.image_size, self.image_size
        sizes = self._host_sizes.double()  # for scales as `to_canvas` has them
        scales = [(x, y) for x, y in self.model.canvas_scales(sizes, self.image_size).tolist()]
        shapes = [(height, width) for height, width in self._host_sizes.tolist()]
        found = self.model.unpack(self._host_packed, size, self.settings)
        if found is None:
            found = self.model.postprocess(self.output, size, scales, shapes, self.settings, clip=True)
            return found[: len(images)]
        return [
            self.model.to_image(one, scale, shape, clip=True)
            for one, scale, shape, _ in zip(found, scales, shapes, images, strict=False)
        ]
