"""What runs of OpenMMLab's own tests are added up to. That mmdet's page is written from it: tests/test_docs.py."""

import pytest

from benches import openmmlab_judge, openmmlab_table


def run(tests: dict[str, str], torch: str = "2.13.0", **settings: bool) -> openmmlab_table.Run:
    """What the judge writes."""
    outcomes = {f"tests/test_ops/test_{test}": {"outcome": outcome, "why": "/a/b"} for test, outcome in tests.items()}
    settings = dict.fromkeys(("without", "patch", "fake_gpu", "gpu"), False) | settings
    return {"suite": "mmcv", **settings, "with": {"torch": torch}, "tests": outcomes}


def test_parts_of_a_run_are_one_and_the_newest_outcome_stands():
    runs: list[openmmlab_table.Run] = []
    openmmlab_table.add_run(runs, run({"carafe.py::a": "failed", "carafe.py::b": "passed"}))
    openmmlab_table.add_run(runs, run({"carafe.py::b": "skipped"}, torch="2.14.0"))
    openmmlab_table.add_run(runs, run({"carafe.py::a": "passed", "nms.py::c": "skipped"}))
    assert [(each["with"]["torch"], [*each["tests"].values()]) for each in runs] == [
        ("2.14.0", ["skipped"]),
        ("2.13.0", ["passed", "passed", "skipped"]),
    ]
    openmmlab_table.add_run(runs, run({"carafe.py::b": "passed", "nms.py::c": "passed"}, fake_gpu=True))
    results = {"runs": runs, "models": []}
    rows = {row.split("`")[1]: row for row in openmmlab_table.ops(results) if "`" in row and "stands" not in row}
    assert rows["carafe"].endswith("| yes | yes | yes | not run | 2 of 2 | none |")
    assert rows["nms"].endswith("| yes | none | yes | not run | none | 1 of 1 |")
    openmmlab_table.add_run(runs, run({"nms.py::c": "passed", "nms.py::d": "failed"}, gpu=True))
    assert "| mmcv's tests: 1 of 2 | none | 1 of 1 |" in [*openmmlab_table.ops(results)][2]
    rows = [row for row in openmmlab_table.suites(results) if row.startswith("| mmcv")]
    assert "| mmcv | over the stand-in | 2 | 0 | 0 | 1 | torch 2.13.0 |" in rows and len(rows) == 4


def test_an_op_without_a_test_is_not_said_to_run_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(openmmlab_table, "TESTS", tmp_path)
    rows = [*openmmlab_table.ops({"runs": [], "models": []})][2:]
    assert len(rows) == len(openmmlab_table.OPS) and all(
        row.endswith("| not tested | not run | not run | not run |") for row in rows
    )


def test_a_model_that_ran_again_stands_in_its_place():
    models = [{"library": "mmdet", "model": name, "failed": "x", "seconds": 1} for name in "ab"]
    openmmlab_table.add_models(models, [{"library": "mmdet", "model": "a", "failed": "y", "seconds": 2}])
    assert [(model["model"], model["failed"]) for model in models] == [("a", "y"), ("b", "x")]


@pytest.mark.parametrize(
    ("name", "source", "asks"),
    [
        (
            "test_a[cuda]",
            "@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda')])\ndef test_a(device):",
            True,
        ),
        (
            "test_a[cpu]",
            "@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda')])\ndef test_a(device):",
            False,
        ),
        ("test_b", "def test_b():\n    if not IS_CUDA_AVAILABLE:\n        return", True),
        ("test_c_1_cpu", "@parameterized.expand([('cuda',), ('cpu',)])\ndef test_c(self, device):", False),
        ("test_d", "def test_d():\n    x = torch.zeros(1)", False),
    ],
)
def test_who_asks_for_a_gpu(name, source, asks):
    assert openmmlab_judge.asks_for_a_gpu(name, source) == asks
