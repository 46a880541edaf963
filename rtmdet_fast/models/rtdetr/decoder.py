"""The decoder of RT-DETR (arXiv:2304.08069): query selection, then layers that refine the boxes of the queries.

Legend: B images, S cells of all levels (stride 8 first, row by row), C classes, Q queries, N denoising queries before
them, L layers, H heads, D channels of a head, P sampling points of all levels (stride 8 first). Boxes are cxcywh
relative to the image, in [0, 1]; `unact` ones are their logits.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rtmdet_fast.kernels.deformable_attention import box_deformable_attention
from rtmdet_fast.kernels.deformable_attention_torch import box_locations, deformable_attention_grid_sample
from rtmdet_fast.models.rtdetr.boxes import inverse_sigmoid
from rtmdet_fast.models.rtdetr.denoising import Denoising
from rtmdet_fast.models.rtdetr.layers import MLP, ConvNorm, SelfAttention, made_once

CHANNELS, HEADS, FEEDFORWARD = 256, 8, 1024
STRIDES = (8, 16, 32)
Sampling = Literal["bilinear", "discrete"]


class DecoderOutput(NamedTuple):
    """logits [L, B, N + Q, C] and boxes [L, B, N + Q, 4] of every layer, in eval mode of the last one alone (L = 1).

    encoder_logits [B, Q, C], encoder_boxes [B, Q, 4]: of the selected cells, topk [B, Q] of the S, the best first.
    """

    logits: Tensor
    boxes: Tensor
    encoder_logits: Tensor
    encoder_boxes: Tensor
    topk: Tensor


@made_once
def anchors(sizes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Boxes [S, 4] unact about the cells of maps of (height, width), strides 8, 16, …, and which are valid [S, 1].

    Their sides are 0.05, 0.1, … of the image's. A cell within 0.01 of the image's edge is not valid, and infinite.
    """
    levels = []
    for level, (height, width) in enumerate(sizes):
        y, x = torch.meshgrid(
            (torch.arange(height, device=device) + 0.5) / height,
            (torch.arange(width, device=device) + 0.5) / width,
            indexing="ij",
        )
        side = torch.full_like(x, 0.05 * 2**level)
        levels.append(torch.stack((x, y, side, side), -1).flatten(0, 1))
    boxes = torch.cat(levels)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    return torch.log(boxes / (1 - boxes)).where(valid, torch.inf), valid


class DeformableAttention(nn.Module):
    """Each query sees a few places about its box in every level, which it chooses itself.

    points: how many in each level.
    """

    def __init__(self, points: tuple[int, ...], sampling: Sampling, published_clamp: bool):
        super().__init__()
        self.points, self.sampling, self.published_clamp = points, sampling, published_clamp
        self.sampling_offsets = nn.Linear(CHANNELS, HEADS * sum(points) * 2)
        self.attention_weights = nn.Linear(CHANNELS, HEADS * sum(points))
        self.value_proj, self.output_proj = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """At first, head k looks along the direction of angle 2πk/8, with one point further out than the other."""
        nn.init.zeros_(self.sampling_offsets.weight)
        angle = torch.arange(HEADS) * (2 * math.pi / HEADS)
        direction = torch.stack((angle.cos(), angle.sin()), -1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.cat([torch.arange(1, p + 1) for p in self.points])
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((direction[:, None] * distance[:, None]).flatten())
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)
        self.sampling_offsets.requires_grad_(self.sampling == "bilinear")  # whole cells have no gradient

    def forward(
        self, queries: Tensor, references: Tensor, memory: Tensor, sizes: tuple[tuple[int, int], ...]
    ) -> Tensor:
        """queries [B, Q, 256], boxes [B, Q, 4], memory [B, S, 256] → [B, Q, 256]."""
        P = sum(self.points)
        value = self.value_proj(memory).unflatten(2, (HEADS, -1))
        offsets = self.sampling_offsets(queries).unflatten(2, (HEADS, P, 2))
        logits = self.attention_weights(queries).unflatten(2, (HEADS, P))
        options: dict[str, Any] = dict(method=self.sampling, published_clamp=self.published_clamp)
        if torch.compiler.is_exporting():  # for runtimes that have standard operators alone
            places = box_locations(references, offsets, self.points).to(value.dtype)
            attended = deformable_attention_grid_sample(
                value, sizes, places, logits.softmax(-1), self.points, **options
            )
        else:
            attended = box_deformable_attention(value, sizes, references, offsets, logits, self.points, **options)
        return self.output_proj(attended)


class DecoderLayer(nn.Module):
    """Attention among the queries, deformable attention to the memory, two linear layers; a LayerNorm after each."""

    def __init__(self, cross_attn: DeformableAttention):
        super().__init__()
        self.self_attn, self.norm1 = SelfAttention(CHANNELS, HEADS), nn.LayerNorm(CHANNELS)
        self.cross_attn, self.norm2 = cross_attn, nn.LayerNorm(CHANNELS)
        self.linear1, self.linear2 = nn.Linear(CHANNELS, FEEDFORWARD), nn.Linear(FEEDFORWARD, CHANNELS)
        self.norm3 = nn.LayerNorm(CHANNELS)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        references: Tensor,
        memory: Tensor,
        sizes: tuple[tuple[int, int], ...],
        blocked: Tensor | None,
    ) -> Tensor:
        x = self.norm1(x + self.self_attn(x, position, blocked))
        x = self.norm2(x + self.cross_attn(x + position, references, memory, sizes))
        # float16 ends at 65504, and what is infinite would be NaN after the LayerNorm
        return self.norm3((x + self.linear2(F.relu(self.linear1(x)))).clamp(-65504, 65504))


class EncoderOutput(nn.Sequential):
    """Linear layer and LayerNorm, by the names that the version gives them."""

    def __init__(self, names: tuple[str, str]):
        super().__init__()
        self.add_module(names[0], nn.Linear(CHANNELS, CHANNELS))
        self.add_module(names[1], nn.LayerNorm(CHANNELS))


class Decoder(nn.Module):
    """Features of the encoder → logits and boxes of the queries.

    Attributes:
        num_queries: how many cells become queries; all of them where there are fewer
        num_layers: that run in eval mode, the first ones
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        num_layers: int,
        num_queries: int,
        points: tuple[int, ...],
        sampling: Sampling,
        version: int,
        *,
        published_clamp: bool = False,
    ):
        """version: 1 or 2, which differ by a name and by initial weights."""
        super().__init__()
        self.num_layers, self.num_queries, self.num_points, self.sampling = num_layers, num_queries, points, sampling
        self.input_proj = nn.ModuleList(ConvNorm(in_channels, CHANNELS) for _ in points)
        layers = nn.ModuleList(
            DecoderLayer(DeformableAttention(points, sampling, published_clamp)) for _ in range(num_layers)
        )
        self.decoder = nn.ModuleDict({"layers": layers})  # for the published names
        self.denoising_class_embed = nn.Embedding(num_classes + 1, CHANNELS, padding_idx=num_classes)
        self.query_pos_head = MLP(4, 2 * CHANNELS, CHANNELS)
        self.enc_output = EncoderOutput(("0", "1") if version == 1 else ("proj", "norm"))
        self.enc_score_head = nn.Linear(CHANNELS, num_classes)
        self.enc_bbox_head = MLP(CHANNELS, CHANNELS, CHANNELS, 4)
        self.dec_score_head = nn.ModuleList(nn.Linear(CHANNELS, num_classes) for _ in range(num_layers))
        self.dec_bbox_head = nn.ModuleList(MLP(CHANNELS, CHANNELS, CHANNELS, 4) for _ in range(num_layers))
        self.reset_parameters(version)

    def reset_parameters(self, version: int) -> None:
        """The initial weights of the published recipe, where they are not PyTorch's own."""
        for score_head in (self.enc_score_head, *self.dec_score_head):
            nn.init.constant_(score_head.bias, -math.log(99))  # a first score of 0.01 for every class
        for bbox_head in (self.enc_bbox_head, *self.dec_bbox_head):
            nn.init.zeros_(bbox_head.layers[-1].weight)  # a first box that is the reference's
            nn.init.zeros_(bbox_head.layers[-1].bias)
        for linear in (self.enc_output[0], *self.query_pos_head.layers):
            nn.init.xavier_uniform_(linear.weight)
        if version == 2:
            for name, weight in (*self.decoder.named_parameters(), *self.input_proj.named_parameters()):
                if name.endswith(("linear1.weight", "linear2.weight", "conv.weight")):
                    nn.init.xavier_uniform_(weight)

    def flatten(self, features: tuple[Tensor, ...]) -> tuple[Tensor, tuple[tuple[int, int], ...]]:
        """Memory [B, S, 256], and the (height, width) of its levels, of the encoder's features."""
        maps = [project(x) for project, x in zip(self.input_proj, features, strict=True)]
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
        return memory, tuple((x.shape[2], x.shape[3]) for x in maps)

    def forward(
        self, memory: Tensor, sizes: tuple[tuple[int, int], ...], denoising: Denoising | None = None
    ) -> DecoderOutput:
        content, references_unact, encoder_logits, topk = self.select(memory, sizes)
        encoder_boxes = references_unact.sigmoid()
        x, references = content.detach(), encoder_boxes.detach()
        blocked = None
        if denoising is not None:
            blocked = denoising.attn_mask
            x = torch.cat((self.denoising_class_embed(denoising.labels).to(x.dtype), x), 1)
            references = torch.cat((denoising.boxes_unact.sigmoid().to(references.dtype), references), 1)
        layers = list(self.decoder.get_submodule("layers").children())
        if not self.training:
            layers = layers[: self.num_layers]
        logits, boxes = [], []
        before: Tensor | None = None
        for i, layer in enumerate(layers):
            position = self.query_pos_head(references.to(x.dtype))
            x = layer(x, position, references, memory, sizes, blocked)
            update = self.dec_bbox_head[i](x)
            box = (update + inverse_sigmoid(references)).sigmoid()
            if self.training:
                # The same boxes, but a layer's loss reaches the box of the layer before it too (look forward twice).
                boxes.append(box if before is None else (update + inverse_sigmoid(before)).sigmoid())
                logits.append(self.dec_score_head[i](x))
                before = box
            elif i == len(layers) - 1:
                boxes.append(box)
                logits.append(self.dec_score_head[i](x))
            references = box.detach()
        return DecoderOutput(torch.stack(logits), torch.stack(boxes), encoder_logits, encoder_boxes, topk)

    def select(self, memory: Tensor, sizes: tuple[tuple[int, int], ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the Q cells with the best scores: content [B, Q, 256], boxes unact, logits [B, Q, C], and indices."""
        boxes, valid = anchors(sizes, memory.device)
        encoded = self.enc_output(memory.where(valid, 0.0))
        logits = self.enc_score_head(encoded)
        topk = logits.amax(-1).topk(min(self.num_queries, memory.shape[1])).indices
        content, logits = (x.gather(1, topk[..., None].expand(-1, -1, x.shape[2])) for x in (encoded, logits))
        return content, self.enc_bbox_head(content) + boxes[topk], logits, topk
