"""Writes `catalogues/torchvision.json` from torchvision's own tables.

Run `python -m service.checkpoints.make_catalogues` when torchvision's pin changes; a test compares the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import orjson

FILE: Final = Path(__file__).parent / "catalogues" / "torchvision.json"
FIRST: Final = "IMAGENET1K_V1"


def torchvision_urls() -> dict[str, str]:
    """URLs of every classifier's weights by OpenMMLab's names for them.

    `resnet50` is the first weights that there were, as it was before a model could have several;
    `resnet50.default` the best, `resnet50.imagenet1k_v2` one of them.
    """
    from torchvision import models

    urls: dict[str, str] = {}
    for name in sorted(models.list_models(models)):
        weights = models.get_model_weights(name)
        if not len(weights):
            continue
        default = weights["DEFAULT"]
        first = weights[FIRST] if FIRST in weights.__members__ else default
        urls[name], urls[f"{name}.default"] = first.url, default.url
        urls |= {f"{name}.{member.name.lower()}": member.url for member in weights}
    return urls


if __name__ == "__main__":
    FILE.write_bytes(orjson.dumps(torchvision_urls(), option=orjson.OPT_INDENT_2) + b"\n")
