"""The command line: what is asked for is looked up in COMMANDS (commands.py).

Every error that a user can put right is one line and exit code 2.
"""

import argparse
import os
import signal
import sys

from r1pipe import __version__
from r1pipe.commands import COMMANDS
from r1pipe.distributed import alone, has_launcher, speaks_first
from r1pipe.errors import GOES_ON, LOST, LostRank, UserError
from r1pipe.progress import Interrupt

FIRST_STEPS = """\
first steps:
  r1pipe doctor configs/demo.yaml   what would go wrong, of this machine and of the recipe
  r1pipe run configs/demo.yaml      the whole recipe: minutes on two cores, no GPU
  r1pipe report runs/demo           curves, cost and every rollout on one page
  r1pipe chat runs/demo             talk to what came out
  r1pipe verify runs/demo           is everything still as it was made?
  r1pipe publish runs/demo --repo user/name --dry-run

Each command has a --help with an example; README.md tells the rest."""
"""What `r1pipe` alone tells a newcomer. A test parses each line."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="r1pipe",
        description="The R1 recipe: cold start, GRPO on vLLM rollouts, distillation, evaluation.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=FIRST_STEPS,
    )
    parser.add_argument("--version", action="version", version=f"r1pipe {__version__}")
    parsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        sub = parsers.add_parser(
            name,
            help=command.help,
            description=command.help,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog=f"example:\n  {command.example}\n\nnext:\n  {command.then}",
        )
        for argument in command.arguments:
            sub.add_argument(*argument.names, **argument.settings)
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may come next
        import argcomplete

        argcomplete.autocomplete(parser)
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, Interrupt.handle)
    try:
        return COMMANDS[options.command].run(options) or 0
    except UserError as error:
        complain(str(error))
        return 2
    except LostRank as error:
        if not has_launcher():  # which knows more of what happened, and tells
            complain(f"{error}; {GOES_ON}")
        return LOST
    except KeyboardInterrupt:
        if Interrupt.signal_number == signal.SIGINT or alone():
            complain(f"interrupted; {GOES_ON}")
        # Otherwise torchrun ends this process because another one has failed, and has told.
        return 130


def complain(lines: str) -> None:
    """On stderr, once for all the processes of a run."""
    if speaks_first():
        for part in lines.splitlines():
            print(f"r1pipe: {part}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
