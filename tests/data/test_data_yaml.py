"""The part of YAML that is read: as PyYAML reads it, or refused in a sentence."""

from contextlib import suppress

import numpy as np
import pytest

from rtmdet_fast.data.formats.data_yaml import read_yaml
from rtmdet_fast.errors import UserError

KEYS = ("names", "train", "val", "path", "nc", "kpt_shape")
READ = (
    "names: [a, b]\n",
    "names: ['a b', \"c\\u00e9\", d's, 'it''s']  # four\ntrain: ../train/images\nval: ../valid/images # hi\n\nnc: 4\n",
    "path: ../coco8 # root\ntrain: images/train\nnames:\n  0: person\n  1: bicycle\n  2: 'a: b'\n"
    "download: |\n  from x import y\n  # hi: there\n  a: b\n",
    "names:\n- a\n- b#c\n- 'it''s'\nnc: 2\n",
    "names: [aa,\n  bb, # x\n  cc]\nother: 1\n",
    "names: [aa,\nbb,]\n",
    "names: {0: a, 1: b b, '2': \"c\"}\n",
    "train: [a/b, c d]\nval: some long path\n",
    "roboflow:\n  workspace: x\n  url: https://universe.roboflow.com/x\nnames: ['0', 1]\nkpt_shape: [17, 3]\n",
    'names:\n  - a # c\n  - "b # d"\n',
    "---\nnames: []\n",
    "train: C:\\data\\x\n",
    "train: it's # x\n",
    '"names": [yes, no, null, 1e3]\n',
    "# only a comment\n\nnames:\n\n  # here\n  - a\n\n  - b\n",
)
REFUSED = (
    '{"names": 1}\n',
    "names: !!python/object/apply:os.system ['ls']\n",
    "other: &x [1]\nnames: *x\n",
    "names: [a, b",
    "names: [[a], b]\n",
    "names: {0: {1: 2}}\n",
    "names:\n  0:\n    x: 1\n",
    "names:\n  - a\n   - b\n",
    "names: 'a\n",
    'names: "\\x41"\n',
    "names: [a]\nnames: [b]\n",
    "names: {0: a, 0: b}\n",
    "names: |\n  a\n",
    "names: a: b\n",
    "names: a\n  b\n",
    "- a\n",
    "names\n",
    "names: [a, ,b]\n",
)


def given(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return read_yaml(path, KEYS)


def by_pyyaml(text):
    yaml = pytest.importorskip("yaml")
    content = yaml.load(text, yaml.BaseLoader)  # noqa: S506: makes texts, lists and dicts of them only
    return {key: value or (None if value == "" else value) for key, value in content.items() if key in KEYS}


@pytest.mark.parametrize("text", READ)
def test_read_as_pyyaml_reads_it(tmp_path, text):
    assert given(tmp_path / "data.yaml", text) == by_pyyaml(text) != {}


@pytest.mark.parametrize("text", REFUSED)
def test_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"data\.yaml, line \d: ") as told:
        given(tmp_path / "data.yaml", text)
    assert str(told.value).isprintable()


def test_what_is_not_asked_for_may_be_anything(tmp_path):
    text = "a: {b: [!!x &y 1,\n2]}\nb: |\n  x: [\n\n  y\nc: 'd\nnames: [e]\n"
    assert given(tmp_path / "data.yaml", text) == {"names": ["e"]}


def test_whatever_is_read_pyyaml_reads_alike(tmp_path):
    """Texts of the pieces that matter, in any order: refused, or the same."""
    yaml = pytest.importorskip("yaml")
    pieces = ["names", "train", ":", ": ", "\n", "\n  ", "- ", "[", "]", "{", "}", ", ", ",", "a", "b c", "'", '"', "#"]
    pieces += [" #", "0", "1: x", "\n- ", "|", "&x ", "''", "\\", "? ", "-", "\t", "é"]
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(6000):
        text = "names: " * int(rng.random() < 0.5) + "".join(rng.choice(pieces, int(rng.integers(1, 12))))
        try:
            ours = given(tmp_path / "data.yaml", text)
        except UserError as error:
            assert str(error).isprintable()
            continue
        if not ours:  # what PyYAML may refuse for what nobody asked for
            continue
        try:
            theirs = by_pyyaml(text)
        except (yaml.YAMLError, AttributeError, TypeError):
            theirs = None
        assert {key: value or (None if value == "" else value) for key, value in ours.items()} == theirs, text
        read += 1
    assert read > 200


def test_long_lines_take_no_time(tmp_path):
    """Nothing is tried in all ways: a line of what may begin anything is read or refused at once."""
    for piece in (" ", "'", '"', "[", "a:", "a,", "\\", "# ", "x'a"):
        for text in (f"names: {piece * 30_000}", f"names: [{piece * 30_000}", piece * 30_000):
            with suppress(UserError):
                given(tmp_path / "data.yaml", text)
