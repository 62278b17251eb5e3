"""Compiles the CPU kernels, in a process of its own that no compiler and no file outlives.

    python -P cpu_build.py FOLDER SOURCES FLAG...   # writes FOLDER/mone_cpu.so; its standard input stays open until then

Whoever starts it may be killed at any moment. Then its standard input ends, and it stops the compilers, removes the folder
and ends too. It must lead a process group of its own. It imports nothing of this package.
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
    os.environ["TMPDIR"] = folder  # where compilers put what they leave behind when they are killed
    # A function, which compilers do not inherit, unlike a signal that is ignored.
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
    except Exception as error:  # whatever a compiler or a linker may have to say
        if abandoned.is_set():
            watch.join()
        sys.exit(str(error).strip().splitlines()[0])


def _end_with_input(folder: str, abandoned: threading.Event) -> None:
    sys.stdin.read()
    abandoned.set()
    os.killpg(0, signal.SIGTERM)
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)  # compilers that still end may be writing there
        if not os.path.exists(folder):
            break
        time.sleep(0.1)
    os._exit(1)


if __name__ == "__main__":
    main()
