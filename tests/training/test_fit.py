"""`model.fit` is a run of `train` that starts from the model and gives it the best weights; `model.evaluate`."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from rtmdet_fast import RTDETR, RTMDet, UserError
from rtmdet_fast.cli import main
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.data.layout import find_sources
from rtmdet_fast.data.shapes import CLASSES, make_shapes
from rtmdet_fast.models.families import load_model
from rtmdet_fast.training.callbacks import Callback
from rtmdet_fast.training.config import TrainConfig, resolve
from rtmdet_fast.training.fit import OF_THE_MODEL, config_for
from rtmdet_fast.training.train import make_model, train

SHORT = dict(epochs=1, batch_size=2, num_workers=0, device="cpu", report=False, progress=False)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return make_shapes(tmp_path_factory.mktemp("shapes"), num_train=4, num_val=2, image_size=64)


def make(class_names=CLASSES, seed=1, **options):
    torch.manual_seed(seed)
    model = RTMDet("nano", class_names=class_names, **options).eval()
    for conv in model.bbox_head.rtm_reg:  # boxes of some size around every prior
        torch.nn.init.constant_(conv.bias, 1.5)
    model.image_size = 64
    return model


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert not [name for name in found if not torch.equal(found[name], expected[name])]


def test_a_run_is_that_of_the_command_line_from_the_saved_weights(shapes, tmp_path):
    model = make()
    model.save(tmp_path / "start.pth")
    settings = dict(data=(shapes.root,), size="nano", image_size=64, **SHORT)
    expected = train(TrainConfig(**settings, init=str(tmp_path / "start.pth"), out=tmp_path / "a"))
    # what runs before the weights are made draws no other random numbers
    result = model.fit(str(shapes.root), out=str(tmp_path / "b"), **SHORT)
    assert_equal(weights(load_model(result.best)), weights(load_model(expected.best)))
    assert_equal(weights(model), weights(load_model(result.best)))
    assert result.metrics == expected.metrics and not model.training and model.image_size == 64
    told = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in "ab"}
    assert {key for key in told["a"] if told["a"][key] != told["b"][key]} == {"init", "out"}
    assert sorted(path.name for path in (tmp_path / "b").iterdir() if "tfevents" not in path.name) == [
        "best.pth",
        "config.json",
        "last.pth",
        "metrics.csv",
    ]


def test_a_model_takes_the_classes_of_the_data_and_keeps_what_it_can(shapes, tmp_path):
    model = make(["a", "b"])
    before, reference = weights(model), model
    with pytest.warns(UserWarning, match="rtm_cls"):
        model.fit(shapes.root, lr=1e-12, out=tmp_path / "a", **SHORT)
    assert model is reference and model.class_names == CLASSES
    assert len(model.predict(str(next(shapes.val_images.iterdir())), score_threshold=0.0)) > 0
    kernel = "backbone.stem.0.conv.weight"
    torch.testing.assert_close(model.state_dict()[kernel], before[kernel], rtol=1e-4, atol=1e-6)
    assert model.state_dict()["bbox_head.rtm_cls.0.weight"].shape[0] == len(CLASSES)
    other = make([*CLASSES[:4], "oval"])
    with pytest.warns(UserWarning, match="are taken for those of the training data"):
        other.fit(shapes.root, lr=1e-12, out=tmp_path / "b", **SHORT)
    assert other.class_names == CLASSES


def test_callbacks_hear_of_the_run_and_can_end_it(shapes, tmp_path):
    class Listener(Callback):
        def __init__(self):
            self.heard = []

        def on_step(self, progress):
            self.heard.append(("step", progress.iteration))
            if progress.iteration == 3:
                progress.stop()

        def on_epoch(self, progress):
            self.heard.append(("epoch", progress.epoch))

        def on_end(self, result):
            self.heard.append(("end", result.ended_by))

    listener, model = Listener(), make()
    result = model.fit(shapes.root, **{**SHORT, "epochs": 3}, out=tmp_path, callbacks=[listener])
    assert listener.heard == [("step", 1), ("step", 2), ("epoch", 1), ("step", 3), ("end", "callback")]
    assert_equal(weights(model), weights(load_model(result.best)))


def test_where_a_run_cannot_be_the_model_stays_as_it_was(shapes, tmp_path):
    model = make(["a", "b"])
    before = weights(model)
    for options, told in (
        (dict(data=shapes.root, epoch=3), "fit has no option 'epoch'; the nearest is 'epochs'"),
        (dict(data=shapes.root, size="tiny"), "fit trains the model as it is: size cannot be set"),
        (dict(data=tmp_path / "nowhere"), "nowhere"),
        (dict(), "give --train FILE and --train-images FOLDER, or --data FOLDER"),
        (dict(data=shapes.root, lr=-1.0), "--lr is -1.0"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            model.fit(**options, out=tmp_path / "out")
    assert_equal(weights(model), before)
    with pytest.raises(UserError, match="a model made ready to run cannot be trained"):
        model.fold().fit(shapes.root)


def test_every_setting_of_the_command_line_is_one_of_fit():
    model = make()
    model.image_size = 96
    given = {field.name: field.default for field in fields(TrainConfig) if field.name not in OF_THE_MODEL}
    config = config_for(model, given)
    assert {name: getattr(config, name) for name in given} == given
    config = config_for(model, {})
    assert (config.model, config.size, config.task, config.image_size) == ("rtmdet", "nano", "det", 96)
    config = config_for(model, {"data": ["a", "b"], "out": "c", "val_images": "d", "loggers": "wandb"})
    assert [str(path) for path in (*config.data, config.out, config.val_images)] == ["a", "b", "c", "d"]
    assert config.loggers == ("wandb",) and config_for(model, {"data": "a"}).data == (Path("a"),)


def test_a_model_of_the_other_family_is_made_anew_as_it_is(shapes):
    torch.manual_seed(0)
    model = RTDETR("r18", 2, class_names=CLASSES, num_queries=20, sampling="discrete")
    model.image_size, model.decoder_layers = 64, 2
    settings = resolve(config_for(model, {"data": shapes.root, "device": "cpu"}))
    assert (settings.model, settings.size, settings.version, settings.queries) == ("rtdetr", "r18", 2, 20)
    dataset = CocoDataset(find_sources(shapes.root, "train"), training=True)
    made = make_model(settings, dataset, model)
    assert_equal(weights(made), weights(model))
    assert made.saved_options() == model.saved_options()


def test_dtype_and_place_stay_those_of_the_model(shapes, tmp_path):
    model = make().to(torch.bfloat16)
    model.train().fit(shapes.root, out=tmp_path, **SHORT)
    assert {value.dtype for value in model.parameters()} == {torch.bfloat16} and not model.training


def test_evaluate_gives_what_the_command_gives(shapes, tmp_path):
    model = make()
    model.save(tmp_path / "w.pth")
    arguments = ["eval", "--weights", tmp_path / "w.pth", "--data", shapes.root, "--json", tmp_path / "e.json"]
    assert main([str(argument) for argument in arguments]) == 0
    expected = json.loads((tmp_path / "e.json").read_text())
    evaluation = model.evaluate(shapes.root, progress=False)
    assert evaluation.metrics == {name: expected[name] for name in evaluation.metrics}
    by_parts = model.evaluate(ann=str(shapes.val_ann), images=str(shapes.val_images), progress=False)
    assert by_parts.metrics == evaluation.metrics and by_parts.detections == evaluation.detections
    train_split = model.evaluate(shapes.root, split="train", progress=False)
    assert len({entry["image_id"] for entry in train_split.detections}) == 4
    for options in (dict(), dict(data=shapes.root, ann="a", images="b"), dict(ann="a"), dict(images="b")):
        with pytest.raises(UserError, match=r"^give the folder of a data set, or both ann and images$"):
            model.evaluate(**options)
    with pytest.raises(UserError, match="split 'best' is unknown; choose one of train, val, test"):
        model.evaluate(shapes.root, split="best")
    with pytest.raises(UserError, match=r"are none of the classes wanted \(a"):
        make(["a"]).evaluate(shapes.root)
