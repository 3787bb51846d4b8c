"""A state dict goes into a network whole or not at all, and every key is accounted for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from service.checkpoints.keys import guess_prefix, strip_prefix
from service.checkpoints.load import load_strict
from service.checkpoints.read import StateDict
from service.config.spec import WeightsRef
from service.errors import CheckpointMismatch

REF = WeightsRef("a.pth", pointer="#/backbone/checkpoint")


class Network(nn.Module):
    """Two weights, a norm with its counter, and a buffer that is in no file."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.register_buffer("scratch", torch.zeros(2), persistent=False)


def weights() -> StateDict:
    """The weights of another network of the same shape."""
    return {name: tensor.clone() for name, tensor in Network().state_dict().items()}


def prefixed(state: StateDict, prefix: str) -> StateDict:
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_holds(network: Network, state: StateDict) -> None:
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype)), name


def mismatch(network: nn.Module, state: StateDict, ref: WeightsRef = REF) -> CheckpointMismatch:
    """The error, after checking that it names the pointer and that nothing was copied."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(CheckpointMismatch) as raised:
        load_strict(network, state, ref)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert raised.value.faults[0].pointer == ref.pointer
    return raised.value


def test_a_fitting_state_is_loaded_whole() -> None:
    network, state = Network(), weights()
    loaded = load_strict(network, state, REF)
    assert_holds(network, state)
    assert (loaded.loaded, loaded.missing, loaded.unexpected, loaded.prefix) == (6, (), (), "")


def test_parameters_stay_the_same_objects() -> None:
    network = Network()
    before = network.conv1.weight
    load_strict(network, weights(), REF)
    assert network.conv1.weight is before
    assert before.requires_grad


def test_a_heads_leftovers_are_reported() -> None:
    state = {**weights(), "fc.weight": torch.ones(2)}
    assert load_strict(Network(), state, REF).unexpected == ("fc.weight",)


def test_a_missing_weight_is_named_and_nothing_is_copied() -> None:
    state = {**weights(), "fc.weight": torch.ones(2)}
    del state["bn1.running_var"]
    error = mismatch(Network(), state)
    assert error.missing == ("bn1.running_var",)
    assert error.unexpected == ("fc.weight",)
    assert "1 of 6 weights are missing: bn1.running_var" in error.detail


def test_a_wrong_shape_is_named_with_both_shapes() -> None:
    error = mismatch(Network(), {**weights(), "conv1.weight": torch.ones(4, 1, 3, 3)})
    assert error.wrong_shape == ("conv1.weight: file [4,1,3,3], backbone [4,3,3,3]",)
    assert "1 have another shape: conv1.weight: file [4,1,3,3], backbone [4,3,3,3]" in error.detail


def test_integers_for_weights_do_not_fit() -> None:
    error = mismatch(Network(), {**weights(), "conv1.weight": torch.ones(4, 3, 3, 3, dtype=torch.int8)})
    assert error.wrong_shape == ("conv1.weight: file [4,3,3,3] int8, backbone [4,3,3,3]",)


def test_counters_may_be_absent_and_may_be_floats() -> None:
    state = weights()
    state["bn1.num_batches_tracked"] = torch.tensor(5.0)
    network = Network()
    load_strict(network, state, REF)
    assert network.bn1.num_batches_tracked == torch.tensor(5)
    del state["bn1.num_batches_tracked"]
    loaded = load_strict(Network(), state, REF)
    assert (loaded.loaded, loaded.missing) == (5, ())


def test_optional_entries_are_reported_and_keep_their_values() -> None:
    network, state = Network(), weights()
    del state["bn1.weight"]
    network.bn1.weight.data.fill_(3)
    loaded = load_strict(network, state, REF, optional=lambda name: name.startswith("bn1"))
    assert loaded.missing == ("bn1.weight",)
    assert network.bn1.weight.tolist() == [3, 3, 3, 3]


def test_optional_or_not_a_file_of_which_nothing_fits_is_an_error() -> None:
    with pytest.raises(CheckpointMismatch, match="none of the file's 1 keys fit"):
        load_strict(Network(), {"x": torch.ones(1)}, REF, optional=lambda name: True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_cast(dtype) -> None:
    network = Network()
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in weights().items()
    }
    load_strict(network, state, REF)
    assert network.conv1.weight.dtype == torch.float32
    assert_holds(network, state)


def test_not_a_number_is_loaded_like_any_other() -> None:
    network, state = Network(), weights()
    state["conv1.weight"].fill_(float("nan"))
    load_strict(network, state, REF)
    assert network.conv1.weight.isnan().all()


def test_a_network_on_the_meta_device_cannot_be_filled() -> None:
    with pytest.raises(ValueError, match="meta"):
        load_strict(Network().to("meta"), weights(), REF)


# --- prefixes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["backbone", "backbone.", "module.backbone."])
def test_a_prefix_is_taken_off_with_or_without_its_dot(prefix) -> None:
    network, state = Network(), weights()
    file = {**prefixed(state, "backbone."), "head.weight": torch.ones(1), "backbone.fc": torch.ones(1)}
    loaded = load_strict(network, file, WeightsRef("a.pth", prefix))
    assert_holds(network, state)
    assert loaded.prefix == "backbone."
    assert loaded.unexpected == ("backbone.fc", "head.weight")


def test_a_prefix_that_is_not_there_names_those_that_are() -> None:
    file = {**prefixed(weights(), "backbone."), "head.weight": torch.ones(1)}
    error = mismatch(Network(), file, WeightsRef("a.pth", "encoder."))
    assert "no key of the file begins with 'encoder.'; they begin with 'backbone.', 'head.'" in error.detail


def test_part_of_a_name_is_no_prefix() -> None:
    with pytest.raises(CheckpointMismatch):
        strip_prefix({"backbone2.x": torch.ones(1)}, "backbone", pointer="#")


@pytest.mark.parametrize("prefix", [None, ""])
def test_no_prefix_leaves_the_names(prefix) -> None:
    state = weights()
    assert strip_prefix(state, prefix, pointer="#") == (state, "", ())


@pytest.mark.parametrize("prefix", ["backbone.", "model.", "encoder.", "module.visual.trunk."])
def test_the_one_prefix_that_fits_is_found_and_reported(prefix) -> None:
    network, state = Network(), weights()
    del state["bn1.num_batches_tracked"]
    loaded = load_strict(network, {**prefixed(state, prefix), "head.x": torch.ones(1)}, REF)
    assert loaded.prefix == prefix
    assert loaded.unexpected == ("head.x",)


def test_bare_names_are_never_prefixed() -> None:
    state = weights()
    both = {**state, **prefixed(state, "momentum.")}
    assert guess_prefix(both, state) == ""
    assert load_strict(Network(), both, REF).prefix == ""


def test_two_prefixes_that_fit_are_no_guess() -> None:
    state = weights()
    error = mismatch(Network(), {**prefixed(state, "student."), **prefixed(state, "teacher.")})
    assert "they begin with 'student.', 'teacher.'" in error.detail


def test_a_file_of_another_network_says_how_its_keys_begin() -> None:
    error = mismatch(Network(), {f"layers.{index}.w": torch.ones(1) for index in range(40)})
    assert "none of the file's 40 keys fit; they begin with 'layers.'" in error.detail
    assert "'conv1.'" in error.detail


def test_hostile_key_names_do_not_fill_the_error() -> None:
    hostile = {f"{'x' * 5000}{index}": torch.ones(1) for index in range(500)}
    assert len(mismatch(Network(), hostile).detail) < 3000
    assert len(mismatch(Network(), {**hostile, "conv1.weight": torch.ones(4, 3, 3, 3)}).detail) < 3000
    deep = {"a." * 50_000 + "conv1.weight": torch.ones(1)}
    assert guess_prefix(deep, ["conv1.weight"]) == ""
