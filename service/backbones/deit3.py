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
    """What decides the numbers and the names of the weights.

    `second_norm`: `ln2` norms what goes into the feed-forward network, else `ln1` once more.
    """

    second_norm: bool = False

    @property
    def extra_positions(self) -> int:
        """None: the class token has no position."""
        return 0


class DeiT3Layer(TransformerLayer):
    """A layer whose feed-forward network takes the tokens normed by `ln1` once more, unless told otherwise.

    mmpretrain 1.x never uses `ln2`, which its checkpoints have. The original network and mmcls do use it.
    """

    def __init__(self, spec: DeiT3Spec) -> None:
        super().__init__(spec)
        self.second_norm = spec.second_norm

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, l, c] to [n, l, c]."""
        tokens = tokens + self.attn(self.ln1(tokens))
        norm = self.ln2 if self.second_norm else self.ln1
        mixed: Tensor = tokens + self.ffn(norm(tokens))
        return mixed


class DeiT3(VisionTransformer):
    """A VisionTransformer whose class token joins after the positions were added."""

    spec: DeiT3Spec

    def make_layer(self) -> nn.Module:
        """One of `layers`."""
        return DeiT3Layer(self.spec)

    def embed(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens with their positions, [n, extra + rows * columns, c], and (rows, columns)."""
        patches, grid = self.patch_embed(images)
        tokens = patches + self.positions(grid)
        if self.cls_token is None or self.spec.drops_cls_token:
            return tokens, grid
        return before(self.cls_token, tokens), grid


# --- mmpretrain.DeiT3 = mmcls.DeiT3 ---------------------------------------------------------------


class DeiT3Config(TransformerConfig):
    """`mmpretrain.DeiT3`, which is also `mmcls.DeiT3`. It freezes nothing and has no `avg_featmap`.

    mmpretrain's layers norm with `ln1` twice and never with `ln2`, which DeiT III has before its feed-forward: so do
    these. Other code gives other features for the same weights: mmcls 1.0rc used `ln2`, and so does a config in
    its spelling, `output_cls_token` (which is the default of mmcls types).
    """

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
        own = {
            "qkv_bias": self.qkv_bias,
            "layer_scale": layer_scale,
            "second_norm": self.output_cls_token is not None,
        }
        return DeiT3Spec(**{**vars(super().spec()), **own})


DEIT3 = make_transformer_family(
    DeiT3Config,
    DeiT3,
    example={"arch": "small", "out_type": "featmap", "out_indices": [2, 5, 8, 11]},
)
