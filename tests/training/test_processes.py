"""Several processes: what they train and find together is what one alone would, and what happens when one dies."""

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from one_of_several import work
from torchrun import torchrun

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.cli import main, processes
from rtmdet_fast.data.shapes import make_shapes
from rtmdet_fast.distributed import loss_normaliser
from rtmdet_fast.training.config import resolve
from rtmdet_fast.training.run_log import read_metrics
from rtmdet_fast.training.train import train

SEEN = 25
"""Images that `eval` is compared on."""
SCRIPT = Path(__file__).with_name("one_of_several.py")


def options_of(config, **changes):
    """A config in JSON, to be shown as one."""
    told = asdict(replace(config, as_one=True, overwrite=True, **changes))
    return {key: str(value) if isinstance(value, Path) else value for key, value in told.items()}


def together(folder, processes, told):
    """The work told, by that many processes: what each of them left."""
    folder.mkdir(exist_ok=True)
    (folder / "told.json").write_text(json.dumps(told))
    done = torchrun(SCRIPT, folder / "told.json", processes=processes)
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"process-{rank}.json").read_text()) for rank in range(processes)]


def losses(out):
    rows = [row for row in read_metrics(out / "metrics.csv") if row["loss"]]
    return [{key: float(value) for key, value in row.items() if key.startswith("loss") and value} for row in rows]


def as_close(outs, within=1e-4):
    """Two runs' losses, step by step, `within` of what they are; how many steps there were.

    Of RT-DETR without the sum, which has those of its denoising queries: they see the padding of their process's batch.
    """
    ours, theirs = map(losses, outs)
    assert len(ours) == len(theirs) > 1
    for a, b in zip(ours, theirs, strict=True):
        a, b = ({key: value for key, value in row.items() if key != "loss" or "loss_vfl" not in row} for row in (a, b))
        assert a == pytest.approx(b, rel=within, abs=1e-6)
    assert abs(ours[0]["loss"] - ours[-1]["loss"]) > 10 * within  # it did train
    return len(ours)


TASKS = {"det": {}, "ins": {"accumulate": 2}, "rotated": {}}


def trainings(config, folder, images, tasks):
    """Of the tasks, with as many images a step and process."""
    run = {"epochs": 1, "stage2_epochs": 0, "batch_size": images, "warmup_iterations": 0}
    return [options_of(config, **{**run, "task": task, **more}, out=folder / task) for task, more in tasks.items()]


@pytest.mark.parametrize("task", ["det", *(pytest.param(task, marks=pytest.mark.slow) for task in ("ins", "rotated"))])
def test_two_processes_do_what_one_does(config, tmp_path, record_property, task):
    """Losses of every step, averaged weights, detections and figures; annotations are read, and images seen, once."""
    torch.manual_seed(3)
    model = RTMDet("nano", task, class_names=("circle", "rectangle", "triangle", "star", "ellipse"))
    model.image_size = 64
    for cls, reg in zip(model.bbox_head.rtm_cls, model.bbox_head.rtm_reg, strict=True):
        torch.nn.init.zeros_(cls.bias)  # so that there are detections
        torch.nn.init.ones_(reg.bias)  # and some overlap objects
    model.save(tmp_path / "model.pth")
    seen = make_shapes(tmp_path / "seen", num_train=1, num_val=SEEN, image_size=64)
    data = ["--ann", seen.val_ann, "--images", seen.val_images, "--batch-size", 3, "--device", "cpu"]

    def told(folder, images):
        files = ["--detections", folder / "found.json", "--json", folder / "figures.json"]
        evaluation = list(map(str, ["--weights", tmp_path / "model.pth", *data, *files]))
        return {
            "double": True,
            "trainings": trainings(config, folder, images, {task: TASKS[task]}),
            "evaluations": [evaluation],
        }

    one, two = tmp_path / "one", tmp_path / "two"
    first, second = together(two, 2, told(two, 2))
    (alone,) = together(one, 1, told(one, 4))

    record_property("steps compared of one process and of several", as_close((one / task, two / task)))
    assert first["averages"] == second["averages"] and len(first["averages"]) == 1
    assert [m.keys() for m in first["metrics"]] == [m.keys() for m in alone["metrics"]] and first["metrics"][0]
    assert len(first["read"]) == len(alone["read"]) == 2 and not second["read"]
    assert first["codes"] == second["codes"] == [0]
    decoded = first["decoded"] + second["decoded"]
    assert sorted(decoded) == [*range(SEEN)] and first["decoded"] and second["decoded"]
    record_property("processes compared with one", 2)
    record_property("images evaluated once by one of several processes", SEEN)
    record_property("images lost or twice", SEEN - len(set(decoded)) + len(decoded) - len(set(decoded)))
    found = [json.loads((folder / "found.json").read_text()) for folder in (one, two)]
    figures = [json.loads((folder / "figures.json").read_text()) for folder in (one, two)]
    assert len({detection["image_id"] for detection in found[0]}) == SEEN and found[0] == found[1]
    for each in figures:
        del each["seconds"]
    assert figures[0] == figures[1] and figures[0]["AP"] > 0


def test_steps_that_stay_in_their_place_agree_on_their_sizes_and_are_the_plain_ones(config, tmp_path):
    """On GPUs they are recorded, and NCCL asks all processes for the same graph. The last batch is uneven."""
    content = json.loads(config.train.read_text())
    left_out = {image["id"] for image in content["images"][11:]}
    content["images"] = content["images"][:11]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in left_out]
    (tmp_path / "train.json").write_text(json.dumps(content))
    config = replace(config, train=tmp_path / "train.json", val=None, val_images=None, epochs=2, stage2_epochs=1)
    runs = [
        options_of(config, batch_size=2, graph=graph, out=tmp_path / graph, resume=False) for graph in ("off", "auto")
    ]
    left = together(tmp_path, 2, {"trainings": runs, "drop_last": False, "sizes": [4, 8, 64]})
    assert [process["eager"] for process in left] == [[2], [2]]  # of each epoch the last
    own = [[values for values, _ in process["agreed"]] for process in left]
    for asked, found in zip(zip(*own, strict=True), (found for _, found in left[0]["agreed"]), strict=True):
        assert found == [max(pair) for pair in zip(*asked, strict=True)]
    assert any(a[0] != b[0] for a, b in zip(*own, strict=True))  # by themselves they would have differed
    assert left[0]["averages"] == left[1]["averages"]
    plain, fixed = (
        torch.load(tmp_path / graph / "last.pth", weights_only=True)["training"] for graph in ("off", "auto")
    )
    assert fixed["iteration"] == plain["iteration"] == 6
    for part in ("model", "ema"):
        for name, value in plain[part].items():
            torch.testing.assert_close(fixed[part][name], value, rtol=1e-6, atol=1e-6 * (part == "ema"))


def test_the_bound_of_one_is_on_the_sum_of_all_processes(monkeypatch):
    """Of 0.2 and 0.6 matched, and of 0.2 and 1.6: each divides its losses by half of what one process would."""
    assert loss_normaliser(torch.tensor(0.2)) == 1 and loss_normaliser(torch.tensor(1.8)) == torch.tensor(1.8)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    for other, sum_of_both in ((0.6, 1.0), (1.6, 1.8)):
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda total, other=other: total.add_(other))
        mine = torch.tensor(0.2)
        assert 2 * loss_normaliser(mine) == pytest.approx(sum_of_both) and mine == torch.tensor(0.2)


def test_resume_auto_goes_on_where_there_is_a_run_and_starts_one_where_there_is_none(config, capsys):
    assert not resolve(replace(config, resume="auto")).resume
    config.out.mkdir()
    (config.out / "last.pth").touch()
    assert resolve(replace(config, resume="auto")).resume is True
    with pytest.raises(UserError, match="--resume never is unknown"):
        resolve(replace(config, resume="never"))
    with pytest.raises(UserError, match=r"--resume auto .* --overwrite"):
        resolve(replace(config, resume="auto", overwrite=True))
    (config.out / "last.pth").unlink()
    data = ["--train", config.train, "--train-images", config.train_images, "--out", config.out]
    data += ["--device", "meta"]  # past the options, and no further
    for given, told in (("", "--device 'meta'"), ("auto", "--device 'meta'"), ("x y", "--resume x y is unknown")):
        assert main(["train", *map(str, data), "--resume", *given.split()]) == 2
        assert told in capsys.readouterr().err


def test_resume_auto_starts_and_continues_and_keeps_weights_that_it_finds(config):
    config = replace(config, epochs=1, stage2_epochs=0, val=None, val_images=None, resume="auto")
    config.out.mkdir()
    (config.out / "best.pth").write_bytes(b"those of a run that was killed before its first checkpoint")
    with pytest.warns(UserWarning, match=r"is best-before\.pth now"):
        first = train(config)
    assert (config.out / "best-before.pth").read_bytes().startswith(b"those of") and state_of(config.out)["epoch"] == 1
    assert train(config).seconds_per_iteration == 0 < first.seconds_per_iteration  # it had ended


def test_a_process_tells_torchrun_why_it_ends(config, tmp_path, monkeypatch, capsys):
    """What torchrun's last words are made of; a process that another has left waits for torchrun to see that one."""
    waits = []
    monkeypatch.setattr(processes.time, "sleep", waits.append)
    monkeypatch.setattr(processes.signal, "signal", lambda *_: None)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    command = ["eval", "--weights", tmp_path / "none.pth", "--ann", config.val, "--images", config.val_images]
    command = list(map(str, command))
    assert main(command) == 2 and not (tmp_path / "error.json").exists()  # one alone
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert main(command) == 2
    told = json.loads((tmp_path / "error.json").read_text())
    assert "none.pth" in told["message"] and told["timestamp"] > 0 and waits == [processes.ALIKE_SECONDS]
    assert f"error: {told['message']}\n" == capsys.readouterr().err

    def leave(*_, **__):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4")

    (tmp_path / "error.json").unlink()
    monkeypatch.setattr("rtmdet_fast.export.engine.load_detector", leave)
    assert main(command) == 1 and waits[1:] == [processes.ENDED_SECONDS]
    assert not (tmp_path / "error.json").exists() and "another process" in capsys.readouterr().err


# ---- what takes minutes


@pytest.mark.slow
def test_three_processes_with_an_uneven_last_batch_and_other_families(config, tmp_path, record_property):
    """16 images: twelve, then four, of which one process shows two and the others one each; and RT-DETR."""
    content = json.loads(config.train.read_text())
    last = {image["id"] for image in content["images"][16:]}
    content["images"] = content["images"][:16]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] not in last]
    (tmp_path / "train.json").write_text(json.dumps(content))
    config = replace(config, train=tmp_path / "train.json")
    of_rtdetr = {"task": "det", "model": "rtdetr", "size": "r18", "queries": 8}
    tasks = {"det": {}, "ins": {}, "rotated": {}, "rtdetr": of_rtdetr}
    told = {"double": True, "drop_last": False}
    three, one = tmp_path / "three", tmp_path / "one"
    left = together(three, 3, {**told, "trainings": trainings(config, three, 4, tasks)})
    alone = work({**told, "trainings": trainings(config, one, 12, tasks)})
    assert len(alone["averages"]) == len(tasks)
    assert left[0]["averages"] == left[1]["averages"] == left[2]["averages"]
    steps = [as_close((one / task, three / task)) for task in tasks]
    assert steps == [2] * len(tasks)
    record_property("processes compared with one", 3)
    record_property("steps compared of one process and of several", sum(steps))


def command_of(config, *more):
    """`rtmdet-fast train` of three epochs, of two images a step and process."""
    data = ["--train", config.train, "--train-images", config.train_images, "--out", config.out]
    data += ["--val", config.val, "--val-images", config.val_images, "--image-size", 64, "--size", "nano"]
    data += ["--epochs", 3, "--stage2-epochs", 1, "--batch-size", 2, "--num-workers", 0, "--device", "cpu"]
    return list(map(str, [*data, "--no-report", "--no-progress", *more]))


def state_of(out):
    return torch.load(out / "last.pth", weights_only=True)["training"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fails", "is killed"])
def test_a_process_that_ends_ends_the_others_with_its_reason(config, tmp_path, how):
    (tmp_path / "told.json").write_text(json.dumps({"commands": [command_of(config)], how: {"rank": "1", "step": 2}}))
    done = torchrun(SCRIPT, tmp_path / "told.json")
    assert done.returncode != 0 and time.time() - float((tmp_path / "ended-at").read_text()) < 60
    root = done.stderr.partition("Root Cause")[2]
    assert "rank      : 1" in root
    if how == "fails":
        assert "this is why process 1 ends" in root and "error: this is why process 1 ends" in done.stderr
    else:
        assert "Signal 9 (SIGKILL)" in root
    assert "gloo" not in done.stderr  # what the process that was left knows of it


@pytest.mark.slow
def test_torchrun_restarts_what_was_killed_and_it_ends_as_unbroken(config, tmp_path):
    """By --max-restarts and --resume auto, to the bit."""
    left = {}
    for name, how in (("whole", {}), ("killed", {"is killed": {"rank": "1", "step": 6}})):
        out = tmp_path / name
        told = {"commands": [command_of(replace(config, out=out), "--resume", "auto")], **how}
        (tmp_path / f"{name}.json").write_text(json.dumps(told))
        done = torchrun(SCRIPT, tmp_path / f"{name}.json", options=("--standalone", "--max-restarts", 2))
        assert done.returncode == 0, done.stderr
        left[name] = state_of(out), read_metrics(out / "metrics.csv")
    assert "exitcode: -9" in done.stderr  # it was
    (a, whole), (b, killed) = left["whole"], left["killed"]
    for part in ("model", "ema"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    assert [row["loss"] for row in whole] == [row["loss"] for row in killed] and a["meters"] == b["meters"]


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_a_run(config, tmp_path):
    """Two processes, then three, then one: the schedule goes by epochs, steps are counted on, and it is told."""
    told = tmp_path / "told.json"
    steps = 0
    for epochs, number in ((1, 2), (2, 3), (3, 1)):
        script = {"commands": [command_of(config, "--resume", "auto")], "fails": {"rank": "0", "step": 0}}
        if number > 1:  # ends with the first step of the next epoch
            script["fails"]["step"] = 18 // 2 // number * epochs + 1
        told.write_text(json.dumps(script))
        done = torchrun(SCRIPT, told, processes=number)
        state = state_of(config.out)
        steps += 18 // 2 // number
        assert state["epoch"] == epochs and state["iteration"] == steps, done.stderr
        assert len(state["samplers"]) == number
        assert ("to the bit it would with" in done.stderr) == (epochs > 1)
    assert done.returncode == 0
    rows = [int(row["iteration"]) for row in read_metrics(config.out / "metrics.csv") if row["loss"]]
    assert rows == list(range(1, steps + 1))


def two_nodes(told):
    """Two torchruns of a process each that meet by c10d on loopback, ended."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    options = ["--nnodes", 2, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "test"]
    node = {"processes": 1, "options": [*options, "--local-addr", "127.0.0.1"], "GLOO_SOCKET_IFNAME": "lo"}
    with ThreadPoolExecutor() as pool:
        nodes = [pool.submit(torchrun, SCRIPT, told, timeout=200, **node) for _ in range(2)]
        return [node.result() for node in nodes]


@pytest.mark.slow
def test_two_nodes_meet_and_do_what_one_process_does(config, tmp_path, record_property):
    """Two torchruns of a process each, by c10d rendezvous on loopback; each reads annotations for itself."""
    both, one = tmp_path / "both", tmp_path / "one"
    both.mkdir()
    told = {"double": True, "trainings": trainings(config, both, 2, {"det": {}})}
    (both / "told.json").write_text(json.dumps(told))
    a, b = two_nodes(both / "told.json")
    assert a.returncode == b.returncode == 0, a.stderr + b.stderr
    work({**told, "trainings": trainings(config, one, 4, {"det": {}})})
    record_property("processes compared with one", 2)
    record_property("steps compared of one process and of several", as_close((one / "det", both / "det")))
    left = [json.loads((both / f"process-{rank}.json").read_text()) for rank in (0, 1)]
    assert left[0]["averages"] == left[1]["averages"] and len(left[0]["read"]) == len(left[1]["read"]) == 2


@pytest.mark.slow
def test_a_node_whose_process_is_killed_ends_the_other(config, tmp_path):
    told = {"commands": [command_of(config)], "is killed": {"rank": "1", "step": 2}}
    (tmp_path / "told.json").write_text(json.dumps(told))
    a, b = two_nodes(tmp_path / "told.json")
    assert a.returncode and b.returncode
    killed, other = (a, b) if "SIGKILL" in a.stderr else (b, a)
    # the node where the torchruns meet may be the one that ends, and then the other's ends its process by itself
    reasons = "another process of this run has ended", "The connection to the C10d store has failed"
    assert "SIGKILL" in killed.stderr and any(reason in other.stderr for reason in reasons)
    assert time.time() - float((tmp_path / "ended-at").read_text()) < 60
