"""What a command prints: training never waits for whoever reads it, and every other command ends with its reader.

    unblock_output()                 # training, before anything else
    drain_output(2.0)                # before os._exit

    with ending_with_reader():       # any other command: `mone-verify ... | head` ends silently
        ...

A pipe can be closed or full, a disk behind a redirection can be full, a terminal can be gone. Each makes an ordinary `print`
raise or wait.
"""

import atexit
import contextlib
import io
import logging
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, TextIO

WAITING = 10_000
"""Pieces of text, mostly lines, that wait for a reader before further ones are left out."""
EXIT_SECONDS = 2.0
"""How long the end of a process waits until its last words are written."""
FORK_SECONDS = 1.0
"""How long a forked process, which has no thread to print, waits until there is room for a piece."""
READER_GONE = 141
"""Exit code of a command whose reader has gone, as a shell shows it for one that SIGPIPE ends."""


class _Outlet:
    """Bytes on their way to a descriptor. What cannot be written is left out; the next piece that can says how much."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        # A SimpleQueue may also be filled in a signal handler, while the same thread fills it.
        self.queue: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self.served_in = os.getpid()
        self.lost, self.reason = 0, ""
        threading.Thread(target=self._serve, name=f"output {descriptor}", daemon=True).start()

    def put(self, data: bytes) -> None:
        """Take bytes; never waits in the process that this was made in."""
        if os.getpid() != self.served_in:
            self._write(data, seconds=FORK_SECONDS)
        elif self.queue.qsize() < WAITING:
            self.queue.put(data)
        else:
            self._lose(data, "nobody read it")

    def drain(self, seconds: float) -> None:
        """Wait until all that was put is written, or left out, but no longer than this."""
        if os.getpid() == self.served_in:
            written = threading.Event()
            self.queue.put(written)
            written.wait(seconds)

    def close(self, seconds: float) -> None:
        """Drain; what is put later is written at once where there is room, as in a fork."""
        self.drain(seconds)
        self.served_in = -1

    def _serve(self) -> None:
        while True:
            taken = [self.queue.get()]
            # Together: for each write this thread must get hold of the interpreter anew.
            while not self.queue.empty() and len(taken) < 100:
                taken.append(self.queue.get())
            text = b"".join(piece for piece in taken if isinstance(piece, bytes))
            if text:
                self._write(text, seconds=None)
            for piece in taken:
                if isinstance(piece, threading.Event):
                    piece.set()

    def _write(self, data: bytes, seconds: float | None) -> None:
        if self.lost:
            note = f"[{self.lost} bytes of output are missing here: {self.reason}]\n".encode()
            if not self._written(note, seconds):
                self._lose(data, self.reason)
                return
            self.lost = 0
        self._written(data, seconds)

    def _written(self, data: bytes, seconds: float | None) -> bool:
        """Whether all of it could be written; seconds: to wait until there is room, None: any time."""
        rest, poll = memoryview(data), select.poll()
        poll.register(self.descriptor, select.POLLOUT)
        try:
            while rest:
                # A pipe that is ready has room for so many bytes; a descriptor may be one that never waits, too.
                if not poll.poll(None if seconds is None else 1000 * seconds):
                    raise BlockingIOError("nobody read it")
                with contextlib.suppress(BlockingIOError):
                    rest = rest[os.write(self.descriptor, rest[: select.PIPE_BUF]) :]
        except (OSError, ValueError) as error:
            self._lose(bytes(rest), getattr(error, "strerror", None) or str(error))
        return not rest

    def _lose(self, data: bytes, reason: str) -> None:
        self.lost, self.reason = self.lost + len(data), reason


class _Raw(io.RawIOBase):
    """The binary stream below sys.stdout or sys.stderr."""

    def __init__(self, outlet: _Outlet, name: str) -> None:
        self.outlet, self.name = outlet, name

    def write(self, data: Any) -> int:
        self.outlet.put(bytes(data))
        return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.outlet.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.outlet.descriptor)


_outlets: dict[int, _Outlet] = {}


def unblock_output() -> None:
    """From now on sys.stdout and sys.stderr neither raise nor wait, in this process and those that it forks.

    A thread writes what they are given. Streams that somebody else has put in their place stay.
    """
    for descriptor in range(3):
        # Else the next file that is opened would get this number, and with it what libraries print in C.
        with contextlib.suppress(OSError):
            _open_unless_open(descriptor)
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # the command was started with >&-
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for the life of the process
        elif stream is getattr(sys, f"__{name}__"):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
            same = descriptor == 2 and 1 in _outlets and os.path.sameopenfile(1, 2)
            # One thread for both where they are one file: lines keep their order.
            outlet = _outlets[descriptor] = _outlets[1] if same else _Outlet(descriptor)
            text = io.TextIOWrapper(
                _Raw(outlet, f"<{name}>"),
                encoding=stream.encoding,
                errors="backslashreplace",
                line_buffering=True,
            )
            setattr(sys, name, text)
            _redirect_logging(stream, text)
    atexit.register(_close)


def _redirect_logging(before: TextIO, after: TextIO) -> None:
    """Give log handlers, which hold on to the stream that they were made with, the new one."""
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(after)


def drain_output(seconds: float) -> None:
    """Wait until what was printed is written, but no longer than this; nothing without `unblock_output`."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    until = time.monotonic() + seconds
    for outlet in _outlets.values():
        outlet.drain(max(0.0, until - time.monotonic()))


def _close() -> None:
    drain_output(EXIT_SECONDS)
    for outlet in _outlets.values():
        outlet.close(0.0)


def _open_unless_open(descriptor: int) -> None:
    try:
        os.fstat(descriptor)
    except OSError:
        os.open(os.devnull, os.O_RDWR)


@contextlib.contextmanager
def ending_with_reader() -> Iterator[None]:
    """End the process quietly, with code 141, if the block prints and nobody can read it any more."""
    try:
        try:
            yield
        finally:
            # At the end of the interpreter it would fail with words of its own.
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        leave_quietly(READER_GONE)
        raise


def leave_quietly(exit_code: int) -> None:
    """End the process if nobody can read its output any more: the pipe that broke may have been another."""
    gone = [descriptor for descriptor in (1, 2) if _reader_has_gone(descriptor)]
    for descriptor in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # for the interpreter's own flush
    if gone:
        sys.exit(exit_code)


def _reader_has_gone(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
