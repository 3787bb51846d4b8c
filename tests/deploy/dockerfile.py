"""The `Dockerfile`, read."""

from __future__ import annotations

import json
import re

from tests.processes import ROOT

LAST_STAGE = (ROOT / "Dockerfile").read_text().rpartition("\nFROM ")[2].replace("\\\n", " ")


def instructions(name: str) -> list[str]:
    """What follows an instruction of the last stage, each time it is there."""
    return [line.strip() for line in re.findall(rf"^{name} (.*)$", LAST_STAGE, re.MULTILINE)]


def exec_form(text: str) -> list[str]:
    """The words of a command that no shell reads.

    Raises:
        ValueError: it is in shell form.
    """
    words: list[str] = json.loads(text)
    return words


def environment_of_the_image() -> dict[str, str]:
    """The variables that the image sets."""
    [line] = instructions("ENV")
    return dict(pair.split("=", 1) for pair in line.split())
