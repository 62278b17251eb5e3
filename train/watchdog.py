"""End a run that hangs, and report which rank hangs in which phase.

    watchdog = Watchdog(store, rank=0, world_size=4, timeout=1800, note=print)
    watchdog.enter(step, "forward and backward")           # at the start of each phase
    watchdog.close()

A collective waits for its slowest rank, or for one that has failed, and does not report which. Threads of every rank post
its phase to the job's store. If a rank stays in one phase for too long, it prints the last post of all ranks and its stacks.

Clocks are not compared, since they can be set and differ between machines. Each rank sums the time that it waits, except
time in which the process was stopped. A rank responds if its beat count grows.
"""

import contextlib
import json
import os
import platform
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from mone_common.output import drain_output
from train.meeting import FAILED

EXIT_HUNG, EXIT_FAILED = 4, 1
ORPHANED_SECONDS = 15.0
"""Time for which a rank may continue after another has failed. With some backends, its collectives would wait forever."""
LOOK = 3
"""Number of beats within which a running rank updates its post."""


class Watchdog:
    """Watches the main thread of this rank; timeout in seconds. note: called with the reason before a hanging run ends."""

    def __init__(
        self, store: dist.Store, *, rank: int, world_size: int, timeout: float, note: Callable[[str], object]
    ) -> None:
        # A store connection serves one caller at a time: a waiting main thread would block these threads.
        self.store = store if isinstance(store, dist.HashStore) else store.clone()  # type: ignore[attr-defined]
        self.rank, self.world_size, self.timeout, self.note = rank, world_size, timeout, note
        self.beat = max(0.2, min(10.0, timeout / 20))
        self.phase, self.step, self.count = "start", 0, 0
        self.other_failed = False
        self.waited = 0.0
        """Seconds in the current phase, without time in which the process was stopped."""
        self.closed = threading.Event()
        for act in (self._post, self._watch):
            threading.Thread(target=act, name="watchdog", daemon=True).start()

    def enter(self, step: int, phase: str) -> None:
        """Start a phase of the main thread. Cheap enough to call for every micro-batch."""
        self.step, self.phase, self.count = step, phase, self.count + 1

    def close(self) -> None:
        """Stop watching."""
        self.closed.set()

    def _post(self) -> None:
        """Post the phase of this rank to the store, once per beat."""
        beats = 0
        while True:
            beats += 1
            post = {"host": platform.node(), "beats": beats, "count": self.count, "step": self.step, "phase": self.phase}
            # The process with the store may have ended; the timeout still applies.
            with contextlib.suppress(Exception):
                self.store.set(f"watchdog/{self.rank}", json.dumps(post | {"waited": self.waited}))
                self.other_failed = self.world_size > 1 and self.store.check([FAILED])
            if self.closed.wait(self.beat):
                return

    def _watch(self) -> None:
        seen, before, orphaned = -1, time.monotonic(), 0.0
        while not self.closed.wait(self.beat):
            now = time.monotonic()
            # After a longer time, this process was stopped or its machine was suspended.
            passed, before = min(now - before, 2 * self.beat), now
            self.waited = self.waited + passed if self.count == seen else 0.0
            seen = self.count
            if self.waited > self.timeout:
                self._report()
            orphaned += passed if self.other_failed else 0.0
            if orphaned > ORPHANED_SECONDS:
                where = f"rank {self.rank} ends in {self.phase} of step {self.step}"
                print(f"error: {where}: another rank has failed and printed the reason", file=sys.stderr, flush=True)
                drain_output(2.0)
                os._exit(EXIT_FAILED)

    def _report(self) -> None:
        """Print the last post of every rank (once per job) and the stacks of this rank, and end this process."""
        found: list[str | None] = []
        self._within_time(lambda: found.append(self._verdict()))
        verdict = found[0] if found else f"rank {self.rank} waits, and the job's store does not respond"
        if verdict is not None:
            text = f"no progress for {self.timeout:.0f} s (run.timeout_minutes): {verdict}"
            # Not logged: the main thread may hang with the lock of the log handler.
            print(f"error: {text}", file=sys.stderr, flush=True)
            self._within_time(lambda: self.note(text.partition("\n")[0]))
        self._within_time(self._print_stacks)
        # Give the other ranks, which time out within a beat, time to print their stacks before a launcher ends them. This
        # rank still posts meanwhile, so that the reporting rank does not list it as silent.
        time.sleep(LOOK * self.beat)
        drain_output(2.0)
        os._exit(EXIT_HUNG)

    def _within_time(self, act: Callable[[], object]) -> None:
        """Call `act`, but wait a limited time: the store, the run folder or the disk with the source may hang as well."""
        acting = threading.Thread(target=act, daemon=True)
        acting.start()
        acting.join(timeout=LOOK * self.beat + 20)

    def _verdict(self) -> str | None:
        """The state of all ranks; None if another rank reports it."""
        try:
            if self.store.add("watchdog/reports", 1) == 1:
                return self._table()
            time.sleep(LOOK * self.beat)
            return None
        except RuntimeError as error:
            return f"rank {self.rank} waits, and the job's store has ended ({error})"

    def _table(self) -> str:
        """The ranks that the others wait for, and one line for the state of each rank."""
        earlier = self._read()
        time.sleep(LOOK * self.beat)
        posts = self._read()
        silent = [rank for rank in range(self.world_size) if rank not in posts]
        rows = [f"  rank {rank} has never responded" for rank in silent]
        for rank, post in posts.items():
            responds = post["beats"] != earlier.get(rank, post)["beats"] or rank not in earlier
            silent += [] if responds else [rank]
            rows.append(
                f"  rank {rank} on {post['host']}: step {post['step']}, {post['phase']}, for {post['waited']:.0f} s"
                + ("" if responds else f"; its process has not responded for {LOOK * self.beat:.0f} s")
            )
        behind = min((post["count"] for post in posts.values()), default=0)
        suspects = silent or [rank for rank, post in posts.items() if post["count"] == behind]
        verdict = (
            f"rank {', '.join(map(str, suspects))} holds up the others"
            if len(suspects) < self.world_size
            else "all ranks are in the same phase: look at the stacks"
        )
        return "\n".join([verdict, *rows])

    def _read(self) -> dict[int, dict[str, Any]]:
        """The last post of each rank that has posted."""
        keys = {rank: f"watchdog/{rank}" for rank in range(self.world_size)}
        return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}

    def _print_stacks(self) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        lines = [f"rank {self.rank}, step {self.step}, {self.phase}: stacks, most recent call last\n"]
        for thread, frame in sys._current_frames().items():
            lines += [f"thread {names.get(thread, thread)}:\n", *traceback.format_stack(frame)]
        # One write through the stream, since a direct write to a full pipe would block.
        print("".join(lines), file=sys.stderr, flush=True)
