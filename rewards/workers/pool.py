"""A pool of killable worker processes: the only place where judging may take long.

What a judge does with a hostile answer cannot be bounded from inside its process: a signal does
not interrupt an integer power, and needs the main thread. So every item runs in a child with a
memory limit, watched by the caller's clock, and a child that is late is killed and replaced.

Workers are programs of their own (``python -c ...``), not forks and not ``multiprocessing``
children: they are safe beside CUDA and threads, and neither import nor need the caller's
``__main__``. The pool starts when it is first used, and ends with the interpreter.
"""

import atexit
import contextlib
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from rewards.workers.worker import Message, encode_frame, read_frame

DEFAULT_LIMIT_S = 5.0
DEFAULT_MEMORY_MB = 1024
START_LIMIT_S = 120.0  # for importing on a busy machine

OK, TIMED_OUT, CRASHED, FAILED = "ok", "timed_out", "crashed", "failed"


class Result(NamedTuple):
    """What became of one item.

    status: ``ok``; ``timed_out``; ``crashed`` (out of memory, or killed by its own doing); or
        ``failed`` (the task raised, and ``value`` is the message).
    seconds: wall-clock time from handing the item to a worker to its reply or its death.
    """

    status: str
    value: Any
    seconds: float


class WorkerError(RuntimeError):
    """Workers cannot be started."""


class _Worker:
    """One child process; used by one thread at a time."""

    def __init__(self, memory_mb: int, preload: Sequence[str]):
        root = str(Path(__file__).resolve().parents[2])
        code = (
            f"import sys; sys.path.insert(0, {root!r}); "
            f"from rewards.workers.worker import main; main({memory_mb}, {[*preload]})"
        )
        # A session of its own keeps a terminal's Ctrl-C with the parent. -P: the working
        # directory's files must not stand in for library modules.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self.requests = cast("IO[bytes]", self.process.stdin)
        self.replies = cast("IO[bytes]", self.process.stdout)
        self.is_ready = False
        self.started = time.monotonic()

    def send(self, path: str, args: Sequence[object], limit_s: float) -> None:
        self.requests.write(encode_frame({"path": path, "args": args, "limit_s": limit_s}))
        self.requests.flush()
        self.started = time.monotonic()

    def receive(self) -> Message | None:
        """Return the worker's next message; None if it died. Blocks until one or the other."""
        return read_frame(self.replies)

    def stop(self) -> None:
        self.process.kill()
        for pipe in (self.requests, self.replies):
            with contextlib.suppress(OSError):
                pipe.close()
        self.process.wait()


class Pool:
    """Runs tasks in up to ``num_workers`` processes; safe to use from any number of threads.

    ``preload``: modules that a worker imports at start, before any item's time limit runs.
    """

    def __init__(
        self, num_workers: int, memory_mb: int = DEFAULT_MEMORY_MB, preload: Sequence[str] = ()
    ):
        if num_workers < 1:
            raise ValueError(f"num_workers must be at least 1, not {num_workers}")
        self.num_workers = num_workers
        self.memory_mb = memory_mb
        self.preload = preload
        self._idle: list[_Worker | None] = [None] * num_workers  # None: not started yet
        self._changed = threading.Condition()
        self._closed = False

    def run(self, path: str, items: Sequence[Sequence[object]], limit_s: float) -> list[Result]:
        """Call ``path`` (``module:function``) with each item's arguments; results in their order.

        Arguments and values must be JSON. ``limit_s`` is wall-clock seconds for each item.
        """
        if not items:
            return []
        results: dict[int, Result] = {}
        waiting = deque(range(len(items)))
        workers = self._borrow(len(items))
        try:
            _Drive(self, path, items, limit_s, results, waiting, workers).run()
        finally:
            self._give_back(workers)
        return [results[index] for index in range(len(items))]

    def _borrow(self, wanted: int) -> list["_Worker | None"]:
        """Take one place in the pool, waiting for it, and as many more as are free."""
        with self._changed:
            while not self._idle and not self._closed:
                self._changed.wait()
            if self._closed:
                raise WorkerError("the worker pool has been shut down")
            self._idle.sort(key=lambda worker: worker is not None)  # running ones are taken first
            count = min(wanted, len(self._idle))
            taken = [self._idle.pop() for _ in range(count)]
        return taken

    def _give_back(self, workers: list["_Worker | None"]) -> None:
        with self._changed:
            if self._closed:
                for worker in workers:
                    if worker:
                        worker.stop()
            else:
                self._idle += workers
            self._changed.notify_all()

    def close(self) -> None:
        """Kill the idle workers; busy ones are killed when their callers are done with them."""
        with self._changed:
            self._closed = True
            for worker in self._idle:
                if worker:
                    worker.stop()
            self._idle.clear()
            self._changed.notify_all()


@dataclass
class _Drive:
    """One call of ``Pool.run``: keeps the borrowed workers busy until nothing is waiting."""

    pool: Pool
    path: str
    items: Sequence[Sequence[object]]
    limit_s: float
    results: dict[int, Result]
    waiting: deque[int]
    workers: list[_Worker | None]
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    item_of: dict[int, int | None] = field(default_factory=dict)  # place -> what it works on
    failed_starts: int = 0

    def run(self) -> None:
        try:
            for place in range(len(self.workers)):
                self._feed(place)
            while self.item_of:
                timeout = min(self._deadline(place) for place in self.item_of) - time.monotonic()
                for key, _ in self.selector.select(max(0.0, timeout)):
                    self._hear(key.data)
                now = time.monotonic()
                for place in [p for p in self.item_of if self._deadline(p) <= now]:
                    self._expire(place)
                if not self.waiting and not any(i is not None for i in self.item_of.values()):
                    for place in list(self.item_of):  # still starting, and no longer needed here
                        self._release(place)
        except BaseException:
            for place in list(self.item_of):  # a worker that is busy with an item cannot be reused
                self._drop(place)
            raise
        finally:
            self.selector.close()

    def _running(self, place: int) -> _Worker:
        """The worker of a place in ``item_of``."""
        return cast("_Worker", self.workers[place])

    def _deadline(self, place: int) -> float:
        worker = self._running(place)
        return worker.started + (self.limit_s if worker.is_ready else START_LIMIT_S)

    def _feed(self, place: int) -> None:
        """Give the worker in ``place`` its next item; start the worker if needed."""
        if not self.waiting:
            return
        worker = self.workers[place]
        if worker is None:
            worker = self.workers[place] = _Worker(self.pool.memory_mb, self.pool.preload)
        self.selector.register(worker.replies, selectors.EVENT_READ, place)
        self.item_of[place] = None
        if worker.is_ready:
            self._send(place)

    def _send(self, place: int) -> None:
        if not self.waiting:  # others finished while this one was starting
            self._release(place)
            return
        index = self.waiting.popleft()
        try:
            self._running(place).send(self.path, self.items[index], self.limit_s)
            self.item_of[place] = index
        except OSError:  # it died while idle; the item is not to blame
            self.waiting.appendleft(index)
            self._drop(place)
            self._count_failed_start()
            self._feed(place)

    def _hear(self, place: int) -> None:
        worker, index = self._running(place), self.item_of[place]
        message = worker.receive()
        if message is None or "failed" in message:
            self._bury(place, message)
        elif "ready" in message:
            worker.is_ready, self.failed_starts = True, 0
            self._send(place)
        elif index is not None:
            status = OK if "value" in message else FAILED
            self._finish(index, status, message.get("value", message.get("error")), worker)
            self._send(place)

    def _bury(self, place: int, message: Message | None) -> None:
        worker, index = self._running(place), self.item_of[place]
        if index is not None:
            self._finish(index, CRASHED, None, worker)
        else:
            self._count_failed_start((message or {}).get("failed", ""))
        self._drop(place)
        self._feed(place)

    def _expire(self, place: int) -> None:
        index = self.item_of[place]
        if index is None:
            self._count_failed_start(f"not ready after {START_LIMIT_S:.0f} s")
        else:
            self._finish(index, TIMED_OUT, None, self._running(place))
        self._drop(place)
        self._feed(place)

    def _finish(self, index: int, status: str, value: object, worker: _Worker) -> None:
        self.results[index] = Result(status, value, time.monotonic() - worker.started)

    def _count_failed_start(self, reason: str = "") -> None:
        self.failed_starts += 1
        if self.failed_starts > 3:
            raise WorkerError(
                f"cannot start reward workers with {sys.executable}: {reason or 'they die at once'}"
            )

    def _release(self, place: int) -> None:
        self.selector.unregister(self._running(place).replies)
        del self.item_of[place]

    def _drop(self, place: int) -> None:
        self._release(place)
        self._running(place).stop()
        self.workers[place] = None


_lock = threading.Lock()
_pool: Pool | None = None
_pool_pid: int | None = None


@dataclass
class _Settings:
    num_workers: int | None = None
    limit_s: float = DEFAULT_LIMIT_S
    memory_mb: int = DEFAULT_MEMORY_MB


_settings = _Settings()
_preload: list[str] = []


def configure_workers(
    num_workers: int | None = None, limit_s: float | None = None, memory_mb: int | None = None
) -> None:
    """Configure the shared pool; what is not given stays as it is.

    num_workers: processes, by default one per usable CPU, 8 at most, or ``REWARDS_WORKERS``.
    limit_s: wall-clock limit per item in seconds (default 5).
    memory_mb: address space of a worker in MiB (default 1024); it holds Python itself, too.
    A pool that runs already is shut down, and a new one started when it is needed.
    """
    given = {"num_workers": num_workers, "limit_s": limit_s, "memory_mb": memory_mb}
    for name, value in given.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, not {value}")
    for name, value in given.items():
        if value is not None:
            setattr(_settings, name, value)
    shut_down_workers()


def get_limit() -> float:
    """Return the wall-clock limit per item in seconds that is in force."""
    return _settings.limit_s


def preload(module: str) -> None:
    """Have workers that the shared pool starts from now on import a module first."""
    _preload.append(module)


def run_task(
    path: str, items: Sequence[Sequence[object]], limit_s: float | None = None
) -> list[Result]:
    """Run a function on every item in the process's one shared pool, as ``Pool.run`` does."""
    return _shared_pool().run(path, items, limit_s or _settings.limit_s)


def shut_down_workers() -> None:
    """Kill the shared pool's workers. Judging afterwards starts new ones."""
    global _pool
    with _lock:
        pool, _pool = _pool, None
    if pool is not None and _pool_pid == os.getpid():
        pool.close()


def _shared_pool() -> Pool:
    global _pool, _pool_pid
    with _lock:
        if _pool is None or _pool_pid != os.getpid():  # not the parent's pipes
            num_workers = _settings.num_workers or _default_num_workers()
            _pool = Pool(num_workers, _settings.memory_mb, _preload)
            _pool_pid = os.getpid()
        return _pool


def _default_num_workers() -> int:
    if wanted := os.environ.get("REWARDS_WORKERS"):
        return int(wanted)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, min(8, usable or 1))


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_renew_lock)  # another thread may have held it
atexit.register(shut_down_workers)
