"""Rendezvous of the processes of a job, before they can call collectives: all continue, or all end with the same error.

    meeting = Meeting(rank, world_size)
    with meeting.together("checks"):     # a failure on any rank ends all ranks, and prints its reason, ranks and hosts
        config = prepare(...)
    meeting.store                        # for process groups

Collectives are not suitable for this: the other ranks would wait for a rank that failed. A single process does not need
torch.
"""

import contextlib
import datetime
import json
import logging
import os
import platform
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from mone_common.console import ReportedError, UserError
from mone_common.files import writing
from train.failures import Failure, describe_failures, describe_ranks, print_error

if TYPE_CHECKING:
    import torch.distributed as dist

logger = logging.getLogger(__name__)

MEETING_SECONDS = 600.0
"""Longest time for which rank 0 waits for the other ranks."""
GRACE_SECONDS = 5.0
"""Time to wait for the results of other ranks after one has failed."""
PATIENCE_SECONDS = 30.0
"""Time after which rank 0 prints the ranks that it waits for."""
SHARED_SECONDS = 20.0
"""Longest time until a new file on a network file system is visible on another machine."""
STORE_TIMEOUT = datetime.timedelta(minutes=30)
TOKEN_PREFIX = ".start-"
FAILED = "failed"
"""Key in the store with the number of ranks that have failed."""


class Missing(ReportedError):
    """A process of the job cannot be reached."""


class Meeting:
    """Rendezvous of this process with the other processes of its job; does nothing for a single process."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.host = rank, world_size, platform.node()
        self.start, self.first_host = uuid.uuid4().hex, self.host
        self._store: dist.Store | None = None

    @property
    def store(self) -> "dist.Store":
        """The store that the processes of this start of the job share."""
        if self._store is None and self.world_size == 1:
            from torch.distributed import HashStore

            self._store = HashStore()
        elif self._store is None:
            with self.together("meeting"):
                pass
        assert self._store is not None
        return self._store

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Run the block on every rank. If it fails on any, print the failures once and end all ranks with its exit code.

        what: a name, unique for each use. With a single process, exceptions pass unchanged.
        """
        if self.world_size == 1:
            yield
            return
        failure = None
        try:
            yield
        except ReportedError as error:
            failure = self._failure(str(error), error.exit_code)
        except Exception as error:
            traceback.print_exc()
            failure = self._failure(f"{type(error).__name__}: {error}", ReportedError.exit_code)
        self._agree(what, failure)

    def report(self, error: Exception) -> bool:
        """Print why this rank ends, together with other ranks that end now; True on the lowest rank with this reason.

        One rank per machine prints each reason. Takes GRACE_SECONDS unless all ranks end.
        """
        if self.world_size == 1 and not isinstance(error, ReportedError):
            return True  # the traceback is printed later
        if isinstance(error, ReportedError) and error.of_all_ranks:
            if self.rank == 0:
                print_error(str(error))
            return self.rank == 0
        code = error.exit_code if isinstance(error, ReportedError) else 1
        reason = str(error) if isinstance(error, ReportedError) else f"{type(error).__name__}: {error}"
        mine = self._failure(reason, code)
        failures = [mine]
        with contextlib.suppress(RuntimeError):  # the process with the store has ended: report this rank only
            failures = self._gather_failures(mine)
        same = [failure for failure in failures if failure.reason == reason]
        if self.rank == min(failure.rank for failure in same if failure.host == self.host):
            print_error(describe_failures(same, self.world_size))
        return self.rank == min(failure.rank for failure in same)

    def check_shared(self, folders: dict[str, Path]) -> None:
        """End all ranks unless each sees a file that rank 0 writes to these folders; keys: the options that name them."""
        if self.world_size == 1:
            return
        # A unique name: other runs may use the folder, and file systems cache that a file is missing.
        files = {option: folder / f"{TOKEN_PREFIX}{self.start}" for option, folder in folders.items()}
        try:
            with self.together("shared folders"):
                for option, path in files.items():
                    self._write_token(option, path) if self.rank == 0 else self._look_for_token(option, path.parent)
        finally:
            if self.rank == 0:
                for path in files.values():
                    with contextlib.suppress(OSError):
                        path.unlink()

    def _write_token(self, option: str, path: Path) -> None:
        written = ""
        try:
            with writing(path) as temporary:
                temporary.touch()
            written = path.name
        except OSError as error:
            raise UserError(f"{option}={path.parent}: cannot be written ({error})") from error
        finally:
            self.store.set(f"token/{option}", written)

    def _look_for_token(self, option: str, folder: Path) -> None:
        self.store.wait([f"token/{option}"], datetime.timedelta(seconds=MEETING_SECONDS))
        written = self.store.get(f"token/{option}").decode()
        if written and not _appears(folder / written):
            raise UserError(
                f"{option}={folder}: a file that rank 0 on {self.first_host} wrote there is not visible here; "
                "give a folder that all machines share"
            )

    def _failure(self, reason: str, code: int) -> Failure:
        return Failure(self.rank, self.host, reason, code)

    def _agree(self, what: str, failure: Failure | None) -> None:
        try:
            failures = self._lead(what, failure) if self.rank == 0 else self._follow(what, failure)
        except RuntimeError as error:
            if failure is None:
                address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                why = str(error).partition("\n")[0]  # followed by C++ frames
                raise Missing(f"rank {self.rank} on {self.host} cannot reach rank 0 at {address}: {why}") from error
            print_error(describe_failures([failure], self.world_size))
            sys.exit(failure.code)
        if not failures:
            return
        # Rank 0 prints all failures. On every other machine, its lowest failed rank prints those of the machine.
        here = [found for found in failures if found.host == self.host]
        if self.rank == 0 or (self.host != self.first_host and here and here[0].rank == self.rank):
            for reason in dict.fromkeys(found.reason for found in (failures if self.rank == 0 else here)):
                print_error(describe_failures([found for found in failures if found.reason == reason], self.world_size))
        if self.rank == 0:
            self._wait_for_readers(what)
        else:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"{what}/read/{self.rank}", "")
        sys.exit(failures[0].code)

    def _lead(self, what: str, failure: Failure | None) -> list[Failure]:
        """On rank 0: collect the failures of all ranks, including ranks that do not connect."""
        raw = self._connect(GRACE_SECONDS if failure else MEETING_SECONDS)
        store = self._store = _within(self.start, raw)
        failures = [] if failure is None else [failure]
        missing, began, failed, printed = set(range(1, self.world_size)), time.monotonic(), 0.0, False
        while missing:
            for rank in sorted(missing):
                self._welcome(rank, raw)
                if store.check([f"{what}/{rank}"]):
                    missing.remove(rank)
                    found = json.loads(store.get(f"{what}/{rank}"))
                    failures += [Failure(**found)] if found else []
            waited = time.monotonic() - began
            failed = failed or (waited if failures else 0.0)
            if (failures and waited - failed > GRACE_SECONDS) or waited > MEETING_SECONDS:
                break
            if waited > PATIENCE_SECONDS and not printed:
                printed = True
                logger.info("waiting for %s of %d processes", describe_ranks(missing), self.world_size)
            time.sleep(0.01)
        if missing and not failures:
            reason = f"{describe_ranks(missing)} did not connect within {MEETING_SECONDS:.0f} s"
            failures = [self._failure(reason, Missing.exit_code)]
        failures.sort(key=lambda found: found.rank)
        store.set(f"{what}/verdict", json.dumps([asdict(found) for found in failures]))
        return failures

    def _follow(self, what: str, failure: Failure | None) -> list[Failure]:
        """On other ranks: send this rank's failure to rank 0, and receive the failures of all ranks."""
        seconds = 3 * GRACE_SECONDS if failure else MEETING_SECONDS + 2 * GRACE_SECONDS
        patience = datetime.timedelta(seconds=seconds)
        if self._store is None:
            raw = self._connect(seconds)
            raw.set(f"hello/{self.rank}", self.start)
            raw.wait([f"welcome/{self.start}"], patience)
            start, self.first_host = raw.get(f"welcome/{self.start}").decode().split(" ", 1)
            self._store = _within(start, raw)
        self._store.set(f"{what}/{self.rank}", json.dumps(asdict(failure) if failure else None))
        self._store.wait([f"{what}/verdict"], patience)
        return [Failure(**found) for found in json.loads(self._store.get(f"{what}/verdict"))]

    def _welcome(self, rank: int, raw: "dist.Store") -> None:
        """Send a rank the id of this start.

        torchrun --max-restarts may keep its store over a restart. The store then has entries of ended processes, and the
        restart count differs between nodes. An answer to an ended process does no harm.
        """
        if raw.check([f"hello/{rank}"]):
            raw.set(f"welcome/{raw.get(f'hello/{rank}').decode()}", f"{self.start} {self.host}")

    def _connect(self, seconds: float) -> "dist.Store":
        """The job's store, in torchrun or in rank 0."""
        if self.rank == 0 and self._store is not None:
            return self._raw
        from torch.distributed import TCPStore

        agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self._raw: dist.Store = _within(
            "mone",
            TCPStore(
                os.environ["MASTER_ADDR"],
                int(os.environ["MASTER_PORT"]),
                self.world_size,
                is_master=self.rank == 0 and not agents,
                timeout=datetime.timedelta(seconds=seconds),
                # Rank 0 must get the results of the ranks that connect, even if others never do.
                wait_for_workers=False,
                multi_tenant=True,
            ),
        )
        self._raw.set_timeout(STORE_TIMEOUT)
        return self._raw

    def _wait_for_readers(self, what: str) -> None:
        """Wait until the others have read the verdict, since the store may end with this process."""
        until = time.monotonic() + GRACE_SECONDS
        readers = [f"{what}/read/{rank}" for rank in range(1, self.world_size) if self.store.check([f"{what}/{rank}"])]
        while readers and not self.store.check(readers) and time.monotonic() < until:
            time.sleep(0.05)

    def _gather_failures(self, mine: Failure) -> list[Failure]:
        if self.world_size == 1:
            return [mine]
        self.store.set(f"failed/{self.rank}", json.dumps(asdict(mine)))
        count, until = self.store.add(FAILED, 1), time.monotonic() + GRACE_SECONDS
        while count < self.world_size and time.monotonic() < until:
            time.sleep(0.05)
            count = self.store.add(FAILED, 0)
        keys = [f"failed/{rank}" for rank in range(self.world_size)]
        if count < self.world_size:
            keys = [key for key in keys if self.store.check([key])]
        return [Failure(**json.loads(found)) for found in self.store.multi_get(keys)]


def _within(prefix: str, store: "dist.Store") -> "dist.Store":
    """The part of a store whose keys begin with a prefix."""
    from torch.distributed import PrefixStore

    return PrefixStore(prefix, store)


def _appears(path: Path) -> bool:
    """Whether a file exists; waits up to SHARED_SECONDS for a network file system."""
    until = time.monotonic() + SHARED_SECONDS
    while True:
        with contextlib.suppress(OSError):
            # After the folders were opened, a network file system reads from its server rather than its cache.
            os.close(os.open(path.parent.parent, os.O_RDONLY))
            os.close(os.open(path.parent, os.O_RDONLY))
        if path.exists():
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
