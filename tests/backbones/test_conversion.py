"""Which network a file is recognised as, from its names alone."""

from __future__ import annotations

import pytest
import timm
import torch
import torchvision

from service.backbones.conversion import convert
from service.checkpoints.read import StateDict
from service.errors import CheckpointMismatch

KINDS = {
    "timm.convnext_atto": "ConvNeXt",
    "timm.deit_tiny_distilled_patch16_224": "VisionTransformer",
    "timm.efficientformer_l1": "EfficientFormer",
    "timm.hrnet_w18_small": "HRNet",
    "timm.levit_128s": "LeViT",
    "timm.mixer_s32_224": "MlpMixer",
    "timm.mobileone_s0": "MobileOne",
    "timm.mobilevit_xxs": "MobileViT",
    "timm.mvitv2_tiny": "MViT",
    "timm.regnetx_002": "RegNet",
    "timm.resnest14d": "ResNeSt",
    "timm.resnet26d": "ResNetV1d",
    "timm.samvit_base_patch16": "ViTSAM",
    "timm.swinv2_tiny_window8_256": "SwinTransformerV2",
    "timm.tf_efficientnet_b0": "EfficientNet",
    "timm.tf_efficientnetv2_b0": "EfficientNetV2",
    "timm.twins_svt_small": "Twins",
    "timm.vit_base_patch16_clip_224": "VisionTransformer",
    "timm.xcit_nano_12_p16_224": "XCiT",
    "torchvision.inception_v3": "InceptionV3",
    "torchvision.shufflenet_v2_x0_5": "ShuffleNetV2",
    "torchvision.swin_t": "SwinTransformer",
}


def names_of(model: str) -> StateDict:
    library, _, name = model.partition(".")
    with torch.device("meta"):
        made = timm.create_model(name) if library == "timm" else getattr(torchvision.models, name)()
    state: StateDict = made.state_dict()
    return state


@pytest.mark.parametrize("prefix", ["", "model.backbone."])
@pytest.mark.parametrize("model", KINDS)
def test_a_file_is_of_the_kind_that_its_names_say(model: str, prefix: str) -> None:
    state = {prefix + name: tensor for name, tensor in names_of(model).items()}
    done = convert(state, "mmpretrain")
    assert (done.kind, done.prefix) == (KINDS[model], prefix)
    assert len(done.renamed.state) + len(done.renamed.left) == len(state)
    # And back by what it was told.
    assert convert(done.renamed.state, done.source, "mmpretrain").kind == KINDS[model]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            "timm.cait_xxs24_224",
            "like a VisionTransformer by timm's names, which has not blocks.0.attn.proj_l",
        ),
        ("timm.ecaresnet26t", "like a ResNetV1d by timm's names, which has not layer1.0.se.conv.weight"),
        (
            "timm.edgenext_xx_small",
            "like a ConvNeXt by timm's names, which has not stages.1.blocks.1.gamma_xca",
        ),
        ("timm.cspresnet50w", "like a CSP.* by timm's names, which has not stem.conv2"),
        ("timm.mobilenetv3_small_100", "MobileNetV3 is another network there"),
        ("timm.davit_tiny", "DaViT is another network there"),
        ("timm.regnety_002", "mmpretrain has no names for RegNet of pycls"),
        ("timm.ghostnet_100", "is not a network that is known"),
        ("torchvision.googlenet", "is not a network that is known"),
    ],
)
def test_what_only_looks_like_a_network_or_is_none_is_refused(model: str, reason: str) -> None:
    with pytest.raises(CheckpointMismatch, match=reason):
        convert(names_of(model), "mmpretrain")
