"""What each command does: reads its arguments, calls the module that does the work."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from r1pipe.config.base import Sampling
from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import Recipe
from r1pipe.utils.errors import UserError

if TYPE_CHECKING:
    from r1pipe.doctor.machine import Diagnosis


def read_recipe(options: argparse.Namespace) -> Recipe:
    return load_recipe(options.config, options.overrides)


def run_all(options: argparse.Namespace) -> None:
    recipe = read_recipe(options)
    from r1pipe.pipeline import run_recipe

    run_recipe(recipe, options.redo, options.skip_doctor)


def run_stage(options: argparse.Namespace) -> None:
    recipe = read_recipe(options)
    from r1pipe.pipeline import run_one

    run_one(recipe, options.command, options.redo, options.skip_doctor)


def run_on_policy(options: argparse.Namespace) -> None:
    if not options.replay:
        return run_stage(options)
    recipe = read_recipe(options)
    from r1pipe.pipeline import replay_stage

    source = find_folder(options.from_run) if options.from_run else None
    steps = parse_steps(options.replay)
    return replay_stage(recipe, options.command, options.stage, steps, source)


def run_eval(options: argparse.Namespace) -> None:
    if not options.checkpoints:
        return run_stage(options)
    recipe = read_recipe(options)
    from r1pipe.pipeline import evaluate_checkpoints

    return evaluate_checkpoints(recipe, options.checkpoints, options.redo, options.skip_doctor)


def diagnose(options: argparse.Namespace) -> int:
    """One line per check; 1 if any has failed."""
    from r1pipe.pipeline import silence_libraries

    recipe = read_recipe(options) if options.config else None
    silence_libraries()
    code = 0
    for diagnosis in list_diagnoses(recipe, options):
        print(diagnosis, flush=True)
        code |= diagnosis.status == "FAIL"
    return code


def list_diagnoses(recipe: Recipe | None, options: argparse.Namespace) -> Iterator["Diagnosis"]:
    from r1pipe.doctor.machine import examine_machine, examine_sandbox

    yield from examine_machine()
    if recipe is None:
        yield examine_sandbox()
        return
    # Later: this imports packages that the machine may lack, which is printed by now.
    from r1pipe.doctor.recipe import diagnose_recipe

    yield from diagnose_recipe(recipe, options.devices, options.quick, options.parity)


def verify(options: argparse.Namespace) -> int:
    """One line per unchanged stage or per finding; 1 if any finding is a problem."""
    from r1pipe.runs.lineage import find_run
    from r1pipe.runs.verify import verify_run

    code = 0
    for stage, findings in verify_run(find_run(options.run)):
        for finding in findings:
            print(f"{'FAIL' if finding.is_problem else 'skipped'}  {stage}: {finding.what}")
        if any(finding.is_problem for finding in findings):
            code = 1
        else:
            print(f"ok  {stage}")
    return code


def publish(options: argparse.Namespace) -> None:
    from r1pipe.publish.options import Options
    from r1pipe.publish.publish import publish

    publish(
        Options(
            target=options.target,
            repo_id=options.repo,
            public=options.public,
            dry_run=options.dry_run,
            force=options.force,
            max_overlap=options.max_overlap,
            licenses=split_pairs(options.license),
            base_models=split_pairs(options.base_model),
            rollouts=options.rollouts,
            gguf=options.gguf,
            adapter=options.adapter,
            collection=options.collection,
        )
    )


def show_cost(options: argparse.Namespace) -> None:
    from r1pipe.report.costs import describe_costs

    print(describe_costs(find_folder(options.run)))


def show_rollouts(options: argparse.Namespace) -> None:
    """A table of the kept steps, or some of a step's rollouts in full."""
    from r1pipe.report.rollouts import describe_step, describe_steps
    from r1pipe.rollout.store import find_rollouts

    folder = find_rollouts(find_folder(options.run), options.stage)
    if options.step is None:
        print(describe_steps(folder))
    else:
        for text in describe_step(folder, options.step, options.best, options.worst):
            print(text)


def report(options: argparse.Namespace) -> None:
    from r1pipe.report.html import watch, write_report

    run = find_folder(options.run)
    if options.watch:
        watch(run, options.out, options.watch)
    print(f"written: {write_report(run, options.out)}")


def compare(options: argparse.Namespace) -> None:
    from r1pipe.report.compare import compare_runs

    print(compare_runs(find_folder(options.a), find_folder(options.b), options.out))
    if options.out:
        print(f"\nwritten: {options.out}")


def serve(options: argparse.Namespace) -> None:
    from r1pipe.serve import serve

    serve(options.target, options.host, options.port, options.max_model_len, options.passed_on)


def chat(options: argparse.Namespace) -> None:
    from r1pipe.pipeline import silence_libraries

    silence_libraries()
    from r1pipe.serve import chat

    if options.top_p is None:
        options.top_p = 0.95 if options.temperature else 1.0
    try:
        sampling = Sampling(
            temperature=options.temperature,
            top_p=options.top_p,
            max_completion_length=options.max_completion_length,
        )
    except ValidationError as error:
        raise UserError(error.errors()[0]["msg"].removeprefix("Value error, ")) from error
    chat(options.target, options.max_model_len, sampling, show_thinking=options.thinking)


def import_gguf(options: argparse.Namespace) -> None:
    from r1pipe.models.gguf import import_gguf

    import_gguf(options.file, options.out)
    print(f"written: {options.out}")


def complete(options: argparse.Namespace) -> None:
    import argcomplete

    print(argcomplete.shellcode(["r1pipe"], shell=options.shell))


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
    """A run's folder by path or by its name in runs/; it may have no finished stage yet."""
    return next((f for f in (Path(run), Path("runs") / run) if f.is_dir()), Path(run))
