"""What a model is worth: its scores on text and on tasks."""

from mone_common.commands import check_packages

# Hydra imports hydra_plugins, which imports `launch`.
check_packages("configs", "data_prep", "hydra_plugins", "launch", "mone_eval", "mone_model")
