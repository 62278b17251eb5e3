"""Many machines, many runs."""

from mone_common.commands import PACKAGES, check_packages

check_packages(*PACKAGES)
