"""One target under atheris: `python -m tests.fuzz.coverage TARGET CORPUS [libFuzzer options]`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

# The packages whose branches guide the fuzzer, by target.
PACKAGES: Mapping[str, tuple[str, ...]] = {
    "decode": ("service.images", "PIL"),
    "array": ("service.images",),
    "form": ("service.api.forms", "python_multipart"),
    "body": ("service.protocol",),
    "torch": ("service.checkpoints",),
    "pickle": ("service.checkpoints",),
    "safetensors": ("service.checkpoints",),
}


def main() -> None:
    """Fuzz until libFuzzer ends it: 0 where nothing was found."""
    import atheris  # there are Pythons that it has no wheel for

    name, corpus, *options = sys.argv[1:]
    # Modules are instrumented while they are imported: nothing of them may have been before.
    with atheris.instrument_imports(include=[*PACKAGES[name]]):
        from tests.fuzz.targets import TARGETS
    folder = Path(corpus)
    folder.mkdir(parents=True, exist_ok=True)
    for index, seed in enumerate(TARGETS[name].seeds()):
        (folder / f"seed-{index}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *options, str(folder)], TARGETS[name].run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
