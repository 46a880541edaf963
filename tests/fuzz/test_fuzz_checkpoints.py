"""Weights and training states altered at random: they load, or one sentence tells why not; nothing in them runs.

RTMDET_FAST_FUZZ_SEED sets the seed, RTMDET_FAST_FUZZ_CHECKPOINTS the number of files.
"""

import copy
import io
import os
import pickle
import shutil
import subprocess
import warnings
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.training.config import TrainConfig
from rtmdet_fast.training.train import train

SEED = int(os.environ.get("RTMDET_FAST_FUZZ_SEED", "0"))
COUNT = int(os.environ.get("RTMDET_FAST_FUZZ_CHECKPOINTS", "150"))
pytestmark = pytest.mark.slow


class Runs:
    """An object whose pickle calls a function of the file's choice."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """The settings of a run of two epochs, and what its last.pth held after the first."""
    shapes = make_shapes(tmp_path_factory.mktemp("shapes"), num_train=4, num_val=1, image_size=64)
    config = TrainConfig(
        train=shapes.train_ann, train_images=shapes.train_images, val=shapes.val_ann, val_images=shapes.val_images,
        out=tmp_path_factory.mktemp("run"), size="nano", epochs=2, stage2_epochs=1, batch_size=2, image_size=64,
        num_workers=0, device="cpu", val_interval=2, progress=False, report=False,
    )  # fmt: skip
    train(config)
    content = torch.load(config.out / "last.pth", weights_only=True)
    content["training"].update(epoch=1, iteration=2, best_epoch=1)
    return config, content


@pytest.fixture(scope="module")
def tally():
    counts = Counter()
    yield counts
    print(f"\n{sum(counts.values())} checkpoints of seed {SEED}: {dict(counts)}")


def archive(content) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def flip_bits(rng, content, canary):
    whole = bytearray(archive(content))
    for place in rng.integers(0, len(whole), rng.integers(1, 30)):
        whole[place] ^= 1 << int(rng.integers(8))
    return whole


def cut(rng, content, canary):
    whole = archive(content)
    return whole[: rng.integers(len(whole))]


def overwrite(rng, content, canary):
    whole = bytearray(archive(content))
    start = int(rng.integers(len(whole)))
    whole[start : start + int(rng.integers(1, 5000))] = rng.bytes(int(rng.integers(0, 5000)))
    return whole


def alter_members(rng, content, canary):
    """Members emptied, cut, exchanged, doubled, renamed, left out, compressed; with checksums that are right."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive(content))) as whole, zipfile.ZipFile(file, "w") as altered:
        members = [(member.filename, whole.read(member)) for member in whole.infolist()]
        victims = {0, *rng.integers(len(members), size=2).tolist()} if rng.random() < 0.5 else {0}
        for i, (name, data) in enumerate(members):
            kind = rng.integers(7) if i in victims else -1
            if kind == 5:
                continue
            name = f"{name}x" if kind == 4 else name
            data = {0: b"", 1: data[: len(data) // 2], 2: rng.bytes(len(data) % 10**6), 3: members[-1][1]}.get(
                kind, data
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a name that is there twice
                altered.writestr(name, data, zipfile.ZIP_DEFLATED if kind == 6 else zipfile.ZIP_STORED)
    return file.getvalue()


def bomb(rng, content, canary):
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(archive(content))) as whole,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as out,
    ):
        for member in whole.infolist():
            out.writestr(member.filename, whole.read(member))
        out.writestr("archive/data/99999", bytes(int(rng.integers(2**20, 2**26))))
    return file.getvalue()


def hostile(rng, content, canary):
    touch = f"touch {canary}"
    runs = [
        Runs(os.system, touch),
        Runs(eval, f"open({str(canary)!r}, 'w')"),
        Runs(exec, f"open({str(canary)!r}, 'w')"),
        Runs(subprocess.check_call, ["touch", str(canary)]),
        Runs(Path.touch, canary),
        Runs(shutil.copy, __file__, canary),
        Runs(os.mkdir, str(canary)),
    ]
    payload = runs[rng.integers(len(runs))]
    if rng.random() < 0.3:
        return pickle.dumps(payload, protocol=int(rng.integers(5)))
    parent, key = place_in(rng, content)
    parent[key] = payload
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=bool(rng.random() < 0.7))
    return file.getvalue()


def place_in(rng, content):
    """A mapping or list within nested ones, and one of its keys."""
    while True:
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
        key = keys[rng.integers(len(keys))]
        inner = content[key]
        if not (isinstance(inner, (dict, list)) and inner and rng.random() < 0.9):
            return content, key
        content = inner


ODD = [
    None, True, -1, 0, 2**40, 10**30, float("nan"), float("inf"), "x", "", "\ud800", b"\0", [], {}, (), [[]], {"x": 1},
    torch.zeros(0), torch.zeros(()), torch.zeros(3), torch.full((2, 2), torch.nan), torch.zeros(2, dtype=torch.cfloat),
    torch.zeros(1).expand(10**12), torch.zeros(5, dtype=torch.bool), Path("x"), {1, 2}, torch.float16,
]  # fmt: skip


def wrong_values(rng, content, canary):
    for _ in range(rng.integers(1, 4)):
        parent, key = place_in(rng, content)
        match rng.integers(4):
            case 0 if isinstance(parent, dict):
                del parent[key]
            case 1 if isinstance(parent, dict):
                parent[ODD[rng.integers(9)]] = parent.pop(key)
            case _:
                parent[key] = copy.copy(ODD[rng.integers(len(ODD))])
    return archive(content)


def wrong_tensors(rng, content, canary):
    """Tensors of other shapes, types and values among the weights, and in a state among its parts."""
    parts = [content["state_dict"], *(content["training"][part] for part in ("model", "ema") if "training" in content)]
    for part in parts:
        for key in rng.permutation(list(part))[: rng.integers(1, 4)].tolist():
            value = part[key]
            match rng.integers(7):
                case 0:
                    part[key] = value.clone().double().fill_(torch.nan)
                case 1:
                    part[key] = torch.full_like(value.double(), -torch.inf)
                case 2:
                    part[key] = value[None]
                case 3:
                    part[key] = value.flatten()[:1]
                case 4:
                    part[key] = torch.zeros(1).expand(2**31, 7)
                case 5:
                    part[key] = value.to([torch.float16, torch.int8, torch.bool, torch.cfloat][rng.integers(4)])
                case 6:
                    part[key] = value * 1e30
    return archive(content)


CHANGES = (flip_bits, cut, overwrite, alter_members, bomb, hostile, wrong_values, wrong_values, wrong_tensors)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", range(COUNT))
def test_an_altered_checkpoint_loads_or_is_one_sentence(started, tmp_path, tally, record_property, case):
    rng = np.random.default_rng((SEED, case))
    config, content = started
    content = copy.deepcopy(content)
    way = ("from_pretrained", "--init", "--resume")[case % 3]
    if way != "--resume":
        del content["training"]
    canary = tmp_path / "canary"
    out = tmp_path / "out"
    out.mkdir()
    path = out / "last.pth" if way == "--resume" else tmp_path / "w.pth"
    path.write_bytes(CHANGES[rng.integers(len(CHANGES))](rng, content, canary))
    try:
        if way == "from_pretrained":
            model = RTMDet.from_pretrained(path)
            model.predict(np.zeros((40, 30, 3), np.uint8), image_size=32, score_threshold=0.0)
        else:
            config = replace(config, out=out, **({"init": str(path)} if way == "--init" else {"resume": True}))
            result = train(replace(config, epochs=1, stage2_epochs=0) if way == "--init" else config)
            model = RTMDet.from_pretrained(result.last)
        assert all(value.float().isfinite().all() for value in model.state_dict().values())
        tally["loaded"] += 1
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000, str(error)
        tally["refused"] += 1
    assert not canary.exists()
    record_property("checkpoints fuzzed", 1)
