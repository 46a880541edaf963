"""Reading weights: files of the reference, of this project, hostile ones, and the ones that do not fit."""

import hashlib
import io
import os
import pickle
import subprocess
import warnings
import zipfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from full_disk import room_for
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from rtmdet_fast import RTMDet, UserError
from rtmdet_fast.models.checkpoint import PRETRAINED, read_checkpoint, resolve_weights, save_atomically
from rtmdet_fast.models.inert_pickle import InertUnpickler


@pytest.fixture(scope="module")
def nano():
    torch.manual_seed(0)
    return RTMDet("nano", class_names=("cat", "dog", "owl")).eval()


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_mmengine_training_checkpoint(shared):
    model = RTMDet.from_pretrained(shared / "reference/mmdet_checkpoint_bccd_rtmdet_tiny.pth")
    assert (model.size, model.task, model.class_names) == ("tiny", "det", ("RBC", "WBC", "Platelets"))
    assert not model.training


def test_saved_model_comes_back_whole(nano, tmp_path):
    nano.image_size = 192
    nano.save(tmp_path / "deep/er/nano.pth")
    again = RTMDet.from_pretrained(tmp_path / "deep/er/nano.pth")
    assert same_weights(nano, again)
    assert (again.size, again.class_names, again.image_size) == ("nano", ("cat", "dog", "owl"), 192)
    # What mmengine's loader reads, without this project's reader.
    content = torch.load(tmp_path / "deep/er/nano.pth", weights_only=True)
    assert content["meta"]["dataset_meta"]["classes"] == ("cat", "dog", "owl")
    nano.image_size = 320


@pytest.mark.parametrize(
    "layout",
    ["plain", "model", "ema", "module", "compiled", "legacy file", "old meta", "one name", "bare", "LibreYOLO"],
)
def test_layouts_of_other_tools(nano, tmp_path, layout):
    state = nano.state_dict()
    path = tmp_path / "weights.pth"
    names = None
    match layout:
        case "plain":
            torch.save(state, path)
        case "model":
            torch.save({"model": state, "epoch": 3}, path)
        case "ema":
            averaged = {f"module.{key}": value for key, value in state.items()}
            torch.save({"ema_state_dict": {"steps": torch.tensor(9), **averaged}}, path)
        case "module":
            torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
        case "compiled":
            torch.save({"state_dict": {f"_orig_mod.{key}": value for key, value in state.items()}}, path)
        case "bare":  # every tensor once, and no counts of batches
            seen = set()
            bare = {k: v for k, v in state.items() if not (v.data_ptr() in seen or seen.add(v.data_ptr()))}
            torch.save({k: v for k, v in bare.items() if not k.endswith("num_batches_tracked")}, path)
        case "legacy file":
            torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=False)
        case "LibreYOLO":
            names = ("a", "b", "c")
            renamed = {key.replace("bbox_head.", "head."): value for key, value in state.items()}
            torch.save({"model": renamed, "nc": 3, "names": {1: "b", 0: "a", 2: "c"}}, path)
        case "old meta":
            names = ("a", "b", "c")
            torch.save({"state_dict": state, "meta": {"CLASSES": names}}, path)
        case "one name":  # a bare string that does not fit three classes
            torch.save({"state_dict": state, "meta": {"dataset_meta": {"classes": "cell"}}}, path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is missing
        model = RTMDet.from_pretrained(path)
    assert same_weights(nano, model)
    assert model.class_names == (names or ("class 0", "class 1", "class 2"))


def test_averaged_weights_win_over_raw_ones_beside_them(nano, tmp_path):
    raw = {f"module.{key}": torch.zeros_like(value) for key, value in nano.state_dict().items()}
    torch.save({"state_dict": nano.state_dict(), "ema_state_dict": raw}, tmp_path / "w.pth")
    assert same_weights(nano, RTMDet.from_pretrained(tmp_path / "w.pth"))


@pytest.mark.parametrize("prefix", ["backbone.", ""])
def test_imagenet_backbone(nano, tmp_path, prefix):
    state = {f"{prefix}{key}": value for key, value in nano.backbone.state_dict().items()}
    torch.save({"state_dict": {**state, "head.fc.weight": torch.zeros(1000, 8)}}, tmp_path / "cspnext.pth")
    with pytest.warns(UserWarning, match=r"freshly initialised.*bbox_head.*neck"):
        model = RTMDet.from_pretrained(tmp_path / "cspnext.pth", num_classes=5)
    assert same_weights(model.backbone, nano.backbone)
    assert len(model.class_names) == 5 and model.size == "nano"


def test_other_number_of_classes_starts_the_classifier_anew(nano, tmp_path):
    nano.save(tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="freshly initialised for 7 classes"):
        model = RTMDet.from_pretrained(tmp_path / "w.pth", num_classes=7)
    assert model.bbox_head.rtm_cls[0].weight.shape[0] == 7
    assert torch.equal(model.bbox_head.rtm_reg[0].weight, nano.bbox_head.rtm_reg[0].weight)
    assert same_weights(model.neck, nano.neck)


class Bomb:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return subprocess.check_call, (["touch", str(self.path)],)


class Code:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_file_is_executed(nano, tmp_path, legacy):
    canary = tmp_path / "executed"
    content = {"state_dict": nano.state_dict(), "meta": {"log": Bomb(canary), "more": Code(canary), "path": Path("x")}}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    assert same_weights(nano, RTMDet.from_pretrained(tmp_path / "w.pth"))
    assert not canary.exists()


def test_a_file_cannot_reach_torchs_own_functions(nano, tmp_path):
    """BUILD on an allowed global sets attributes on a copy."""
    torch.save({"state_dict": nano.state_dict()}, tmp_path / "w.pth")
    function = torch._utils._rebuild_tensor_v2
    payload = pickle.PROTO + b"\x02ctorch._utils\n_rebuild_tensor_v2\n}U\x04evilK\x01sb" + pickle.STOP
    (tmp_path / "evil.pth").write_bytes(payload)
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "evil.pth")
    assert not hasattr(function, "evil")
    InertUnpickler(io.BytesIO(payload)).load()
    assert not hasattr(function, "evil")


def test_the_sources_of_modules_are_not_compared(tmp_path):
    """Of a module whose source has changed, `torch.load` writes NAME.patch: a path of the file's choice."""

    def text(value: str) -> bytes:
        return b"X" + len(value).to_bytes(4, "little") + value.encode()

    # BUILD with (None, attributes) gives a function that is allowed another name.
    module_type = b"ctorch._utils\n_rebuild_tensor\nN}(" + text("dump_patches") + b"\x88"
    module_type += text("__name__") + text(str(tmp_path / "canary")) + b"u\x86b"
    header = b"".join(pickle.dumps(value, 2) for value in (MAGIC_NUMBER, PROTOCOL_VERSION, {}))
    module = b"\x80\x02(" + text("module") + module_type + text("x.py") + text("words of the file's own") + b"tQ."
    (tmp_path / "w.pth").write_bytes(header + module + pickle.dumps([], 2))
    with pytest.raises(UserError):
        read_checkpoint(tmp_path / "w.pth")
    assert os.listdir(tmp_path) == ["w.pth"]


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"", "cannot be read"), (b"not a checkpoint at all", "cannot be read"), (None, "does not exist")],
)
def test_files_that_are_no_checkpoint(tmp_path, content, word):
    path = tmp_path / "w.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=word):
        read_checkpoint(path)


def test_truncated_file(nano, tmp_path):
    nano.save(tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "w.pth")


def test_a_flipped_bit_anywhere_in_an_archive_is_seen(nano, tmp_path):
    """Of weights too, whose checksums torch does not look at; in the padding between them it changes nothing."""
    path = tmp_path / "w.pth"
    nano.save(path)
    whole = path.read_bytes()
    directory = whole.rindex(b"PK\x01\x02", 0, whole.index(b"PK\x01\x02") + 5)
    places = [*np.random.default_rng(0).integers(0, len(whole), 12), *range(directory, directory + 70), len(whole) - 20]
    refused = 0
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(place % 8)
        path.write_bytes(damaged)
        try:
            assert same_weights(nano, RTMDet.from_pretrained(path))
        except UserError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1
            refused += 1
    assert refused > len(places) // 2


def test_an_archive_that_grows_when_read_is_not_read(nano, tmp_path):
    nano.save(tmp_path / "w.pth")
    with (
        zipfile.ZipFile(tmp_path / "w.pth") as whole,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in whole.infolist():
            bomb.writestr(member.filename, whole.read(member))
        bomb.writestr("w/data/1000", bytes(2**24))
    with pytest.raises(UserError, match=r"bomb\.pth is a compressed archive"):
        read_checkpoint(tmp_path / "bomb.pth")


def test_tensors_larger_than_the_file_are_refused(nano, tmp_path):
    state = nano.state_dict()
    state["bbox_head.rtm_cls.0.weight"] = torch.zeros(1, 1, 1, 1).expand(10**12, 64, 1, 1)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match="larger than the file"):
        RTMDet.from_pretrained(tmp_path / "w.pth")


def test_a_pickle_of_ten_bytes_takes_no_memory():
    """A memo index makes the unpickler in C fill 16 bytes times as much."""
    from full_disk import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    InertUnpickler(io.BytesIO(b"\x80\x02Nr" + (2**27).to_bytes(4, "little") + b".")).load()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # KiB (macOS: bytes)


def test_tar_archives_are_refused(tmp_path):
    """torch unpacks them, whatever stands in place of a file."""
    import tarfile

    with tarfile.open(tmp_path / "w.pth", "w") as archive:
        pipe = tarfile.TarInfo("storages")
        pipe.type = tarfile.FIFOTYPE
        archive.addfile(pipe)
    with pytest.raises(UserError, match="tar archive"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("own", "word"),
    [
        ({"image_size": 10**9}, "image size 1000000000"),
        ({"image_size": 100}, "multiple of 32"),
        ({"image_size": "640"}, "its image_size is '640'"),
        ({"image_size": True}, "its image_size is 'True'"),
        ({"image_size": None}, "its image_size is 'None'"),
        ({"image_size": 640, "patch_size": "x"}, "its patch_size is 'x'"),
        ({"image_size": 640, "patch_size": 0.5}, "its patch_size is '0.5'"),
        ({"patch_size": -1}, "its patch_size is '-1'"),
    ],
)
def test_metadata_of_a_wrong_kind(nano, tmp_path, own, word):
    torch.save({"state_dict": nano.state_dict(), "meta": {"rtmdet_fast": own}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"w\.pth is damaged: .*{word}"):
        RTMDet.from_pretrained(tmp_path / "w.pth")


@pytest.mark.parametrize("own", [None, 3, [], {}, {"size": 7}, {"patch_size": None}])
def test_metadata_that_tells_no_sizes(nano, tmp_path, own):
    torch.save({"state_dict": nano.state_dict(), "meta": {"rtmdet_fast": own}}, tmp_path / "w.pth")
    model = RTMDet.from_pretrained(tmp_path / "w.pth")
    assert (model.image_size, model.patch_size) == (320, None)


@pytest.mark.parametrize("shape", [(), (3,), (0, 64, 1, 1)])
def test_a_classifier_of_an_odd_shape(nano, tmp_path, shape):
    state = {**nano.state_dict(), "bbox_head.rtm_cls.0.weight": torch.zeros(shape)}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth is damaged: bbox_head\.rtm_cls\.0\.weight has shape"):
        RTMDet.from_pretrained(tmp_path / "w.pth")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused(nano, tmp_path, value, dtype):
    """They would find nothing, without a word."""
    state = {key: tensor.clone() for key, tensor in nano.state_dict().items()}
    key = "neck.out_convs.0.depthwise_conv.bn.running_var"
    state[key] = state[key].to(dtype)
    state[key][3] = value
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"no finite numbers \(first: {key}\)"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("value", [torch.zeros(1), torch.full((1,), torch.nan), torch.zeros(1, dtype=torch.int8)])
def test_names_in_a_file_cannot_write_to_the_terminal(nano, tmp_path, value):
    torch.save({**nano.state_dict(), "neck.\x1b[2J.weight": value}, tmp_path / "w.pth")
    with pytest.raises(UserError) as refused:
        RTMDet.from_pretrained(tmp_path / "w.pth")
    assert str(refused.value).isprintable() and r"\x1b[2J" in str(refused.value)


def test_quantised_weights_are_refused(nano, tmp_path):
    """They would load, as other numbers than they stand for."""
    state = {k: v.to(torch.int8) if v.is_floating_point() else v for k, v in nano.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"w\.pth holds weights of torch\.int8 \(first: backbone"):
        read_checkpoint(tmp_path / "w.pth")


def test_safetensors_of_another_model(tmp_path):
    from safetensors.torch import save_file

    from rtmdet_fast.models.families import load_model

    save_file({"bert.embeddings.weight": torch.zeros(3, 4)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"holds none of RTMDet.*first key is 'bert\.embeddings\.weight'"):
        load_model(tmp_path / "w.safetensors")


def test_weights_of_another_model(nano, tmp_path):
    torch.save({"state_dict": {"layer1.0.weight": torch.zeros(3)}}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"no RTMDet or CSPNeXt"):
        RTMDet.from_pretrained(tmp_path / "resnet.pth")
    nano.save(tmp_path / "nano.pth")
    with pytest.raises(UserError, match="size 'nano', not 's'"):
        RTMDet.from_pretrained(tmp_path / "nano.pth", size="s")
    state = nano.state_dict()
    state.pop("neck.out_convs.0.depthwise_conv.conv.weight")
    state["neck.unheard_of.weight"] = torch.zeros(1)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(UserError, match=r"neck\.unheard_of\.weight"):
        RTMDet.from_pretrained(tmp_path / "odd.pth")


def test_torchscript_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("model/constants.pkl", b"")
    with pytest.raises(UserError, match="TorchScript"):
        read_checkpoint(tmp_path / "w.pt")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(UserError, match=r"rtmdet-tiny.*rotated-rtmdet-l"):
        resolve_weights("rtmdet-huge")


def test_known_name_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def offline(url, target, digest, **_):
        assert url == PRETRAINED["rtmdet-tiny"] and digest == "78e30dcc"
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"put that file at .*checkpoints/rtmdet_tiny.*78e30dcc\.pth"):
        resolve_weights("RTMDet_tiny")


def test_cached_download_is_checked_against_its_hash(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    content = b"weights"
    digest = hashlib.sha256(content).hexdigest()[:8]
    monkeypatch.setitem(PRETRAINED, "rtmdet-tiny", f"https://example.org/tiny-{digest}.pth")
    path = tmp_path / f"checkpoints/tiny-{digest}.pth"
    path.parent.mkdir()
    path.write_bytes(content)
    assert resolve_weights("rtmdet-tiny") == path
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match="damaged"):
        resolve_weights("rtmdet-tiny")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    save_atomically({"a": 1}, tmp_path / "w.pth")
    with pytest.raises((pickle.PicklingError, AttributeError)):
        save_atomically({"a": lambda: 0}, tmp_path / "w.pth")
    assert torch.load(tmp_path / "w.pth") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_a_full_disk_leaves_the_old_weights_and_one_sentence(nano, tmp_path):
    path = tmp_path / "w.pth"
    nano.save(path)
    size = path.stat().st_size
    before = path.read_bytes()
    for room in (0, 100, 5000, size // 2, size - 100):
        with room_for(room), pytest.raises(UserError, match=r"^cannot write .*w\.pth: File too large$"):
            nano.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["w.pth"]


def test_weights_of_rotated_boxes_start_those_of_upright_ones(tmp_path):
    rotated = RTMDet("nano", "rotated", class_names=("a", "b"))
    rotated.save(tmp_path / "rotated.pth")
    model = RTMDet("nano", class_names=("a", "b"))
    model.load_weights(read_checkpoint(tmp_path / "rotated.pth"))
    state = rotated.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
