"""The quickest model of `benches.openmmlab_demos`, by its published config; it has deformable convolutions."""

import math
import sys

import pytest
from needs import openmmlab

openmmlab("mmdet")

import rtmdet_fast.compat.mmcv_ext as ext
from benches import openmmlab_demos as demos


@pytest.mark.skipif(sys.modules["mmcv._ext"] is not ext, reason="this mmcv is a compiled one")
def test_centernet_has_losses_gradients_and_detections():
    found = demos.run("mmdet", demos.MMDET["CenterNet"], demos.SIZE)
    assert math.isfinite(found["loss"]) and found["loss"] > 0
    assert found["parameters with gradient"] > 90 and found["detections"] == [100, 100]
