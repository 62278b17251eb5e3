"""unit: one process; distributed: gloo, 2 to 4 processes; e2e: the commands a user types."""

from mone_model import megatron

megatron.prepare()  # before any test module imports Megatron-Core
