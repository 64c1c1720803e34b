"""The command line: parses arguments and calls the command in COMMANDS (commands.py).

Every error that a user can put right is one line and exit code 2.
"""

import argparse
import io
import os
import signal
import sys

from r1pipe import __version__, put_working_folder_last
from r1pipe.cli.commands import COMMANDS
from r1pipe.config.base import STAGE_TYPES
from r1pipe.utils.distributed import alone, has_launcher, speaks_first
from r1pipe.utils.errors import FULL, LOST, RESUME_HINT, LostRank, UserError, is_disk_full
from r1pipe.utils.progress import Interrupt

FIRST_STEPS = """\
first steps:
  r1pipe doctor configs/demo.yaml   check this machine and the recipe
  r1pipe run configs/demo.yaml      the whole recipe: minutes on two cores, no GPU
  r1pipe report runs/demo           curves, cost and every rollout on one page
  r1pipe chat runs/demo             talk to what came out
  r1pipe verify runs/demo           is everything still as it was made?
  r1pipe publish runs/demo --repo user/name --dry-run

Each command has a --help with an example; README.md has the rest."""
"""Printed by `r1pipe` without a command. A test parses each line."""


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
    put_working_folder_last()
    open_standard_streams()
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # the shell asks what may come next
        import argcomplete

        argcomplete.autocomplete(parser)
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["check"]:  # its name in older versions
        arguments = ["doctor", "--quick", *arguments[1:]]
    passed_on: list[str] = []
    if arguments[:1] == ["serve"] and "--" in arguments:
        place = arguments.index("--")
        arguments, passed_on = arguments[:place], arguments[place + 1 :]
    options, unknown = parser.parse_known_args(arguments)
    options.passed_on = passed_on
    if unknown:
        hint = "; vLLM's own flags go after --" if options.command == "serve" else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if options.command is None:
        parser.print_help()
        return 0
    handlers = {
        number: signal.signal(number, Interrupt.handle)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        code = COMMANDS[options.command].run(options) or 0
        sys.stdout.flush()
        return code
    except UserError as error:
        complain(str(error))
        return 2
    except BrokenPipeError:
        # The reader (`| head`) has closed the pipe: silent, as after a SIGPIPE.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except OSError as error:
        # A user's file or folder is missing, not permitted, or on a full or broken disk.
        complain(FULL if is_disk_full(error) else describe_os_error(error))
        return 2
    except LostRank as error:
        if not has_launcher():  # which prints the cause
            complain(f"{error}; {RESUME_HINT}")
        return LOST
    except KeyboardInterrupt:
        makes_a_run = options.command in ("run", *STAGE_TYPES)
        if makes_a_run and (Interrupt.signal_number == signal.SIGINT or alone()):
            complain(f"interrupted; {RESUME_HINT}")
        # Otherwise torchrun ends this process because another one has failed and printed why.
        return 130
    finally:
        # A signal during the interpreter's exit would raise within its finalizers.
        for number, handler in handlers.items():
            signal.signal(number, handler)


def open_standard_streams() -> None:
    """Replace closed streams by /dev/null: the next opened file would take their number. Escape
    characters that the terminal cannot show."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
            setattr(sys, name, os.fdopen(number, "w" if number else "r", encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and number:
            stream.reconfigure(errors="backslashreplace")


def describe_os_error(error: OSError) -> str:
    if error.filename is None:
        return " ".join(f"{type(error).__name__}: {error}".split())
    names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name)
    return f"{names}: {error.strerror}"


def complain(lines: str) -> None:
    """Print on stderr, once for all processes of a run."""
    if speaks_first():
        for part in lines.splitlines():
            print(f"r1pipe: {part}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
