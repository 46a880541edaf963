"""What a machine with nothing but torch and numpy can do, and which room of the package may import which."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import rtmdet_fast

CODE = """
import sys
for name in ("cv2", "pycocotools", "matplotlib", "PIL", "tyro", "tqdm", "tensorboard"):
    sys.modules[name] = None  # importing it raises ImportError
import torch
import rtmdet_fast.ops
from rtmdet_fast import RTMDet
from rtmdet_fast.models.rtmdet.detection_head import Targets
model = RTMDet("nano", num_classes=2)
targets = Targets(torch.tensor([[[4.0, 4, 30, 40]]]), torch.tensor([[1]]), torch.tensor([1]))
losses = model(torch.randn(1, 3, 64, 64), targets)
sum(losses.values()).backward()
found = model.detect(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), [(1.0, 1.0)], [(64, 64)])
assert len(found) == 1
print("fine")
"""


def test_models_losses_and_detection_need_only_torch_and_numpy():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.stdout.strip() == "fine", done.stderr


HEAVY = {"torch", "torch._dynamo", "torch._inductor", "sympy", "cv2", "PIL", "matplotlib", "pycocotools", "scipy"}
HEAVY |= {"tensorboard", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf", "safetensors"}
OPENMMLAB = {"mmcv", "mmdet", "mmengine", "mmrotate", "torchvision"}
HEAVY |= {"rtmdet_fast.compat", "mmcv._ext", *OPENMMLAB}


def imported_by(code: str) -> set[str]:
    """Which of the heavy modules a process has imported after this code."""
    code += "\nimport sys\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return HEAVY & set(done.stderr.split())


@pytest.mark.parametrize(
    "code",
    [
        "import rtmdet_fast; dir(rtmdet_fast)",
        "import rtmdet_fast.cli",
        *(
            f"from rtmdet_fast.cli import main\ntry: main({arguments})\nexcept SystemExit as end: assert not end.code"
            for arguments in (["--version"], ["--help"], ["train", "--help"], ["predict", "--help"])
        ),
    ],
)
def test_help_needs_no_pytorch(code):
    assert not imported_by(code)


CPU = """
import torch
from rtmdet_fast import RTMDet, accelerate
model = RTMDet("nano", num_classes=2).eval()
with torch.no_grad():
    model(torch.randn(1, 3, 64, 64))
"""


def test_a_model_on_a_cpu_needs_nothing_of_torch_compile():
    assert imported_by(CPU) == {"torch"}


def test_the_parts_for_openmmlab_are_imported_by_those_who_ask_for_them():
    """By no other module, wherever in it; and the watch above sees it where someone does."""
    known = modules()
    for name, path in known.items():
        if not name.startswith("rtmdet_fast.compat"):
            assert not [imported for imported in imports(path, known) if imported.startswith("rtmdet_fast.compat")], (
                name
            )
            text = path.read_text()
            assert not re.search(rf"^\s*(from|import) +({'|'.join(OPENMMLAB)})\b", text, re.MULTILINE), name
    seen = imported_by("import rtmdet_fast.compat.mmcv_ext")
    assert {"rtmdet_fast.compat", "mmcv._ext"} <= seen


def test_the_names_of_the_package_are_found_when_asked_for():
    assert set(rtmdet_fast.__all__) <= set(dir(rtmdet_fast))
    assert all(getattr(rtmdet_fast, name) for name in rtmdet_fast.__all__)
    with pytest.raises(AttributeError, match=r"^module 'rtmdet_fast' has no attribute 'bogus'$"):
        _ = rtmdet_fast.bogus
    with pytest.raises(ImportError, match="cannot import name 'bogus'"):
        from rtmdet_fast import bogus  # noqa: F401


PACKAGE = Path(rtmdet_fast.__file__).parent
FLOORS = (
    "errors",
    "files class_names devices distributed",
    "images pages",
    "kernels geometry",
    "ops inference",
    "compat",
    "models",
    "acceleration data export",
    "predictor",
    "evaluation tasks",
    "training",
    "cli",
)
"""From the ground up: a room imports from itself and from the floors below."""
DOORS: dict[str, set[str]] = {
    "rtmdet_fast.models.detector": {
        "rtmdet_fast.data.layout",
        "rtmdet_fast.evaluation.evaluate",
        "rtmdet_fast.export.export",
        "rtmdet_fast.predictor.predictor",
        "rtmdet_fast.tasks",
        "rtmdet_fast.training.fit",
    },
}
"""Modules with methods that open what stands above, and what these import, inside of functions only."""


def modules(folder: Path = PACKAGE) -> dict[str, Path]:
    """Files of the package by the names they import by; `kernels`, a link, is gone into too."""
    found = {}
    for path in folder.iterdir():
        if path.is_dir():
            found |= modules(path)
        elif path.suffix == ".py":
            name = ".".join(("rtmdet_fast", *path.relative_to(PACKAGE).with_suffix("").parts))
            found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: dict[str, Path], *, doors: bool = True) -> set[str]:
    """Which of the known modules a file imports, wherever in it; without `doors` not those of DOORS in its functions.

    Such an import outside of functions counts in any case.
    """
    tree = ast.parse(path.read_text())
    found = _imported(ast.walk(tree), path, known)
    if doors:
        return found
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    outside = _imported((node for node in ast.walk(tree) if node not in inside), path, known)
    opened = {imported for name, targets in DOORS.items() if known.get(name) == path for imported in targets}
    return found - (opened - outside)


def _imported(nodes: Iterable[ast.AST], path: Path, known: dict[str, Path]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            members = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= members & known.keys() or {node.module}
    return found & known.keys()


def test_every_room_stands_on_a_floor_and_imports_downwards_only():
    known = modules()
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
    front = ("rtmdet_fast", "rtmdet_fast.__main__")  # what users import and run
    room_of = {name: name.split(".")[1] for name in known if name not in front}
    assert set(room_of.values()) == floor_of.keys()
    wrong = [
        f"{name} imports {imported}"
        for name, room in room_of.items()
        for imported in imports(known[name], known, doors=False) - {"rtmdet_fast"}
        if room_of[imported] != room and floor_of[room_of[imported]] >= floor_of[room]
    ]
    assert not wrong


def test_no_two_modules_import_each_other():
    known = modules()
    graph = {name: imports(path, known, doors=False) - {name} for name, path in known.items()}
    graphlib.TopologicalSorter(graph | {"rtmdet_fast": set()}).prepare()


@pytest.mark.parametrize(
    "text", ["from rtmdet_fast.cli import main", "import rtmdet_fast.cli", "from rtmdet_fast import cli"]
)
def test_an_import_of_any_form_is_seen(text, tmp_path):
    (tmp_path / "a.py").write_text(f"def f():\n    {text}\n")
    assert imports(tmp_path / "a.py", modules()) == {"rtmdet_fast.cli"}


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("def f():\n    from rtmdet_fast.export.export import export\n", False),
        ("class A:\n    def f(self):\n        import rtmdet_fast.export.export\n", False),
        ("from rtmdet_fast.export.export import export\n", True),
        ("class A:\n    from rtmdet_fast.export.export import export\n", True),
        ("import rtmdet_fast.export.export\ndef f():\n    import rtmdet_fast.export.export\n", True),
        ("def f():\n    from rtmdet_fast.export.engine import Engine\n", True),
    ],
)
def test_a_door_opens_inside_of_functions_to_what_it_names(text, counts, tmp_path):
    (tmp_path / "detector.py").write_text(text)
    known = modules() | {"rtmdet_fast.models.detector": tmp_path / "detector.py"}
    assert len(imports(tmp_path / "detector.py", known, doors=False)) == counts
    (tmp_path / "other.py").write_text(text)  # which is not in DOORS
    assert len(imports(tmp_path / "other.py", known, doors=False)) == 1
