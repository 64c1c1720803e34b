"""Where judged programs run: which sandbox is used, and a client for its fork-server.

``configure_sandbox`` or ``REWARDS_SANDBOX`` choose; ``auto`` takes the first of these that really
runs a program here, and none is used silently that confines less:

1. ``namespaces``: user, mount, process, network, IPC and UTS namespaces, Landlock (if the kernel
   has it), seccomp, resource limits.
2. ``bubblewrap``: the same fork-server within ``bwrap``, for systems that allow only that
   program to make namespaces.
3. ``landlock``: Landlock, seccomp and resource limits, where nobody may make namespaces.

``none`` runs programs with resource limits only, and is never chosen by ``auto``.
"""

import contextlib
import fcntl
import json
import os
import resource
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

MECHANISMS = ("namespaces", "bubblewrap", "landlock")
CHOICES = ("auto", *MECHANISMS, "none")
START_LIMIT_S = 60.0
STACK_ROOM = 1 << 30  # bytes; a program's own limit is half of its memory
GRACE_S = 20.0  # for forking and reporting on a busy machine
_ROOT = Path(__file__).resolve().parents[2]
_SERVER = "rewards/sandbox/server.py"


class SandboxError(RuntimeError):
    """No sandbox can be used here, or the one that was asked for cannot."""


class Limits(NamedTuple):
    """What one program may use.

    seconds: wall-clock (and, one more, of processor time).
    memory_mb: address space, Python included. disk_mb: size of all its files in the scratch
    folder, and of each. output_bytes: what it prints. processes: 1 forbids starting others;
    threads are always allowed, about 60 of them.
    """

    seconds: float = 5.0
    memory_mb: int = 512
    disk_mb: int = 16
    output_bytes: int = 1 << 20
    processes: int = 1


class Ending(NamedTuple):
    """How a program ended.

    code: its exit status, or minus the signal that killed it; None if it was stopped because
    nobody waited for it any longer. output: what came out of the pipe that was listened to.
    """

    code: int | None
    timed_out: bool
    overflowed: bool
    output: bytes


class Server:
    """A fork-server and the one thread that uses it. Raises ``SandboxError`` if it cannot run.

    ``module`` is imported before anything is confined, from ``folders`` of installed packages,
    which programs can then read.
    """

    def __init__(self, mechanism: str, folders: Sequence[str] = (), module: str = ""):
        self.mechanism = mechanism
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.control = ours
        with theirs:
            command = _make_command(mechanism, [str(theirs.fileno()), mechanism, module, *folders])
            with _large_stack():
                self.process = subprocess.Popen(
                    command, env=_make_environment(), pass_fds=[theirs.fileno()], cwd="/",
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                )  # fmt: skip
        try:
            self.description = self._wait_until_ready()
        except BaseException:
            self.close()
            raise

    def _wait_until_ready(self) -> str:
        self.control.settimeout(START_LIMIT_S)
        try:
            reply = json.loads(self.control.recv(65_536) or b'{"failed": "it ended at once"}')
        except (OSError, ValueError) as error:
            raise SandboxError(f"the sandbox server does not start: {error}") from error
        if "ready" not in reply:
            raise SandboxError(reply["failed"])
        self.control.settimeout(None)
        return str(reply["ready"])

    def start(self, kind: str, payload: Mapping[str, object], limits: Limits, **fds: int) -> "Run":
        """Start a process; ``fds`` are its ``stdin``, ``stdout``, ``channel`` and ``report``."""
        if limits.processes > 1 and self.mechanism != "namespaces":
            raise SandboxError("only namespaces can end a program together with its children")
        reader, writer = os.pipe()
        # Opened for each: flags, owners and locks of an open file would tell the next program of
        # this one.
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        payload_fd = make_memory_file(json.dumps(payload).encode())
        request = {"kind": kind, **limits._asdict()}
        stdin, stdout, channel, report = (
            fds.get(name, null) for name in ("stdin", "stdout", "channel", "report")
        )
        passed = [stdin, stdout, payload_fd, channel, report, writer]
        try:
            socket.send_fds(self.control, [json.dumps(request).encode()], passed)
        except OSError as error:
            os.close(reader)
            raise SandboxError(f"the sandbox server has ended: {error}") from error
        finally:
            for fd in (payload_fd, writer, null):
                os.close(fd)
        return Run(reader, limits)

    def close(self) -> None:
        """End the server and, with it, everything that it has started."""
        self.control.close()
        self.process.kill()
        self.process.wait()


class Run:
    """A process in the sandbox. Leave nothing running: ``wait`` for it or ``stop`` it."""

    def __init__(self, status: int, limits: Limits):
        self.status: int | None = status
        self.limits = limits
        self.started = time.monotonic()

    def stop(self) -> None:
        """Kill it: the watcher notices that its status pipe has no reader."""
        if self.status is not None:
            os.close(self.status)
            self.status = None

    def wait(self, listen_to: int | None = None) -> Ending:
        """Collect what comes out of a pipe, and how the process ends. Closes the pipe.

        Raises ``SandboxError`` if the process could not be confined or its watcher died.
        """
        fds = [fd for fd in (self.status, listen_to) if fd is not None]
        try:
            texts, overflowed = self._collect(fds)
            return self._conclude(texts[0], b"".join(texts[1:]), overflowed)
        finally:
            self.stop()
            if listen_to is not None:
                os.close(listen_to)

    def _collect(self, fds: list[int]) -> tuple[list[bytes], bool]:
        """Read the pipes to their ends; return that and whether the output exceeded its limit."""
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        parts: dict[int, list[bytes]] = {fd: [] for fd in fds}
        open_fds = set(fds)
        left = self.limits.output_bytes
        deadline = self.started + self.limits.seconds + GRACE_S  # the watcher's limit is shorter
        while open_fds and left >= 0:
            events = poll.poll(max(0.0, 1000 * (deadline - time.monotonic())))
            if not events and self.status in open_fds:
                raise SandboxError("a program was not stopped in time")
            if not events:  # unconfined: a child that it left behind holds the pipe
                break
            for fd, _ in events:
                part = os.read(fd, 1 << 16)
                parts[fd].append(part)
                if not part:
                    poll.unregister(fd)
                    open_fds.discard(fd)
                if fd == self.status and not part:
                    deadline = min(deadline, time.monotonic() + 1.0)
                if fd != self.status:
                    left -= len(part)
        return [b"".join(parts[fd]) for fd in fds], left < 0

    def _conclude(self, status: bytes, output: bytes, overflowed: bool) -> Ending:
        messages = [json.loads(line) for line in status.splitlines()]
        failed = [m["failed"] for m in messages if "failed" in m]
        if failed:
            raise SandboxError(f"a program cannot be confined: {failed[0]}")
        ended = [m for m in messages if "code" in m]
        if overflowed:
            return Ending(None, False, True, output)
        if not messages[:1] or not messages[0].get("started"):  # not the program's fault
            raise SandboxError("a program did not start in time")
        if not ended:
            raise SandboxError("a program was lost: something has killed its watcher")
        return Ending(ended[0]["code"], ended[0]["timed_out"], False, output)


_servers: dict[tuple[str, str], Server] = {}


def get_server(mechanism: str, folders: Sequence[str] = (), module: str = "") -> Server:
    """Return this process's fork-server, started if need be. Raises ``SandboxError``."""
    server = _servers.get((mechanism, module))
    if server is not None and server.process.poll() is not None:
        _servers.pop((mechanism, module)).close()
        server = None
    if server is None:
        server = _servers[mechanism, module] = Server(mechanism, folders, module)
    return server


def close_servers() -> None:
    """End this process's fork-servers; they start again when needed."""
    while _servers:
        _servers.popitem()[1].close()


def make_memory_file(content: bytes) -> int:
    """Return a descriptor of a file in memory that holds ``content`` and cannot be changed."""
    fd = os.memfd_create("input", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(content)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, 0xF)  # F_SEAL_SEAL, SHRINK, GROW and WRITE
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


@contextlib.contextmanager
def _large_stack() -> Iterator[None]:
    """Raise the stack limit for processes started within: it is reserved at start."""
    soft, hard = resource.getrlimit(resource.RLIMIT_STACK)
    room = STACK_ROOM if hard == resource.RLIM_INFINITY else min(STACK_ROOM, hard)
    if soft != resource.RLIM_INFINITY and soft < room:
        resource.setrlimit(resource.RLIMIT_STACK, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_STACK, (soft, hard))


def _find_python() -> str:
    """Return the interpreter itself, not a virtual environment's link to it."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


def _make_environment() -> dict[str, str]:
    """Return what the interpreter needs to start; the server forgets it before it runs anything."""
    # Equal hashes in every run: a program that is judged twice is judged alike. One arena: each
    # further one would take 64 MiB of the address space from a program with threads.
    environment = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
    if path := os.environ.get("LD_LIBRARY_PATH"):  # some interpreters find libpython by it
        environment["LD_LIBRARY_PATH"] = path
    return environment


def _make_command(mechanism: str, arguments: list[str]) -> list[str]:
    # -s -S -P: nothing of the user's is looked up or imported.
    python = [_find_python(), "-s", "-S", "-P", "-X", "utf8"]
    if mechanism != "bubblewrap":
        return [*python, str(_ROOT / _SERVER), *arguments]
    bubblewrap = _make_bubblewrap(python[0], arguments[3:])
    return [*bubblewrap, *python, f"/sandbox/{_SERVER}", *arguments]


def _make_bubblewrap(python: str, folders: Sequence[str]) -> list[str]:
    """Return the command up to the program: a file system of the interpreter's files only."""
    program = shutil.which("bwrap")
    if program is None:
        raise SandboxError("bwrap is not installed")
    options = ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"]
    options += ["--die-with-parent", "--new-session"]
    if os.geteuid() == 0:  # programs get a uid of their own
        for capability in ("SETUID", "SETGID", "KILL"):
            options += ["--cap-add", f"CAP_{capability}"]
    else:
        options += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
    library = os.path.dirname(os.path.dirname(os.path.realpath(os.__file__)))
    for folder in reversed(Path(library).parents[:-1]):  # passable, also if it is root's home
        options += ["--perms", "0755", "--dir", str(folder)]
    for path in ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", library):
        options += ["--ro-bind-try", path, path]
    for path in _list_package_folders():
        options += ["--tmpfs", path]
    if folders:  # importing from them may write files
        options += ["--size", str(16 << 20), "--tmpfs", "/tmp"]
    for path in folders:
        for folder in reversed(Path(path).parents[:-1]):
            options += ["--perms", "0755", "--dir", str(folder)]
        options += ["--ro-bind", path, path]
    options += ["--ro-bind", python, python]
    options += ["--ro-bind", str(_ROOT / "rewards/sandbox"), "/sandbox/rewards/sandbox"]
    for path in ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"):
        options += ["--dev-bind-try", path, path]
    return [program, *options, "--remount-ro", "/", "--chdir", "/", "--"]


def _list_package_folders() -> list[str]:
    library = os.path.dirname(os.path.realpath(os.__file__))
    folders = (f"{library}/site-packages", "/usr/lib/python3/dist-packages")
    return [folder for folder in folders if os.path.isdir(folder)]
