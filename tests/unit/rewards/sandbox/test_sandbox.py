"""The sandbox under attack, in each mechanism, as root and as an ordinary user."""

import contextlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from code_attacks import (
    PROGRAMS,
    SLOW_PROGRAMS,
    SLOW_SOLUTIONS,
    SOLUTIONS,
    run_all,
    run_as_cells,
    run_programs,
)

from rewards.sandbox import client
from rewards.sandbox.client import SandboxError

HERE = Path(__file__).resolve().parents[1]
NOBODY = 65_534
# Attacks that harm nobody are run without a sandbox too: they have to succeed there.
SUCCEED_UNCONFINED = (
    "read a file of the user's", "read the password file", "see the machine's processes",
    "change its mode", "change its times", "reach it by a symbolic link", "connect by TCP",
    "listen by TCP", "send by UDP", "connect to a unix socket", "connect to an abstract socket",
    "send from a socket pair to a unix socket", "signal the parent", "start a process", "fork",
    "fill memory by files in memory", "make a file beside it", "have the kernel signal the parent",
    "lock a file that others see",
)  # fmt: skip


class Surroundings:
    """Files and sockets that attacks are after, and what has become of them."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="attacked-", dir="/tmp"))
        self.folder.chmod(0o777)  # no sandbox must be needed to get here
        self.canary = self.folder / "canary"
        self.sockets = {}
        for name, family, kind, address in (
            ("tcp", socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            ("udp", socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            ("unix", socket.AF_UNIX, socket.SOCK_STREAM, f"{self.folder}/stream"),
            ("unix_datagram", socket.AF_UNIX, socket.SOCK_DGRAM, f"{self.folder}/datagram"),
            ("abstract", socket.AF_UNIX, socket.SOCK_STREAM, f"\0attacked-{os.getpid()}"),
        ):
            self.sockets[name] = server = socket.socket(family, kind)
            server.bind(address)
            server.setblocking(False)
            if kind == socket.SOCK_STREAM:
                server.listen()
        for path in self.folder.iterdir():
            path.chmod(0o777)
        self.restore()

    def restore(self) -> None:
        self.canary.write_text("secret")
        self.canary.chmod(0o666)
        os.utime(self.canary, (1000, 1000))
        self.before = self.describe()

    def describe(self) -> tuple:
        status = self.canary.stat()
        return (
            self.canary.read_text(), stat.S_IMODE(status.st_mode), status.st_uid, status.st_mtime,
            sorted(path.name for path in self.folder.iterdir()), os.listxattr(self.canary),
            os.path.exists("/dev/shm/canary"),
        )  # fmt: skip

    def heard(self) -> list[str]:
        """Return the names of the sockets that something has arrived at."""
        names = []
        for name, server in self.sockets.items():
            with contextlib.suppress(BlockingIOError):
                server.accept() if "datagram" not in name and name != "udp" else server.recv(9)
                names.append(name)
        return names

    def context(self) -> dict:
        return {
            "canary": str(self.canary), "home": os.path.expanduser("~"), "pid": os.getpid(),
            "tcp": self.sockets["tcp"].getsockname()[1],
            "udp": self.sockets["udp"].getsockname()[1],
            "unix": f"{self.folder}/stream", "unix_datagram": f"{self.folder}/datagram",
            "abstract": f"attacked-{os.getpid()}", "expected": "hidden-5a17c0de",
        }  # fmt: skip

    def close(self) -> None:
        for server in self.sockets.values():
            server.close()
        shutil.rmtree(self.folder)


@pytest.fixture(scope="module")
def surroundings():
    os.environ["REWARDS_TEST_SECRET"] = "secret"
    found = Surroundings()
    yield found
    found.close()
    del os.environ["REWARDS_TEST_SECRET"]


def find_public_python() -> str | None:
    """Return a Python that an ordinary user can start, if this user is root."""
    for program in (os.path.realpath(sys.executable), "/usr/bin/python3", "/usr/local/bin/python3"):
        code = f"import sys; sys.path.insert(0, {str(HERE.parents[2])!r}); import rewards"
        with contextlib.suppress(OSError):
            done = subprocess.run([program, "-c", code], user=NOBODY, group=NOBODY,
                                  extra_groups=[], capture_output=True, cwd="/")  # fmt: skip
            if done.returncode == 0:
                return program
    return None


def attack_as_nobody(mechanism: str, context: dict) -> dict:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    program = find_public_python()
    if program is None:
        pytest.skip("an ordinary user cannot read this checkout or no Python of 3.11 or later")
    # Programs only: what solutions try does not depend on whose processes they are.
    done = subprocess.run(
        [program, HERE / "code_attacks.py", mechanism, json.dumps(context)],
        user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True, text=True, timeout=120,
        cwd="/",
    )  # fmt: skip
    if "in get_server" in done.stderr:
        pytest.skip(f"{mechanism}: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def attack_as_self(mechanism: str, context: dict) -> dict:
    try:
        client.get_server(mechanism)
    except SandboxError as error:
        pytest.skip(f"{mechanism}: {error}")
    try:
        if mechanism == "namespaces":  # the clock is the same in all of them
            return run_all(mechanism, context, PROGRAMS | SLOW_PROGRAMS, SOLUTIONS | SLOW_SOLUTIONS)
        # Within bubblewrap the two processes of a function test are confined as by Landlock alone.
        return run_all(mechanism, context, PROGRAMS, SOLUTIONS if mechanism == "landlock" else {})
    finally:
        client.close_servers()


def attack_by_cells(mechanism: str, context: dict) -> dict:
    """As a model that has Python as a tool."""
    try:
        return run_all(mechanism, context, PROGRAMS | SLOW_PROGRAMS, {}, run_as_cells)
    except SandboxError as error:
        pytest.skip(f"{mechanism}: {error}")
    finally:
        client.close_servers()


OLD_LANDLOCK = """
import runpy, sys, types
sys.argv = sys.argv[1:]
package = sys.modules["rewards"] = types.ModuleType("rewards")
package.__path__ = [sys.argv[0].removesuffix("/sandbox/server.py")]
from rewards.sandbox import kernel
kernel.landlock_version = lambda: 1
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def attack_old_landlock(mechanism: str, context: dict) -> dict:
    """With the first version of Landlock, which knows nothing of signals and abstract sockets."""
    make_command = client._make_command

    def make_old(*args):
        command = make_command(*args)
        at = next(n for n, part in enumerate(command) if part.endswith("server.py"))
        return [*command[:at], "-c", OLD_LANDLOCK, *command[at:]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "_make_command", make_old)
        return attack_as_self(mechanism, context)


WAYS = [
    (attack, mechanism)
    for attack in (attack_as_self, attack_as_nobody)
    for mechanism in ("namespaces", "bubblewrap", "landlock")
] + [
    pytest.param((attack_old_landlock, "landlock"), marks=pytest.mark.slow),
    (attack_by_cells, "namespaces"),
    (attack_by_cells, "landlock"),
]


@pytest.fixture(scope="module", params=WAYS, ids=lambda way: f"{way[0].__name__}-{way[1]}")
def outcomes(request, surroundings):
    """All attacks, run once in each way; what they did to their surroundings is checked here."""
    attack, mechanism = request.param
    if mechanism == "bubblewrap" and not shutil.which("bwrap"):
        pytest.skip("bwrap is not installed")
    surroundings.restore()
    found = attack(mechanism, surroundings.context())
    found["changed"] = surroundings.describe() != surroundings.before
    found["heard"] = surroundings.heard()
    return found


def test_the_tables_are_as_long_as_promised():
    assert len(PROGRAMS | SLOW_PROGRAMS) + len(SOLUTIONS | SLOW_SOLUTIONS) >= 40


def test_no_attack_is_rewarded(outcomes):
    programs, solutions = outcomes["programs"], outcomes["solutions"]
    assert set(programs) >= set(PROGRAMS)
    assert not solutions or set(solutions) >= set(SOLUTIONS)
    assert [name for name, o in programs.items() if o["status"] == "right"] == []
    assert [name for name, o in solutions.items() if o["passed"] or o["status"] == "right"] == []


def test_nothing_outside_has_changed(outcomes):
    assert not outcomes["changed"]
    assert outcomes["heard"] == []
    assert outcomes["left"] == 0


def test_the_judge_does_not_fail(outcomes):
    found = outcomes["programs"] | outcomes["solutions"]
    assert {o["status"] for o in found.values()} <= {"wrong", "crashed", "timed_out"}


def test_every_attack_ends_in_time(outcomes):
    found = outcomes["programs"] | outcomes["solutions"]
    slow = [name for name in (*SLOW_PROGRAMS, *SLOW_SOLUTIONS) if name in found]
    assert {found[name]["status"] for name in slow} <= {"timed_out"}
    # After 3 s at most; those that sleep would take 60, others would never end.
    assert {name: o["seconds"] for name, o in found.items() if o["seconds"] > 30} == {}


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's attacks fail for other reasons")
@pytest.mark.parametrize("run", [run_programs, run_as_cells])
def test_the_attacks_are_real(surroundings, run):
    attacks = {name: PROGRAMS[name] for name in SUCCEED_UNCONFINED}
    try:
        found = run("none", surroundings.context(), attacks)
    finally:
        client.close_servers()
        surroundings.heard()
        (surroundings.folder / "canary.new").unlink(missing_ok=True)
        Path("/tmp/link").unlink(missing_ok=True)
    assert [name for name, outcome in found.items() if outcome["status"] != "right"] == []
