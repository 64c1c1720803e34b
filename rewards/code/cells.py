"""Cells of Python that build on each other, as in a notebook: for models that use Python as a tool.

Between cells there is no process: the earlier ones run again, silently. So a session costs nothing
while the model writes, and each run has the limits of one program in the sandbox. `random` has one
seed, that a variable is the same each time; what comes from the clock or the system is not.
"""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

from rewards.code.runs import run_program
from rewards.sandbox.choice import find_mechanism
from rewards.sandbox.client import Limits, SandboxError, get_server
from rewards.workers import pool

GRACE_S = 90.0  # for starting a fork-server; the sandbox keeps the clock of what it runs
LIMITS = Limits(output_bytes=1 << 16)

_HARNESS = """
import ast, contextlib, io, random, traceback

def run_cell(source, space):
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, '<cell>', 'exec'), space)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), '<cell>', 'eval'), space)
        if value is not None:
            print(repr(value))

random.seed(0)
space = {'__name__': '__main__'}
*earlier, newest = CELLS
with contextlib.redirect_stdout(io.StringIO()):
    for source in earlier:
        try:
            run_cell(source, space)
        except Exception:
            pass
try:
    run_cell(newest, space)
except Exception as error:
    print(''.join(traceback.format_exception_only(error)).strip())
"""


class CellResult(NamedTuple):
    """output: what the cell printed, then the value of its last expression, or the last line of a
    traceback. ended: it ran to its end or to an exception; otherwise it broke a limit, which
    ``output`` says, and would again: it should not be among the next cells."""

    output: str
    ended: bool


class Reply(TypedDict):
    output: str
    ended: bool


def run_cells(cells: Sequence[str], limits: Limits = LIMITS) -> CellResult:
    """Run the last cell with the variables of those before it.

    Raises ``rewards.SandboxError`` if no sandbox works here.
    """
    item = (find_mechanism(), list(cells), limits)
    (result,) = pool.run_task("rewards.code.cells:run_in_worker", [item], limits.seconds + GRACE_S)
    if result.status != pool.OK:
        raise SandboxError(f"a cell could not be run: {result.value or result.status}")
    return CellResult(**result.value)


def run_in_worker(mechanism: str, cells: list[str], limits: list[Any]) -> Reply:
    """The pool's task: JSON in, JSON out."""
    most = Limits(*limits)
    code = f"CELLS = {json.dumps(cells)}\n{_HARNESS}"
    ending = run_program(get_server(mechanism), code, "", most)
    output = ending.output.decode("utf-8", "replace")
    broken = ""
    if ending.timed_out:
        broken = f"error: out of time ({most.seconds:g} s)"
    elif ending.overflowed:
        broken = "error: too much output"
    elif ending.code != 0:
        broken = f"error: the process ended with {ending.code}"
    parts = [output[: most.output_bytes].rstrip("\n"), broken]
    return {"output": "\n".join(part for part in parts if part), "ended": not broken}
