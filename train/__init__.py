"""The run: data, engine, loop, checkpoints, metrics."""

from mone_common.commands import PACKAGES, check_packages

check_packages(*PACKAGES)

import mone_model  # noqa: E402, F401  makes Megatron-Core ready for this machine before any module here imports it
