"""Pydantic's errors as the service's faults."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from service.errors import Fault, InvalidConfig
from service.validation import MAX_FAULTS, faults_from, invalid, pointer_to


class Pretrained(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["Pretrained"]
    checkpoint: str


class Left(BaseModel):
    kind: Literal["left"]


class Right(BaseModel):
    kind: Literal["right"]


class Config(BaseModel):
    model_config = ConfigDict(extra="forbid")
    depth: int = 50
    out_indices: int | tuple[int, ...] = (0,)
    init_cfg: Pretrained | str | None = None
    side: Annotated[Left | Right, Field(discriminator="kind")] | None = None
    even: int = 0

    @field_validator("even")
    @classmethod
    def _is_even(cls, value: int) -> int:
        if value % 2:
            raise ValueError("give an even number")
        return value


def faults_of(
    config: dict[str, Any], pointer: str = "#/backbone", known: tuple[str, ...] = ()
) -> list[Fault]:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate(config)
    return faults_from(caught.value, pointer, known)


@pytest.mark.parametrize(
    ("config", "pointers"),
    [
        ({"depth": "many"}, ["#/backbone/depth"]),
        ({"out_indices": [0, "x"]}, ["#/backbone/out_indices/1"]),
        ({"out_indices": "x"}, ["#/backbone/out_indices"]),
        (
            {"init_cfg": {"type": "Pretrained", "chekpoint": 1}},
            ["#/backbone/init_cfg/checkpoint", "#/backbone/init_cfg/chekpoint"],
        ),
        ({"init_cfg": 3}, ["#/backbone/init_cfg"]),
        ({"a/b~c": 1}, ["#/backbone/a~1b~0c"]),
        ({"str": 1}, ["#/backbone/str"]),
        ({"": 1}, ["#/backbone/"]),
    ],
)
def test_pointers_are_paths_of_the_request(config: dict[str, Any], pointers: list[str]) -> None:
    assert [fault.pointer for fault in faults_of(config)] == pointers


def test_the_branches_of_a_union_are_alternatives() -> None:
    [fault] = faults_of({"init_cfg": 3})
    assert ", or: " in fault.detail
    assert "string" in fault.detail


def test_an_unknown_key_comes_with_the_nearest_known_ones() -> None:
    [fault] = faults_of({"deph": 1}, known=("depth", "style"))
    assert fault.detail == "unknown key; nearest: depth"
    [fault] = faults_of({"zzzz": 1}, known=("depth", "style"))
    assert fault.detail == "unknown key; known: depth, style"
    assert faults_of({"deph": 1})[0].detail == "unknown key"


def test_the_clients_values_are_never_echoed() -> None:
    secret = "s3cret-payload"
    config = {
        "depth": secret,
        "out_indices": [secret],
        "init_cfg": {"type": secret},
        "side": {"kind": secret},
    }
    assert secret not in " ".join(fault.pointer + fault.detail for fault in faults_of(config))


def test_a_validators_own_words_come_without_pydantics_prefix() -> None:
    assert faults_of({"even": 3}) == [Fault("#/backbone/even", "give an even number")]


def test_a_thousand_unknown_keys_are_twenty_faults() -> None:
    assert len(faults_of({f"key{number}": 1 for number in range(1000)}, known=("depth",))) == MAX_FAULTS


def test_a_huge_key_is_cut_in_the_pointer() -> None:
    [fault] = faults_of({"k" * 1_000_000: 1}, known=("depth",))
    assert len(fault.pointer) < 100
    assert len(fault.detail) < 100


def test_invalid_carries_every_fault() -> None:
    with pytest.raises(ValidationError) as caught:
        Config.model_validate({"depth": "x", "zzz": 1})
    error = invalid(caught.value, "#")
    assert isinstance(error, InvalidConfig)
    assert [fault.pointer for fault in error.faults] == ["#/depth", "#/zzz"]


def test_pointer_to_the_root_itself() -> None:
    assert pointer_to("#") == "#"
    assert pointer_to("#", "images", 3) == "#/images/3"


def test_a_huge_key_of_brackets_is_read_in_no_time() -> None:
    class Free(BaseModel):
        names: dict[str, int]

    with pytest.raises(ValidationError) as caught:
        Free.model_validate({"names": {"[]" * 1_000_000 + "A" * 1_000_000: "x"}})
    started = time.perf_counter()
    [fault] = faults_from(caught.value, "#")
    assert time.perf_counter() - started < 1.0
    assert len(fault.pointer) < 100
