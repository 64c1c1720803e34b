"""What runs inside the sandbox: a program, a candidate's functions, a test's checker, or the scorer
of a reasoning-gym task.

Each is a process of its own, forked by ``rewards.sandbox.server`` and already confined. A function
test takes two: the *candidate* holds the model's code, the *checker* the test's. The test calls
the candidate through stand-ins; arguments and results cross as plain data
(``rewards.sandbox.inside.plain_data``). So nothing that the model's code does in its own process,
to ``assert``, to ``==``, to this module or to the messages it sends, does more than choose the
values that its functions return.

What is rewarded is only what the checker reports, on a pipe that the candidate does not have.
"""

import atexit
import builtins
import contextlib
import functools
import gc
import io
import json
import os
import resource
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from rewards.sandbox.inside.candidate import serve_candidate
from rewards.sandbox.inside.checker import run_checker
from rewards.sandbox.inside.gym_scorer import score_answer
from rewards.sandbox.inside.protocol import FDS, PAYLOAD_FD, make_module

__all__ = ["FDS", "run"]

PROGRAM = "solution.py"
# There is no /proc, to which these names lead elsewhere.
_STANDARD_FILES = {
    name: fd
    for fd, stream in enumerate(("stdin", "stdout", "stderr"))
    for name in (f"/dev/{stream}", f"/dev/fd/{fd}", f"/proc/self/fd/{fd}")
}
_PATHS = (str, os.PathLike)


def run(kind: str) -> int:
    """Run the payload as what ``kind`` says; return the exit status."""
    with open(PAYLOAD_FD, encoding="utf-8", errors="surrogatepass") as file:
        payload = json.load(file)
    _open_standard_streams()
    sys.argv, sys.orig_argv = [PROGRAM], ["python", PROGRAM]
    if kind != "scorer":
        sys.set_int_max_str_digits(0)  # time is limited anyway
        _limit_thread_stacks()
    runners: dict[str, Callable[..., int]] = {
        "program": run_program,
        "candidate": serve_candidate,
        "checker": run_checker,
        "scorer": score_answer,
    }
    return runners[kind](**payload)


def _open_standard_streams() -> None:
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        errors = "surrogateescape" if fd < 2 else "backslashreplace"
        stream = open(fd, mode, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _limit_thread_stacks() -> None:
    """Let programs ask for stacks of any size, as they do for deep recursion; half is enough."""
    set_size, default = threading.stack_size, threading.stack_size()
    set_size(default)
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]

    def stack_size(size: int = 0) -> int:
        return set_size((size if limit < 0 else min(size, limit // 2)) or default)

    threading.stack_size = stack_size


def _open_standard_files() -> None:
    """Let programs open their standard streams by name."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def opened(file: Any, *args: object, **kwargs: object) -> object:
            fd = _STANDARD_FILES.get(os.fspath(file)) if isinstance(file, _PATHS) else None
            if fd is None:
                return function(file, *args, **kwargs)
            copy = os.dup(fd)
            return copy if function is os_open else function(copy, *args, **kwargs)

        return opened

    os_open = os.open
    builtins.open = io.open = wrap(open)
    os.open = wrap(os_open)


def run_program(code: str) -> int:
    """Run ``code`` as a script; return its exit status, as the interpreter would."""
    _open_standard_files()
    namespace = make_module("__main__")
    namespace["__file__"] = os.path.join(os.getcwd(), PROGRAM)
    status = _run_main(code, namespace)
    with contextlib.suppress(BaseException):
        threading._shutdown()  # type: ignore[attr-defined]  # waits for the program's threads
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    has_written = _flush(sys.stdout)
    sys.stdout = sys.__stdout__
    # Finalize what is left; files and __del__ may still write.
    for name in [n for n in namespace if n != "__builtins__"]:
        namespace[name] = None
    gc.collect()
    return status if _flush(sys.stdout) and has_written else status or 120


def _flush(stream: Any) -> bool:
    try:
        if not stream.closed:
            stream.flush()
    except AttributeError:  # the program replaced it
        return True
    except BaseException:
        return False
    return True


def _run_main(code: str, namespace: dict[str, Any]) -> int:
    try:
        exec(compile(code, PROGRAM, "exec", dont_inherit=True), namespace)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        return 1
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
        return 1
    return 0
