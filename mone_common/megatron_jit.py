"""Import Megatron-Core without what takes a quarter of the time of its import."""

import sys
import types
from typing import Any


def leave_out_jit() -> None:
    """Replace Megatron-Core's decorator jit_fuser by one that does nothing, unless Megatron-Core has been imported.

    It is torch.compile, which takes seconds to import and to compile dozens of small functions.
    """
    if "megatron.core" in sys.modules:
        return
    jit: Any = types.ModuleType("megatron.core.jit")
    jit.jit_fuser = jit.noop_decorator = lambda function: function
    jit.enable_jit_fuser = jit.disable_jit_fuser = lambda: None
    sys.modules[jit.__name__] = jit
