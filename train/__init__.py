"""The run: data, engine, loop, checkpoints, metrics."""

import mone_model  # noqa: F401  makes Megatron-Core ready for this machine before any module here imports it
