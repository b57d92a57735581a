"""steer-heal: steer a chat model towards a trait, distil it into the weights, heal the incoherence, and repeat."""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

from steer_heal.processor import processor

if TYPE_CHECKING:
    from steer_heal.python import Result, Trait, answer, extract, load, load_trait, resume, run

__all__ = ["VERSION", "Result", "Trait", "answer", "extract", "load", "load_trait", "resume", "run"]

VERSION = "0.5.0"  # a run folder is read by versions that share its first two numbers

# A sum must come out the same wherever its numbers lie in memory and whatever else is in the batch. Intel's library
# promises that for matrix products on x86 in this mode only; it is read at the first product.
os.environ.setdefault("MKL_CBWR", processor().mkl_mode)
# Large tensors on a CPU in large pages; torch reads it at the first one.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

# At its import on a CPU it advises a package that it does not need.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """The names of `steer_heal.python`, which imports torch: the command line starts without it."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("steer_heal.python"), name)


def check_types() -> None:
    """From here on every steer_heal module that is imported checks its types and tensor shapes at run time."""
    from functools import partial
    from importlib.machinery import SourceFileLoader
    from unittest.mock import patch

    from jaxtyping import _import_hook as hook

    hook.install_import_hook("steer_heal", "beartype.beartype")

    # While a checked module runs, jaxtyping 0.3 looks for compiled code under a name of its own, also for that of all
    # that the module imports: torch and transformers would be compiled anew. It need only while it reads the module.
    def get_code(self: hook._JaxtypingLoader, name: str) -> Any:
        named = partial(hook._optimized_cache_from_source, self._typechecker.get_hash())
        with patch("importlib._bootstrap_external.cache_from_source", named):
            return SourceFileLoader.get_code(self, name)

    hook._JaxtypingLoader.get_code, hook._JaxtypingLoader.exec_module = get_code, SourceFileLoader.exec_module


if os.environ.get("STEER_HEAL_CHECK_TYPES") == "1":
    check_types()
