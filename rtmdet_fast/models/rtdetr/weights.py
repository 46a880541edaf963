"""Weights of RT-DETR by the names that others give them → by those of the published PyTorch code."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

HUGGING_FACE = [
    (r"^model\.backbone\.model\.embedder\.embedder\.0\.", "backbone.conv1.conv1_1."),
    (r"^model\.backbone\.model\.embedder\.embedder\.1\.", "backbone.conv1.conv1_2."),
    (r"^model\.backbone\.model\.embedder\.embedder\.2\.", "backbone.conv1.conv1_3."),
    (r"^model\.backbone\.model\.encoder\.stages\.(\d+)\.layers\.", r"backbone.res_layers.\1.blocks."),
    (r"\.layer\.0\.", ".branch2a."),
    (r"\.layer\.1\.", ".branch2b."),
    (r"\.layer\.2\.", ".branch2c."),
    (r"\.shortcut\.1\.", ".short.conv."),
    (r"\.shortcut\.", ".short."),
    (r"\.convolution\.", ".conv."),
    (r"\.normalization\.", ".norm."),
    (r"^model\.(encoder|decoder)_input_proj\.(\d+)\.0\.", r"\1.input_proj.\2.conv."),
    (r"^model\.(encoder|decoder)_input_proj\.(\d+)\.1\.", r"\1.input_proj.\2.norm."),
    (r"^(model\.decoder\.)?class_embed\.", "decoder.dec_score_head."),
    (r"^(model\.decoder\.)?bbox_embed\.", "decoder.dec_bbox_head."),
    (r"^model\.decoder\.layers\.", "decoder.decoder.layers."),
    (r"^model\.decoder\.query_pos_head\.", "decoder.query_pos_head."),
    (r"^model\.encoder\.", "encoder."),
    (r"^model\.enc_output\.0\.", "decoder.enc_output.proj."),
    (r"^model\.enc_output\.1\.", "decoder.enc_output.norm."),
    (r"^model\.(denoising_class_embed|enc_score_head|enc_bbox_head)\.", r"decoder.\1."),
    (r"\.encoder_attn\.n_points_scale$", ".cross_attn.num_points_scale"),
    (r"\.encoder_attn\.", ".cross_attn."),
    (r"\.self_attn_layer_norm\.", ".norm1."),
    (r"\.encoder_attn_layer_norm\.", ".norm2."),
    (r"^(decoder\..*)\.final_layer_norm\.", r"\1.norm3."),
    (r"\.final_layer_norm\.", ".norm2."),
    (r"\.fc(\d)\.", r".linear\1."),
]
"""Applied one after the other to a name of Hugging Face's, they make version 2's name."""
VERSION_1 = [
    (r"^encoder\.input_proj\.(\d+)\.conv\.", r"encoder.input_proj.\1.0."),
    (r"^encoder\.input_proj\.(\d+)\.norm\.", r"encoder.input_proj.\1.1."),
    (r"^decoder\.enc_output\.proj\.", "decoder.enc_output.0."),
    (r"^decoder\.enc_output\.norm\.", "decoder.enc_output.1."),
]
"""From a name of version 2 to that of version 1, where they differ."""
PROJECTION = re.compile(r"\.([qkv])_proj\.(weight|bias)$")


def from_hugging_face(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights by the published names of their version, which is 2 where they tell points' scales."""
    rules = HUGGING_FACE + ([] if any(key.endswith(".n_points_scale") for key in state) else VERSION_1)
    renamed: dict[str, Tensor] = {}
    projections: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        if (match := PROJECTION.search(key)) is None:
            renamed[key] = value
        else:
            name = f"{key[: match.start()]}.in_proj_{match[2]}"
            projections.setdefault(name, {})[match[1]] = value
    renamed |= {name: torch.cat([parts[part] for part in "qkv"]) for name, parts in projections.items()}
    return renamed


def from_paddle(arrays: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> dict[str, Tensor] | None:
    """Arrays of Paddle, which names them otherwise but keeps their order; None where they are of another model.

    shapes: of the model's state_dict with its keys, in order.
    """
    keys = [key for key in shapes if not key.endswith(".num_batches_tracked")]
    if len(keys) != len(arrays):
        return None
    state: dict[str, Tensor] = {}
    for key, array in zip(keys, arrays.values(), strict=True):
        if key == "decoder.denoising_class_embed.weight":
            array = torch.cat((array, array.new_zeros(1, *array.shape[1:])))  # the padding's row
        elif array.ndim == 2:
            array = array.T
        if array.shape != shapes[key]:
            return None
        state[key] = array.contiguous()
    return state


def points_of(state: Mapping[str, Tensor], heads: int) -> tuple[int, ...] | None:
    """Sampling points of each level; None where the weights do not tell.

    Without the scale of the points only their sum is known, and they are taken to be equal.
    """
    weights = state.get("decoder.decoder.layers.0.cross_attn.attention_weights.bias")
    if (points := points_of_scale(state)) is not None:
        return points
    if weights is None or weights.numel() % (3 * heads) or not weights.numel():
        return None
    return (weights.numel() // (3 * heads),) * 3


def points_of_scale(state: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """Sampling points of each level by the scale that version 2 keeps of each point: 1 over the points of its level."""
    scale = state.get("decoder.decoder.layers.0.cross_attn.num_points_scale")
    if scale is None:
        return None
    values, points = scale.flatten().tolist(), []
    while values and 0 < values[0] <= 1:
        points.append(round(1 / values[0]))
        values = values[points[-1] :]
    return tuple(points) if len(points) == 3 else None
