"""EVA-02 (Fang et al., arXiv:2303.11331) as a detector's backbone, with detrex's key names.

It is detectron2's plain ViT whose queries and keys are rotated by their position (Su et al., arXiv:2104.09864), by rows
and by columns, with a gated feed-forward. Windows and the whole map have tables of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, StrictBool
from torch import Tensor, nn

from service.backbones import detectron2_vit
from service.backbones.detectron2_vit import Block, ViT, ViTConfig, ViTSpec
from service.backbones.detrex import LayerNormPartial, MlpRatio, NormLayer
from service.backbones.openmmlab import Computed, Scale, make_family
from service.backbones.vitdet_layers import MAX_PATCHES, ActivationLayer, Size
from service.config.spec import PreprocessDefaults
from service.errors import InvalidConfig

BASE = 10_000.0  # of the frequencies
MAX_SIDE = math.isqrt(MAX_PATCHES)


@dataclass(frozen=True)
class Eva02Spec(ViTSpec):
    """What else decides the numbers.

    `window_side` and `map_side` are how many places high and wide the tables of windows and of the whole map are;
    `trained_side` is how many the first and the last of them are apart, about. `rotated_as_windows` are the blocks
    that take the windows' table.
    """

    window_side: int = 0
    map_side: int = 1
    trained_side: int = 16
    rotated_as_windows: tuple[int, ...] = ()

    @property
    def channels_per_head(self) -> int:
        """Rounded down: what is left of the width is not used."""
        return self.width // self.heads


class Rotation(Computed):
    """Rotates pairs of channels by the place of each token; buffers `freqs_cos`, `freqs_sin`, [side², c].

    The first half of the channels turns with the row, the second with the column.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, side: int, trained_side: int, channels: int) -> None:
        super().__init__()
        self.side, self.trained_side, self.turned = side, trained_side, channels // 2
        for name in ("freqs_cos", "freqs_sin"):
            self.register_buffer(name, torch.empty(side * side, channels), persistent=False)

    def compute(self) -> None:
        """The tables, which follow from their side."""
        frequencies = 1 / BASE ** (torch.arange(0, self.turned, 2).float() / self.turned)
        places = torch.arange(self.side) / self.side * self.trained_side
        angles = (places[:, None] * frequencies).repeat_interleave(2, dim=-1)
        rows = angles[:, None].expand(-1, self.side, -1)
        columns = angles[None].expand(self.side, -1, -1)
        grid = torch.cat((rows, columns), dim=-1).flatten(0, 1)
        self.freqs_cos.copy_(grid.cos())
        self.freqs_sin.copy_(grid.sin())

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, heads, l, c] to the same shape.

        Raises:
            InvalidConfig: the table is for another number of places.
        """
        count, length = self.freqs_cos.shape[0], tokens.shape[2]
        if count not in (1, length):
            detail = (
                f"positions are made for {count} patches, not for {length}; resize the images or set img_size"
            )
            raise InvalidConfig("#/backbone/img_size", detail)
        even, odd = tokens[..., ::2], tokens[..., 1::2]
        turned = torch.stack((-odd, even), dim=-1).flatten(-2)
        return (tokens * self.freqs_cos + turned * self.freqs_sin).to(tokens.dtype)


class RotatedAttention(Scale):
    """Self-attention of a map; keys `q_bias`, `v_bias`, `q_proj`, `k_proj`, `v_proj`, `proj`.

    `rope` is put in by `EVA02`: one module serves many blocks, and the library's files name its tables below each.
    """

    q_bias: nn.Parameter | None
    v_bias: nn.Parameter | None
    rope: Rotation

    def __init__(self, spec: Eva02Spec) -> None:
        super().__init__()
        inner, self.heads = spec.heads * spec.channels_per_head, spec.heads
        for name in ("q_bias", "v_bias"):
            self.register_parameter(name, nn.Parameter(torch.empty(inner)) if spec.qkv_bias else None)
        self.q_proj = nn.Linear(spec.width, inner, bias=False)
        self.k_proj = nn.Linear(spec.width, inner, bias=False)
        self.v_proj = nn.Linear(spec.width, inner, bias=False)
        self.proj = nn.Linear(inner, spec.width)

    def start(self) -> None:
        """No biases at first."""
        for parameter in self.parameters(recurse=False):
            nn.init.zeros_(parameter)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        query = self.rope(self._heads(F.linear(maps, self.q_proj.weight, self.q_bias)))
        key = self.rope(self._heads(self.k_proj(maps)))
        value = self._heads(F.linear(maps, self.v_proj.weight, self.v_bias))
        mixed = F.scaled_dot_product_attention(query, key, value)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected.reshape(maps.shape)

    def _heads(self, maps: Tensor) -> Tensor:
        """[n, h, w, heads * c] to [n, heads, h * w, c]."""
        n, height, width, channels = maps.shape
        return maps.reshape(n, height * width, self.heads, channels // self.heads).transpose(1, 2)


class GatedFeedForward(nn.Module):
    """SiLU-gated and normed (Shazeer, arXiv:2002.05202); keys `w1`, `w2`, `ffn_ln`, `w3`."""

    def __init__(self, spec: ViTSpec) -> None:
        super().__init__()
        hidden = int(spec.width * spec.mlp_ratio)
        self.w1 = nn.Linear(spec.width, hidden)
        self.w2 = nn.Linear(spec.width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=spec.eps)
        self.w3 = nn.Linear(hidden, spec.width)

    def forward(self, maps: Tensor) -> Tensor:
        """[..., c] to the same shape."""
        projected: Tensor = self.w3(self.ffn_ln(F.silu(self.w1(maps)) * self.w2(maps)))
        return projected


class Eva02Block(Block):
    """Keys of `Block`."""

    def make_attention(self, spec: ViTSpec, index: int, made_for: Size | None) -> nn.Module:  # noqa: ARG002 - of any block
        """`attn`."""
        assert isinstance(spec, Eva02Spec)
        return RotatedAttention(spec)

    def make_feed_forward(self, spec: ViTSpec) -> nn.Module:
        """`mlp`."""
        return GatedFeedForward(spec)


class EVA02(ViT):
    """Keys of `ViT`, and `rope_win`, `rope_glb` in the library's files."""

    def __init__(self, spec: Eva02Spec) -> None:
        super().__init__(spec)
        channels = spec.channels_per_head
        self.rope_win = Rotation(spec.window_side, spec.trained_side, channels)
        self.rope_glb = Rotation(spec.map_side, spec.trained_side, channels)
        for index in range(len(spec.windows)):
            rotation = self.rope_win if index in spec.rotated_as_windows else self.rope_glb
            self.get_submodule(f"blocks.{index}.attn").rope = rotation

    def make_block(self, spec: ViTSpec, index: int) -> nn.Module:
        """One of `blocks`."""
        return Eva02Block(spec, index)


# --- detrex.EVA02_ViT -----------------------------------------------------------------------------

EPSILON = LayerNormPartial.model_validate({"_target_": "LayerNorm", "eps": 1e-6})


class Eva02Config(ViTConfig):
    """`detrex.EVA02_ViT`: images of `img_size` only, unless all blocks attend in windows."""

    NETWORK: ClassVar[str] = "detrex.EVA02_ViT"

    mlp_ratio: MlpRatio = 4 * 2 / 3
    norm_layer: NormLayer = Field(EPSILON, description="LayerNorm, or a partial of it with its eps.")
    act_layer: ActivationLayer = Field("GELU", description="No effect.")
    use_rel_pos: StrictBool = Field(False, description="No effect.")
    rope: StrictBool = Field(True, description="No effect: queries and keys are always rotated.")
    pt_hw_seq_len: Annotated[int, Field(strict=True, ge=1, le=MAX_SIDE)] = Field(
        16, description="Patches high and wide of the pretraining's images, to which places are scaled."
    )
    intp_freq: StrictBool = Field(True, description="False takes pt_hw_seq_len for the side of all tables.")
    xattn: StrictBool = Field(True, description="Saves memory; changes nothing here.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        yield from (fault for fault in super().faults() if fault[0] != "num_heads")
        if "rel_pos_zero_init" in self.model_fields_set:
            yield "rel_pos_zero_init", "EVA02_ViT has no such key"
        if (channels := self.embed_dim // self.num_heads) == 0 or channels % 4:
            yield "num_heads", f"{channels} channels a head; rotations need a multiple of 4"
        side = self.img_size // self.patch_size
        if not 0 < side <= MAX_SIDE:
            yield "img_size", f"is {side} patches of {self.patch_size} px high; tables have 1 to {MAX_SIDE}"
        if self.window_size > MAX_SIDE:
            yield "window_size", f"tables have at most {MAX_SIDE} places a side"
        yield from self._window_faults()

    def _window_faults(self) -> Iterator[tuple[str, str]]:
        windowed, fixed = self._windowed(), self.pt_hw_seq_len
        if self.intp_freq and self.window_size == 0:
            yield "window_size", "is needed, even if no block attends in windows, unless intp_freq is false"
        if windowed and not self.intp_freq and fixed != 1 and self.window_size not in (0, fixed):
            yield "window_size", f"must be pt_hw_seq_len, {fixed}, without intp_freq"

    def _windowed(self) -> tuple[int, ...]:
        """Blocks of `window_block_indexes`; the library passes over what is no block."""
        return tuple(sorted({index for index in self.window_block_indexes if index < self.depth}))

    def _map_side(self) -> int:
        return self.img_size // self.patch_size if self.intp_freq else self.pt_hw_seq_len

    def input_defaults(self) -> PreprocessDefaults:
        """The images that the positions of the whole map are made for."""
        side = self._map_side() * self.patch_size
        return PreprocessDefaults(size=(side, side))

    def spec(self) -> Eva02Spec:
        """The neutral spelling."""
        own = {
            "activation": "GELU",
            "relative": False,
            "window_side": self.window_size if self.intp_freq else self.pt_hw_seq_len,
            "map_side": self._map_side(),
            "trained_side": self.pt_hw_seq_len,
            "rotated_as_windows": self._windowed(),
        }
        return Eva02Spec(**{**vars(super().spec()), **own})


EXAMPLE: dict[str, Any] = {
    key: value for key, value in detectron2_vit.EXAMPLE.items() if key not in ("use_rel_pos", "norm_layer")
}
EVA02_FAMILY = make_family(Eva02Config, EVA02, example=EXAMPLE)
