"""Compiles the CPU kernels in a separate process, which stops its compilers and removes its files if it is abandoned.

    python -P build.py FOLDER SOURCES FLAG...   # writes FOLDER/mone_cpu.so; its standard input stays open until then

The process that starts it may be killed. Then the standard input of this one ends, and it stops the compilers, removes the
folder and exits. It must be the leader of a process group. It imports nothing of this package.
"""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

NAME = "mone_cpu"


def main() -> None:
    """Compile; exit code 1 with the reason as the last line if that fails."""
    folder, sources, *flags = sys.argv[1:]
    os.environ["TMPDIR"] = folder  # for temporary files, which killed compilers do not remove
    # Compilers inherit an ignored signal, but not a handler.
    signal.signal(signal.SIGTERM, lambda *_: None)
    abandoned = threading.Event()
    watch = threading.Thread(target=_end_with_input, args=(folder, abandoned), daemon=True)
    watch.start()
    try:
        from torch.utils import cpp_extension

        cpp_extension.load(
            NAME,
            [str(source) for source in sorted(Path(sources).glob("*.cpp"))],
            extra_cflags=flags,
            extra_ldflags=["-fopenmp"],
            build_directory=folder,
            is_python_module=False,
            with_cuda=False,
        )
    except Exception as error:  # any error of the compiler or the linker
        if abandoned.is_set():
            watch.join()
        sys.exit(str(error).strip().splitlines()[0])


def _end_with_input(folder: str, abandoned: threading.Event) -> None:
    sys.stdin.read()
    abandoned.set()
    os.killpg(0, signal.SIGTERM)
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)  # compilers that have not ended yet may write there
        if not os.path.exists(folder):
            break
        time.sleep(0.1)
    os._exit(1)


if __name__ == "__main__":
    main()
