"""DeiT III (Touvron et al., arXiv:2204.07118) with mmpretrain's key names, computed as mmpretrain 1.x computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from service.backbones.vision_transformer import (
    ArchConfig,
    Size,
    TransformerConfig,
    TransformerLayer,
    VisionTransformer,
    VisionTransformerSpec,
    arch_or_object,
    before,
    make_transformer_family,
)

ARCHS: dict[str, Size] = {
    name: size
    for names, size in (
        (("s", "small"), Size(384, 12, 6, 1536)),
        (("m", "medium"), Size(512, 12, 8, 2048)),
        (("b", "base"), Size(768, 12, 12, 3072)),
        (("l", "large"), Size(1024, 24, 16, 4096)),
        (("h", "huge"), Size(1280, 32, 16, 5120)),
    )
    for name in names
}
LAYER_SCALE = 1e-5


@dataclass(frozen=True)
class DeiT3Spec(VisionTransformerSpec):
    """What decides the numbers and the names of the weights."""

    @property
    def extra_positions(self) -> int:
        """None: the class token has no position."""
        return 0


class DeiT3Layer(TransformerLayer):
    """A layer whose feed-forward network takes the tokens normed by `ln1` once more.

    mmpretrain 1.x never uses `ln2`, which its checkpoints have. The original network does use it.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        tokens = tokens + self.attn(self.ln1(tokens))
        mixed: Tensor = tokens + self.ffn(self.ln1(tokens))
        return mixed


class DeiT3(VisionTransformer):
    """A VisionTransformer whose class token joins after the positions were added."""

    def make_layer(self) -> nn.Module:
        """One of `layers`."""
        return DeiT3Layer(self.spec)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with their positions, [n, extra + rows * columns, c], and (rows, columns)."""
        patches, grid = self.patch_embed(images)
        tokens = patches + self.positions(grid)
        return tokens if self.cls_token is None else before(self.cls_token, tokens), grid


# --- mmpretrain.DeiT3 = mmcls.DeiT3 ---------------------------------------------------------------


class DeiT3Config(TransformerConfig):
    """`mmpretrain.DeiT3`, which is also `mmcls.DeiT3`. It freezes nothing and has no `avg_featmap`."""

    NETWORK: ClassVar[str] = "DeiT3"
    ARCHS: ClassVar[dict[str, Size]] = ARCHS

    arch: Annotated[
        str | ArchConfig, arch_or_object(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "base"
    out_type: Literal["raw", "cls_token", "featmap"] | None = Field(None, description="null is cls_token.")
    qkv_bias: bool = True
    use_layer_scale: bool = Field(True, description="A learnt factor a channel on both residual branches.")

    def spec(self) -> DeiT3Spec:
        """The neutral spelling."""
        layer_scale = LAYER_SCALE if self.use_layer_scale else 0.0
        return DeiT3Spec(**{**vars(super().spec()), "qkv_bias": self.qkv_bias, "layer_scale": layer_scale})


DEIT3 = make_transformer_family(
    DeiT3Config,
    DeiT3,
    example={"arch": "small", "out_type": "featmap", "out_indices": [2, 5, 8, 11]},
)
