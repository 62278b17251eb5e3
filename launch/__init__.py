"""Plans runs, starts them on one or many machines, and reports their results."""

from mone_common.commands import PACKAGES, check_packages

check_packages(*PACKAGES)
