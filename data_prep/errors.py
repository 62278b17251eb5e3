"""What is the user's to mend, told so that they can.

with naming_folder("output", folder):
    ...                        # a full disk becomes a DataError that says which folder and option
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
    """The user's data, option or folder is at fault; the message says which one and what would be right."""


@contextmanager
def naming_folder(option: str, folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Turn an OSError that comes of a full or forbidden `folder`, given as `option`, into a DataError.

    shared: other processes write there, too. Else what is unfinished there makes room on a full disk.
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
                "What was finished is kept: make room and run the same command again to continue, "
                "or choose a folder on another disk"
            ) from error
        if error.errno in REFUSED:
            raise DataError(f"{option}={folder}: cannot write there ({error.strerror}: {error.filename})") from error
        raise
