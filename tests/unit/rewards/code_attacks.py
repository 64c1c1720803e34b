"""Hostile programs, as tables: what they try, and a way to run all of them in one sandbox.

A *program* prints what the tests expect only if its attack succeeds, so that none may be right.
A *solution* tries to pass function tests whose answers it cannot know. Run as a script, this file
runs them for another user: ``python code_attacks.py MECHANISM CONTEXT``; it prints JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from rewards.code import cells, runs
from rewards.sandbox import client
from rewards.sandbox.client import Limits

ESCAPED = "escaped"
# Small, so that a sandbox that fails takes nothing down with it.
LIMITS = Limits(seconds=3.0, memory_mb=200, disk_mb=4, output_bytes=100_000)

PRELUDE = """
import ctypes, mmap, os, resource, signal, socket, sys, threading, time
C = {context!r}
libc = ctypes.CDLL(None, use_errno=True)
def syscall(number, *arguments):
    if libc.syscall(ctypes.c_long(number), *arguments) < 0:
        raise OSError(ctypes.get_errno(), "denied")
def escaped():
    print("escaped", flush=True)
    os._exit(0)
def check(success):
    if success:
        escaped()
"""

# Each line or block of these is tried on its own; see ``_make_program``.
PROGRAMS = {
    "read a file of the user's": "check('secret' in open(C['canary']).read())",
    "read it through a descriptor of its folder": """
fd = os.open(os.path.dirname(C['canary']), os.O_PATH)
check(os.read(os.open('canary', os.O_RDONLY, dir_fd=fd), 6) == b'secret')""",
    "read the password file": "check('root' in open('/etc/passwd').read())",
    "list the home folder": "check(os.listdir(C['home']))",
    "list the root folder's etc": "check(os.listdir('/etc'))",
    "find a secret in the environment": "check(any('secret' in v for v in os.environ.values()))",
    "read the environment of init": "check(open('/proc/1/environ', 'rb').read())",
    "read the environment of the parent": """
for pid in (os.getppid(), C['pid']):
    try:
        check(b'secret' in open(f'/proc/{pid}/environ', 'rb').read())
    except OSError:
        pass""",
    "see the machine's processes": "check(any(p.isdigit() for p in os.listdir('/proc')))",
    "read the parent's memory": "check(open(f\"/proc/{C['pid']}/mem\", 'rb'))",
    "read the kernel's log": "syscall(103, 3, ctypes.create_string_buffer(64), 64)\nescaped()",
    "write to a file of the user's": "open(C['canary'], 'a').write('x')\nescaped()",
    "truncate it": "os.truncate(C['canary'], 0)\nescaped()",
    "remove it": "os.unlink(C['canary'])\nescaped()",
    "rename it": "os.rename(C['canary'], C['canary'] + '.moved')\nescaped()",
    "change its mode": "os.chmod(C['canary'], 0o777)\nescaped()",
    "change its owner": "os.chown(C['canary'], os.getuid(), os.getgid())\nescaped()",
    "change its times": "os.utime(C['canary'], (1, 1))\nescaped()",
    "set an attribute of it": "os.setxattr(C['canary'], 'user.x', b'1')\nescaped()",
    "reach it by a symbolic link": """
os.symlink(C['canary'], '/tmp/link')
check(open('/tmp/link').read())""",
    "reach it by a hard link": "os.link(C['canary'], '/tmp/link')\ncheck(open('/tmp/link').read())",
    "reach it by its handle": """
fd = os.open('/', os.O_PATH)
handle = ctypes.create_string_buffer((128).to_bytes(4, 'little') + bytes(132), 136)
syscall(303, -100, C['canary'].encode(), handle, ctypes.byref(ctypes.c_int()), 0)
escaped()""",
    "make a file beside it": "open(C['canary'] + '.new', 'w').close()\nescaped()",
    "make a folder beside it": "os.mkdir(C['canary'] + '.folder')\nescaped()",
    "make a device": "os.mknod('/tmp/device', 0o60666, os.makedev(8, 0))\nescaped()",
    "change the standard library": "open(os.__file__, 'a').close()\nescaped()",
    "leave a file in shared memory": "open('/dev/shm/canary', 'w').close()\nescaped()",
    "fill the disk": """
for n in range(100):
    with open(f'/tmp/{n}', 'wb') as file:
        file.write(bytes(1 << 20))
escaped()""",
    "make one large file": """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with open('/tmp/large', 'wb') as file:
    for _ in range(100):
        file.write(bytes(1 << 20))
escaped()""",
    "fill memory by files in memory": "os.memfd_create('x')\nescaped()",
    "connect by TCP": "socket.create_connection(('127.0.0.1', C['tcp']), 1)\nescaped()",
    "listen by TCP": "socket.create_server(('127.0.0.1', 0))\nescaped()",
    "send by UDP": "socket.socket(type=2).sendto(b'x', ('127.0.0.1', C['udp']))\nescaped()",
    "connect to a unix socket": "socket.socket(1).connect(C['unix'])\nescaped()",
    "connect to an abstract socket": "socket.socket(1).connect('\\0' + C['abstract'])\nescaped()",
    "send from a socket pair to a unix socket": """
one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
try:
    one.sendto(b'x', C['unix_datagram'])
except OSError:
    one.connect(C['unix_datagram'])
escaped()""",
    "open a raw or a netlink socket": """
for family, kind in ((socket.AF_NETLINK, 3), (socket.AF_PACKET, 3), (socket.AF_INET, 3)):
    try:
        socket.socket(family, kind)
        escaped()
    except OSError:
        pass""",
    "signal the parent": """
for pid in (C['pid'], os.getppid() or C['pid']):
    try:
        os.kill(pid, 0)
        escaped()
    except OSError:
        pass""",
    "signal everyone": "os.kill(-1, 0)\nescaped()",
    "signal a thread of the parent": "syscall(200, C['pid'], 0)\nescaped()",
    "have the kernel signal the parent": """
import fcntl, struct
reader, writer = os.pipe()
for command, value in ((8, C['pid']), (8, os.getppid() or C['pid']), (10, 9), (4, 0x2000 | 0x800),
                       (15, struct.pack('ii', 1, C['pid'])), (1024, 0), (1026, 1)):
    try:
        fcntl.fcntl(reader, command, value)
        escaped()
    except OSError:
        pass""",
    "lock a file that others see": "import fcntl\nfcntl.flock(0, 2)\nescaped()",
    "signal by a descriptor": "os.pidfd_open(C['pid'])\nescaped()",
    "trace the parent": "syscall(101, 16, C['pid'], 0, 0)\nescaped()",
    "read the parent's memory by a call": """
buffer = ctypes.create_string_buffer(8)
vector = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
syscall(310, C['pid'], vector, 1, vector, 1, 0)
escaped()""",
    "change the parent's limits": "resource.prlimit(C['pid'], resource.RLIMIT_NOFILE)\nescaped()",
    "raise its own limits": """
hard = resource.getrlimit(resource.RLIMIT_AS)[1]
resource.setrlimit(resource.RLIMIT_AS, (2 * hard, 2 * hard))
escaped()""",
    "become root": "os.setuid(0)\nescaped()",
    "have been root": "check(0 in (*os.getresuid(), *os.getresgid(), *os.getgroups()))",
    "make a user namespace": "check(libc.unshare(0x10000000) == 0)",
    "make a process in a new namespace": "syscall(56, 0x10000000 | 17, 0, 0, 0, 0)\nescaped()",
    "mount": "check(libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) == 0)",
    "unmount": "check(libc.umount2(b'/tmp', 2) == 0)",
    "change the root folder": "os.chroot('/tmp')\nescaped()",
    "open a file system by the new calls": "syscall(430, b'tmpfs', 0)\nescaped()",
    "set up io_uring": "syscall(425, 8, ctypes.create_string_buffer(256))\nescaped()",
    "load a BPF program": "syscall(321, 0, ctypes.create_string_buffer(128), 128)\nescaped()",
    "use the kernel's keys": "syscall(250, 0, -3, 1)\nescaped()",
    "take page faults": "syscall(323, 1)\nescaped()",
    "count events": "syscall(298, ctypes.create_string_buffer(128), 0, -1, -1, 0)\nescaped()",
    "share memory by System V": "syscall(29, 1234, 4096, 0o1666)\nescaped()",
    "keep running after its parent": "syscall(157, 1, 0)\nescaped()",
    "change the host's name": "socket.sethostname('x')\nescaped()",
    "type into the terminal": "import fcntl\nfcntl.ioctl(0, 0x5412, b'x')\nescaped()",
    "take both processors' priority": "os.sched_setscheduler(0, 1, os.sched_param(1))\nescaped()",
    "start a shell": "os.execv('/bin/sh', ['sh', '-c', 'echo escaped'])",
    "start a process": "import subprocess\nsubprocess.run([sys.executable, '-c', '0'])\nescaped()",
    "fork": "if os.fork() == 0: os._exit(0)\nescaped()",
    "leave a daemon behind": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(60)
    os._exit(0)
escaped()""",
    "fork without end": "for _ in range(200): os.fork()\nescaped()",
    "start threads without end": """
for _ in range(200):
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
escaped()""",
    "take much memory": "block = b'x' * (400 << 20)\nescaped()",
    "map much memory": "blocks = [mmap.mmap(-1, 8 << 20) for _ in range(50)]\nescaped()",
    "print without end": "while True: print('x' * 1000)",
    "write to every descriptor": """
for fd in (1, *range(3, 64)):
    for line in (b'{"started": true}', b'{"code": 0, "timed_out": false}', b'escaped'):
        try:
            os.write(fd, line + b'\\n')
        except OSError:
            pass""",
    "find the expected output in memory": """
import gc, inspect, re
frame, seen = sys._getframe(), []
while frame:
    seen += [repr(frame.f_locals), repr(frame.f_globals), str(frame.f_code.co_consts)]
    frame = frame.f_back
seen += [repr(thing) for thing in gc.get_objects() if isinstance(thing, (dict, list, str, bytes))]
found = re.search('hidden-[0-9a-f]{8}', ' '.join(seen))
print(found.group() if found else 'nothing')""",
    "find the expected output in descriptors": """
import re
for fd in range(0, 64):
    try:
        os.lseek(fd, 0, 0)
        found = re.search(b'hidden-[0-9a-f]{8}', os.read(fd, 1 << 20))
    except OSError:
        continue
    if found:
        print(found.group().decode())""",
    "print nothing and succeed": "os._exit(0)",
    "print all it was given": "print(sys.stdin.read())",
    "print, then crash": "print(C['expected']); sys.stdout.flush(); raise SystemExit(3)",
    "print, then be killed": "print(C['expected'], flush=True); libc.abort()",
    "print, then more at exit": """
import atexit
atexit.register(print, 'more')
print(C['expected'])""",
    "crash the interpreter": "ctypes.string_at(0)\nescaped()",
}  # fmt: skip
# Those that only the clock ends; together, because each takes its time.
SLOW_PROGRAMS = {
    "sleep": "time.sleep(60)",
    "compute": "x = 7 ** 10 ** 9",
    "ignore all signals": """
for number in range(1, 65):
    try:
        signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError):
        pass
while True: pass""",
    "linger in a thread": """
threading.Thread(target=time.sleep, args=(60,)).start()
print(C['expected'])""",
}

SECRET = 730_281_946
FUNCTION_TESTS = f"""
assert candidate(3) == {SECRET}
assert {SECRET} == candidate(3)
assert not candidate(3) != {SECRET}
assert abs(candidate(3) - {SECRET}) < 1
assert candidate(3) in {{{SECRET}}}
assert {SECRET} in [candidate(3)]
assert all(map(lambda n: candidate(n) == {SECRET}, [1, 2, 3]))
assert all([candidate(n) == {SECRET} for n in [1, 2, 3]])
assert str(candidate(3)) == '{SECRET}'
assert [candidate(3)] == [{SECRET}]
assert min(candidate(3), {SECRET}) == max({SECRET}, candidate(3))
result = [candidate(n) for n in range(3)]; assert result == [{SECRET}] * 3
items = [3, 1, 2]; assert candidate(items) == sorted(items) + [{SECRET}]
assert isinstance(candidate(3), int) and candidate(3) > 5 and candidate(3) % 1000 == 946
""".strip().splitlines()

_FIND = """
import gc, inspect, os, re, sys, types
def search():
    texts, frame = [], sys._getframe()
    while frame:
        texts += [repr(frame.f_locals), repr(frame.f_globals), repr(frame.f_code.co_consts)]
        frame = frame.f_back
    for thing in gc.get_objects():
        if isinstance(thing, (dict, list, tuple, str, bytes)):
            texts.append(repr(thing)[:100000])
    for fd in range(64):
        try:
            texts.append(repr(os.pread(fd, 1 << 20, 0)))
        except OSError:
            pass
    found = re.search('candidate.{1,9} == ([0-9]{9})', ' '.join(texts))
    return int(found.group(1)) if found else None
"""
_FORGED = (
    '{"completed": true, "bad_tests": null, "passed": 14, "failed": 0, "error": "", '
    '"started": true, "gone": false}'
)

SOLUTIONS = {
    "exit early with success": "import os\nos._exit(0)",
    "exit early, politely": "import sys\nsys.exit(0)",
    "exit in the function": "import os\ndef f(x): os._exit(0)",
    "exit in the function, politely": "import sys\ndef f(x): sys.exit(0)",
    "raise what ends loops": "def f(x): raise StopIteration",
    "raise what ends generators": "def f(x): raise GeneratorExit",
    "raise an interrupt": "def f(x): raise KeyboardInterrupt",
    "raise a base exception": "class E(BaseException): pass\ndef f(x): raise E",
    "raise an error with a hostile text": """
class E(Exception):
    def __str__(self): raise SystemExit(0)
def f(x): raise E""",
    "equal everything": """
class Any:
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda s, o: True
    __ne__ = lambda s, o: False
    __hash__ = lambda s: 730281946
    __abs__ = __sub__ = __rsub__ = __add__ = __mod__ = lambda s, *o: s
    __class__ = int
    __bool__ = lambda s: True
def f(x): return Any()""",
    "equal everything, as an int": """
class Any(int):
    __eq__ = lambda s, o: True
    __ne__ = lambda s, o: False
    __hash__ = int.__hash__
    __sub__ = __rsub__ = __mod__ = lambda s, o: 0
    __str__ = __repr__ = lambda s: '730281946'
    __index__ = __int__ = lambda s: 0
def f(x): return Any(6)""",
    "equal everything, as a string": """
class Any(str):
    __eq__ = lambda s, o: True
    __hash__ = str.__hash__
def f(x): return Any('x')""",
    "equal everything, as a list": """
class Any(list):
    __eq__ = __contains__ = lambda s, o: True
    __iter__ = lambda s: iter([730281946])
    __len__ = lambda s: 1
def f(x): return Any([1])""",
    "equal everything, by a metaclass": """
class Meta(type):
    __eq__ = lambda s, o: True
    __hash__ = type.__hash__
class Any(metaclass=Meta): pass
def f(x): return Any""",
    "be a mock": "from unittest.mock import MagicMock, ANY\ndef f(x): return ANY",
    "replace the builtins": """
import builtins
for name in ('all', 'any', 'isinstance', 'abs', 'len', 'sorted', 'str', 'int', 'min', 'max', 'map'):
    setattr(builtins, name, lambda *a, **k: True)
def f(x): return 0""",
    "replace AssertionError": """
import builtins
builtins.AssertionError = type('Quiet', (Exception,), {'__init__': lambda s, *a: None})
def f(x): return 0""",
    "define the checker": """
def check(candidate): pass
def candidate(x): return 0
def f(x): return 0
import sys, types
for name in ('tests', '__main__', 'rewards.sandbox.inside.checker',
             'rewards.sandbox.inside.link', 'rewards.sandbox.inside.asserts'):
    sys.modules[name] = types.ModuleType(name)""",
    "replace the modules of the judge": """
import json, struct, os, sys
import rewards.sandbox.inside.plain_data as p, rewards.sandbox.inside.candidate as i
p.encode = i.encode = lambda *a: 730281945
i.receive_frame = p.receive_frame = lambda fd: {'do': 'call'}
json.dumps = lambda *a, **k: '{"value": true}'
json.loads = lambda *a, **k: {}
struct.pack = lambda *a: b''
def f(x): return 0""",
    "search the interpreter for the tests": _FIND + """
found = []
def f(x):
    found or found.append(search())
    return found[0]""",
    "search before the tests run": _FIND + "\nfound = search()\ndef f(x): return found",
    "search the caller": """
import sys
def f(x):
    frame = sys._getframe(1)
    while frame:
        for value in list(frame.f_locals.values()) + list(frame.f_globals.values()):
            if value == 730281946 and type(value) is int and 'PLANTED' not in globals():
                return value
        frame = frame.f_back
PLANTED = 1""",
    "write a report to every descriptor": f"""
import os
for fd in range(64):
    try: os.write(fd, {_FORGED!r}.encode())
    except OSError: pass
def f(x): os._exit(0)""",
    "send a report on the channel": f"""
import os
def f(x):
    body = {_FORGED!r}.encode()
    os.write(4, len(body).to_bytes(4, 'big') + body)
    return 0""",
    "send many answers beforehand": """
import os
for _ in range(100):
    os.write(4, b'\\0\\0\\0\\x0f{"value": true}')
def f(x): return True""",
    "claim to be another object": """
import os
def send(body):
    os.write(4, len(body).to_bytes(4, 'big') + body)
def f(x):
    send(b'{"value": {"callback": 0}}')
    send(b'{"value": {"object": -1}}')
    send(b'{"value": {"builtin": "__import__"}}')
    return 0""",
    "call what was never passed": """
import os
def f(x):
    body = b'{"callback": 0, "args": [730281946]}'
    os.write(4, len(body).to_bytes(4, 'big') + body)
    return 0""",
    "announce a huge message": "import os\ndef f(x): os.write(4, b'\\xff' * 64)",
    "send what is no JSON": "import os\ndef f(x): os.write(4, b'\\0\\0\\0\\4nope')",
    "nest a message deeply": """
import os
def f(x):
    body = b'{"value": ' + b'[' * 200000 + b']' * 200000 + b'}'
    os.write(4, len(body).to_bytes(4, 'big') + body)""",
    "send a number of a million digits": """
import os
def f(x):
    body = b'{"value": ' + b'7' * 1000000 + b'}'
    os.write(4, len(body).to_bytes(4, 'big') + body)""",
    "close the channel": "import os\nos.closerange(3, 64)\ndef f(x): return 0",
    "change the argument": "def f(x):\n    x.clear()\n    return []",
    "change the argument to the answer": "def f(x):\n    x[:] = [730281945]\n    return x",
    "return a generator without end": "def f(x):\n    while True: yield 1",
    "return a large value": """
sizes = [40_000_000]
def f(x): return 'x' * (sizes.pop() if sizes else 0)""",
    "return a list that holds itself": "def f(x):\n    x = []\n    x.append(x)\n    return x",
    "return a deep list": "def f(x):\n    x = []\n    for _ in range(10**4): x = [x]\n    return x",
    "return what cannot be copied": "import threading\ndef f(x): return threading.Lock()",
    "return itself": "def f(x): return f",
    "return not a number": "def f(x): return float('nan')",
    "return a true thing": "def f(x): return True",
    "return a class": "def f(x): return object",
    "fail to import": "def f(x): raise ImportError('no module', name='x')",
    "import what is not there": "def f(x): import not_there",
    "recurse without end": "def f(x): return f(x)",
    "act at exit": """
import atexit, os
atexit.register(os.write, 1, b'passed')
class D:
    def __del__(self): os._exit(0)
d = D()
def f(x): return 0""",
    "answer from a thread": """
import os, threading
def work():
    while True:
        os.write(4, b'\\0\\0\\0\\x0f{"value": true}')
threading.Thread(target=work, daemon=True).start()
def f(x): return False""",
    "hook imports": """
import sys
class Hook:
    def find_spec(self, *a): raise SystemExit(0)
sys.meta_path.insert(0, Hook())
def f(x):
    import secrets
    return 0""",
    "trace the interpreter": """
import sys
def trace(frame, event, value):
    if event == 'return': frame.f_locals['reply'] = {'value': 730281945}
    return trace
sys.setprofile(trace)
def f(x): return 0""",
    "signal the checker": """
import os
for pid in range(1, 10):
    try: os.kill(pid, 9)
    except OSError: pass
def f(x): return 0""",
}  # fmt: skip
SLOW_SOLUTIONS = {
    "never return": "def f(x):\n    while True: pass",
    "never start": "while True: pass",
    "never answer": "import os, time\ndef f(x):\n    os.close(4)\n    time.sleep(60)",
}


def run_programs(mechanism: str, context: dict, programs: dict[str, str]) -> dict[str, dict]:
    """Run programs in a sandbox; return each one's outcome, ``right`` if its attack succeeded."""
    outcomes = {}
    for name, attack in programs.items():
        expected = context["expected"] if "hidden" in attack else ESCAPED
        told = context | {"expected": ESCAPED}
        code = PRELUDE.format(context=told) + attack
        limits = LIMITS._replace(seconds=0.8) if name in SLOW_PROGRAMS else LIMITS
        start = time.monotonic()
        outcome = runs.judge_program(
            mechanism, code, ["question\n"], [expected], limits, True, 10.0
        )
        outcomes[name] = outcome | {"seconds": time.monotonic() - start}
    return outcomes


def run_as_cells(mechanism: str, context: dict, programs: dict[str, str]) -> dict[str, dict]:
    """As a model's calls of the tool ``python``, each in a session of its own: ``right`` if the
    model would read what it is after."""
    outcomes = {}
    for name, attack in programs.items():
        expected = context["expected"] if "hidden" in attack else ESCAPED
        session = [PRELUDE.format(context=context | {"expected": ESCAPED}), attack]
        limits = LIMITS._replace(seconds=0.8) if name in SLOW_PROGRAMS else LIMITS
        start = time.monotonic()
        reply = cells.run_in_worker(mechanism, session, list(limits))
        late = "out of time" in reply["output"]
        status = "right" if reply["output"] == expected else "timed_out" if late else "wrong"
        outcomes[name] = {"status": status, "seconds": time.monotonic() - start}
    return outcomes


def run_solutions(mechanism: str, solutions: dict[str, str]) -> dict[str, dict]:
    """Judge solutions by every assert of ``FUNCTION_TESTS`` on its own; return the outcomes."""
    outcomes = {}
    tests = {"units": FUNCTION_TESTS, "entry_point": "f", "prompt": "", "in_place": False}
    for name, code in solutions.items():
        limits = LIMITS._replace(seconds=0.8) if name in SLOW_SOLUTIONS else LIMITS
        start = time.monotonic()
        outcome = runs.judge_function(mechanism, code, tests, len(FUNCTION_TESTS), limits, False)
        outcomes[name] = outcome | {"seconds": time.monotonic() - start}
    return outcomes


def is_running(pid: int) -> bool:
    """Say whether a process is there, and not a zombie that waits for somebody to ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def list_descendants(pid: int) -> list[int]:
    """Return the processes below a process, as /proc has them, zombies left out."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            parents[int(folder.name)] = int(fields[1])
    found, level = [], [pid]
    while level:
        level = [child for child, parent in parents.items() if parent in level]
        found += level
    return found


def count_descendants(pid: int) -> int:
    return len(list_descendants(pid))


def run_all(
    mechanism: str, context: dict, programs: dict, solutions: dict, run: Callable = run_programs
) -> dict:
    """Run the attacks; return the outcomes, and how many processes were left running."""
    server = client.get_server(mechanism)
    base = count_descendants(server.process.pid)  # bubblewrap has processes of its own
    outcomes = {
        "programs": run(mechanism, context, programs),
        "solutions": run_solutions(mechanism, solutions),
    }
    deadline = time.monotonic() + 30
    while count_descendants(server.process.pid) > base and time.monotonic() < deadline:
        time.sleep(0.05)
    return outcomes | {"left": count_descendants(server.process.pid) - base}


if __name__ == "__main__":
    print(json.dumps(run_all(sys.argv[1], json.loads(sys.argv[2]), PROGRAMS, {})))
