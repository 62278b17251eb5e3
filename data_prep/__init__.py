"""Converts text to token shards on disk; independent of the model."""

from mone_common.commands import check_packages

# Hydra imports hydra_plugins, which imports `launch`.
check_packages("configs", "data_prep", "hydra_plugins", "launch")
