"""DaViT (Ding et al., arXiv:2204.03645) with mmpretrain's key names: attention in windows, then among channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from service.backbones.base import Backbone, DropRate, Indices, InputChannels
from service.backbones.freezing import freeze_report, in_module_order, is_under
from service.backbones.norms import LayerNormConfig
from service.backbones.openmmlab import OpenMMLabConfig, SamePadConv2d, deepest, make_family, named_arch
from service.backbones.output_norms import may_lack_output_norms, without_output_norms
from service.backbones.swin import (
    ArchConfig,
    FeedForward,
    NothingConfig,
    ShiftedWindows,
    SwinSpec,
    Window,
    stage_faults,
    with_outputs,
)
from service.checkpoints.layouts import KeyLayout, Naming, below, rules
from service.config.spec import Freeze, FreezeReport
from service.errors import InvalidConfig

if TYPE_CHECKING:
    from service.checkpoints.read import StateDict

ARCHS: dict[str, ArchConfig] = {
    name: ArchConfig(embed_dims=width, depths=depths, num_heads=tuple(heads * 2**stage for stage in range(4)))
    for names, width, depths, heads in (
        (("t", "tiny"), 96, (1, 1, 3, 1), 3),
        (("s", "small"), 96, (1, 1, 9, 1), 3),
        (("b", "base"), 128, (1, 1, 9, 1), 4),
        (("l", "large"), 192, (1, 1, 9, 1), 6),
        (("h", "huge"), 256, (1, 1, 9, 1), 8),
        (("g", "giant"), 384, (1, 1, 12, 3), 12),
    )
    for name in names
}


class Positions(nn.Module):
    """What each channel sees around it, added; key `proj`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(width, width, 3, padding=1, groups=width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        seen: Tensor = self.proj(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return maps + seen


class WindowAttention(nn.Module):
    """Self-attention in a window, without positions; keys `qkv`, `proj`."""

    def __init__(self, spec: SwinSpec, stage: int) -> None:
        super().__init__()
        width, self.heads = spec.widths()[stage], spec.heads[stage]
        self.qkv = nn.Linear(width, 3 * width, bias=spec.qkv_bias)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[n * windows, window², c] to the same shape."""
        n, length, _ = tokens.shape
        query, key, value = (
            self.qkv(tokens).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        )
        mixed = self.mix(query, key, value, mask)
        projected: Tensor = self.proj(mixed.transpose(1, 2).flatten(2))
        return projected

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """[n, heads, l, c / heads] each, to the same shape."""
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class ChannelAttention(WindowAttention):
    """Self-attention among the channels of a head: each is weighed by what it has in common with the others."""

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """[n, h, w, c] to the same shape."""
        mixed: Tensor = super().forward(tokens.flatten(1, 2), mask).reshape(tokens.shape)
        return mixed

    def mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:  # noqa: ARG002
        """[n, heads, l, c / heads] each, to the same shape; all positions are seen."""
        weights = (key * key.shape[-1] ** -0.5).transpose(-1, -2) @ value
        mixed: Tensor = weights.softmax(dim=-1) @ query.transpose(-1, -2)
        return mixed.transpose(-1, -2)


class Windows(ShiftedWindows):
    """Attention in windows that are never shifted; key `w_msa`."""

    def __init__(self, spec: SwinSpec, stage: int) -> None:
        nn.Module.__init__(self)
        self.spec, self.shift = spec, 0
        self.add_module("w_msa", WindowAttention(spec, stage))


class HalfBlock(nn.Module):
    """Attention of a kind and feed-forward; keys `cpe1`, `norm1`, `attn`, `cpe2`, `norm2`, `ffn`."""

    def __init__(self, spec: SwinSpec, stage: int, attention: Callable[[SwinSpec, int], nn.Module]) -> None:
        super().__init__()
        width = spec.widths()[stage]
        self.cpe1 = Positions(width)
        self.norm1 = nn.LayerNorm(width)
        self.attn = attention(spec, stage)
        self.cpe2 = Positions(width)
        self.norm2 = nn.LayerNorm(width)
        self.ffn = FeedForward(spec, width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        maps = self.cpe1(maps)
        maps = self.cpe2(maps + self.attn(self.norm1(maps)))
        mixed: Tensor = maps + self.ffn(self.norm2(maps))
        return mixed


class Block(nn.Module):
    """Keys `spatial_block`, `channel_block`."""

    def __init__(self, spec: SwinSpec, stage: int) -> None:
        super().__init__()
        self.spatial_block = HalfBlock(spec, stage, Windows)
        self.channel_block = HalfBlock(spec, stage, ChannelAttention)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to the same shape."""
        mixed: Tensor = self.channel_block(self.spatial_block(maps))
        return mixed


class Downsample(nn.Module):
    """Half the size, twice the channels; keys `projection`, `norm`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(width, 2 * width, 2, stride=2)
        self.norm = nn.LayerNorm(width)

    def forward(self, maps: Tensor) -> Tensor:
        """[n, h, w, c] to [n, h // 2, w // 2, 2c].

        Raises:
            InvalidConfig: both sides are odd, which the library refuses too.
        """
        height, width = maps.shape[1:3]
        if height % 2 and width % 2:
            detail = (
                f"a map of {height}x{width} cannot be halved; send images whose sides are multiples of 32"
            )
            raise InvalidConfig("#/preprocess", detail)
        projected: Tensor = self.projection(self.norm(maps).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return projected


class Stage(nn.Module):
    """Blocks, and what halves the map for the next stage; keys `blocks`, `downsample`."""

    def __init__(self, spec: SwinSpec, stage: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(spec, stage) for _ in range(spec.depths[stage])))
        self.downsample = Downsample(spec.widths()[stage]) if spec.merges(stage) else nn.Identity()


class PatchEmbed(nn.Module):
    """Overlapping patches projected and normed; keys `projection`, `norm`."""

    def __init__(self, spec: SwinSpec) -> None:
        super().__init__()
        self.projection = SamePadConv2d(spec.in_channels, spec.width, 7, stride=spec.patch)
        self.norm = nn.LayerNorm(spec.width)

    def forward(self, images: Tensor) -> Tensor:
        """[n, c, h, w] to [n, rows, columns, width]."""
        normed: Tensor = self.norm(self.projection(images).permute(0, 2, 3, 1))
        return normed


class DaViT(Backbone):
    """Keys `patch_embed`, `stages`, and `norm0` … of the outputs where `eps` is not 0."""

    def __init__(self, spec: SwinSpec) -> None:
        super().__init__()
        self.features = spec.features()
        self.output_norms = [f"norm{stage}" for stage in spec.outputs]
        self.patch_embed = PatchEmbed(spec)
        self.stages = nn.ModuleList(Stage(spec, stage) for stage in range(len(spec.depths)))
        for name, stage in zip(self.output_norms, spec.outputs, strict=True):
            width = spec.widths()[stage]
            self.add_module(name, nn.LayerNorm(width, eps=spec.eps) if spec.eps else nn.Identity())

    def forward(self, images: Tensor, nodes: Sequence[str]) -> dict[str, Tensor]:
        """Normed maps of the stages in `nodes`; stops after the deepest of them."""
        maps, found = self.patch_embed(images), {}
        last = deepest(nodes)
        for index in range(last + 1):
            maps = self.get_submodule(f"stages.{index}.blocks")(maps)
            if str(index) in nodes:
                output = self.get_submodule(f"norm{index}")(maps)
                # The blocks work on NHWC; the wire promises NCHW.
                found[str(index)] = output.permute(0, 3, 1, 2).contiguous()
            maps = self.get_submodule(f"stages.{index}.downsample")(maps) if index < last else maps
        return {node: found[node] for node in nodes}

    def needs(self, node: str) -> frozenset[str]:  # noqa: ARG002 - the same for every stage
        """All weights but the output norms, which a file may leave at 1 and 0."""
        return without_output_norms(self)

    def frozen(self, freeze: Freeze) -> FreezeReport:
        """mmpretrain's rule: k is `patch_embed` and stages 0 to k, and their output norms, which stay in train mode.

        `norm_cfg`, and so what it freezes, is of the output norms alone.
        """
        stages = range(-1 if freeze.stages is None else freeze.stages + 1)
        names = [*(["patch_embed"] if stages else []), *(f"stages.{stage}" for stage in stages)]
        report = freeze_report(self, replace(freeze, all_norms=False), names)
        norms = self.output_norms if freeze.all_norms else [f"norm{stage}" for stage in stages]
        outputs = [name for name, _ in self.named_parameters() if is_under(name, norms)]
        return in_module_order(self, freeze, (*report.parameters, *outputs), report.norms)


# --- mmpretrain.DaViT = mmcls.DaViT ---------------------------------------------------------------


class DaViTConfig(OpenMMLabConfig):
    """`mmpretrain.DaViT`, which is also `mmcls.DaViT`."""

    NETWORK: ClassVar[str] = "DaViT"

    arch: Annotated[
        str | ArchConfig, named_arch(ARCHS), Field(json_schema_extra={"examples": list(ARCHS)})
    ] = "tiny"
    patch_size: Annotated[int, Field(strict=True, ge=1, le=32)] = 4
    in_channels: InputChannels = 3
    window_size: Window = 7
    ffn_ratio: Annotated[float, Field(gt=0, le=16)] = 4.0
    qkv_bias: bool = True
    drop_path_rate: DropRate = Field(0.1, description="Training only; changes nothing here.")
    out_after_downsample: bool = Field(
        False, description="True works for the last stage only, where it changes nothing."
    )
    pad_small_map: bool = Field(False, description="Pads maps that are smaller than a window.")
    norm_cfg: LayerNormConfig | None = Field(
        LayerNormConfig(type="LN"), description="Of the outputs; null leaves their norms out."
    )
    stage_cfgs: NothingConfig = NothingConfig()
    frozen_stages: Annotated[int, Field(strict=True, ge=-1, le=7)] = Field(
        -1, description="-1 nothing, k the patch embedding and stages 0 to k with their output norms."
    )
    out_indices: Indices = Field((3,), description="Stages, 0 at stride 4; each has a norm of its own.")

    def faults(self) -> Iterator[tuple[str, str]]:
        """What each key allows alone but the network does not, as (key, detail)."""
        spec = self.spec()
        yield from stage_faults(spec, "arch/num_heads")
        if spec.width % 2 and len(spec.depths) > 1:
            yield "arch/embed_dims", f"{spec.width} is odd"
        last = len(spec.depths) - 1
        if self.frozen_stages > last:
            yield "frozen_stages", f"{self.frozen_stages} is not a stage of 0 to {last}"
        if self.out_after_downsample and spec.outputs not in ((last,), ()):
            yield "out_after_downsample", f"works for stage {last} only, here as in the library"

    def spec(self) -> SwinSpec:
        """The neutral spelling; `eps` 0 is no output norms."""
        arch = ARCHS[self.arch] if isinstance(self.arch, str) else self.arch
        spec = SwinSpec(
            arch.embed_dims,
            arch.depths,
            arch.num_heads,
            outputs=(),
            rule="mmpretrain",
            pads_small=self.pad_small_map,
            in_channels=self.in_channels,
            patch=self.patch_size,
            window=self.window_size,
            mlp_ratio=self.ffn_ratio,
            qkv_bias=self.qkv_bias,
            eps=self.norm_cfg.eps if self.norm_cfg is not None else 0.0,
        )
        return with_outputs(spec, self.out_indices, self.strides)


def _optional(config: DaViTConfig, state: StateDict) -> Callable[[str], bool]:
    return may_lack_output_norms(state, last=len(config.spec().depths) - 1)


def _blocks(theirs: str, embedding: str) -> dict[str, str]:
    """The rules of blocks, each two of theirs; `embedding` is what a depthwise convolution is called there."""
    found: dict[str, str] = {}
    for index, (block, attention) in enumerate((("spatial_block", "attn.w_msa"), ("channel_block", "attn"))):
        names = {
            "cpe1.{rest}": embedding.format(0, 1),
            "cpe2.{rest}": embedding.format(1, 2),
            attention + ".{rest}": "attn.{rest}",
            "norm{k}.{leaf}": "norm{k}.{leaf}",
            "ffn.layers.0.0.{leaf}": "mlp.fc1.{leaf}",
            "ffn.layers.1.{leaf}": "mlp.fc2.{leaf}",
        }
        found |= below(f"stages.{{s}}.blocks.{{b}}.{block}.", f"{theirs}{index}.", names)
    return found


_OTHER_STEM = (
    "OpenMMLab's DaViT pads its 7x7 stem to the right and bottom, timm's and the official one on all sides"
)
DAVIT_NAMES = Naming(
    "DaViT",
    own=("mmpretrain",),
    marks=(
        "patch_embed.projection.weight",
        "stages.0.blocks.0.spatial_block.cpe1.proj.weight",
        "stages.0.blocks.0.channel_block.attn.qkv.weight",
        "stages.0.downsample.projection.weight",
    ),
    layouts=(
        KeyLayout(
            "timm",
            rules(
                {
                    "patch_embed.projection.{leaf}": "stem.conv.{leaf}",
                    "patch_embed.norm.{leaf}": "stem.norm.{leaf}",
                    "stages.{s}.downsample.projection.{leaf}": "stages.{s+1}.downsample.conv.{leaf}",
                    "stages.{s}.downsample.norm.{leaf}": "stages.{s+1}.downsample.norm.{leaf}",
                    **_blocks("stages.{s}.blocks.{b}.", "cpe{1}.{{rest}}"),
                    "norm3.{leaf}": "head.norm.{leaf}",
                }
            ),
            differs=_OTHER_STEM,
        ),
        KeyLayout(
            "official",
            rules(
                {
                    "patch_embed.projection.{leaf}": "patch_embeds.0.proj.{leaf}",
                    "patch_embed.norm.{leaf}": "patch_embeds.0.norm.{leaf}",
                    "stages.{s}.downsample.projection.{leaf}": "patch_embeds.{s+1}.proj.{leaf}",
                    "stages.{s}.downsample.norm.{leaf}": "patch_embeds.{s+1}.norm.{leaf}",
                    **_blocks("main_blocks.{s}.{b}.", "cpe.{0}.{{rest}}"),
                    "norm3.{leaf}": "norms.{leaf}",
                }
            ),
            differs=_OTHER_STEM,
        ),
    ),
)


DAVIT = make_family(
    DaViTConfig,
    DaViT,
    example={"arch": "tiny", "out_indices": [0, 1, 2, 3]},
    architectures=tuple(ARCHS),
    optional=_optional,
    naming=DAVIT_NAMES,
)
