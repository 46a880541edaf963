"""Class names in one form, whatever they are read from."""

import json

import pytest
import torch

from rtmdet_fast.class_names import class_name
from rtmdet_fast.data.coco import CocoDataset
from rtmdet_fast.errors import UserError
from rtmdet_fast.models.checkpoint import read_checkpoint
from rtmdet_fast.models.detector import resolve_class_names

FORMS = {
    "traffic light": "traffic light",
    " traffic\n\tlight\r\n": "traffic light",
    "a\u2028b\x85c\xa0d": "a b c d",
    "nul\0, bell\a": "nul\ufffd, bell\ufffd",
    "half \ud83d of a pair": "half \ufffd of a pair",
    "円 👩\u200d🚒 क्षि": "円 👩\u200d🚒 क्षि",
    " \n": "",
}


def test_forms():
    assert {name: class_name(name) for name in FORMS} == FORMS
    assert all(class_name(name) == name for name in FORMS.values())


def test_of_annotations_models_and_checkpoints(tmp_path):
    names = [name for name, form in FORMS.items() if form][1:]
    forms = tuple(FORMS[name] for name in names)
    (tmp_path / "a.json").write_text(
        json.dumps({"images": [], "categories": [{"id": i, "name": name} for i, name in enumerate(names)]})
    )
    dataset = CocoDataset(tmp_path / "a.json", tmp_path)
    assert dataset.class_names == forms
    assert CocoDataset(tmp_path / "a.json", tmp_path, class_names=names).category_ids == dataset.category_ids
    assert resolve_class_names(None, names, ()) == forms
    torch.save(
        {"meta": {"classes": [*names, "\n"]}, "state_dict": {"backbone.stem.0.w": torch.zeros(1)}}, tmp_path / "a.pth"
    )
    assert read_checkpoint(tmp_path / "a.pth").class_names == (*forms, f"class {len(forms)}")


def test_no_name():
    with pytest.raises(UserError, match=r"class_names\[1\] is '\\n'; each class needs a name"):
        resolve_class_names(None, ["a", "\n"], ())
