"""What was imported is not walked over by every full collection; garbage is still found. In a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import gc, importlib, sys, weakref
from service.collector import MANY_MODULES, set_imports_aside

class Knot:
    def __init__(self): self.self = self

gc.collect()
set_imports_aside()
set_imports_aside()
assert len(gc.callbacks) == 1
first = gc.get_freeze_count()
knot = weakref.ref(Knot())
gc.collect()
assert knot() is None and gc.get_freeze_count() <= first, "nothing was imported"
sys.path.insert(0, sys.argv[1])
for index in range(MANY_MODULES):
    importlib.import_module(f"module_{index}")
knot = weakref.ref(Knot())
gc.collect(1)
assert gc.get_freeze_count() <= first, "only a full collection sets aside"
knot = weakref.ref(Knot())
gc.collect()
assert knot() is None
second = gc.get_freeze_count()
assert second > first + 10 * MANY_MODULES
gc.collect()
assert gc.get_freeze_count() <= second
"""


def test_new_modules_are_set_aside_once(tmp_path: Path) -> None:
    for index in range(50):
        functions = "".join(f"def f{number}(): pass\n" for number in range(10))
        (tmp_path / f"module_{index}.py").write_text(functions)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
