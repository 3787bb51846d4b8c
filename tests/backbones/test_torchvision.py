"""torchvision's models: nodes by torchvision's names, numbers as its own extractor gives them, whole checkpoints."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights, list_models
from torchvision.models.feature_extraction import create_feature_extractor

from service.backbones import tables
from service.backbones.torchvision import MAX_EXTRACTORS, TORCHVISION, TorchvisionBackbone, TorchvisionConfig
from service.config.spec import Freeze, LoadedKeys, WeightsRef
from service.errors import CheckpointMismatch, InvalidConfig, UnknownBackbone

REF = WeightsRef("weights.pth", pointer="#/backbone/checkpoint")
State = dict[str, Tensor]


def config(model: str, **keys: Any) -> TorchvisionConfig:
    return TORCHVISION.config.model_validate({"type": f"torchvision.{model}", **keys})


def whole(model: str, **keys: Any) -> nn.Module:
    """A whole torchvision model with numbers that no constructor gives."""
    torch.manual_seed(1)
    net: nn.Module = get_model(model, weights=None, **keys).eval()
    for tensor in net.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim < 2:
            tensor.uniform_(0.5, 1.5)
    return net


def loaded(
    cfg: TorchvisionConfig, state: State, ref: WeightsRef = REF
) -> tuple[TorchvisionBackbone, LoadedKeys]:
    backbone, keys = TORCHVISION.load(cfg, state, ref)
    assert isinstance(backbone, TorchvisionBackbone)
    return backbone.eval(), keys


def features_of(cfg: TorchvisionConfig, backbone: nn.Module, images: Tensor) -> dict[str, Tensor]:
    levels = cfg.levels(TORCHVISION.describe(cfg))
    with torch.inference_mode():
        features = backbone(images, [level.node for level in levels])
    return {level.name: features[level.node] for level in levels}


def images(size: int = 64) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(2, 3, size, size + 32)


@pytest.mark.parametrize(
    ("model", "nodes", "keys"),
    [
        ("resnet18", {"layer4": "c5", "layer2.1.relu_1": "odd", "x": "input"}, {}),
        ("resnet50", {"layer3": "a", "layer4": "b"}, {"replace_stride_with_dilation": [False, True, True]}),
        ("mobilenet_v3_small", {"features.3": "a", "flatten": "v"}, {"norm_layer": "BatchNorm2d"}),
        ("regnet_x_400mf", {"trunk_output.block1.block1-0": "a", "trunk_output.block3": "b"}, {}),
        ("convnext_tiny", {"features.1": "a", "features.3.0.block.2": "inner"}, {}),
        ("inception_v3", {"Mixed_5b": "a"}, {"transform_input": True}),
    ],
)
def test_features_are_those_of_torchvisions_extractor(
    model: str, nodes: dict[str, str], keys: dict[str, Any]
) -> None:
    cfg = config(model, return_nodes=nodes, **keys)
    builder_keys = {key: nn.BatchNorm2d if key == "norm_layer" else value for key, value in keys.items()}
    net = whole(model, **builder_keys)
    backbone, report = loaded(cfg, net.state_dict())
    batch = images(96)
    ours = features_of(cfg, backbone, batch)
    with torch.inference_mode():
        theirs = create_feature_extractor(net, nodes)(batch)
    assert (list(ours), report.missing, report.unexpected) == (list(nodes.values()), (), ())
    for name, want in theirs.items():
        last = want.ndim == 4 and want.shape != ours[name].shape
        torch.testing.assert_close(ours[name], want.permute(0, 3, 1, 2) if last else want)


def test_swin_maps_have_their_channels_second() -> None:
    cfg = config("swin_t", return_nodes=["features.1", "features.7", "permute", "features.0.1"])
    with torch.device("meta"):
        features = features_of(cfg, TORCHVISION.build(cfg).eval(), torch.empty(1, 3, 64, 96))
    assert [tuple(feature.shape[1:]) for feature in features.values()] == [
        (96, 16, 24),
        (768, 2, 3),
        (768, 2, 3),
        (96, 16, 24),
    ]


def test_by_default_the_last_module_of_every_stride_is_returned() -> None:
    described = TORCHVISION.describe(config("resnet18"))
    assert [(f.node, f.stride, f.channels, f.shape) for f in described.features] == [
        ("layer1", 4, 64, (64, 56, 56)),
        ("layer2", 8, 128, (128, 28, 28)),
        ("layer3", 16, 256, (256, 14, 14)),
        ("layer4", 32, 512, (512, 7, 7)),
    ]
    levels = config("resnet18", strides=[32, 4]).levels(described)
    assert [level.node for level in levels] == ["layer4", "layer1"]


def test_a_vision_transformer_gives_tokens_and_takes_one_size() -> None:
    cfg = config("vit_b_32", image_size=64)
    described = TORCHVISION.describe(cfg)
    (feature,) = described.features
    assert (feature.layout, feature.shape, described.fixed_input) == ("NLC", (5, 768), True)
    assert described.input.size == (64, 64)


@pytest.mark.parametrize("keys", [{}, {"image_size": 64}])
def test_the_class_token_comes_before_the_patches(keys: dict[str, Any]) -> None:
    cfg = config("vit_b_32", **keys)
    described, backbone = TORCHVISION.describe(cfg), TORCHVISION.build(cfg).eval()
    images = torch.randn(1, 3, *(described.input.size or (0, 0)))
    with torch.inference_mode():
        tokens = backbone(images, ["encoder.dropout"])["encoder.dropout"]
    state = backbone.state_dict()
    first = state["net.class_token"] + state["net.encoder.pos_embedding"][:, :1]
    torch.testing.assert_close(tokens[:, : described.prefix_tokens], first)


@pytest.mark.parametrize("model", ["resnet18", "vit_b_32", "swin_t", "googlenet"])
def test_the_table_says_what_building_says(model: str) -> None:
    described = TORCHVISION.describe(config(model))
    with torch.device("meta"):
        backbone = TORCHVISION.build(config(model))
    assert described.parameters == sum(parameter.numel() for parameter in backbone.parameters())
    assert described.tensors == backbone.frozen(Freeze()).of


def test_dilation_changes_the_strides() -> None:
    cfg = config("resnet50", replace_stride_with_dilation=[False, False, True])
    assert [feature.stride for feature in TORCHVISION.describe(cfg).features] == [4, 8, 16, 16]


@pytest.mark.parametrize(
    ("model", "keys", "pointer"),
    [
        (
            "resnet18",
            {"replace_stride_with_dilation": [False, False, True]},
            "#/backbone/replace_stride_with_dilation",
        ),
        ("vgg11", {"norm_layer": "FrozenBatchNorm2d"}, "#/backbone/norm_layer"),
        ("resnet18", {"image_size": 64}, "#/backbone/image_size"),
        ("resnet18", {"weights": "IMAGENET1K_V7"}, "#/backbone/weights"),
        ("resnet18", {"weights": "ResNet50_Weights.IMAGENET1K_V1"}, "#/backbone/weights"),
        ("vit_b_16", {"weights": "IMAGENET1K_V1", "image_size": 64}, "#/backbone/image_size"),
    ],
)
def test_what_a_builder_does_not_take_is_refused_by_its_key(
    model: str, keys: dict[str, Any], pointer: str
) -> None:
    with pytest.raises(InvalidConfig) as refused:
        TORCHVISION.describe(config(model, **keys))
    assert refused.value.faults[0].pointer == pointer


@pytest.mark.parametrize(
    "keys",
    [
        {"frozen_stages": 1},
        {"return_nodes": {}},
        {"return_nodes": []},
        {"return_nodes": {"layer1": "a", "layer2": "a"}},
        {"return_nodes": ["layer1", "layer1"]},
        {"return_nodes": ["../layer1"]},
        {"return_nodes": {"layer1": "../a"}},
        {"return_nodes": {"layer1": ""}},
        {"return_nodes": {"layer1": "a" * 129}},
        {"return_nodes": [f"layer{i}" for i in range(65)]},
        {"return_nodes": "layer1"},
        {"norm_layer": "torch.nn.LayerNorm"},
        {"replace_stride_with_dilation": [True]},
        {"weights": {"url": "https://example.com"}},
        {"pretrained": "yes"},
        {"named_weights": "DEFAULT"},
    ],
)
def test_unknown_and_unbounded_keys_are_refused(keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config("resnet18", **keys)


@pytest.mark.parametrize("name", ["resnet19", "os.system", "", "fcn_resnet50", "a" * 5000])
def test_only_names_of_the_table_reach_torchvision(name: str) -> None:
    with pytest.raises(UnknownBackbone) as refused:
        config(name)
    assert len(refused.value.detail) < 600


def test_an_unknown_node_is_refused_with_the_nearest() -> None:
    cfg = config("resnet18", return_nodes=["layer1", "layer5", "layer2.9"])
    with pytest.raises(InvalidConfig, match=r"no node named 'layer5'; nearest: layer") as refused:
        cfg.levels(TORCHVISION.describe(cfg))
    assert [fault.pointer for fault in refused.value.faults] == ["#/backbone/return_nodes"] * 2


@pytest.mark.parametrize(
    ("model", "node"),
    [
        ("vit_b_32", "getattr"),
        ("shufflenet_v2_x0_5", "stage2.0.view"),
        ("swin_t", "features.1.0.attn.getattr"),
    ],
)
def test_a_node_that_gives_no_batch_of_features_is_refused(model: str, node: str) -> None:
    cfg = config(model, return_nodes=[node])
    with pytest.raises(InvalidConfig, match=r"return_nodes"):
        cfg.levels(TORCHVISION.describe(cfg))


# --- loading ----------------------------------------------------------------------------------------------


def test_what_no_selected_node_needs_may_be_missing() -> None:
    state = whole("resnet18").state_dict()
    del state["fc.weight"], state["layer4.0.conv1.weight"], state["layer1.0.bn1.num_batches_tracked"]
    backbone, report = loaded(config("resnet18", return_nodes=["layer3"]), state)
    assert sorted(report.missing) == ["fc.weight", "layer4.0.conv1.weight"]
    assert "layer4.0.conv1.weight" in backbone.needs("layer4") - backbone.needs("layer3")
    assert "layer1.0.bn1.running_var" in backbone.needs("layer3")
    with pytest.raises(CheckpointMismatch, match=r"layer4\.0\.conv1\.weight"):
        loaded(config("resnet18"), state)


def test_a_classifier_for_other_classes_does_not_matter_but_other_shapes_do() -> None:
    state = whole("resnet18", num_classes=7).state_dict()
    _, report = loaded(config("resnet18"), {f"module.{name}": t for name, t in state.items()})
    assert sorted(report.unexpected) == ["fc.bias", "fc.weight"]
    assert report.prefix == "module."
    with pytest.raises(CheckpointMismatch, match="conv1"):
        loaded(config("resnet18"), state | {"conv1.weight": torch.zeros(64, 3, 3, 3)})


@pytest.mark.parametrize(
    ("model", "now", "then"),
    [
        ("densenet121", "denseblock1.denselayer1.norm2.", "denseblock1.denselayer1.norm.2."),
        ("vit_b_32", "encoder_layer_3.mlp.3.", "encoder_layer_3.mlp.linear_2."),
    ],
)
def test_names_in_torchvisions_own_files_fit(model: str, now: str, then: str) -> None:
    keys = {"image_size": 32} if model == "vit_b_32" else {}
    state = {name.replace(now, then): tensor for name, tensor in whole(model, **keys).state_dict().items()}
    assert any(then in name for name in state)
    _, report = loaded(config(model, **keys), state)
    assert (report.missing, report.unexpected) == ((), ())


@pytest.mark.parametrize("state", [{}, {"a.b": torch.zeros(3)}])
def test_a_file_of_something_else_is_a_mismatch(state: State) -> None:
    with pytest.raises(CheckpointMismatch):
        loaded(config("resnet18"), state)


# --- weights and freezing ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "member"),
    [
        ({"weights": "DEFAULT"}, "IMAGENET1K_V2"),
        ({"weights": "IMAGENET1K_V1"}, "IMAGENET1K_V1"),
        ({"weights": "ResNet50_Weights.IMAGENET1K_V2"}, "IMAGENET1K_V2"),
        ({"pretrained": True}, "IMAGENET1K_V1"),
    ],
)
def test_named_weights_are_torchvisions_url_and_preprocessing(keys: dict[str, Any], member: str) -> None:
    cfg, want = config("resnet50", **keys), get_model_weights("resnet50")[member]
    ref, preset, defaults = cfg.weights(), want.transforms(), cfg.input_defaults()
    assert ref is not None
    assert ref.name == want.url
    assert ref.pointer == f"#/backbone/{next(iter(keys))}"
    assert defaults.size == (224, 224)
    assert defaults.crop_pct == 224 / preset.resize_size[0]
    assert (defaults.mean, defaults.interpolation) == (tuple(preset.mean), "bilinear")


def test_weights_and_a_checkpoint_are_refused_together() -> None:
    with pytest.raises(InvalidConfig, match="not both"):
        config("resnet50", weights="DEFAULT", checkpoint="a.pth").weights()
    assert config("resnet50").weights() is None


def test_weights_bring_the_input_that_they_were_trained_with() -> None:
    assert config("vit_b_16", weights="IMAGENET1K_SWAG_E2E_V1").built().size == (384, 384)
    assert config("inception_v3", weights="DEFAULT").arguments() == {"transform_input": True}


def test_configs_that_differ_in_what_they_return_share_a_model() -> None:
    views: list[dict[str, Any]] = [
        {},
        {"return_nodes": ["layer1"]},
        {"weights": "DEFAULT"},
        {"norm_layer": "FrozenBatchNorm2d"},
        {"replace_stride_with_dilation": [False, False, False]},
    ]
    assert len({config("resnet50", **view).key() for view in views}) == 1


def test_frozen_batch_norms_are_reported() -> None:
    cfg = config("resnet18", norm_layer="FrozenBatchNorm2d")
    with torch.device("meta"):
        report = TORCHVISION.build(cfg).frozen(cfg.freeze())
    assert (len(report.norms), len(report.parameters), report.of) == (20, 40, 62)


# --- the module -------------------------------------------------------------------------------------------


def test_extractors_share_the_models_weights_and_are_few() -> None:
    backbone = TORCHVISION.build(config("resnet18"))
    before = sum(1 for _ in backbone.parameters())
    images = torch.zeros(1, 3, 32, 32)
    blocks = [f"layer{stage}.{block}" for stage in (1, 2, 3) for block in (0, 1)]
    nodes = [f"{block}.{part}" for block in blocks for part in ("conv1", "bn1", "conv2")]
    assert len(nodes) > MAX_EXTRACTORS
    with torch.inference_mode():
        for node in nodes:
            backbone(images, [node])
        assert len(backbone._extractors) == MAX_EXTRACTORS
        assert sum(1 for _ in backbone.parameters()) == before
        assert backbone.double()(images.double(), [nodes[-1]])[nodes[-1]].dtype == torch.float64


def test_a_model_runs_while_another_is_traced() -> None:
    running, failures, stop = whole("resnet18"), [], threading.Event()
    batch = torch.zeros(1, 3, 32, 32)

    def run() -> None:
        while not stop.is_set():
            try:
                running(batch)
            except NameError as error:
                failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    cfg = config("densenet161", return_nodes=["features.transition1"])
    cfg.levels(TORCHVISION.describe(cfg))
    stop.set()
    thread.join()
    assert failures == []


def test_describing_costs_milliseconds() -> None:
    began = time.perf_counter()
    TORCHVISION.describe(config("regnet_y_128gf"))
    assert time.perf_counter() - began < 0.5


def test_the_table_has_every_model_of_the_installed_torchvision() -> None:
    from torchvision import models

    assert set(tables.torchvision_models()) == set(list_models(module=models))


@pytest.mark.parametrize("model", ["resnet18", "vit_b_16", "squeezenet1_1"])
def test_examples_work_as_they_stand(model: str) -> None:
    cfg = TORCHVISION.config.model_validate(TORCHVISION.example(f"torchvision.{model}"))
    assert cfg.levels(TORCHVISION.describe(cfg))
