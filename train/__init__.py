"""The run: data, engine, loop, checkpoints, metrics. Importing it changes nothing in the process."""

from mone_common.commands import PACKAGES, check_packages

check_packages(*PACKAGES)
