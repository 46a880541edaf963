"""A prediction in shards finds what `predict` does, each image once, however often it is killed."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from busy import busy, images
from full_disk import no_space, room_for
from killed_shards import IMAGES, Predictor

from rtmdet_fast import UserError
from rtmdet_fast.cli import main
from rtmdet_fast.files import alone_with
from rtmdet_fast.inference.shards import Keys, Merged, Shard, key_of, read_part
from rtmdet_fast.models.rtmdet.model import HEADS
from rtmdet_fast.predictor.shards import predict_shard


def run(*arguments):
    return main([str(argument) for argument in arguments])


def save_images(folder, count=7):
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images(count)):
        cv2.imwrite(str(folder / f"{i}.png"), image)
    return folder


def found(path):
    """Of a predictions.json, by the names of its images."""
    told = json.loads(path.read_text())
    names = {image["id"]: image["file_name"] for image in told["images"]}
    sizes = {image["file_name"]: (image["width"], image["height"]) for image in told["images"]}
    assert len(names) == len(sizes) == len(told["images"])
    assert [entry["id"] for entry in told["annotations"]] == list(range(1, len(told["annotations"]) + 1))
    by_name = {name: [] for name in sizes}
    for entry in told["annotations"]:
        by_name[names[entry["image_id"]]].append({k: v for k, v in entry.items() if k not in ("id", "image_id")})
    return sizes, by_name, told["categories"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.pth"
    busy("det").save(path)
    return path


@pytest.mark.parametrize("task", HEADS)
def test_shards_merged_are_what_predict_finds(task, tmp_path, capsys):
    pytest.importorskip("pyarrow", reason="extra `parquet` is not installed")
    folder, weights = save_images(tmp_path / "images"), tmp_path / "w.pth"
    busy(task).save(weights)
    (tmp_path / "tars").mkdir()
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"tars/{name}.tar", "w") as archive:
            archive.add(tmp_path / "w.pth", "0.pth")
            for path in sorted(folder.iterdir())[name == "b" :: 2]:
                archive.add(path, path.name)
    common = ["--weights", weights, "--score-threshold", 0.2]
    assert run("predict", folder, *common, "--out", tmp_path / "plain") == 0
    expected = found(tmp_path / "plain/predictions.json")
    assert sum(map(len, expected[1].values())) > 100
    merged = {}
    others = [("jsonl", tmp_path / "tars")] if task == "det" else []
    for form, source in (("parquet", folder), *others):
        out = tmp_path / f"{form} {source.name}"
        for i in range(2):
            options = ["--shard", f"{i}/2", "--format", form, "--part-size", 2, "--out", out]
            assert run("predict", source, *common, *options, "--json", tmp_path / "s.json") == 0
            assert 0 < json.loads((tmp_path / "s.json").read_text())["images"] < 7
        for to in ("a.json", "a.jsonl", "a.parquet"):
            assert run("merge", out, "--to", out / to, "--json", tmp_path / "m.json") == 0
        assert json.loads((tmp_path / "m.json").read_text())["images"] == 7
        sizes, by_name, categories = found(out / "a.json")
        assert ({Path(name).name: size for name, size in sizes.items()}, categories) == (expected[0], expected[2])
        assert {Path(name).name: entries for name, entries in by_name.items()} == expected[1]
        rows = list(read_part(out / "a.jsonl"))
        assert list(read_part(out / "a.parquet")) == rows
        merged[form] = {Path(row["file_name"]).name: {**row, "file_name": None} for row in rows}
        assert all(Path(row["file_name"]).parent.name in ("", "a.tar", "b.tar") for row in rows)
    assert task != "det" or merged["jsonl"] == merged["parquet"]
    capsys.readouterr()


def predict(source, out, shard="0/1", **options):
    """By a predictor that finds a box in each image."""
    return predict_shard(Predictor(), [source], out, Shard.parsed(shard, {}), **{"part_size": 3, **options})


def names_in(out):
    return sorted(row["file_name"] for row in Merged(out).rows())


def test_a_shard_goes_on_only_where_asked_and_as_it_was_begun(tmp_path):
    folder, out, made_with = save_images(tmp_path / "images"), tmp_path / "out", {"weights": "a", "image_size": 64}
    assert predict(folder, out, made_with=made_with).images == 7
    with pytest.raises(UserError, match="--resume goes on"):
        predict(folder, out, made_with=made_with)
    with pytest.raises(UserError, match="other weights"):
        predict(folder, out, resume=True, made_with={**made_with, "weights": "b"})
    with pytest.raises(UserError, match="image size 64, not 96"):
        predict(folder, out, resume=True, made_with={**made_with, "image_size": 96})
    with pytest.raises(UserError, match=r"classes None, not \['a'\]"):
        predict(folder, out, resume=True, made_with=made_with, classes=("a",))
    with pytest.raises(UserError, match="shards of 1, not of 2"):
        predict(folder, out, "0/2", resume=True, made_with=made_with)
    with (
        alone_with(out / "shard-00000-of-00001/lock", "the shard"),
        pytest.raises(UserError, match="is being written by another process"),
    ):
        predict(folder, out, resume=True, made_with=made_with)
    parts = {path: path.stat().st_mtime_ns for path in out.rglob("part-*")}
    assert predict(folder, out, resume=True, made_with=made_with).before == 7
    assert {path: path.stat().st_mtime_ns for path in out.rglob("part-*")} == parts and len(parts) == 3
    cv2.imwrite(str(folder / "new.png"), images(1)[0])  # comes later
    assert predict(folder, out, resume=True, made_with=made_with).images == 8
    assert names_in(out) == sorted(path.name for path in folder.iterdir())


def test_merge_tells_of_shards_that_lack_something(tmp_path):
    folder, out = save_images(tmp_path / "images", 12), tmp_path / "out"
    with pytest.raises(UserError, match="holds no shard"):
        Merged(tmp_path)
    predict(folder, out, "0/2")
    with pytest.raises(UserError, match=r"lacks shard 1/2: `predict --shard 1/2`"):
        Merged(out)
    predict(folder, out, "1/2")
    assert len(names_in(out)) == 12
    part = out / "shard-00001-of-00002/part-000000.jsonl"
    content = part.read_text()
    part.unlink()
    with pytest.raises(UserError, match=r"--shard 1/2 --resume"):
        Merged(out)
    part.write_text(content[:-5])
    with pytest.raises(UserError, match=r"part-000000\.jsonl is damaged"):
        Merged(out)
    part.unlink()
    predict(folder, out, "1/2", resume=True)
    assert len(names_in(out)) == 12
    told = json.loads((part.parent / "shard.json").read_text())
    (part.parent / "shard.json").write_text(json.dumps({**told, "class_names": ["b"]}))
    with pytest.raises(UserError, match="class names"):
        Merged(out)
    (part.parent / "shard.json").write_text("{")
    with pytest.raises(UserError, match=r"shard\.json: it is damaged"):
        Merged(out)


def test_a_row_that_stands_twice_counts_once(tmp_path):
    """For instance of an archive with two members of a name."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i, name in enumerate(("1.png", "2.png", "1.png")):
            cv2.imwrite(str(tmp_path / "x.png"), np.full((4, 4, 3), i, np.uint8))
            archive.add(tmp_path / "x.png", name)
    predict(tmp_path / "a.tar", tmp_path / "out")
    merged = Merged(tmp_path / "out")
    assert (merged.images, merged.detections, merged.total, merged.repeated) == (2, 2, 2, 1)
    boxes = {row["file_name"]: row["detections"][0]["box"][2] for row in merged.rows()}
    assert boxes == {"a.tar/1.png": 0, "a.tar/2.png": 1}


def test_keys_of_zeros_are_keys():
    keys = [bytes(16), b"a" + bytes(15), bytes(15) + b"a", *(key_of(str(i)) for i in range(100))]
    assert all(key in Keys(keys) for key in keys) and len(Keys(keys)) == 103
    assert b"b" + bytes(15) not in Keys(keys) and bytes(16) not in Keys([])


def test_unreadable_files_end_a_shard_or_are_kept_as_such(tmp_path, caplog):
    folder, out = save_images(tmp_path / "images"), tmp_path / "out"
    (folder / "bad.png").write_bytes(b"not an image")
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.add(folder / "bad.png", "in/bad.png")
        archive.add(folder / "0.png", "in/0.png")
    whole = (folder / "a.tar").read_bytes()
    (folder / "b.tar").write_bytes(whole[: whole.index((folder / "0.png").read_bytes()) + 100])
    with pytest.raises(UserError, match=r"--skip-bad goes on over such files; what was found is in .*, and --resume"):
        predict(folder, out)
    for _ in range(2):
        done = predict(folder, out, resume=True, skip_bad=True)
        assert (done.images, done.unreadable) == (8, 5)
    errors = {row["file_name"]: row["error"] for row in Merged(out).rows() if "error" in row}
    assert errors.keys() == {"bad.png", "a.tar/in/bad.png", "b.tar/in/bad.png", "b.tar/in/0.png", "b.tar"}
    assert all(name in error for name, error in errors.items())


def test_hostile_archives_write_nothing(tmp_path):
    picture = cv2.imencode(".png", images(1)[0])[1].tobytes()
    inner = tmp_path / "deep/er/in"
    inner.mkdir(parents=True)
    (inner / "x.png").write_bytes(picture)
    with tarfile.open(inner / "a.tar", "w") as archive:
        for name in (
            "../up.png",
            str(tmp_path / "absolute.png"),
            "../../out/shard-00000-of-00001/part-000000.jsonl.png",
        ):
            archive.add(inner / "x.png", name)
            archive.getmembers()[-1].name = name
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/"
        archive.addfile(link)
        archive.add(inner / "x.png", "link/tmp/through.png")
    before = set(tmp_path.rglob("*"))
    assert predict(inner / "a.tar", tmp_path / "deep/out").images == 4
    shard = tmp_path / "deep/out/shard-00000-of-00001"
    written = {shard / name for name in ("lock", "shard.json", "part-000000.jsonl", "part-000001.jsonl")}
    assert set(tmp_path.rglob("*")) - before == {shard.parent, shard, *written}


def test_a_full_disk_leaves_what_was_written(tmp_path):
    folder, out = save_images(tmp_path / "images", 40), tmp_path / "out"
    predict(folder, out, part_size=5)
    size = max(path.stat().st_size for path in out.rglob("part-*"))
    with room_for(size + 100), pytest.raises(UserError, match=r"cannot write .*part-.*File too large"):
        predict(folder, tmp_path / "full", part_size=5)
        predict(folder, tmp_path / "fuller", part_size=12)
    with no_space(), pytest.raises(UserError, match=r"cannot write .*part-.*No space left on device"):
        predict(folder, tmp_path / "fuller", resume=True)
    predict(folder, tmp_path / "fuller", resume=True)
    assert names_in(tmp_path / "fuller") == names_in(out)


def test_an_interrupt_keeps_what_was_found(tmp_path, monkeypatch):
    folder, out = save_images(tmp_path / "images"), tmp_path / "out"
    detect, seen = Predictor.detect, []

    def interrupted(self, images):
        seen.extend(images)
        if len(seen) == 5:
            raise KeyboardInterrupt
        return detect(self, images)

    monkeypatch.setattr(Predictor, "detect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        predict(folder, out, part_size=1000)
    (part,) = out.rglob("part-*")
    assert len(list(read_part(part))) == 4
    assert predict(folder, out, resume=True).before == 4 and len(names_in(out)) == 7


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="file names are Unicode there")
def test_names_that_are_not_utf8(tmp_path):
    pytest.importorskip("pyarrow", reason="extra `parquet` is not installed")
    folder = save_images(tmp_path / "images", 1)
    (folder / "0.png").rename(folder / "\udcff.png")
    predict(folder, tmp_path / "out")
    assert names_in(tmp_path / "out") == ["\udcff.png"]
    with pytest.raises(UserError, match="not UTF-8"):
        predict(folder, tmp_path / "parquet", file_format="parquet")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--shard", "8/8"], "0/8, 1/8"),
        (["--shard", "x"], "0/8, 1/8"),
        (["--shard", "auto"], "torchrun"),
        (["--shard", "0/1", "--save-txt"], "--save-txt cannot"),
        (["--shard", "0/1", "--format", "coco"], "--format coco cannot"),
        (["--shard", "0/1", "--part-size", "0"], "part_size is 0"),
        (["--resume"], "--resume is for shards"),
        (["--format", "jsonl"], "--format jsonl is for shards"),
    ],
)
def test_options_that_do_not_go_together(options, told, weights, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    save_images(tmp_path / "images", 1)
    assert run("predict", tmp_path / "images", "--weights", weights, "--out", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ") and told in error
    assert not (tmp_path / "out").exists()


def test_the_place_among_torchruns_processes():
    assert Shard.parsed("auto", {"RANK": "3", "WORLD_SIZE": "8"}) == Shard.parsed("3/8", {}) == Shard(3, 8)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes cannot be forked there")
def test_killed_at_any_step_it_goes_on(tmp_path, record_property):
    command = [sys.executable, Path(__file__).with_name("killed_shards.py"), tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] >= 20 and told["counted"] == [IMAGES] * told["kills"]
    record_property("kills of predict survived", told["kills"])
    record_property("images counted after them", sum(told["counted"]))
    record_property("images lost or twice", sum(abs(IMAGES - count) for count in told["counted"]))


@pytest.mark.slow
def test_the_example_for_ray_finds_what_predict_finds(weights, tmp_path, record_property):
    """That of docs/scale.md, with two workers."""
    pytest.importorskip("ray.data", reason="extra `ray` is not installed")
    import pyarrow.parquet

    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    for i, image in enumerate(images(17)):
        cv2.imwrite(str(folder / f"{i}.jpg"), image)
    page = (Path(__file__).parents[2] / "docs/scale.md").read_text(encoding="utf-8")
    (code,) = (code for code in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "import ray\n" in code)
    for before, after in (("runs/demo/data/val", folder), ("runs/demo/run/best.pth", weights), ("runs/ray", out)):
        assert before in code
        code = code.replace(before, str(after))
    assert "ray.init()" in code
    # a folder of its own for Ray's logs, whose sockets allow no long name
    with tempfile.TemporaryDirectory(prefix="ray") as logs:
        local = f"ray.init(num_cpus=2, include_dashboard=False, _temp_dir={logs!r})"
        (tmp_path / "example.py").write_text(code.replace("ray.init()", local))
        # on a busy machine workers that are nicer than the rest would wait for hours
        environment = {**os.environ, "RAY_worker_niceness": "0", "RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
        command = [sys.executable, "example.py"]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert run("predict", folder, "--weights", weights, "--out", tmp_path / "plain") == 0
    told = json.loads((tmp_path / "plain/predictions.json").read_text())
    names = {image["id"]: image["file_name"] for image in told["images"]}
    expected = {name: [] for name in names.values()}
    for entry in told["annotations"]:
        expected[names[entry["image_id"]]].append((entry["category_id"] - 1, entry["score"], entry["bbox"]))
    rows = pyarrow.parquet.read_table(out).to_pylist()
    assert len(rows) == 17 and {row["file_name"] for row in rows} == expected.keys()
    for row in rows:
        bbox = [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in row["boxes"]]
        found = list(zip(row["labels"], row["scores"], bbox, strict=True))
        # batches of eight may round otherwise
        assert [label for label, *_ in found] == [label for label, *_ in expected[row["file_name"]]]
        for (_, score, box), (_, other, true) in zip(found, expected[row["file_name"]], strict=True):
            assert abs(score - other) < 1e-4 and np.allclose(box, true, atol=0.05)
    record_property("images by Ray as by predict", len(rows))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no such signal there")
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_killed_at_random_moments_the_command_goes_on(form, weights, tmp_path, record_property):
    """Twenty times, of two shards side by side, with images in folders and archives; each goes on where it was."""
    pytest.importorskip("pyarrow", reason="extra `parquet` is not installed")
    rng, count, kills = random.Random(7), 900, 0
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(count):
        cv2.imwrite(str(folder / f"{i:04d}.png"), np.full((4, 4, 3), i % 256, np.uint8))
    for name, start in (("a", 0), ("b", 300)):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for i in range(start, start + 300):
                archive.add(folder / f"{i:04d}.png", f"{i}.png")
                (folder / f"{i:04d}.png").unlink()
    command = [sys.executable, "-m", "rtmdet_fast", "predict", folder, "--weights", weights, "--out", tmp_path / "out"]
    command += ["--resume", "--part-size", "3", "--image-size", "32", "--format", form]

    def start(shard):
        return subprocess.Popen([*map(str, command), "--shard", shard], stderr=subprocess.DEVNULL)

    def parts():
        return len(list((tmp_path / "out").rglob("part-*")))

    left = []
    while kills < 20:
        before = parts()
        left = [start("0/2"), start("1/2")]
        for _ in range(3000):  # until they are at work
            if parts() > before:
                break
            time.sleep(0.2)
        else:
            pytest.fail("no results within ten minutes")
        time.sleep(rng.uniform(0, 0.3))
        for process in left:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
            process.wait(60)
    for process in [start("0/2"), start("1/2")]:
        assert process.wait(600) == 0
    merged = Merged(tmp_path / "out")
    names = [row["file_name"] for row in merged.rows()]
    assert (len(names), len(set(names)), merged.repeated) == (count, count, 0)
    record_property("kills of predict survived", kills)
    record_property("images counted after them", count)
    record_property("images lost or twice", count - len(set(names)) + merged.repeated)
