"""Tests beside OpenMMLab, in environments of their own: `make test-openmmlab` builds these and runs the tests."""

import rtmdet_fast.compat.mmcv_ext  # noqa: F401 (has to stand before mmdet)
