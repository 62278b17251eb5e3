"""Text to tokens on disk. Knows no model."""

from mone_common.commands import check_packages

# Hydra imports all plugins, ours of `launch` too.
check_packages("configs", "data_prep", "hydra_plugins", "launch")
