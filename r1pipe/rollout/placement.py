"""Where a fleet's engines run: in processes of this machine, or in Ray's actors on any.

Both kinds are asked in the same way: `begin` calls, and `wait` for answers of any. Imports no
torch, which would read the number of threads before the engine's process has set it.
"""

import gc
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for_connections
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol
from unittest import mock

from r1pipe.config.recipe import SamplerPlace
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError, first_line
from r1pipe.utils.phases import seconds_since_heartbeat
from r1pipe.utils.quiet import silence_warnings
from r1pipe.utils.threads import VARIABLE, available_cores

if TYPE_CHECKING:
    import torch

UNITS = {"cpu": "core", "cuda": "GPU"}
"""What an engine takes, by torch's name for its kind of device."""
VISIBLE = "CUDA_VISIBLE_DEVICES"
SAFE = "PYTHONSAFEPATH"
"""Keeps modules of the working folder from standing in for others."""
IMPORTS = ["vllm.entrypoints.llm", "r1pipe.rollout.engine_host"]
BEAT_S = 1.0
"""Seconds from one message of a busy engine's process, that it works, to the next."""
CONNECT_S = 10.0
"""Seconds that a cluster may take to answer."""
OBJECT_STORE = 2**27
"""Bytes of a Ray of our own for weights, beside three times those of the first checkpoint: the old
ones are freed when all engines have the new ones."""


class Answer(NamedTuple):
    """Of an engine's process: an item of what a call asked for; the call's end; what it raised; how
    many seconds ago the process has last done something; or that it is gone, and how."""

    kind: Literal["item", "end", "error", "beat", "lost"]
    value: Any = None
    call: int = 0


class Host(Protocol):
    """An engine's process, as the trainer sees it."""

    def begin(self, call: int, method: str, arguments: tuple[Any, ...]) -> None:
        """Ask `engine_host.EngineHost` for this; answers have the call's number."""

    def kill(self) -> None: ...


class Placement(Protocol):
    """Starts the processes and hears what they answer."""

    address: str
    """Of the trainer's machine, for the engines."""

    def start(self, number: int) -> Host: ...

    def share(self, data_N: "torch.Tensor") -> Any:
        """Put bytes, uint8, where all can read them: what it returns is an argument of `begin`, and
        arrives as a tensor or an array."""

    def wait(self, hosts: Collection[Any], timeout_s: float) -> Iterator[tuple[Any, Answer]]:
        """The answers that are there; waits for a first one. A lost host answers that once."""

    def close(self) -> None: ...


# --- In the engine's process ----------------------------------------------------------------------


class EngineProcess:
    """One `engine_host.EngineHost`, which works in one thread while others ask and listen."""

    def __init__(self, number: int, device_type: str, path: Iterable[str] = ()):
        """`path`: see begin_apart."""
        begin_apart(path)
        if device_type == "cpu":
            settle_core(number)
        silence_warnings()
        from r1pipe.rollout.engine_host import EngineHost

        self.answers: SimpleQueue[Answer] = SimpleQueue()
        self.host = EngineHost(number, self.answers.put)
        self._early: dict[int, tuple[Any, ...]] = {}
        self._num_asked = 0

    def ask(self, order: int, *call: Any) -> None:
        """Number, method and arguments of a call. Ray may bring them in another `order`."""
        self._early[order] = call
        while self._num_asked in self._early:
            self.host.inbox.put(self._early.pop(self._num_asked))
            self._num_asked += 1

    def work(self) -> None:
        """Never ends."""
        self.host.work()

    def listen(self) -> Iterator[Answer]:
        """Never ends."""
        while True:
            yield self.answers.get()

    def idle_s(self) -> Answer:
        return Answer("beat", seconds_since_heartbeat())


def begin_apart(path: Iterable[str]) -> None:
    """In a process that a rank has started: be no rank. `path`: where the trainer finds modules,
    which Ray does not pass on."""
    distributed.leave()
    sys.path.extend(place for place in path if place not in sys.path)


def settle_core(number: int) -> None:
    """Compute with one thread, on a core of its own as far as there are as many."""
    os.environ[VARIABLE] = "1"
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})


def serve(
    number: int, device_type: str, environment: dict[str, str], connection: Connection
) -> None:
    """Runs in a process of this machine until the trainer's ends."""
    gc.freeze()  # a collection would look at, and so copy, what the server has imported
    os.environ.clear()
    os.environ.update(environment)
    for ignored in (signal.SIGINT, signal.SIGTERM):  # of the process group: the trainer decides
        signal.signal(ignored, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    process = EngineProcess(number, device_type)

    def ask() -> None:
        with suppress(EOFError, ConnectionResetError):
            while True:
                process.ask(*connection.recv())

    def answer() -> None:
        with suppress(BrokenPipeError, ConnectionResetError):
            for answer in process.listen():
                connection.send(answer)

    def beat() -> None:
        while True:
            time.sleep(BEAT_S)
            if process.host.is_busy and process.answers.empty():
                process.answers.put(process.idle_s())

    for task in (ask, answer, beat):
        threading.Thread(target=task, daemon=True).start()
    process.work()


def end_with_parent() -> None:
    """Also if the trainer was killed while this process computes."""
    parent = multiprocessing.parent_process()
    wait_for_connections([parent.sentinel])
    os._exit(1)


# --- In the trainer's -----------------------------------------------------------------------------


class LocalProcess:
    """See Host."""

    def __init__(self, number: int, gpu: str | None):
        # Not forked from the trainer, which has threads, and torch; on CPU from a server that has
        # imported what takes most of an engine's start.
        context = multiprocessing.get_context("spawn" if gpu else "forkserver")
        if not gpu:
            context.set_forkserver_preload(IMPORTS)
        self.connection, theirs = context.Pipe()
        own = {VISIBLE: gpu} if gpu else {VARIABLE: "1"}
        arguments = (number, "cuda" if gpu else "cpu", {**os.environ, **own}, theirs)
        self.process = context.Process(
            target=serve, args=arguments, name=f"engine {number}", daemon=True
        )
        # Before anything imports torch there, which a user's own main module may.
        with mock.patch.dict(os.environ, {**own, SAFE: "1"}):
            self.process.start()
        theirs.close()  # so that its end is noticed here
        self.orders = count()

    def begin(self, call: int, method: str, arguments: tuple[Any, ...]) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # `receive` will tell
            self.connection.send((next(self.orders), call, method, *arguments))

    def receive(self) -> Answer:
        try:
            return self.connection.recv()
        except (EOFError, OSError):  # also in the middle of an answer
            self.process.join()
            code = self.process.exitcode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return Answer("lost", f"ended by {how}")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class Processes:
    """See Placement. `gpus`: one for each of this rank's engines; None: on cores."""

    address = "127.0.0.1"

    def __init__(self, gpus: list[str] | None):
        self.gpus = gpus

    def start(self, number: int) -> LocalProcess:
        return LocalProcess(number, self.gpus[number % len(self.gpus)] if self.gpus else None)

    def share(self, data_N: "torch.Tensor") -> "torch.Tensor":
        return data_N.share_memory_()

    def wait(
        self, hosts: Collection[LocalProcess], timeout_s: float
    ) -> Iterator[tuple[LocalProcess, Answer]]:
        by_connection = {host.connection: host for host in hosts}
        for connection in wait_for_connections(list(by_connection), timeout_s):
            host = by_connection[connection]
            if not connection.closed:  # killed for what another has answered
                yield host, host.receive()

    def close(self) -> None:
        pass


class RayActor:
    """See Host."""

    def __init__(self, ray: Any, number: int, device_type: str):
        self._ray = ray
        # A thread each: for the engine, for what it is asked while it works, and for what it says.
        groups = {"ask": 1, "listen": 1}
        needs = {"num_cpus": 1, "num_gpus": 1 if device_type == "cuda" else 0}
        remote = ray.remote(**needs, max_restarts=0, concurrency_groups=groups)(EngineProcess)
        self.actor = remote.remote(number, device_type, sys.path)
        self.working = self.actor.work.remote()
        listen = self.actor.listen.options(concurrency_group="listen", num_returns="streaming")
        self.stream = listen.remote()
        self.beat: Any = None
        self.orders = count()

    def begin(self, call: int, method: str, arguments: tuple[Any, ...]) -> None:
        ask = self.actor.ask.options(concurrency_group="ask")
        ask.remote(next(self.orders), call, method, *arguments)

    def receive(self, reference: Any) -> Answer:
        try:
            return self._ray.get(next(reference) if reference is self.stream else reference)
        except self._ray.exceptions.RayActorError as error:
            return Answer("lost", first_line(error))

    def kill(self) -> None:
        self._ray.kill(self.actor)


class RayPlacement:
    """See Placement. A Ray that was started here is shut down with it; if this process is killed,
    Ray's own reaper does so."""

    def __init__(self, address: str | None, num_engines: int, device_type: str, object_store: int):
        import ray

        self._ray, self._device_type = ray, device_type
        self._beat_at = time.monotonic()
        join_ray(ray, address, num_engines, device_type, object_store)
        self.address = ray.util.get_node_ip_address()

    def start(self, number: int) -> RayActor:
        return RayActor(self._ray, number, self._device_type)

    def share(self, data_N: "torch.Tensor") -> Any:
        return self._ray.put(data_N.numpy())  # once, however many read it

    def wait(
        self, hosts: Collection[RayActor], timeout_s: float
    ) -> Iterator[tuple[RayActor, Answer]]:
        if time.monotonic() - self._beat_at > BEAT_S:
            self._beat_at = time.monotonic()
            for host in hosts:
                beat = host.actor.idle_s.options(concurrency_group="ask")
                host.beat = host.beat or beat.remote()
        waiting = {host.stream: host for host in hosts}
        waiting |= {host.beat: host for host in hosts if host.beat}
        ready, _ = self._ray.wait(list(waiting), num_returns=1, timeout=timeout_s)
        for reference in ready:
            host = waiting[reference]
            answer = host.receive(reference)
            if reference is host.beat:
                host.beat = None
            yield host, answer

    def close(self) -> None:
        self._ray.shutdown()


# --- What there is ------------------------------------------------------------------------------


def open_placement(place: SamplerPlace, device_type: str, weight_bytes: int) -> Placement:
    """Every rank must call it: none takes a cluster's cores before all have counted them. Raises
    UserError for what does not fit."""
    check_placement(place, device_type)
    num_own = place.engines // distributed.world_size()
    if place.ray is None:
        return Processes(cut_gpus(num_own) if device_type == "cuda" else None)
    address = find_ray_address(place.ray)
    # Without a cluster, which a rank of another machine could not join, each has a Ray of its own.
    num_here = place.engines if address else num_own
    distributed.barrier()
    placement = RayPlacement(address, num_here, device_type, 3 * weight_bytes)
    distributed.barrier()
    return placement


def check_placement(place: SamplerPlace, device_type: str) -> None:
    """Raises UserError for what is known without starting or joining anything."""
    num_ranks = distributed.world_size()
    for what in ("engines", "reward_workers"):
        if (count := getattr(place, what)) % num_ranks:
            raise UserError(
                f"sampler.{what} {count}: the trainer's {num_ranks} processes have as many "
                f"each: take {num_ranks}, or a multiple of it"
            )
    if place.ray is not None:
        try:
            import ray  # noqa: F401
        except ImportError as error:
            raise UserError(
                'sampler.ray: Ray is not installed: pip install "r1pipe[ray]", or leave out ray: '
                "processes of this machine need none"
            ) from error
        if find_ray_address(place.ray):
            return  # its devices are not this machine's
    num_local = distributed.local_world_size()
    room = count_room(device_type)
    if place.engines // num_ranks * num_local > room:
        most = room // num_local * num_ranks
        raise UserError(
            f"sampler.engines {place.engines}: each takes a {UNITS[device_type]}, and there are "
            f"{room}{' beside the trainer' * (device_type == 'cuda')}: "
            + (f"take {most} or fewer" if most else "leave out sampler")
        )


def count_room(device_type: str) -> int:
    """How many engines this machine has a device for."""
    return available_cores() if device_type == "cpu" else len(list_spare_gpus())


def list_spare_gpus() -> list[str]:
    """This machine's GPUs beside those of the trainer's ranks, which take the first; each as
    CUDA_VISIBLE_DEVICES has it."""
    import torch

    count, visible = torch.cuda.device_count(), os.environ.get(VISIBLE)
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return names[distributed.local_world_size() : count]


def cut_gpus(num_engines: int) -> list[str]:
    """Those of this rank's engines."""
    first = distributed.local_rank() * num_engines
    return list_spare_gpus()[first : first + num_engines]


def find_ray_address(wanted: str) -> str | None:
    """None: there is no cluster to join."""
    return (os.environ.get("RAY_ADDRESS") or None) if wanted == "auto" else wanted


def describe_placement(place: SamplerPlace, device_type: str) -> str:
    """For the doctor; joins a cluster, but starts none. Raises UserError for what does not fit."""
    check_placement(place, device_type)
    what = f"{place.engines} engine{'s' * (place.engines > 1)}"
    if not distributed.alone():
        what += f", {place.engines // distributed.world_size()} for each process of the trainer,"
    what += " on"
    unit = f"{UNITS[device_type]}s"
    here = f"{count_room(device_type)} {'spare ' * (device_type == 'cuda')}{unit} of this machine"
    if place.ray is None:
        return f"{what} {here}"
    import ray

    if address := find_ray_address(place.ray):
        join_ray(ray, address, place.engines, device_type)
        free = count_free(ray, device_type)
        ray.shutdown()
        return f"{what} {free} {unit} of {address}, by Ray {ray.__version__}"
    return f"{what} {here}, by a Ray {ray.__version__} of the run's own"


def join_ray(
    ray: Any, address: str | None, num_engines: int, device_type: str, object_store: int = 0
) -> None:
    """Raises UserError for a cluster that does not answer or has too few devices."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            # Ray waits for minutes.
            host, _, port = address.removeprefix("ray://").rpartition(":")
            socket.create_connection((host, int(port)), CONNECT_S).close()
            ray.init(address, **quiet)
        else:
            os.environ.setdefault("RAY_worker_niceness", "0")  # 15: last in line on a busy machine
            gpus = cut_gpus(num_engines) if device_type == "cuda" else []
            own = {"num_cpus": num_engines, "num_gpus": len(gpus), "include_dashboard": False}
            own["object_store_memory"] = OBJECT_STORE + object_store
            # It hands out those that it sees.
            with mock.patch.dict(os.environ, {VISIBLE: ",".join(gpus)} if gpus else {}):
                ray.init("local", **own, **quiet)
    except Exception as error:  # a node that takes too long to start is a plain one
        where = f"the cluster at {address}" if address else "it does not start"
        # Ray asks for a token since 2.60, and does not say that it was the wrong one.
        hint = ": is its token in RAY_AUTH_TOKEN?" if address else ""
        raise UserError(f"sampler.ray: {where}: {first_line(error)}{hint}") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            # Ray's own would end a run in the middle of a step, without saving it.
            signal.signal(signal.SIGTERM, on_sigterm)
    free = count_free(ray, device_type)
    if free < num_engines:
        ray.shutdown()
        raise UserError(
            f"sampler.engines {num_engines}: each takes a {UNITS[device_type]}, and {free} of the "
            f"Ray cluster at {address} are free"
        )


def count_free(ray: Any, device_type: str) -> int:
    """A cluster's cores, or GPUs."""
    return int(ray.available_resources().get("GPU" if device_type == "cuda" else "CPU", 0))
