"""The processes of a job before they can call collectives: they meet, and go on together or end together.

    meeting = Meeting(rank, world_size)
    with meeting.together("checks"):     # a check that fails on any rank ends all, with its reason, ranks and hosts
        config = prepare(...)
    meeting.store                        # for process groups

Collectives cannot do that: a rank that failed takes part in none, and the others would wait for it. A process
that is alone meets without torch.
"""

import contextlib
import datetime
import json
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

MEETING_SECONDS = 600.0
"""How long a rank may come later than the first."""
GRACE_SECONDS = 5.0
"""How long the others may still say what they found once one has failed."""
PATIENCE_SECONDS = 30.0
"""After which the first rank tells for whom it waits."""
SHARED_SECONDS = 20.0
"""How long a network file system may take to show a new file on another machine."""
STORE_TIMEOUT = datetime.timedelta(minutes=30)
TOKEN_PREFIX = ".start-"
FAILED = "failed"
"""Key of the store under which ranks that end are counted."""


class Missing(ReportedError):
    """Some process of the job cannot be met."""


class Meeting:
    """This process among those of its job; of a single one every verb is trivial."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.host = rank, world_size, platform.node()
        self.start, self.first_host = uuid.uuid4().hex, self.host
        self._store: dist.Store | None = None

    @property
    def store(self) -> "dist.Store":
        """Where the processes of this start of the job meet."""
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
        """Run the block on every rank; if it fails on any, all say so as one, and end with the exit code of the failure.

        what: a name of its own for each use. Alone, its exception is raised as it is.
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

    def tell(self, error: Exception) -> bool:
        """Print why this rank ends, together with others that do at this moment; whether it is the first of them.

        Of those that end for the same reason on the same machine, one prints. Takes GRACE_SECONDS unless all end.
        """
        if self.world_size == 1 and not isinstance(error, ReportedError):
            return True  # its traceback follows
        if isinstance(error, ReportedError) and error.of_all_ranks:
            if self.rank == 0:
                print_error(str(error))
            return self.rank == 0
        code = error.exit_code if isinstance(error, ReportedError) else 1
        reason = str(error) if isinstance(error, ReportedError) else f"{type(error).__name__}: {error}"
        mine = self._failure(reason, code)
        said = [mine]
        with contextlib.suppress(RuntimeError):  # the store went with its process: this rank speaks for itself
            said = self._those_who_end(mine)
        same = [failure for failure in said if failure.reason == reason]
        if self.rank == min(failure.rank for failure in same if failure.host == self.host):
            print_error(describe_failures(same, self.world_size))
        return self.rank == min(failure.rank for failure in same)

    def check_shared(self, folders: dict[str, Path]) -> None:
        """End all ranks unless each sees what the first one writes into these folders, by their options."""
        if self.world_size == 1:
            return
        # Of a name of its own: another run may use the folder, and a file system remembers what was not there.
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
                f"{option}={folder}: what rank 0 on {self.first_host} writes there cannot be seen here; "
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
                why = str(error).partition("\n")[0]  # behind it, a page of C++ frames
                raise Missing(f"rank {self.rank} on {self.host} cannot meet rank 0 at {address}: {why}") from error
            print_error(describe_failures([failure], self.world_size))
            sys.exit(failure.code)
        if not failures:
            return
        # The first rank tells it all, and on each other machine its first rank what is wrong there.
        here = [found for found in failures if found.host == self.host]
        if self.rank == 0 or (self.host != self.first_host and here and here[0].rank == self.rank):
            for reason in dict.fromkeys(found.reason for found in (failures if self.rank == 0 else here)):
                print_error(describe_failures([found for found in failures if found.reason == reason], self.world_size))
        if self.rank == 0:
            self._let_them_read(what)
        else:
            with contextlib.suppress(RuntimeError):
                self.store.set(f"{what}/read/{self.rank}", "")
        sys.exit(failures[0].code)

    def _lead(self, what: str, failure: Failure | None) -> list[Failure]:
        """Collect what every rank found; the failures, also of ranks that do not come."""
        raw = self._connect(GRACE_SECONDS if failure else MEETING_SECONDS)
        store = self._store = _within(self.start, raw)
        failures = [] if failure is None else [failure]
        missing, began, failed, told = set(range(1, self.world_size)), time.monotonic(), 0.0, False
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
            if waited > PATIENCE_SECONDS and not told:
                told = True
                print(f"waiting for {describe_ranks(missing)} of {self.world_size} processes", file=sys.stderr, flush=True)
            time.sleep(0.01)
        if missing and not failures:
            reason = f"{describe_ranks(missing)} did not come within {MEETING_SECONDS:.0f} s"
            failures = [self._failure(reason, Missing.exit_code)]
        failures.sort(key=lambda found: found.rank)
        store.set(f"{what}/verdict", json.dumps([asdict(found) for found in failures]))
        return failures

    def _follow(self, what: str, failure: Failure | None) -> list[Failure]:
        """Say what this rank found; what all found, from the first."""
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
        """Tell a rank the name of this start.

        torchrun --max-restarts may keep its store when it starts the processes again; in it are the words of those that
        are gone, and its count of restarts differs between nodes. This may welcome one that is gone: no harm.
        """
        if raw.check([f"hello/{rank}"]):
            raw.set(f"welcome/{raw.get(f'hello/{rank}').decode()}", f"{self.start} {self.host}")

    def _connect(self, seconds: float) -> "dist.Store":
        """The job's store, which is torchrun's or the first rank's."""
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
                # The first rank must hear of those that come, also if some never do.
                wait_for_workers=False,
                multi_tenant=True,
            ),
        )
        self._raw.set_timeout(STORE_TIMEOUT)
        return self._raw

    def _let_them_read(self, what: str) -> None:
        """Stay while others read the verdict: the store may end with this process."""
        until = time.monotonic() + GRACE_SECONDS
        readers = [f"{what}/read/{rank}" for rank in range(1, self.world_size) if self.store.check([f"{what}/{rank}"])]
        while readers and not self.store.check(readers) and time.monotonic() < until:
            time.sleep(0.05)

    def _those_who_end(self, mine: Failure) -> list[Failure]:
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
    """A store's part whose keys begin with a prefix."""
    from torch.distributed import PrefixStore

    return PrefixStore(prefix, store)


def _appears(path: Path) -> bool:
    """Whether a file is there, at the latest after what a network file system may need."""
    until = time.monotonic() + SHARED_SECONDS
    while True:
        with contextlib.suppress(OSError):
            # To open a folder is to ask the server; a name alone may be looked up in memory.
            os.close(os.open(path.parent.parent, os.O_RDONLY))
            os.close(os.open(path.parent, os.O_RDONLY))
        if path.exists():
            return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
