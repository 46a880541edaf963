"""Drop-in parts for OpenMMLab: `mmcv_ext` (mmcv's compiled module, without compiling) and `mmdet` (batched targets)."""
