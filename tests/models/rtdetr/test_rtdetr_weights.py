"""Weights of every origin: official files, Hugging Face's, Paddle's, our own; and files that do not fit."""

import pickle
import warnings
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from rtmdet_fast import RTDETR, RTMDet, UserError
from rtmdet_fast.models.checkpoint import PRETRAINED, read_checkpoint
from rtmdet_fast.models.families import load_model

A = "branch2a.conv.weight"


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def unlike_fresh(model):
    """With no two weights alike, none at zero, and outputs in which no two queries are alike either."""
    torch.manual_seed(0)
    for key, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        elif tensor.is_floating_point() and not key.endswith("points_scale"):  # which is no weight
            tensor.uniform_(*((0.8, 1.2) if key.endswith(("weight", "running_var")) else (-0.2, 0.2)))
    return model.eval()


@pytest.fixture(scope="module", params=[1, 2])
def model(request):
    return unlike_fresh(RTDETR("r18", request.param, class_names=["cat", "dog", "owl"]))


def same_weights(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    return all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def with_computed(model):
    """The state_dict as the published code has it: version 2 with what it computes, partly infinite."""
    return model.saved_weights()["model"]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"ema": {"module": state}},
        lambda state: {"model": {k: torch.zeros_like(v) for k, v in state.items()}, "ema": {"module": state}},
        lambda state: {"model": state, "last_epoch": 3, "date": "today"},
        lambda state: {"model": {f"module.{key}": value for key, value in state.items()}},
        lambda state: state,
    ],
)
def test_official_files_of_every_layout(model, tmp_path, wrap):
    torch.save(wrap(with_computed(model)), tmp_path / "w.pth")
    loaded = load_model(tmp_path / "w.pth")
    assert isinstance(loaded, RTDETR) and not loaded.training
    assert (loaded.size, loaded.version, len(loaded.class_names)) == ("r18", model.version, 3)
    assert same_weights(loaded, model)


def test_own_files_tell_everything_again(tmp_path):
    options = {"sampling": "discrete", "num_points": (2, 4, 3), "num_queries": 50, "num_decoder_layers": 5}
    model = unlike_fresh(RTDETR("r34", 2, 4, **options, decoder_layers=2))
    model.image_size = 320
    model.save(tmp_path / "w.pth")
    again = load_model(tmp_path / "w.pth")
    assert same_weights(again, model)
    for key, value in model.saved_options().items():
        assert again.saved_options()[key] == value
    assert again.decoder.num_points == (2, 4, 3) and again.image_size == 320 and again.class_names == model.class_names
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again(images).logits, model(images).logits)


@pytest.mark.parametrize("version", [1, 2])
def test_saved_files_are_what_the_published_code_loads(shared, tmp_path, version):
    import json

    unlike_fresh(RTDETR("r18", version)).save(tmp_path / "w.pth")
    content = torch.load(tmp_path / "w.pth", weights_only=True)
    name = "rtdetr_r18" if version == 1 else "rtdetrv2_r18"
    keys = json.loads((shared / f"reference/rtdetr/keys/{name}.json").read_text())
    assert {key: list(value.shape) for key, value in content["model"].items()} == keys
    if version == 2:
        state = content["model"]
        assert state["decoder.valid_mask"].dtype == torch.bool and int(state["decoder.valid_mask"].sum()) == 8084
        assert state["decoder.anchors"].isinf().any() and not state["decoder.anchors"].isnan().any()
        assert torch.equal(state["decoder.decoder.layers.2.cross_attn.num_points_scale"], torch.full((12,), 0.25))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("folder", [True, False])
def test_hugging_faces_files_predict_what_its_own_code_does(tmp_path, version, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        backbone = transformers.RTDetrResNetConfig(
            depths=[2, 2, 2, 2], layer_type="basic", hidden_sizes=[64, 128, 256, 512],
            out_features=["stage2", "stage3", "stage4"],
        )  # fmt: skip
        kind = "RTDetr" if version == 1 else "RTDetrV2"
        config = getattr(transformers, f"{kind}Config")(
            backbone_config=backbone, encoder_in_channels=[128, 256, 512], hidden_expansion=0.5, decoder_layers=2,
            num_queries=30, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1},
            **({"decoder_n_points": 2} if version == 2 else {}),
        )  # fmt: skip
        theirs = unlike_fresh(getattr(transformers, f"{kind}ForObjectDetection")(config))
        theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path if folder else tmp_path / "model.safetensors")
    assert (ours.size, ours.version, ours.class_names, ours.decoder.num_queries) == ("r18", version, ("cat", "dog"), 30)
    assert ours.decoder.num_points == ((4,) * 3 if version == 1 else (2,) * 3) and ours.decoder_layers == 2
    images = torch.rand(2, 3, 96, 160)
    with torch.no_grad():
        found, expected = ours(images), theirs(images)
    assert (found.logits - expected.logits).abs().max() < 1e-4
    assert (found.boxes - expected.pred_boxes).abs().max() < 1e-5
    assert found.boxes.std(1).min() > 1e-4  # no two queries are alike


def test_hugging_faces_names_are_the_published_rules_of_all_models(shared):
    """The rules of the reference, applied to the published names, come back as these names."""
    import json
    import re

    from rtmdet_fast.models.rtdetr.weights import from_hugging_face

    folder = shared / "reference/rtdetr/keys"
    rules = json.loads((folder / "hf_rules.json").read_text())["rules"]
    for size, version in (("r18", 1), ("r34", 1), ("r50m", 2), ("r50", 1), ("r101", 2)):
        name = f"rtdetr{'v2' if version == 2 else ''}_{size}"
        official = {}
        hub = {}
        for number, key in enumerate(json.loads((folder / f"{name}.json").read_text())):
            if key.endswith((".anchors", ".valid_mask")):
                continue
            value = torch.full((3,), float(number))
            official[key] = value
            for pattern, replacement in rules:
                key = re.sub(pattern, replacement, key)
            if ".in_proj_" in key:
                for part, third in zip("qkv", value.chunk(3), strict=True):
                    hub[key.replace(".in_proj_", f".{part}_proj.")] = third
            else:
                hub[key] = value
        found = from_hugging_face(hub)
        assert found.keys() == official.keys()
        assert all(torch.equal(found[key], value) for key, value in official.items())


def as_paddle(model):
    """What PaddlePaddle would write of a model: other names, the order of the published ones, matrices transposed."""
    arrays = {}
    for number, (key, value) in enumerate(model.state_dict().items()):
        if key.endswith("num_batches_tracked"):
            continue
        value = value.numpy()
        if key == "decoder.denoising_class_embed.weight":
            value = value[:-1]
        elif value.ndim == 2:
            value = value.T
        key = key.replace(".running_mean", "._mean").replace(".running_var", "._variance")
        arrays[f"{key}.{number}" if "proj" in key else key] = value
    return {**arrays, "StructuredToParameterName@@": {key: f"parameter_{key}" for key in arrays}}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(("size", "classes"), [("r18", 3), ("l", 80)])
def test_paddles_files(tmp_path, size, classes, protocol):
    if (size, protocol) == ("l", 2):
        pytest.skip("once is enough")
    model = unlike_fresh(RTDETR(size, num_classes=classes))
    with torch.no_grad():
        model.decoder.denoising_class_embed.weight[-1] = 0
    (tmp_path / "w.pdparams").write_bytes(pickle.dumps(as_paddle(model), protocol=protocol))
    loaded = load_model(tmp_path / "w.pdparams")
    assert (loaded.size, loaded.version, len(loaded.class_names)) == (size, 1, classes)
    assert same_weights(loaded, model)


def test_paddles_files_are_not_run(tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (canary,))

    arrays = as_paddle(unlike_fresh(RTDETR("r18", num_classes=2)))
    (tmp_path / "w.pdparams").write_bytes(pickle.dumps({"evil": Evil(), **arrays}))
    assert len(load_model(tmp_path / "w.pdparams").class_names) == 2
    assert not canary.exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"no pickle", "cannot be read"),
        (pickle.dumps([1, 2]), "holds no weights"),
        (pickle.dumps({"a": 1}), "holds no weights"),
        (pickle.dumps({"a._mean": np.zeros(3, np.float32)}), "holds none of"),
        (pickle.dumps({"a": np.array(["x"])}), "cannot be read"),
        (pickle.dumps({"a": np.array([np.nan], np.float32)}), "no finite numbers"),
        (pickle.dumps({f"a{i}": x for x in [np.zeros(9, np.float32)] for i in range(99)}), "larger than the file"),
    ],
)
def test_paddles_files_that_cannot_be(tmp_path, content, words):
    (tmp_path / "w.pdparams").write_bytes(content)
    with pytest.raises(UserError, match=words) as told:
        load_model(tmp_path / "w.pdparams")
    assert "w.pdparams" in str(told.value) and len(str(told.value).splitlines()) == 1


def test_arrays_in_fortrans_order(tmp_path):
    array = np.asfortranarray(np.arange(24, dtype=np.float32).reshape(2, 3, 4))
    (tmp_path / "w.pdparams").write_bytes(pickle.dumps({"a": array, "b": np.float64([]), "c": np.array(3)}))
    state = read_checkpoint(tmp_path / "w.pdparams").state_dict
    assert np.array_equal(state["a"].numpy(), array) and state["b"].shape == (0,) and state["c"].shape == ()


@pytest.mark.parametrize("size", ["r18", "r50", "r101", "l"])
def test_a_bare_backbone_starts_a_model(tmp_path, size):
    model = RTDETR(size, num_classes=2)
    backbone = unlike_fresh(model.backbone).state_dict()
    for key in [key for key in backbone if key.endswith(".running_var")]:  # which frozen ones drop
        backbone[key.replace("running_var", "num_batches_tracked")] = torch.tensor(9)
    torch.save(backbone, tmp_path / "backbone.pth")
    fresh = RTDETR(size, 2, num_classes=2)
    with pytest.warns(UserWarning, match="freshly initialised, to be trained: decoder, encoder$"):
        fresh.load_weights(read_checkpoint(tmp_path / "backbone.pth"))
    for key, value in fresh.backbone.state_dict().items():
        assert torch.equal(value, backbone[key])
    with pytest.warns(UserWarning, match="freshly initialised"):
        loaded = load_model(tmp_path / "backbone.pth", num_classes=2)
    assert loaded.size == size
    if size == "r50":
        with pytest.warns(UserWarning, match="freshly initialised"):
            assert load_model(tmp_path / "backbone.pth", size="r50m", num_classes=2).size == "r50m"


def test_other_classes_leave_the_classifiers_fresh(model, tmp_path):
    model.save(tmp_path / "w.pth")
    with pytest.warns(UserWarning) as told:
        other = RTDETR.from_pretrained(tmp_path / "w.pth", class_names=["a", "b"])
    (warning,) = told
    assert str(warning.message) == (
        "w.pth: freshly initialised for 2 classes, to be trained: decoder.dec_score_head, "
        "decoder.denoising_class_embed, decoder.enc_score_head"
    )
    assert other.class_names == ("a", "b")
    for key, value in other.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]) or "score_head" in key or "class_embed" in key


def test_files_of_another_model(model, tmp_path):
    model.save(tmp_path / "w.pth")
    other = 3 - model.version
    with pytest.raises(UserError, match=rf"w\.pth holds a model of version {model.version}, not {other}$"):
        RTDETR.from_pretrained(tmp_path / "w.pth", version=other)
    with pytest.raises(UserError, match="size 'r18', not 'r50'"):
        RTDETR.from_pretrained(tmp_path / "w.pth", size="r50")
    for wrong, words in (
        (RTDETR("r34", model.version, 3), "holds a model of size 'r18', not 'r34'"),
        (RTDETR("r18", other, 3), f"holds a model of version {model.version}, not {other}"),
        (RTDETR("r18", model.version, 3, num_decoder_layers=2), r"does not fit a RT-DETR.*decoder\.dec_bbox_head\.2"),
        (RTDETR("r18", model.version, 3, num_points=(1, 2, 3)), "does not fit|num_points"),
    ):
        with pytest.raises(UserError, match=words):
            wrong.load_weights(read_checkpoint(tmp_path / "w.pth"))
    with pytest.raises(UserError, match=r"w\.pth holds no RTMDet or CSPNeXt weights"):
        RTMDet.from_pretrained(tmp_path / "w.pth")
    RTMDet("nano", num_classes=2).save(tmp_path / "nano.pth")
    with pytest.raises(UserError, match=r"nano\.pth holds no RT-DETR, PResNet or HGNetv2 weights"):
        RTDETR.from_pretrained(tmp_path / "nano.pth")
    assert isinstance(load_model(tmp_path / "nano.pth"), RTMDet)
    torch.save({"layer1.0.weight": torch.zeros(3)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"resnet\.pth holds none of .*'layer1\.0\.weight'"):
        load_model(tmp_path / "resnet.pth")


def test_unequal_points_of_one_sum_are_told_apart(tmp_path):
    unlike_fresh(RTDETR("r18", 2, 3, num_points=(2, 4, 3))).save(tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"num_points \(2, 4, 3\), not \(3, 3, 3\)"):
        RTDETR("r18", 2, 3, num_points=(3, 3, 3)).load_weights(read_checkpoint(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop(f"backbone.res_layers.1.blocks.0.{A}"), r"does not fit .*branch2a"),
        (lambda state: state.update({"decoder.enc_score_head.weight": torch.zeros(())}), "is damaged"),
        (lambda state: state.update({"decoder.enc_score_head.weight": torch.zeros(0, 256)}), "at least one class"),
        (lambda state: state.update({"encoder.unheard_of": torch.zeros(1)}), "does not fit .*unheard_of"),
        (
            lambda state: state.update({f"backbone.res_layers.2.blocks.2.{A}": torch.zeros(1)}),
            "no RT-DETR",
        ),
    ],
)
def test_damaged_files(model, tmp_path, change, words):
    state = OrderedDict(with_computed(model))
    change(state)
    torch.save({"model": state}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=words) as told:
        load_model(tmp_path / "w.pth")
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [({"num_queries": "x"}, "num_queries is 'x'"), ({"decoder_layers": 9}, "9"), ({"sampling": 3}, "sampling is '3'")],
)
def test_options_of_a_wrong_kind(model, tmp_path, options, words):
    torch.save({"model": model.state_dict(), "meta": {"rtmdet_fast": options}}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=words):
        load_model(tmp_path / "w.pth")


def test_the_published_files_of_discrete_sampling_are_known_by_name(tmp_path):
    model = RTDETR("r18", 2, 3)
    name = PRETRAINED["rtdetrv2-r18-discrete"].rsplit("/", 1)[1]
    for path, sampling in ((tmp_path / name, "discrete"), (tmp_path / "w.pth", "bilinear")):
        torch.save({"model": with_computed(model)}, path)
        assert load_model(path).decoder.sampling == sampling
    assert load_model(tmp_path / "w.pth", sampling="discrete").decoder.sampling == "discrete"


def test_a_config_that_cannot_be_read(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read as JSON"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="cannot be read as a file of safetensors"):
        load_model(tmp_path)
