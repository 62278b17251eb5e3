"""End a run that hangs, and say which rank hangs where.

    watchdog = Watchdog(store, rank=0, world_size=4, timeout=1800, note=print)
    watchdog.enter(step, "forward and backward")           # whenever the loop turns to something else
    watchdog.close()

A collective waits for its slowest rank, or for one that has failed, and tells nobody which that is. Here threads of every
rank post to the job's store what the rank is doing. When a rank has been in one phase for too long, it prints what all ranks
last said and its own stack.

No clocks are compared: the clock of a machine may be set, and those of two machines differ. Each rank adds up how long its
own thread has waited, without the time in which the process was stopped. Another rank answers if its count of beats grows.
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
"""How long a rank may go on after another one has said that it ends: with some communication it would wait for ever."""
LOOK = 3
"""Beats in which a rank that answers is seen to answer."""


class Watchdog:
    """Watches the main thread of this rank; timeout in seconds. note: takes the reason before a run that hangs is ended."""

    def __init__(
        self, store: dist.Store, *, rank: int, world_size: int, timeout: float, note: Callable[[str], object]
    ) -> None:
        # A store's connection serves one caller at a time, and a waiting main thread would block these threads.
        self.store = store if isinstance(store, dist.HashStore) else store.clone()  # type: ignore[attr-defined]
        self.rank, self.world_size, self.timeout, self.note = rank, world_size, timeout, note
        self.beat = max(0.2, min(10.0, timeout / 20))
        self.phase, self.step, self.count = "start", 0, 0
        self.other_failed = False
        self.waited = 0.0
        """Seconds that this rank has been in its phase, as far as its process ran."""
        self.closed = threading.Event()
        for act in (self._post, self._watch):
            threading.Thread(target=act, name="watchdog", daemon=True).start()

    def enter(self, step: int, phase: str) -> None:
        """The main thread begins a phase; cheap enough for every micro-batch."""
        self.step, self.phase, self.count = step, phase, self.count + 1

    def close(self) -> None:
        """Stop watching."""
        self.closed.set()

    def _post(self) -> None:
        """Tell the others, once a beat, what this rank does."""
        beats = 0
        while True:
            beats += 1
            said = {"host": platform.node(), "beats": beats, "count": self.count, "step": self.step, "phase": self.phase}
            # The store may be gone with the process that held it; what matters then is the time.
            with contextlib.suppress(Exception):
                self.store.set(f"watchdog/{self.rank}", json.dumps(said | {"waited": self.waited}))
                self.other_failed = self.world_size > 1 and self.store.check([FAILED])
            if self.closed.wait(self.beat):
                return

    def _watch(self) -> None:
        seen, before, orphaned = -1, time.monotonic(), 0.0
        while not self.closed.wait(self.beat):
            now = time.monotonic()
            # Of a longer time this process was stopped, or its machine asleep.
            passed, before = min(now - before, 2 * self.beat), now
            self.waited = self.waited + passed if self.count == seen else 0.0
            seen = self.count
            if self.waited > self.timeout:
                self._report()
            orphaned += passed if self.other_failed else 0.0
            if orphaned > ORPHANED_SECONDS:
                where = f"rank {self.rank} ends in {self.phase} of step {self.step}"
                print(f"error: {where}: another rank has ended and said why", file=sys.stderr, flush=True)
                drain_output(2.0)
                os._exit(EXIT_FAILED)

    def _report(self) -> None:
        """Print once for the job what every rank said last, this rank's stacks, and leave."""
        found: list[str | None] = []
        self._within_time(lambda: found.append(self._verdict()))
        verdict = found[0] if found else f"rank {self.rank} waits, and the job's store does not say what the others do"
        if verdict is not None:
            text = f"no progress for {self.timeout:.0f} s (run.timeout_minutes): {verdict}"
            print(f"error: {text}", file=sys.stderr, flush=True)
            self._within_time(lambda: self.note(text.partition("\n")[0]))
        self._within_time(self._print_stacks)
        # Leave the others, which notice within a beat, the time to show theirs before a launcher ends them. Meanwhile this
        # rank still posts, so that the rank that looks sees it answer.
        time.sleep(LOOK * self.beat)
        drain_output(2.0)
        os._exit(EXIT_HUNG)

    def _within_time(self, act: Callable[[], object]) -> None:
        """Act, but not for ever: the store, the run folder or the disk with the source may hang, too."""
        acting = threading.Thread(target=act, daemon=True)
        acting.start()
        acting.join(timeout=LOOK * self.beat + 20)

    def _verdict(self) -> str | None:
        """What the ranks do; None if another rank tells it."""
        try:
            if self.store.add("watchdog/reports", 1) == 1:
                return self._table()
            time.sleep(LOOK * self.beat)
            return None
        except RuntimeError as error:
            return f"rank {self.rank} waits, and the job's store is gone ({error})"

    def _table(self) -> str:
        """Which ranks hold up the others, and a line for each of what it does."""
        earlier = self._read()
        time.sleep(LOOK * self.beat)
        said = self._read()
        silent = [rank for rank in range(self.world_size) if rank not in said]
        rows = [f"  rank {rank} has never answered" for rank in silent]
        for rank, entry in said.items():
            answers = entry["beats"] != earlier.get(rank, entry)["beats"] or rank not in earlier
            silent += [] if answers else [rank]
            rows.append(
                f"  rank {rank} on {entry['host']}: step {entry['step']}, {entry['phase']}, for {entry['waited']:.0f} s"
                + ("" if answers else f"; its process has not answered for {LOOK * self.beat:.0f} s")
            )
        behind = min((entry["count"] for entry in said.values()), default=0)
        suspects = silent or [rank for rank, entry in said.items() if entry["count"] == behind]
        verdict = (
            f"rank {', '.join(map(str, suspects))} holds up the others"
            if len(suspects) < self.world_size
            else "all ranks are in the same phase: look at the stacks"
        )
        return "\n".join([verdict, *rows])

    def _read(self) -> dict[int, dict[str, Any]]:
        """What each rank that has said anything said last."""
        keys = {rank: f"watchdog/{rank}" for rank in range(self.world_size)}
        return {rank: json.loads(self.store.get(key)) for rank, key in keys.items() if self.store.check([key])}

    def _print_stacks(self) -> None:
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        lines = [f"rank {self.rank}, step {self.step}, {self.phase}: its stacks, of the last call at the end\n"]
        for thread, frame in sys._current_frames().items():
            lines += [f"thread {names.get(thread, thread)}:\n", *traceback.format_stack(frame)]
        # In one piece, and through the stream: to write to a pipe that nobody reads would wait.
        print("".join(lines), file=sys.stderr, flush=True)
