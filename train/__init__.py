"""The run: data, engine, loop, checkpoints, metrics."""

from mone_common.commands import PACKAGES, check_packages

check_packages(*PACKAGES)

from mone_model import megatron  # noqa: E402

megatron.prepare()  # before any module here imports Megatron-Core
