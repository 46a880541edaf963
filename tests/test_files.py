"""Files are whole: after a full disk, an interrupt, a kill."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest
from full_disk import room_for

from rtmdet_fast import UserError, files
from rtmdet_fast.files import write_atomically, write_json


def test_a_full_disk_leaves_the_old_file_and_one_sentence(tmp_path):
    path = tmp_path / "deep/er/a.json"
    write_json(path, {"a": "円"})
    for size in (0, 1000):
        with room_for(size), pytest.raises(UserError, match=r"^cannot write .*a\.json: File too large$"):
            write_json(path, list(range(1000)))
    assert json.loads(path.read_bytes().decode("ascii")) == {"a": "円"}
    assert os.listdir(path.parent) == ["a.json"]


def test_an_interrupt_before_and_after_the_renaming(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt), write_atomically(tmp_path / "a") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    replace = os.replace

    def interrupted(*paths):
        replace(*paths)
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path / "a", 1)
    assert os.listdir(tmp_path) == ["a"]


WRITER = """
import sys, time
from rtmdet_fast.files import write_atomically
with write_atomically(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    print("ready", flush=True)
    sys.stdin.read()
    file.write(b", whole")
"""


@pytest.mark.parametrize("name", ["last.pth", "[a].json"])
def test_what_a_killed_process_left_goes_and_what_another_writes_stays(tmp_path, name):
    path = tmp_path / name
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    assert all(writer.stdout.readline() == b"ready\n" for writer in writers)
    killed, alive = writers
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert len(os.listdir(tmp_path)) == 2
    keep = tmp_path / f".{name}.backup"
    keep.write_text("mine")
    write_json(path, "mine")
    assert len(os.listdir(tmp_path)) == 3 and keep.exists()  # the file, what is being written, and what is not ours
    alive.communicate()
    assert alive.returncode == 0 and path.read_bytes() == b"half, whole"
    assert sorted(os.listdir(tmp_path)) == sorted([name, keep.name])


def test_links_stay_links_and_pipes_pipes(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_json(tmp_path / "link", 1)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "1"
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_json(tmp_path / "pipe", [2], indent=None)
    reader.join()
    assert read == ["[2]"] and (tmp_path / "pipe").is_fifo()


PRINTER = """
from rtmdet_fast.files import write_json
print("before")
write_json("/dev/stdout", [2], indent=None)
print("\\nafter")
"""


def test_stdout_that_leads_to_a_file(tmp_path):
    (tmp_path / "out").write_text("older\n")
    with (tmp_path / "out").open("a") as out:
        subprocess.run([sys.executable, "-c", PRINTER], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "older\nbefore\n[2]\nafter\n"
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_of_the_system_without_its_text(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("the cable is out")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(UserError, match=r"cannot write .*a\.json: the cable is out$"):
        write_json(tmp_path / "a.json", 1)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        write_json(tmp_path, 1)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/a: its folder is a file"):
        write_json(tmp_path / "file/a", 1)
