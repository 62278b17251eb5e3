"""Output of commands. Training never blocks on its output; every other command ends when its reader has ended.

    unblock_output()                 # training, before anything else
    drain_output(2.0)                # before os._exit

    with ending_with_reader():       # other commands: `mone-verify ... | head` ends silently
        ...

An ordinary `print` raises or blocks if a pipe is closed or full, a disk is full, or the terminal is closed.
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
"""Largest number of queued pieces of text, mostly lines; further ones are dropped."""
EXIT_SECONDS = 2.0
"""Longest wait at the end of a process until its output is written."""
FORK_SECONDS = 1.0
"""Longest wait for a piece in a forked process, which has no output thread."""
READER_GONE = 141
"""Exit code of a command whose reader has ended, as a shell shows for SIGPIPE."""


class _Outlet:
    """Queues bytes for a descriptor. Bytes that cannot be written are dropped; the next output notes their number."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        # A SimpleQueue is reentrant: a signal handler can put while the same thread puts.
        self.queue: queue.SimpleQueue[bytes | threading.Event] = queue.SimpleQueue()
        self.served_in = os.getpid()
        self.lost, self.reason = 0, ""
        threading.Thread(target=self._serve, name=f"output {descriptor}", daemon=True).start()

    def put(self, data: bytes) -> None:
        """Queue bytes. Never blocks in the process that created this object."""
        if os.getpid() != self.served_in:
            self._write(data, seconds=FORK_SECONDS)
        elif self.queue.qsize() < WAITING:
            self.queue.put(data)
        else:
            self._lose(data, "not read")

    def drain(self, seconds: float) -> None:
        """Wait until all queued bytes are written or dropped, but at most this long."""
        if os.getpid() == self.served_in:
            written = threading.Event()
            self.queue.put(written)
            written.wait(seconds)

    def close(self, seconds: float) -> None:
        """Drain. Bytes that are put later are written directly, as in a fork."""
        self.drain(seconds)
        self.served_in = -1

    def _serve(self) -> None:
        while True:
            taken = [self.queue.get()]
            # Write many pieces at once, since each write needs the interpreter lock again.
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
        """Write bytes; returns whether all could be written. seconds: longest wait for space; None: no limit."""
        rest, poll = memoryview(data), select.poll()
        poll.register(self.descriptor, select.POLLOUT)
        try:
            while rest:
                # A pipe that is ready has space for PIPE_BUF bytes. The descriptor may be non-blocking.
                if not poll.poll(None if seconds is None else 1000 * seconds):
                    raise BlockingIOError("not read")
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
    """Make sys.stdout and sys.stderr neither raise nor block, in this process and its forks.

    A thread writes the output. Streams that other code has replaced are not changed.
    """
    for descriptor in range(3):
        # Otherwise the next opened file would get this descriptor, and receive what C libraries print.
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
            # If both are the same file, one thread writes both, which keeps the order of lines.
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
    """Replace the stream of log handlers, which keep the stream that they were created with."""
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(after)


def drain_output(seconds: float) -> None:
    """Wait until printed output is written, but at most this long. Only flushes without `unblock_output`."""
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
    """End the process silently, with exit code 141, if the block prints and the reader of the output has ended."""
    try:
        try:
            yield
        finally:
            # A flush at interpreter exit would print an error.
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        leave_quietly(READER_GONE)
        raise


def leave_quietly(exit_code: int) -> None:
    """End the process if the reader of its output has ended. Returns if another pipe was broken."""
    gone = [descriptor for descriptor in (1, 2) if _reader_has_gone(descriptor)]
    for descriptor in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # for the interpreter's own flush
    if gone:
        sys.exit(exit_code)


def _reader_has_gone(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
