"""Tests beside OpenMMLab, in environments of their own: `make test-openmmlab` builds these and runs the tests."""

import collections
import collections.abc

import rtmdet_fast.compat.mmcv_ext  # noqa: F401 (has to stand before mmdet)

if not hasattr(collections, "Sequence"):
    collections.Sequence = collections.abc.Sequence  # e2cnn, which mmrotate needs, is older than Python 3.10
