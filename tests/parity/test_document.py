"""docs/backbones.md is what `make docs` would write, from errors that were measured for every pack."""

from __future__ import annotations

import orjson

from service.backbones.catalogue import backbone_registry
from service.necks.catalogue import neck_registry
from tests.parity.document import DOCUMENT, MEASURED, MODEL_LIBRARIES, document
from tests.parity.packs import load_pack, pack_names


def test_the_table_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == document()


def test_every_pack_was_measured_and_is_within_its_tolerance() -> None:
    measured = orjson.loads(MEASURED.read_bytes())
    assert sorted(measured) == pack_names()
    for name, error in measured.items():
        assert error <= max(expected.tolerance for expected in load_pack(name).outputs)


def test_every_type_is_in_the_table_or_is_timms_or_torchvisions() -> None:
    text = DOCUMENT.read_text()
    for entry in (*backbone_registry().entries(), *neck_registry().entries()):
        if entry.scope not in MODEL_LIBRARIES:
            assert f"`{entry.type}`" in text
