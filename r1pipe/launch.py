"""Starts one command as several processes: torchrun, whose report of a failure becomes one line.

    python -m r1pipe.launch --nproc-per-node 2 grpo configs/demo.yaml

and on each of several nodes, with torchrun's own options before the command:

    python -m r1pipe.launch --nnodes 2 --nproc-per-node 8 --rdzv-id 1 --rdzv-backend c10d \\
        --rdzv-endpoint node0:29500 run configs/qwen3_30b_a3b.yaml

Plain `torchrun OPTIONS -m r1pipe COMMAND` does the same and reports more.
"""

import logging
import os
import signal
import sys

from r1pipe import put_working_folder_last

if __name__ == "__main__":
    put_working_folder_last()

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.run import get_args_parser, run

from r1pipe.config.recipe import STAGE_TYPES
from r1pipe.utils.distributed import LAUNCHER
from r1pipe.utils.errors import HUNG, LOST, RESUME_HINT
from r1pipe.utils.threads import available_cores


def main(arguments: list[str] | None = None) -> int:
    """Exits as the command does that failed first: 2 for what a user can put right."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"run", *STAGE_TYPES}
    start = next((i for i, word in enumerate(arguments) if word in commands), None)
    if start is None:
        print(f"r1pipe: no command; there are {', '.join(sorted(commands))}", file=sys.stderr)
        return 2
    options = arguments[:start]
    if not any(option.startswith(("--nnodes", "--rdzv", "--standalone")) for option in options):
        options = [*options, "--standalone"]
    parsed = get_args_parser().parse_args([*options, "-m", "r1pipe", *arguments[start:]])
    # torchrun would give every process one thread.
    if parsed.nproc_per_node.isdigit():
        threads = max(1, available_cores() // int(parsed.nproc_per_node))
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    os.environ[LAUNCHER] = "1"
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        run(parsed)
    except ChildFailedError as error:
        return explain(error.failures)
    except SignalException as error:
        if error.sigval != signal.SIGINT:  # which the ranks have got themselves, and told
            print(f"r1pipe: interrupted; {RESUME_HINT}", file=sys.stderr)
        return 130
    return 0


def explain(failures: dict[int, ProcessFailure]) -> int:
    """Say which rank brought the others down, unless it has said so; the exit code to use."""
    rank, cause = min(
        failures.items(), key=lambda item: (rank_cause(item[1].exitcode), item[1].timestamp)
    )
    if cause.exitcode == -signal.SIGALRM:
        return HUNG  # its guardian has told; see watchdog.py
    if cause.exitcode < 0:
        name = signal.Signals(-cause.exitcode).name
        why = f"{name}; out of memory?" if name == "SIGKILL" else name
        print(
            f"r1pipe: rank {rank} was killed ({why}) and the others were ended; {RESUME_HINT}",
            file=sys.stderr,
        )
        return 1
    if cause.exitcode == LOST:
        print(f"r1pipe: rank {rank} lost a rank of another machine; {RESUME_HINT}", file=sys.stderr)
        return 1
    return cause.exitcode


def rank_cause(code: int) -> int:
    """How likely a process with this exit code failed by itself, and not because another did: the
    smaller the likelier."""
    if code in (-signal.SIGTERM, 130, LOST):
        return 3
    if code == -signal.SIGABRT:
        # Also how a process ends whose communication threads were running when it gave up.
        return 2
    return 0 if code < 0 else 1


if __name__ == "__main__":
    sys.exit(main())
