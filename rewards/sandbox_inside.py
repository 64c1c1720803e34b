"""What runs inside the sandbox: a program, a candidate's functions, a test's checker, or the scorer
of a reasoning-gym task.

Each is a process of its own, forked by ``rewards.sandbox_server`` and already confined. A function
test takes two: the *candidate* holds the model's code, the *checker* the test's. The test calls
the candidate through stand-ins; arguments and results cross as plain data (``rewards.plain_data``).
So nothing that the model's code does in its own process, to ``assert``, to ``==``, to this module
or to the messages it sends, does more than choose the values that its functions return.

What is rewarded is only what the checker reports, on a pipe that the candidate does not have.
"""

import atexit
import contextlib
import json
import sys
import threading
import traceback

from rewards.code_candidate import serve_candidate
from rewards.code_checker import run_checker
from rewards.code_protocol import FDS, PAYLOAD_FD, make_module
from rewards.gym_scorer import score_answer

__all__ = ["FDS", "run"]


def run(kind: str) -> int:
    """Run the payload as what ``kind`` says; return the exit status."""
    with open(PAYLOAD_FD, encoding="utf-8", errors="surrogatepass") as file:
        payload = json.load(file)
    _open_standard_streams()
    runners = {
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


def run_program(code: str) -> int:
    """Run ``code`` as a script; return its exit status, as the interpreter would."""
    status = _run_main(code)
    with contextlib.suppress(BaseException):
        threading._shutdown()  # waits for the program's threads
    with contextlib.suppress(BaseException):
        atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BaseException:
        return status or 120
    return status


def _run_main(code: str) -> int:
    namespace = make_module("__main__")
    try:
        exec(compile(code, "<program>", "exec", dont_inherit=True), namespace)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        return 1
    except BaseException:
        with contextlib.suppress(BaseException):
            traceback.print_exc()
        return 1
    return 0
