"""The commands, nothing else. Every error that a user can put right is one line and exit code 2."""

import argparse
import os
import signal
import sys
from pathlib import Path

from r1pipe import __version__
from r1pipe.config import STAGE_TYPES, Sampling, load_recipe
from r1pipe.distributed import alone, has_launcher, speaks_first
from r1pipe.errors import GOES_ON, LOST, LostRank, UserError
from r1pipe.guide import add_examples
from r1pipe.progress import Interrupt

DEFAULT_CONFIG = "configs/demo.yaml"
STAGE_HELP = {
    "init": "make a policy from random weights",
    "sft": "cold start: supervised training on written-out reasoning",
    "grpo": "reinforcement learning",
    "reject": "sample traces for a later sft stage",
    "distill": "teach a dense student",
    "eval": "measure checkpoints on held-out problems",
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="r1pipe",
        description="The R1 recipe: cold start, GRPO on vLLM rollouts, distillation, evaluation.",
    )
    parser.add_argument("--version", action="version", version=f"r1pipe {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def add(name: str, help_text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("config", nargs="?", default=DEFAULT_CONFIG, metavar="CONFIG")
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            dest="overrides",
            help="change a key of the recipe: seed=1, stages.grpo.max_steps=2",
        )
        return command

    def add_skip(command: argparse.ArgumentParser) -> None:
        command.add_argument(
            "--skip-doctor", action="store_true", help="begin without looking for what would fail"
        )

    run = add("run", "run all stages of a recipe that are not finished")
    run.add_argument("--redo", metavar="STAGE", help="make this stage and what follows again")
    add_skip(run)
    for kind in STAGE_TYPES:
        command = add(kind, STAGE_HELP[kind])
        command.add_argument("--redo", action="store_true", help="make it again if it is finished")
        if kind == "eval":
            add_eval_options(command)
        if kind == "grpo":
            add_replay_options(command)
        add_skip(command)
    check = add("check", "read a recipe and its data, say whether it fits, and run nothing")
    check.add_argument(
        "--devices", metavar="8x80GB", help="that the recipe is to fit on; default: this machine's"
    )

    doctor = add("doctor", "look for what would go wrong, of this machine and of a recipe")
    doctor.set_defaults(config=None)
    doctor.add_argument("--devices", metavar="8x80GB", help="that the recipe is to fit on")
    doctor.add_argument(
        "--parity", action="store_true", help="compare sampler and trainer as well; takes an engine"
    )
    verify = commands.add_parser(
        "verify", help="compute the hashes of a run's lineage again: is everything as it was?"
    )
    verify.add_argument("run", metavar="RUN", help="its folder, or its name in runs/")
    add_publish(commands)

    cost = commands.add_parser("cost", help="what a run has cost, stage by stage, or costs so far")
    cost.add_argument("run", metavar="RUN", help="its folder, or its name in runs/")

    rollouts = commands.add_parser("rollouts", help="read what a run's grpo stage has sampled")
    rollouts.add_argument("run", metavar="RUN", help="its folder, or its name in runs/")
    rollouts.add_argument("--stage", help="one of several grpo stages")
    rollouts.add_argument("--step", type=int, help="this step's; without, a line for each step")
    for end in ("best", "worst"):
        help_text = f"the {end} by reward, 3 or as many as given"
        rollouts.add_argument(f"--{end}", type=int, nargs="?", const=3, metavar="N", help=help_text)
    report = commands.add_parser("report", help="write a run's report: one HTML file to look at it")
    report.add_argument("run", metavar="RUN", help="its folder, or its name in runs/")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: RUN/report.html")
    report.add_argument(
        "--watch",
        type=float,
        nargs="?",
        const=10.0,
        metavar="SECONDS",
        help="go on, and write it again when the run has gone on (looks every 10 seconds)",
    )

    compare = commands.add_parser("compare", help="two runs: settings, curves, accuracy")
    compare.add_argument("a", metavar="RUN_A")
    compare.add_argument("b", metavar="RUN_B")
    compare.add_argument("--out", type=Path, metavar="FILE", help="a page with the curves of both")
    add_serving(commands)

    gguf = commands.add_parser("import-gguf", help="turn a GGUF file into a checkpoint folder")
    gguf.add_argument("file", type=Path, metavar="FILE")
    gguf.add_argument("out", type=Path, metavar="OUT")

    completion = commands.add_parser("completion", help="print a script that completes by TAB")
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="bash|zsh|fish")
    add_examples(parser)
    return parser


def add_replay_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--replay",
        metavar="STEP[:STEP]",
        help="train on the rollouts that were kept of these steps, without a sampler",
    )
    command.add_argument("--stage", help="with --replay: one of several grpo stages")
    command.add_argument(
        "--from-run", metavar="RUN", help="with --replay: the run that has sampled them"
    )


def add_serving(commands: argparse._SubParsersAction) -> None:
    serve = commands.add_parser("serve", help="vLLM's OpenAI-compatible server for a stage")
    chat = commands.add_parser("chat", help="talk to a stage here; or: echo QUESTION | r1pipe chat")
    for command in (serve, chat):
        command.add_argument("target", metavar="RUN[/STAGE]", help="or a folder, or a hub id")
        command.add_argument("--max-model-len", type=int, metavar="TOKENS", help="context")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    chat.add_argument("--temperature", type=float, default=0.6)
    chat.add_argument("--top-p", type=float, default=0.95)
    chat.add_argument("--max-completion-length", type=int, default=4096, metavar="TOKENS")
    chat.add_argument("--thinking", action="store_true", help="show it through a pipe, too")


def add_eval_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        action="append",
        default=[],
        metavar="STAGE|FOLDER|ID",
        dest="checkpoints",
        help="evaluate this instead of the recipe's checkpoints; may be given again",
    )
    command.add_argument(
        "--compare",
        nargs=2,
        action="extend",
        metavar=("A", "B"),
        dest="checkpoints",
        help="evaluate these two, if that is not done, and give their difference",
    )


def add_publish(commands: argparse._SubParsersAction) -> None:
    publish = commands.add_parser("publish", help="put a finished stage on the Hugging Face hub")
    publish.add_argument("target", type=Path, metavar="RUN[/STAGE]")
    publish.add_argument("--repo", default="", metavar="USER/NAME")
    publish.add_argument("--public", action="store_true", help="default: private")
    publish.add_argument(
        "--dry-run", action="store_true", help="write the folder, show what would change, stop"
    )
    publish.add_argument(
        "--force",
        action="store_true",
        help="in spite of objections, which the card then names",
    )
    publish.add_argument(
        "--max-overlap", type=float, default=0.0, metavar="SHARE", help="of the held-out problems"
    )
    publish.add_argument(
        "--license",
        action="append",
        default=[],
        metavar="[SOURCE=]ID",
        help="of a base model or data whose licence is not known; without SOURCE: the model's own",
    )
    publish.add_argument(
        "--base-model",
        action="append",
        default=[],
        metavar="FOLDER=HUB_ID",
        help="the hub's name of a base model that the recipe reads from a folder",
    )
    publish.add_argument("--rollouts", action="store_true", help="and the samples, as a dataset")
    publish.add_argument("--collection", metavar="TITLE", help="add it to this collection")


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
        return run_command(options)
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


def run_command(options: argparse.Namespace) -> int:
    """Returns the exit code."""
    if options.command == "import-gguf":
        from r1pipe.models import import_gguf

        import_gguf(options.file, options.out)
        print(f"written: {options.out}")
        return 0
    if options.command == "completion":
        import argcomplete

        print(argcomplete.shellcode(["r1pipe"], shell=options.shell))
        return 0
    if options.command == "verify":
        return verify(options.run)
    if options.command == "publish":
        from r1pipe.publish import Options, publish

        publish(
            Options(
                target=options.target,
                repo_id=options.repo,
                public=options.public,
                dry_run=options.dry_run,
                force=options.force,
                max_overlap=options.max_overlap,
                licences=split_pairs(options.license),
                base_models=split_pairs(options.base_model),
                rollouts=options.rollouts,
                collection=options.collection,
            )
        )
        return 0
    if options.command == "doctor":
        return call_doctor(options)
    if options.command == "cost":
        return show_cost(options.run)
    if options.command == "rollouts":
        return show_rollouts(options)
    if options.command == "serve":
        from r1pipe.serve import serve

        serve(options.target, options.host, options.port, options.max_model_len)
    if options.command == "chat":
        return chat(options)
    if options.command == "compare":
        return compare(options)
    if options.command == "report":
        return report(options)
    recipe = load_recipe(options.config, options.overrides)
    if options.command == "check":
        from r1pipe.check import check_recipe

        for line in check_recipe(recipe, options.devices):
            print(line)
        return 0
    from r1pipe.pipeline import evaluate_checkpoints, replay_stage, run_one, run_recipe

    if options.command == "run":
        run_recipe(recipe, options.redo, options.skip_doctor)
    elif options.command == "eval" and options.checkpoints:
        evaluate_checkpoints(recipe, options.checkpoints, options.redo, options.skip_doctor)
    elif options.command == "grpo" and options.replay:
        source = find_folder(options.from_run) if options.from_run else None
        replay_stage(recipe, options.stage, parse_steps(options.replay), source)
    else:
        run_one(recipe, options.command, options.redo, options.skip_doctor)
    return 0


def call_doctor(options: argparse.Namespace) -> int:
    from r1pipe.doctor import diagnose
    from r1pipe.pipeline import silence_libraries

    silence_libraries()
    recipe = load_recipe(options.config, options.overrides) if options.config else None
    code = 0
    for diagnosis in diagnose(recipe, options.devices, options.parity):
        print(diagnosis, flush=True)
        code |= diagnosis.status == "FAIL"
    return code


def chat(options: argparse.Namespace) -> int:
    from r1pipe.serve import chat

    sampling = Sampling(
        temperature=options.temperature,
        top_p=options.top_p,
        max_completion_length=options.max_completion_length,
    )
    chat(options.target, options.max_model_len, sampling, show_thinking=options.thinking)
    return 0


def compare(options: argparse.Namespace) -> int:
    from r1pipe.compare import compare_runs

    print(compare_runs(find_folder(options.a), find_folder(options.b), options.out))
    if options.out:
        print(f"\nwritten: {options.out}")
    return 0


def report(options: argparse.Namespace) -> int:
    from r1pipe.report import watch, write_report

    run = find_folder(options.run)
    if options.watch:
        watch(run, options.out, options.watch)
    print(f"written: {write_report(run, options.out)}")
    return 0


def verify(name: str) -> int:
    """One line per stage that is as it was, or per thing that is not."""
    from r1pipe.lineage import find_run, verify_run

    code = 0
    for stage, findings in verify_run(find_run(name)):
        for finding in findings:
            print(f"{'FAIL' if finding.is_problem else 'skipped'}  {stage}: {finding.what}")
        if any(finding.is_problem for finding in findings):
            code = 1
        else:
            print(f"ok  {stage}")
    return code


def split_pairs(texts: list[str]) -> dict[str, str]:
    """SOURCE=VALUE by source; a VALUE alone under ""."""
    parts = (text.rpartition("=") for text in texts)
    return {source: value for source, _, value in parts}


def parse_steps(text: str) -> range:
    """ "12", or "1:16" with both ends."""
    first, colon, last = text.partition(":")
    numbers = [first, last if colon else first]
    if not all(number.isdigit() for number in numbers) or not 0 < int(first) <= int(numbers[1]):
        raise UserError(f"--replay {text}: give a step, such as 12, or a range, such as 1:16")
    return range(int(first), int(numbers[1]) + 1)


def find_folder(run: str) -> Path:
    """Of a run that may have no finished stage yet, by its path or by its name in runs/."""
    return next((f for f in (Path(run), Path("runs") / run) if f.is_dir()), Path(run))


def show_cost(name: str) -> int:
    from r1pipe.costs import describe_costs

    print(describe_costs(find_folder(name)))
    return 0


def show_rollouts(options: argparse.Namespace) -> int:
    """A table of the steps that are kept, or some of a step's rollouts in full."""
    from r1pipe.rollout_view import describe_step, describe_steps, find_rollouts

    folder = find_rollouts(find_folder(options.run), options.stage)
    if options.step is None:
        print(describe_steps(folder))
    else:
        for text in describe_step(folder, options.step, options.best, options.worst):
            print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
