"""Layers of ViTDet (Li et al., arXiv:2203.16527) and MViTv2 (Li et al., arXiv:2112.01526), with detectron2's key names.

Tokens stay maps, [n, h, w, c], all the way. Relative positions are decomposed: the bias of a pair of places is that
of their rows plus that of their columns, each a product of the query and a row of a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import BeforeValidator
from torch import Tensor, nn

from service.backbones.detectron2_resnet import ChannelNorm
from service.backbones.lazyconfig import short_class
from service.backbones.openmmlab import Scale
from service.backbones.tracing import ceil_div, is_known, is_tracing
from service.errors import TooLarge

MAX_PATCHES = 16_384  # 2048 px in patches of 16
# Windows pad a map that is much longer than high to many times its size.
MAX_PADDED_PATCHES = 4 * MAX_PATCHES
# Biases that are held at once, in numbers: more queries than have so many are taken in turns.
MAX_BIASES = 2**26
Size = tuple[int, int]

# --- windows --------------------------------------------------------------------------------------


def split_windows(maps: Tensor, window: int) -> tuple[Tensor, Size]:
    """[n, h, w, c] to windows [n * count, window, window, c] and the padded (h, w); zeros right and bottom.

    Raises:
        TooLarge: more than 65536 patches with the padding.
    """
    n, height, width, channels = maps.shape
    rows, columns = height + -height % window, width + -width % window
    if rows * columns > MAX_PADDED_PATCHES:
        raise TooLarge(f"{rows * columns} patches in windows of {window}; the limit is {MAX_PADDED_PATCHES}")
    padded = F.pad(maps, (0, 0, 0, columns - width, 0, rows - height))
    cut = padded.reshape(n, rows // window, window, columns // window, window, channels)
    return cut.transpose(2, 3).reshape(-1, window, window, channels), (rows, columns)


def merge_windows(windows: Tensor, padded: Size, size: Size) -> Tensor:
    """Windows [n * count, window, window, c] of a map padded to `padded` back to [n, *size, c]."""
    side, channels = windows.shape[1], windows.shape[3]
    rows, columns = padded
    cut = windows.reshape(-1, rows // side, columns // side, side, side, channels)
    return cut.transpose(2, 3).reshape(-1, rows, columns, channels)[:, : size[0], : size[1]]


# --- positions ------------------------------------------------------------------------------------


def relative_table(table: Tensor, queries: int, keys: int) -> Tensor:
    """[queries, keys, c] of a table [length, c] of relative positions along one side.

    A table of another length than the sides need is resampled; the shorter side's steps are as long as the
    longer one's allow.

    Raises:
        TooLarge: more than 2**26 numbers.
    """
    if queries * keys * table.shape[1] > MAX_BIASES:
        raise TooLarge(f"relative positions among {queries} and {keys} patches a side; resize the images")
    length = 2 * max(queries, keys) - 1
    if not is_known((length,), table.shape[:1]):
        table = F.interpolate(table.T[None], size=length, mode="linear")[0].T
    query = torch.arange(queries, device=table.device)[:, None] * max(keys / queries, 1.0)
    key = torch.arange(keys, device=table.device)[None, :] * max(queries / keys, 1.0)
    offset = (keys - 1) * max(queries / keys, 1.0)
    return table[(query - key + offset).long()]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tables: tuple[Tensor, Tensor] | None,
    query_size: Size,
    key_size: Size,
) -> Tensor:
    """Attention with decomposed biases of relative position; the biases are products of the unscaled query.

    Args:
        query: [n, heads, h * w, c] of a map of `query_size`.
        key: the same of `key_size`, as is `value`.
        tables: of rows and of columns, [length, c] each; None for none.
        query_size: [h, w].
        key_size: [h, w].

    Returns:
        [n, heads, h * w, c] of `query_size`.
    """
    if tables is None:
        return F.scaled_dot_product_attention(query, key, value)
    down, across = _biases(query, tables, query_size, key_size)
    n, heads, length, _ = query.shape
    # A trace has no turns: how many there are would be fixed for the traced size.
    step = length if is_tracing() else max(1, MAX_BIASES // (n * heads * key.shape[2]))
    parts = []
    for start in (0,) if is_tracing() else range(0, length, step):
        part = slice(start, start + step)
        bias = (down[:, :, part, :, None] + across[:, :, part, None, :]).flatten(3)
        parts.append(F.scaled_dot_product_attention(query[:, :, part], key, value, attn_mask=bias))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _biases(
    query: Tensor, tables: tuple[Tensor, Tensor], query_size: Size, key_size: Size
) -> tuple[Tensor, Tensor]:
    """[n, heads, queries, key rows] and [n, heads, queries, key columns]."""
    rows = relative_table(tables[0], query_size[0], key_size[0])
    columns = relative_table(tables[1], query_size[1], key_size[1])
    placed = query.reshape(*query.shape[:2], *query_size, query.shape[3])
    down = torch.einsum("nahwc,hkc->nahwk", placed, rows)
    across = torch.einsum("nahwc,wkc->nahwk", placed, columns)
    return down.flatten(2, 3), across.flatten(2, 3)


@dataclass(frozen=True)
class PositionTable:
    """Absolute positions of a square grid of `side` patches, behind that of a class token; `side` 0 is none."""

    side: int
    with_cls_token: bool

    def made(self, width: int) -> nn.Parameter | None:
        """The table, [1, tokens, width]."""
        if not self.side:
            return None
        return nn.Parameter(torch.empty(1, self.side**2 + self.with_cls_token, width))

    def added(self, maps: Tensor, table: Tensor | None) -> Tensor:
        """[n, h, w, c] with the positions of its places, resampled where it is no such grid."""
        if table is None:
            return maps
        size = (maps.shape[1], maps.shape[2])
        grid = table[:, int(self.with_cls_token) :].reshape(1, self.side, self.side, -1)
        if is_known(size, (self.side, self.side)):
            return maps + grid
        resized = F.interpolate(grid.permute(0, 3, 1, 2), size=size, mode="bicubic", align_corners=False)
        return maps + resized.permute(0, 2, 3, 1)


# --- layers ---------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    """Patches projected to a width; they may overlap. Key `proj`."""

    def __init__(self, inputs: int, width: int, kernel: Size, stride: Size, padding: Size = (0, 0)) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, width, kernel, stride=stride, padding=padding)

    def forward(self, images: Tensor) -> Tensor:
        """[n, c, h, w] to [n, rows, columns, width]; what is left right and bottom of whole patches is not read.

        Raises:
            TooLarge: more than 16384 patches, which attention would take for hours.
        """
        strides = self.proj.stride
        patches = math.prod(
            [ceil_div(side, stride) for side, stride in zip(images.shape[2:], strides, strict=True)]
        )
        if patches > MAX_PATCHES:
            raise TooLarge(f"{patches} patches of {strides[0]} px; the limit is {MAX_PATCHES}")
        maps: Tensor = self.proj(images)
        return maps.permute(0, 2, 3, 1)


class RelativePositions(Scale):
    """Base of attention with tables of relative positions; keys `rel_pos_h`, `rel_pos_w`."""

    def add_tables(self, lengths: Size | None, channels: int) -> None:
        """Tables of so many rows and columns; none for None."""
        self.rel_pos_h = nn.Parameter(torch.empty(lengths[0], channels)) if lengths else None
        self.rel_pos_w = nn.Parameter(torch.empty(lengths[1], channels)) if lengths else None

    def start(self) -> None:
        """All places alike at first."""
        for table in (self.rel_pos_h, self.rel_pos_w):
            if table is not None:
                nn.init.zeros_(table)

    def tables(self) -> tuple[Tensor, Tensor] | None:
        """Of rows and of columns."""
        if self.rel_pos_h is None or self.rel_pos_w is None:
            return None
        return self.rel_pos_h, self.rel_pos_w


class Attention(RelativePositions):
    """Self-attention of a whole map; keys `qkv`, `proj`, and of `RelativePositions`.

    `made_for` is the [h, w] of the map that the tables of relative positions are for, None for no tables.
    """

    def __init__(
        self, width: int, heads: int, *, qkv_bias: bool = True, made_for: Size | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)
        lengths = (2 * made_for[0] - 1, 2 * made_for[1] - 1) if made_for else None
        self.add_tables(lengths, width // heads)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        n, height, width, channels = maps.shape
        qkv = self.joint(maps).reshape(n, height * width, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        size = (height, width)
        mixed = attend(query, key, value, self.tables_for(size), size, size)
        projected: Tensor = self.proj(mixed.transpose(1, 2).reshape(maps.shape))
        return projected

    def joint(self, maps: Tensor) -> Tensor:
        """Queries, keys and values of [n, h, w, c], [n, h, w, 3c]."""
        found: Tensor = self.qkv(maps)
        return found

    def tables_for(self, size: Size) -> tuple[Tensor, Tensor] | None:  # noqa: ARG002 - relatives resample them
        """The tables for a map of this size."""
        return self.tables()


class FeedForward(nn.Module):
    """Two linear layers; keys `fc1`, `fc2`."""

    def __init__(self, width: int, hidden: int, activation: ActivationName = "GELU") -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, maps: Tensor) -> Tensor:
        """[..., c] to the same shape."""
        projected: Tensor = self.fc2(self.activation(self.fc1(maps)))
        return projected


class ResidualBottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with layer norms, added to the map; keys `conv1`, `norm1` and so on."""

    def __init__(self, width: int, inner: int, activation: ActivationName = "GELU") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, inner, 1, bias=False)
        self.norm1 = ChannelNorm(inner, eps=1e-6)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.norm2 = ChannelNorm(inner, eps=1e-6)
        self.conv3 = nn.Conv2d(inner, width, 1, bias=False)
        self.norm3 = ChannelNorm(width, eps=1e-6)
        self.activation = ACTIVATIONS[activation]

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        inner = maps.permute(0, 3, 1, 2)
        inner = self.activation(self.norm1(self.conv1(inner)))
        inner = self.activation(self.norm2(self.conv2(inner)))
        added: Tensor = self.norm3(self.conv3(inner))
        return maps + added.permute(0, 2, 3, 1)


# --- what configs say of layers -------------------------------------------------------------------

ActivationName = Literal["GELU", "ReLU", "SiLU"]
ACTIVATIONS: dict[ActivationName, Callable[[Tensor], Tensor]] = {
    "GELU": F.gelu,
    "ReLU": F.relu,
    "SiLU": F.silu,
}
ActivationLayer = Annotated[ActivationName, BeforeValidator(short_class)]
