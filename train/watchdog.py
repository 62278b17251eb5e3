"""End a run that hangs, and say which rank hangs where.

    watchdog = Watchdog(store, rank=0, world_size=4, timeout=1800)
    watchdog.enter(step, "forward and backward")           # whenever the loop turns to something else
    watchdog.close()

A collective waits for its slowest rank and tells nobody which that is. Here a thread of every rank posts to the job's store
what its rank is doing. When a rank has been in one phase for too long, it prints what all ranks last said and its own stack.
"""

import contextlib
import faulthandler
import json
import os
import platform
import sys
import threading
import time

import torch.distributed as dist

EXIT_HUNG = 4


class Watchdog:
    """Watches the main thread of this rank; timeout in seconds."""

    def __init__(self, store: dist.Store, *, rank: int, world_size: int, timeout: float) -> None:
        # A store's connection serves one caller at a time, and a waiting main thread would block this thread.
        self.store = store if isinstance(store, dist.HashStore) else store.clone()  # type: ignore[attr-defined]
        self.rank, self.world_size, self.timeout = rank, world_size, timeout
        self.beat = max(0.2, min(10.0, timeout / 10))
        self.phase, self.step, self.since, self.count = "start", 0, time.time(), 0
        self.closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, step: int, phase: str) -> None:
        """The main thread begins a phase; cheap enough for every micro-batch."""
        self.step, self.phase, self.since, self.count = step, phase, time.time(), self.count + 1

    def close(self) -> None:
        """Stop watching."""
        self.closed.set()

    def _watch(self) -> None:
        while True:
            # The store may be gone with the process that held it; what matters then is the time.
            with contextlib.suppress(Exception):
                self._post()
            if self.closed.wait(self.beat):
                return
            if time.time() - self.since > self.timeout:
                self._report()

    def _post(self) -> None:
        said = {
            "host": platform.node(),
            "count": self.count,
            "step": self.step,
            "phase": self.phase,
            "since": self.since,
            "seen": time.time(),
        }
        self.store.set(f"watchdog/{self.rank}", json.dumps(said))

    def _report(self) -> None:
        """Print once for the job what every rank said last, this rank's stack, and leave."""
        # The store may hang too; the process ends all the same.
        reading = threading.Thread(target=self._print_table, daemon=True)
        reading.start()
        reading.join(timeout=20)
        print(f"rank {self.rank}, step {self.step}, {self.phase}: its stack", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
        # Leave the others, which notice within a beat, the time to show theirs before a launcher ends them.
        time.sleep(3 * self.beat)
        os._exit(EXIT_HUNG)

    def _print_table(self) -> None:
        if self.store.add("watchdog/reports", 1) > 1:
            return
        now, said = time.time(), {}
        for rank in range(self.world_size):
            if self.store.check([f"watchdog/{rank}"]):
                said[rank] = json.loads(self.store.get(f"watchdog/{rank}"))
        silent = [rank for rank in range(self.world_size) if rank not in said]
        rows = [f"  rank {rank} has never answered" for rank in silent]
        for rank, entry in said.items():
            answers = now - entry["seen"] < 5 * self.beat
            silent += [] if answers else [rank]
            rows.append(
                f"  rank {rank} on {entry['host']}: step {entry['step']}, {entry['phase']}, for {now - entry['since']:.0f} s"
                + ("" if answers else f"; its process has not answered for {now - entry['seen']:.0f} s")
            )
        behind = min((entry["count"] for entry in said.values()), default=0)
        suspects = silent or [rank for rank, entry in said.items() if entry["count"] == behind]
        verdict = (
            f"rank {', '.join(map(str, suspects))} holds up the others"
            if len(suspects) < self.world_size
            else "all ranks are in the same phase: look at the stacks"
        )
        text = "\n".join([f"error: no progress for {self.timeout:.0f} s (run.timeout_minutes): {verdict}", *rows])
        print(text, file=sys.stderr, flush=True)
