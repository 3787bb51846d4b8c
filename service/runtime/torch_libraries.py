"""torch's shared libraries, loaded without the interpreter lock.

`import torch` links half a gigabyte of code in one call that keeps every other Python thread waiting, the one that
answers probes too: 300 ms on two fast cores. The same call through a foreign function does not.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from importlib.util import find_spec
from pathlib import Path

LIBRARY = "libtorch_python.so"  # names all the others as its dependencies
log = logging.getLogger("service.start")


def load_torch_libraries() -> None:
    """Link what `import torch` would; Linux only, elsewhere the import does it."""
    spec = find_spec("torch")
    if sys.platform != "linux" or spec is None or not spec.submodule_search_locations:
        return
    library = Path(spec.submodule_search_locations[0]) / "lib" / LIBRARY
    # `ctypes.CDLL(path)` would hold the lock; a function of a library that is already there is called without it.
    dlopen = ctypes.CDLL(None).dlopen
    dlopen.argtypes, dlopen.restype = (ctypes.c_char_p, ctypes.c_int), ctypes.c_void_p
    if not dlopen(os.fsencode(library), os.RTLD_NOW | os.RTLD_LOCAL):
        log.info("%s is not there to be linked early", LIBRARY)
