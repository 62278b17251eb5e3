"""A replacement of megatron.core.jit, which makes the import of Megatron-Core a quarter faster."""

import sys
import types
from typing import Any


def jit_without_compiler() -> types.ModuleType:
    """megatron.core.jit with decorators that do nothing.

    The original jit_fuser is torch.compile, which takes seconds to import and to compile dozens of small functions.
    """
    jit: Any = types.ModuleType("megatron.core.jit")
    jit.jit_fuser = jit.noop_decorator = lambda function: function
    jit.enable_jit_fuser = jit.disable_jit_fuser = lambda: None
    return jit


def leave_out_jit() -> None:
    """Replace megatron.core.jit, unless Megatron-Core has been imported."""
    if "megatron.core" not in sys.modules:
        sys.modules["megatron.core.jit"] = jit_without_compiler()
