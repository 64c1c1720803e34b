"""The fork-server: a small program that starts confined processes, a few milliseconds each.

    python -S -s -P server.py CONTROL_FD MECHANISM MODULE [FOLDER ...]

``rewards.sandbox.client`` starts it, without the user's environment and with nothing open but the
control socket. It is single-threaded and knows no secret: each request is a few limits and
descriptors, and what is to run is read from one of them by the confined process alone, after it was
forked.

For each request it forks a *watcher*, which makes the namespaces, forks the process and kills it
when its time is over or when nobody waits for it any more. In a process namespace the process is
number 1, so that everything it may have started ends with it. Every link of the chain is killed
by the kernel if the one above it ends.
"""

import contextlib
import gc
import importlib
import json
import os
import resource
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

if __name__ == "__main__":  # the package without its __init__, which imports what is not needed
    _package = types.ModuleType("rewards")
    _package.__path__ = [str(Path(__file__).resolve().parents[1])]
    sys.modules["rewards"] = _package

from rewards.sandbox import kernel
from rewards.sandbox.inside.main import FDS, run
from rewards.sandbox.inside.protocol import Message
from rewards.sandbox.kernel import CLONE_NEWIPC, CLONE_NEWNS, CLONE_NEWPID
from rewards.sandbox.seccomp import build_filter

# Where descriptors end up: stdin, stdout, payload, channel, report and status are passed in this
# order; the last tells the watcher that the process has started.
FD_PLACES = (0, 1, *FDS, 6, 7)
START_LIMIT_S = 10.0  # for confining a process on a busy machine
NUM_THREADS = 64
THREAD_STACK = 8 << 20  # bytes; the C library would give each as much as the main thread may have
INSIDE_ID = 1000  # uid and gid as an ordinary user's confined processes see them

# Imported once, here, instead of by every program. Also those that load shared libraries.
PRELOADED = (
    "array", "base64", "bisect", "bz2", "calendar", "cmath", "copy", "ctypes", "datetime",
    "decimal", "enum", "fractions", "hashlib", "heapq", "inspect", "itertools", "lzma", "math",
    "numbers", "pprint", "queue", "random", "statistics", "string", "textwrap", "threading",
    "typing", "unicodedata", "uuid", "zlib",
)  # fmt: skip
MODULES = os.path.dirname(os.path.realpath(os.__file__))
# The programs' own folder; it must not hide the modules, nor the packages that are shown.
SCRATCH = "/scratch" if any(p.startswith("/tmp/") for p in (MODULES, *sys.argv[4:])) else "/tmp"
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo")
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


class Confinement:
    """How processes are confined, decided once. ``uid`` is what root becomes, else None.

    ``folders`` are shown to them beside the interpreter's files.
    """

    def __init__(self, mechanism: str, folders: list[str]):
        self.mechanism = mechanism
        self.folders = folders
        self.has_namespaces = mechanism == "namespaces"
        self.is_root = os.geteuid() == 0
        self.uid = _choose_uid() if self.is_root and mechanism != "none" else None
        self.has_landlock = False
        if mechanism == "none":
            return
        kernel.check_machine()
        self.has_landlock = kernel.landlock_version() > 0
        if mechanism == "landlock" and not self.has_landlock:
            raise OSError("the kernel has no Landlock, or it is switched off")
        if self.has_namespaces:
            _enter_namespaces(self.is_root, folders)
            build_filter(pid=1, may_fork=False)  # once, for all that are forked later

    def describe(self) -> str:
        """Name what is in force, for people."""
        if self.mechanism == "none":
            return "none"
        own = [] if self.mechanism == "landlock" else [self.mechanism]
        return "+".join([*own, *["landlock"] * self.has_landlock, "seccomp"])


def _choose_uid() -> int:
    """Return a uid that no other process has, if this user namespace has one to spare."""
    try:
        lines = Path("/proc/self/uid_map").read_text().splitlines()
    except FileNotFoundError:  # no /proc within bubblewrap: then the first will do or nothing
        lines = ["0 0 4294967295"]
    ranges = [tuple(map(int, line.split())) for line in lines]
    number = int.from_bytes(os.urandom(3), "big")
    for uid in (0x70000000 + number, 50_000 + number % 10_000, 65_534):
        if any(first <= uid < first + size for first, _, size in ranges):
            return uid
    raise OSError("no uid to give up root for")


def _enter_namespaces(is_root: bool, folders: list[str]) -> None:
    """Move this process into a file system of the interpreter's files only, without network.

    Root needs no user namespace for that, and its confined processes change to a uid of their
    own. Anyone else is the owner of a user namespace, in which the processes have no rights.
    """
    flags = CLONE_NEWNS | CLONE_NEWIPC | kernel.CLONE_NEWNET | kernel.CLONE_NEWUTS
    if is_root:
        kernel.unshare(flags)
    else:
        uid, gid = os.geteuid(), os.getegid()
        kernel.unshare(flags | kernel.CLONE_NEWUSER)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"{INSIDE_ID} {gid} 1")
        Path("/proc/self/uid_map").write_text(f"{INSIDE_ID} {uid} 1")
    _change_root(folders)


def _change_root(folders: list[str]) -> None:
    kernel.mount("none", "/", "", kernel.MS_REC | kernel.MS_PRIVATE)
    base = "/tmp" if os.path.isdir("/tmp") else "/"
    kernel.mount("tmpfs", base, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=1m")
    os.chdir(base)
    os.mkdir("new")
    os.mkdir("old")
    kernel.pivot_root(".", "old")
    os.chdir("/")
    kernel.mount("tmpfs", "/new", "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "mode=755,size=1m")
    for path in (*LIBRARIES, *_list_library_paths(), *DEVICES, *folders):
        _show(path)
    os.makedirs(f"/new{SCRATCH}", exist_ok=True)
    kernel.make_read_only("/new")
    for path in _list_package_folders():
        if os.path.isdir(f"/new{path}") and path not in folders:
            kernel.mount("tmpfs", f"/new{path}", "tmpfs", kernel.MS_RDONLY, "size=4k")
    os.chdir("/new")
    kernel.pivot_root(".", ".")
    kernel.unmount(".")
    os.chdir("/")


def _show(path: str) -> None:
    """Make a path of the old root visible at the same place in the new one."""
    source, target = f"/old{path}", f"/new{path}"
    if os.path.lexists(target) or not os.path.lexists(source):
        return
    os.makedirs(os.path.dirname(target), 0o755, exist_ok=True)
    if os.path.islink(source):  # such as /lib -> usr/lib
        os.symlink(os.readlink(source), target)
    elif os.path.isdir(source):
        os.mkdir(target, 0o755)
        kernel.bind(source, target)
    else:
        Path(target).touch()
        kernel.bind(source, target)


def _list_library_paths() -> list[str]:
    """Return where the interpreter's own modules and shared libraries lie."""
    return [MODULES] if MODULES.startswith("/usr/lib/") else [os.path.dirname(MODULES)]


def _list_package_folders() -> list[str]:
    """Return the folders of installed packages within the library: they are not shown."""
    modules = os.path.dirname(os.path.realpath(os.__file__))
    return [
        f"{modules}/site-packages",
        f"{modules}/dist-packages",
        "/usr/lib/python3/dist-packages",
    ]


def serve(control: socket.socket, confinement: Confinement) -> None:
    """Start a watcher for every request until the other end closes the socket."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers are not waited for
    gc.collect()
    gc.freeze()
    while True:
        message, fds, _, _ = socket.recv_fds(control, 65_536, len(FD_PLACES) - 1)
        if not message:
            return
        if os.fork() == 0:
            with contextlib.suppress(BaseException):
                control.close()
                watch(json.loads(message), fds, confinement)
            os._exit(1)
        for fd in fds:
            os.close(fd)


def watch(request: Message, fds: list[int], confinement: Confinement) -> None:
    """Fork the process, enforce its time limit, and report how it ended on the status pipe."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    kernel.die_with_parent()
    status = fds[-1]
    try:
        if confinement.has_namespaces:
            kernel.unshare(CLONE_NEWPID | CLONE_NEWNS | CLONE_NEWIPC)
            size = request["disk_mb"]
            options = f"size={size}m,mode=1777,nr_inodes=1024"
            flags = kernel.MS_NOSUID | kernel.MS_NODEV
            kernel.mount("tmpfs", SCRATCH, "tmpfs", flags, options)
            os.chdir(SCRATCH)
        started, starting = os.pipe()
        pid = os.fork()
    except OSError as error:
        os.write(status, _line({"failed": str(error)}))
        os._exit(1)
    if pid == 0:
        _run_confined(request, [*fds, starting], confinement)
    for fd in (*fds[:-1], starting):
        os.close(fd)
    timed_out = not _wait(pid, status, started, request["seconds"])
    if timed_out:
        os.kill(pid, signal.SIGKILL)
    _, code = os.waitpid(pid, 0)
    report = {"code": os.waitstatus_to_exitcode(code), "timed_out": timed_out}
    with contextlib.suppress(OSError):
        os.write(status, _line(report))
    os._exit(0)


def _line(message: Message) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _wait(pid: int, status: int, started: int, limit_s: float) -> bool:
    """Wait until the process ends; False if its time is over, or the status pipe has no reader.

    Its time begins when the other end of ``started`` is closed: it is confined, and its own.
    """
    process = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.register(status, 0)  # errors are always reported
    poll.register(started, 0)
    deadline = time.monotonic() + START_LIMIT_S
    while (left_s := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(1000 * left_s + 1):
            if fd != started:
                return fd == process
            poll.unregister(started)
            deadline = time.monotonic() + limit_s
    return False


def _run_confined(request: Message, fds: list[int], confinement: Confinement) -> None:
    """In the new process: confine it, say so, and run what was asked for. Does not return."""
    code = 1
    try:
        status, starting = _arrange_fds(fds)
        try:
            _confine(request, confinement)
        except BaseException as error:
            os.write(status, _line({"failed": f"{type(error).__name__}: {error}"}))
            os._exit(1)
        os.write(status, _line({"started": True}))
        os.close(status)
        os.close(starting)
        gc.enable()
        code = run(request["kind"])
    finally:
        os._exit(code)


def _arrange_fds(fds: list[int]) -> tuple[int, int]:
    """Move the descriptors to their places and close all others; return the last two's."""
    high = [os.dup2(fd, 100 + index) for index, fd in enumerate(fds)]
    os.closerange(0, 100)
    for fd, place in zip(high, FD_PLACES):
        os.dup2(fd, place)
    os.open("/dev/null", os.O_WRONLY)  # the lowest that is free: standard error
    os.closerange(FD_PLACES[-1] + 1, 1024)
    return FD_PLACES[-2:]


def _confine(request: Message, confinement: Confinement) -> None:
    """Give up, in this order: memory and time, files, root, new rights, capabilities, calls."""
    for name, limit in _list_limits(request, confinement).items():
        _lower_limit(getattr(resource, name), limit)
    if confinement.mechanism == "none":
        kernel.die_with_parent()
        return
    rules = _make_rules(confinement) if confinement.has_landlock else None
    if confinement.uid is not None:
        _give_up_root(confinement.uid)
    kernel.die_with_parent()
    kernel.forbid_new_privileges()
    if rules is not None:
        kernel.apply_landlock(rules)
        os.close(rules)
    kernel.drop_capabilities()
    kernel.apply_seccomp(build_filter(pid=os.getpid(), may_fork=request["processes"] > 1))


def _make_rules(confinement: Confinement) -> int:
    """Return Landlock rules; made while still root, which may pass folders that others may not."""
    read = [*LIBRARIES, *DEVICES, *_list_library_paths(), *confinement.folders]
    scratch = [SCRATCH] if confinement.has_namespaces else []
    return kernel.make_landlock_rules(read, ["/dev/null", *scratch])


def _give_up_root(uid: int) -> None:
    modules = os.open(MODULES, os.O_PATH)
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    if os.access(MODULES, os.R_OK):
        os.close(modules)
        return
    # The interpreter lies in root's home, say. Without a mount namespace its modules can only be
    # reached by a descriptor that was opened before.
    place = f"/proc/self/fd/{modules}"
    sys.path[:] = [path.replace(MODULES, place) for path in sys.path]
    for module in list(sys.modules.values()):
        if isinstance(getattr(module, "__path__", None), list):
            module.__path__[:] = [path.replace(MODULES, place) for path in module.__path__]


def _list_limits(request: Message, confinement: Confinement) -> dict[str, int]:
    megabyte = 1 << 20
    return {
        "RLIMIT_AS": request["memory_mb"] * megabyte,
        "RLIMIT_STACK": request["memory_mb"] * megabyte // 2,  # recursion in C needs more than 8
        "RLIMIT_CPU": int(request["seconds"]) + 1,
        "RLIMIT_FSIZE": request["disk_mb"] * megabyte,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
        "RLIMIT_NPROC": request["processes"] + NUM_THREADS + _count_others(confinement),
    }


def _count_others(confinement: Confinement) -> int:
    """Count the threads that the kernel counts beside the sandbox's: those of the user's.

    A uid of one's own and a user namespace of one's own have none.
    """
    if confinement.uid is not None or confinement.mechanism in ("namespaces", "bubblewrap"):
        return 0
    num_threads = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid == os.getuid():
                num_threads += len(os.listdir(folder / "task"))
    return num_threads


def _lower_limit(number: int, limit: int) -> None:
    _, hard = resource.getrlimit(number)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(number, (limit, limit))


def main() -> None:
    """Confine as the command line asks, say how or why not on the control socket, and serve."""
    control = socket.socket(fileno=int(sys.argv[1]))
    kernel.die_with_parent()
    os.environ.clear()
    threading.stack_size(THREAD_STACK)
    try:
        module, *folders = sys.argv[3:]
        _preload()
        if module:
            _preload_package(module, folders)
        confinement = Confinement(sys.argv[2], folders)
    except Exception as error:
        control.send(_line({"failed": f"{error}"}))
        sys.exit(1)
    control.send(_line({"ready": confinement.describe()}))
    serve(control, confinement)


def _preload() -> None:
    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # a Python built without it
            importlib.import_module(name)
    import _sitebuiltins  # what `site` would do: programs end themselves by exit()
    import builtins

    builtins.exit = _sitebuiltins.Quitter("exit", "Ctrl-D (i.e. EOF)")
    builtins.quit = _sitebuiltins.Quitter("quit", "Ctrl-D (i.e. EOF)")


def _preload_package(module: str, folders: list[str]) -> None:
    sys.path += folders
    # Namespaces are entered, and programs forked, by a process of one thread.
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MPLCONFIGDIR"] = folder  # matplotlib, if imported, writes a cache
        importlib.import_module(module)
    os.environ.clear()


if __name__ == "__main__":
    main()
