"""What is read of a data.yaml, or refused in a sentence."""

from contextlib import suppress

import pytest
import yaml

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
    '{"names": 1}\n',
    "other: &x [1]\nnames: *x\n",
    "names:\n  - a\n   - b\n",
    'names: "\\x41"\n',
    "names: |\n  a\n",
    "names: a\n  b\n",
)
REFUSED = (
    "names: [a, b",
    "names: [[a], b]\n",
    "names: {0: {1: 2}}\n",
    "names:\n  0:\n    x: 1\n",
    "names: 'a\n",
    "names: [a]\nnames: [b]\n",
    "names: {0: a, 0: b}\n",
    "names: a: b\n",
    "- a\n",
    "names\n",
    "names: [a, ,b]\n",
    "names: \x01\n",
    "names: " + "[" * 5000,
)


def given(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return read_yaml(path, KEYS)


@pytest.mark.parametrize("text", READ)
def test_read(tmp_path, text):
    """Scalars are text, whatever they look like: a class may be called no, or 007."""
    content = yaml.load(text, yaml.BaseLoader)
    expected = {key: None if value == "" else value for key, value in content.items() if key in KEYS}
    assert given(tmp_path / "data.yaml", text) == expected != {}


@pytest.mark.parametrize("text", REFUSED)
def test_refused(tmp_path, text):
    with pytest.raises(UserError, match=r"data\.yaml(, line \d)?: ") as told:
        given(tmp_path / "data.yaml", text)
    assert str(told.value).isprintable()


def test_nothing_of_it_is_run(tmp_path):
    assert given(tmp_path / "data.yaml", "names: !!python/object/apply:os.system ['ls']\n") == {"names": ["ls"]}


def test_what_is_not_asked_for_may_be_anything(tmp_path):
    text = "a: {b: [!!x &y 1,\n2]}\nb: |\n  x: [\n\n  y\nc: 'd'\nnames: [e]\n"
    assert given(tmp_path / "data.yaml", text) == {"names": ["e"]}


def test_long_lines_take_no_time(tmp_path):
    """Nothing is tried in all ways: a line of what may begin anything is read or refused at once."""
    for piece in (" ", "'", '"', "[", "a:", "a,", "\\", "# ", "x'a"):
        for text in (f"names: {piece * 30_000}", f"names: [{piece * 30_000}", piece * 30_000):
            with suppress(UserError):
                given(tmp_path / "data.yaml", text)
