"""Errors that the user can correct.

with naming_folder("output", folder):
    ...                        # a full disk becomes a DataError that names folder and option
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mone_common.console import UserError
from mone_common.files import TEMPORARY_PREFIX

FULL = (errno.ENOSPC, errno.EDQUOT)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


class DataError(UserError):
    """An error in the user's data, options or folders; the message names it and a way out."""


@contextmanager
def naming_folder(option: str, folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Turn an OSError of a full or unwritable `folder`, the value of `option`, into a DataError.

    shared: other processes write to the folder as well. Otherwise unfinished files are removed if the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            for unfinished in [] if shared else folder.glob(f"{TEMPORARY_PREFIX}*"):
                if unfinished.is_file():
                    unfinished.unlink()
            raise DataError(
                f"{option}={folder}: no space left in this folder ({error.strerror}). "
                "Finished files are kept: free some space and run the same command again to continue, "
                "or choose a folder on another disk"
            ) from error
        if error.errno in REFUSED:
            raise DataError(f"{option}={folder}: cannot write there ({error.strerror}: {error.filename})") from error
        raise
