"""The table of commands.

An entry has the help text, arguments, an example that a test parses, the next command, and a
handler. Handlers import what they need when they are called, so that the command line answers
without torch.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from r1pipe.cli.handlers import (
    chat,
    compare,
    complete,
    diagnose,
    import_gguf,
    publish,
    report,
    run_all,
    run_eval,
    run_on_policy,
    run_stage,
    serve,
    show_cost,
    show_rollouts,
    verify,
)
from r1pipe.config.recipe import STAGE_TYPES
from r1pipe.config.rl import OnPolicy

DEFAULT_CONFIG = "configs/demo.yaml"


@dataclass(frozen=True)
class Argument:
    """Arguments of argparse's add_argument."""

    names: tuple[str, ...]
    settings: dict[str, Any]


@dataclass(frozen=True)
class Command:
    help: str
    run: Callable[[argparse.Namespace], int | None]
    """Given the parsed arguments; returns the exit code, 0 for None."""
    arguments: tuple[Argument, ...]
    example: str
    then: str
    """The next command."""


def argument(*names: str, **settings: Any) -> Argument:
    return Argument(names, settings)


def number(kind: type, low: float, high: float = math.inf, above: bool = False) -> Callable:
    """A type of argparse: from `low`, or `above` it, to `high`."""

    def read(text: str) -> float:
        value = kind(text)
        if not low <= value <= high or (above and value == low):
            limits = f"{'above' if above else 'from'} {low:g}"
            limits += "" if high == math.inf else f" to {high:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    read.__name__ = kind.__name__  # "invalid int value"
    return read


# --- How they are called ------------------------------------------------------------------------


def recipe_arguments(default: str | None = DEFAULT_CONFIG) -> tuple[Argument, ...]:
    return (
        argument("config", nargs="?", default=default, metavar="CONFIG"),
        argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            dest="overrides",
            help="change a key of the recipe: seed=1, stages.grpo.max_steps=2",
        ),
    )


RUN = argument("run", metavar="RUN", help="its folder, or its name in runs/")
SKIP_DOCTOR = argument("--skip-doctor", action="store_true", help="start without the checks")
SERVED = (
    argument("target", metavar="RUN[/STAGE]", help="or a folder, or a hub id"),
    argument("--max-model-len", type=number(int, 1), metavar="TOKENS", help="context"),
)

REPLAY = (
    argument(
        "--replay",
        metavar="STEP[:STEP]",
        help="train on the rollouts that were kept of these steps, without a sampler",
    ),
    argument("--stage", help="with --replay: one of several such stages"),
    argument("--from-run", metavar="RUN", help="with --replay: the run that has sampled them"),
)


EVAL = (
    argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="STAGE|FOLDER|ID",
        dest="checkpoints",
        help="evaluate this instead of the recipe's checkpoints; may be given again",
    ),
    argument(
        "--compare",
        nargs=2,
        action="extend",
        metavar=("A", "B"),
        dest="checkpoints",
        help="evaluate these two, if that is not done, and give their difference",
    ),
)


def stage_command(kind: str) -> Command:
    """`r1pipe KIND`: runs the recipe's first unfinished stage of this kind."""
    stage = STAGE_TYPES[kind]
    run, more = run_stage, ()
    if stage.measures:
        run, more = run_eval, EVAL
    elif issubclass(stage, OnPolicy):
        run, more = run_on_policy, REPLAY
    redo = argument("--redo", action="store_true", help="make it again if it is finished")
    arguments = (*recipe_arguments(), redo, *more, SKIP_DOCTOR)
    example = stage.example or f"r1pipe {kind} {DEFAULT_CONFIG}"
    return Command(stage.help, run, arguments, example, stage.then)


COMMANDS: dict[str, Command] = {
    "run": Command(
        "run all stages of a recipe that are not finished",
        run_all,
        (
            *recipe_arguments(),
            argument("--redo", metavar="STAGE", help="make this stage and what follows again"),
            SKIP_DOCTOR,
        ),
        example="r1pipe run configs/demo.yaml --set seed=1 --set name=seed1",
        then="r1pipe report runs/seed1",
    ),
    **{kind: stage_command(kind) for kind in STAGE_TYPES},
    "doctor": Command(
        "check this machine, and a recipe: rewards, data, models, memory, disk; runs nothing",
        diagnose,
        (
            *recipe_arguments(default=None),
            argument(
                "--devices",
                metavar="8x80GB",
                help="that the recipe is to fit on; default: this machine's",
            ),
            argument(
                "--quick",
                action="store_true",
                help="only what takes seconds: what a run checks before it starts",
            ),
            argument(
                "--parity",
                action="store_true",
                help="compare sampler and trainer as well; starts an engine",
            ),
        ),
        example="r1pipe doctor configs/r1.yaml --devices 8x80GB --quick",
        then="r1pipe run configs/r1.yaml",
    ),
    "verify": Command(
        "check a run's files, data and code against the hashes of its lineage",
        verify,
        (RUN,),
        example="r1pipe verify runs/demo",
        then="r1pipe publish runs/demo --repo user/name --dry-run",
    ),
    "publish": Command(
        "publish a finished stage on the Hugging Face hub",
        publish,
        (
            argument("target", type=Path, metavar="RUN[/STAGE]"),
            argument("--repo", default="", metavar="USER/NAME"),
            argument("--public", action="store_true", help="default: private"),
            argument(
                "--dry-run",
                action="store_true",
                help="write the folder, show what would change, stop",
            ),
            argument(
                "--force",
                action="store_true",
                help="publish despite objections, which the card lists",
            ),
            argument(
                "--max-overlap",
                type=number(float, 0, 1),
                default=0.0,
                metavar="SHARE",
                help="of the held-out problems",
            ),
            argument(
                "--license",
                action="append",
                default=[],
                metavar="[SOURCE=]ID",
                help="of a base model or data whose license is not known; without SOURCE: the "
                "model's own",
            ),
            argument(
                "--base-model",
                action="append",
                default=[],
                metavar="FOLDER=HUB_ID",
                help="the hub's name of a base model that the recipe reads from a folder",
            ),
            argument("--rollouts", action="store_true", help="and the samples, as a dataset"),
            argument(
                "--gguf",
                nargs="?",
                const="Q8_0",
                type=str.upper,
                choices=("Q8_0", "F16", "F32"),
                metavar="TYPE",
                help="and a file for llama.cpp, of a dense model: Q8_0, or F16 or F32",
            ),
            argument(
                "--adapter",
                action="store_true",
                help="the adapter alone, for peft, instead of the merged model",
            ),
            argument("--collection", metavar="TITLE", help="add it to this collection"),
        ),
        example="r1pipe publish runs/demo/distill --repo user/name --dry-run",
        then="r1pipe publish runs/demo/distill --repo user/name",
    ),
    "cost": Command(
        "cost of a run, finished or running, by stage",
        show_cost,
        (RUN,),
        example="r1pipe cost runs/demo",
        then="r1pipe publish runs/demo --repo user/name --dry-run",
    ),
    "rollouts": Command(
        "print the rollouts that a stage trained on",
        show_rollouts,
        (
            RUN,
            argument("--stage", help="one of several such stages"),
            argument("--step", type=int, help="this step's; without, a line for each step"),
            *(
                argument(
                    f"--{end}",
                    type=number(int, 0),
                    nargs="?",
                    const=3,
                    metavar="N",
                    help=f"the {end} by reward, 3 or as many as given",
                )
                for end in ("best", "worst")
            ),
        ),
        example="r1pipe rollouts runs/demo --step 3 --worst",
        then="r1pipe grpo configs/demo.yaml --redo --set stages.grpo.max_steps=24",
    ),
    "report": Command(
        "write a run's report, one HTML file",
        report,
        (
            RUN,
            argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html"),
            argument(
                "--watch",
                type=number(float, 0, above=True),
                nargs="?",
                const=10.0,
                metavar="SECONDS",
                help="keep running and rewrite it as the run advances (default: every 10 seconds)",
            ),
        ),
        example="r1pipe report runs/demo --watch",
        then="r1pipe compare runs/demo runs/seed1",
    ),
    "compare": Command(
        "compare two runs: settings, curves, accuracy",
        compare,
        (
            argument("a", metavar="RUN_A"),
            argument("b", metavar="RUN_B"),
            argument("--out", type=Path, metavar="FILE", help="a page with the curves of both"),
        ),
        example="r1pipe compare runs/demo runs/seed1 --out compare.html",
        then="r1pipe eval configs/demo.yaml --compare sft grpo",
    ),
    "serve": Command(
        "serve a checkpoint with vLLM's OpenAI-compatible server; vLLM's own flags go after --",
        serve,
        (
            *SERVED,
            argument("--host", default="127.0.0.1"),
            argument("--port", type=number(int, 1, 65535), default=8000),
        ),
        example="r1pipe serve runs/demo/grpo --port 8000 -- --api-key secret",
        then="r1pipe chat runs/demo/grpo",
    ),
    "chat": Command(
        "chat with a checkpoint; or: echo QUESTION | r1pipe chat",
        chat,
        (
            *SERVED,
            argument("--temperature", type=number(float, 0), default=0.6),
            argument("--top-p", type=number(float, 0, 1, above=True), help="default: 0.95"),
            argument(
                "--max-completion-length", type=number(int, 1), default=4096, metavar="TOKENS"
            ),
            argument("--thinking", action="store_true", help="show it through a pipe, too"),
        ),
        example="r1pipe chat runs/demo/grpo --temperature 0.6",
        then="r1pipe publish runs/demo/grpo --repo user/name --dry-run",
    ),
    "import-gguf": Command(
        "turn a GGUF file into a checkpoint folder",
        import_gguf,
        (argument("file", type=Path, metavar="FILE"), argument("out", type=Path, metavar="OUT")),
        example="r1pipe import-gguf model.Q4_1.gguf models/mine",
        then="r1pipe run configs/gsm8k_smollm2.yaml --set stages.sft.from=models/mine",
    ),
    "completion": Command(
        "print a shell completion script",
        complete,
        (argument("shell", choices=("bash", "zsh", "fish"), metavar="bash|zsh|fish"),),
        example="r1pipe completion bash >> ~/.bashrc",
        then="r1pipe <TAB>, in a new shell",
    ),
}
