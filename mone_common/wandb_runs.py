"""Settings of W&B for all commands."""

import os
from typing import Any

TIMEOUTS = {"init_timeout": 20.0, "finish_timeout": 60.0}
"""Seconds for W&B to start, and to upload the rest at the end; `wandb sync` uploads what remains. The environment variables
WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT override them."""


def wandb_settings() -> Any:
    """Settings of W&B: no console output, and short timeouts.

    Without timeouts, a finished run would wait for an unreachable server as long as W&B retries.
    """
    import wandb

    known = wandb.Settings.model_fields
    ours = {name: value for name, value in TIMEOUTS.items() if name in known and f"WANDB_{name.upper()}" not in os.environ}
    return wandb.Settings(silent=True, **ours)
