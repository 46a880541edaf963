"""Hostile files of weights, in every format that torch knows: nothing in them runs, and memory stays in proportion."""

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from rtmdet_fast import UserError
from rtmdet_fast.models import inert_pickle
from rtmdet_fast.models.checkpoint import read_checkpoint
from rtmdet_fast.models.torch_file import load_archive


class Payload:
    """An object whose pickle calls a function of the file's choice."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def zipped(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def members(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def torchscript(content: bytes) -> bytes:
    """A scripted module, its pickle another one."""

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    file = io.BytesIO()
    torch.jit.save(torch.jit.script(Module()), file)
    parts = members(file.getvalue())
    return zipped({name: content if name.endswith("data.pkl") else data for name, data in parts.items()})


def tarred(content: bytes) -> bytes:
    """As torch wrote before 2017."""
    file = io.BytesIO()
    nothing = pickle.dumps(0, 2)
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in (("storages", nothing + pickle.dumps([], 2)), ("tensors", nothing), ("pickle", content)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


WEIGHTS = {"backbone.weight": torch.arange(6.0).reshape(2, 3)}
FORMATS = {
    "zip": lambda content, protocol: saved(content, pickle_protocol=protocol),
    "legacy": lambda content, protocol: saved(content, pickle_protocol=protocol, _use_new_zipfile_serialization=False),
    "tar": lambda content, protocol: tarred(pickle.dumps(content, protocol)),
    "TorchScript": lambda content, protocol: torchscript(pickle.dumps(content, protocol)),
    "pickle": pickle.dumps,
    "pdparams": lambda content, protocol: pickle.dumps({"a": np.zeros(3, np.float32), "b": content}, protocol),
}


@pytest.mark.filterwarnings("ignore:.*pickle protocol:UserWarning")  # of torch, below 2
@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("form", FORMATS)
def test_nothing_runs_in_any_format(tmp_path, form, protocol):
    canary = tmp_path / "canary"
    payloads = [
        Payload(os.system, f"touch {canary}"),
        Payload(eval, f"open({str(canary)!r}, 'w')"),
        Payload(exec, f"open({str(canary)!r}, 'w')"),
        Payload(subprocess.check_call, ["touch", str(canary)]),
        Payload(shutil.copy, __file__, canary),
        Payload(os.mkdir, str(canary)),
        Payload(torch.load, str(canary)),
        Payload(torch.hub.load, str(canary), "model"),
    ]
    suffix = ".pdparams" if form == "pdparams" else ".pth"
    for payload in payloads:
        for content in ({"state_dict": WEIGHTS, "meta": {"log": payload}}, payload):
            path = tmp_path / f"w{suffix}"
            path.write_bytes(FORMATS[form](content, protocol))
            try:
                read = read_checkpoint(path)
                assert set(read.state_dict) == ({"a"} if form == "pdparams" else set(WEIGHTS))
            except UserError as error:
                assert str(error).isprintable()
                assert form not in ("zip", "legacy") or content is payload, str(error)
            assert not canary.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"w{suffix}"]


def test_protocols_0_and_1_run_nothing(tmp_path):
    canary = tmp_path / "canary"
    for protocol in (0, 1):
        payload = Payload(os.system, f"touch {canary}")
        data = b"".join(pickle.dumps(value, protocol) for value in (MAGIC_NUMBER, PROTOCOL_VERSION, {}, payload, []))
        (tmp_path / "w.pth").write_bytes(data)
        with pytest.raises(UserError, match="holds no state_dict"):
            read_checkpoint(tmp_path / "w.pth")
    assert not canary.exists()


def test_a_file_that_two_readers_see_differently_is_not_run(tmp_path, monkeypatch):
    """With two directories: Python takes the last, torch's reader that which the offset leads to."""
    ours = members(saved({"state_dict": WEIGHTS}))
    top = next(iter(ours)).split("/")[0]
    ours[f"{top}/xonstants.pkl"] = b"\x80\x02)."
    benign = zipped(ours)
    scripted = benign.replace(b"xonstants.pkl", b"constants.pkl")
    path = tmp_path / "w.pth"
    path.write_bytes(scripted + benign)
    with zipfile.ZipFile(path) as archive:
        assert f"{top}/xonstants.pkl" in archive.namelist()
    reader = torch._C.PyTorchFileReader(str(path))
    assert any(name.endswith("constants.pkl") and "xon" not in name for name in reader.get_all_records())
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("run as TorchScript"))
    assert torch.equal(read_checkpoint(path).state_dict["backbone.weight"], WEIGHTS["backbone.weight"])


BOMBS = {
    # ten bytes that ask for four gigabytes
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**32) + b".",
    "bytes": b"\x80\x05\x8e" + struct.pack("<Q", 2**32) + b".",
    # tuples in each other, as a key: hashing them would take the machine's stack
    "tuples": b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",
    "marked tuples": b"\x80\x02}" + b"(" * 200_000 + b"t" * 200_000 + b"Ns.",
}


ITEMS = b"]q\0(" + b"".join(b"M" + struct.pack("<H", i) for i in range(1000)) + b"e"
LARGE = {
    "lists": b"\x80\x02](" + b"]" * 20_000 + b"e.",
    "globals": b"\x80\x02](" + b"ca\na\n0" * 20_000 + b"e.",
    "copies in sets": b"\x80\x02" + ITEMS + b"c__builtin__\nset\nq\1](" + b"h\1h\0\x85R" * 1000 + b"e.",
    "copies in sizes": b"\x80\x02" + ITEMS + b"ctorch\nSize\nq\1](" + b"h\1h\0\x85R" * 1000 + b"e.",
}


@pytest.mark.parametrize("name", LARGE)
def test_a_pickle_has_so_many_operations_and_copies(tmp_path, monkeypatch, name):
    """Which take up to a hundred times their bytes, or as often as there are operations."""
    monkeypatch.setattr(inert_pickle, "MOST_OPERATIONS", 15_000)
    (tmp_path / "w.pth").write_bytes(zipped({"a/data.pkl": LARGE[name]}))
    with pytest.raises(UserError, match=r"more than 15,000 (operations|items)"):
        read_checkpoint(tmp_path / "w.pth")


def of_a_wrong_size(form):
    """Weights that tell of 400 MB, and a file that has a thousandth of it in another place."""
    data = saved({"state_dict": {"a": torch.zeros(1000)}}, _use_new_zipfile_serialization=form == "zip")
    number = b"M" + struct.pack("<H", 1000)
    assert number in data
    if form == "legacy":
        return data.replace(number, b"J" + struct.pack("<i", 10**8), 1)
    parts = members(data)
    return zipped({name: part.replace(number, b"J" + struct.pack("<i", 10**8), 1) for name, part in parts.items()})


def test_bombs_are_refused_within_a_gigabyte(tmp_path):
    pytest.importorskip("resource")
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC_NUMBER, PROTOCOL_VERSION, {}))
    for name, bomb in BOMBS.items():
        (tmp_path / f"{name} legacy.pth").write_bytes(head + bomb + pickle.dumps([], 2))
        (tmp_path / f"{name}.pdparams").write_bytes(bomb)
        (tmp_path / f"{name}.pth").write_bytes(zipped({"a/data.pkl": bomb}))
    for form in ("zip", "legacy"):
        (tmp_path / f"size {form}.pth").write_bytes(of_a_wrong_size(form))
    told = {"a": {"dtype": "F32", "shape": [10**8], "data_offsets": [0, 4 * 10**8]}}
    head = json.dumps(told).encode()
    (tmp_path / "size.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(64))
    (tmp_path / "header.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{}")
    nested = torch.zeros(1)
    from safetensors.torch import save_file

    (tmp_path / "config").mkdir()
    save_file({"a": nested}, tmp_path / "config/model.safetensors")
    (tmp_path / "config/config.json").write_text("[" * 100_000)
    names = sorted(str(path) for path in tmp_path.iterdir())
    code = (
        "import resource, sys\n"
        "from rtmdet_fast.errors import UserError\n"
        "from rtmdet_fast.models.checkpoint import read_checkpoint\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for path in sys.argv[1:]:\n"
        "    try:\n"
        "        read_checkpoint(path)\n"
        "        print('read', path)\n"
        "    except UserError as error:\n"
        "        print('refused', error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.returncode} {done.stderr}"
    *lines, grown = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["refused"] * len(names), lines
    unit = 1 if sys.platform == "darwin" else 1024
    assert int(grown) * unit < 2**30, grown


@pytest.mark.parametrize("legacy", [False, True])
def test_what_torch_writes_is_read_to_the_bit(tmp_path, legacy):
    base = torch.randn(4, 5, 6)
    content = {
        "state_dict": {
            "dtypes": [base.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int8)],
            "long": torch.arange(9)[2:7:2],
            "transposed": base.permute(2, 0, 1),
            "shared": base[1:],
            "scalar": torch.tensor(3.5),
            "empty": torch.empty(0, 3),
            "flags": base > 0,
            "parameter": torch.nn.Parameter(base[0]),
            "complex": torch.randn(3, dtype=torch.complex64),
        },
        "epoch": 7,
        "sizes": (base.shape, {1, 2}),
    }
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    read = load_archive(tmp_path / "w.pth")
    expected = torch.load(tmp_path / "w.pth", weights_only=False)
    tensors = read["state_dict"]
    assert all(
        torch.equal(a, b) for a, b in zip(tensors.pop("dtypes"), expected["state_dict"].pop("dtypes"), strict=True)
    )
    for key, value in expected["state_dict"].items():
        assert torch.equal(tensors[key], value) and tensors[key].dtype == value.dtype, key
        assert tensors[key].stride() == value.stride() and not tensors[key].requires_grad
    assert (read["epoch"], read["sizes"]) == (7, (torch.Size([4, 5, 6]), {1, 2}))
    assert tensors["shared"].untyped_storage().data_ptr() == tensors["transposed"].untyped_storage().data_ptr()


def test_a_tensor_beyond_its_storage_is_refused(tmp_path):
    """torch makes the storage larger, and leaves what was in the memory before."""
    data = saved({"state_dict": {"a": torch.zeros(1000)}})
    parts = members(data)
    (name,) = [name for name in parts if name.endswith("data.pkl")]
    size = b"M" + struct.pack("<H", 1000)
    assert parts[name].count(size) == 2  # of the storage, and of the tensor
    at = parts[name].rindex(size)
    parts[name] = parts[name][:at] + b"M" + struct.pack("<H", 1001) + parts[name][at + 3 :]
    (tmp_path / "w.pth").write_bytes(zipped(parts))
    with pytest.raises(UserError, match="out of bounds"):
        read_checkpoint(tmp_path / "w.pth")


def test_weights_of_another_byte_order_are_refused(tmp_path):
    parts = members(saved({"state_dict": WEIGHTS}))
    other = "big" if sys.byteorder == "little" else "little"
    parts = {name: other.encode() if name.endswith("byteorder") else data for name, data in parts.items()}
    (tmp_path / "w.pth").write_bytes(zipped(parts))
    with pytest.raises(UserError, match="another byte order"):
        read_checkpoint(tmp_path / "w.pth")
