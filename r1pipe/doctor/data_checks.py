"""Checks of a stage's rewards, loss, data and gold answers."""

from collections.abc import Iterator, Sequence

from r1pipe.config.base import ProblemSet, Stage
from r1pipe.config.rl import Grpo, OnPolicyDistill
from r1pipe.doctor.golds import pick_judging, spread, try_golds, try_rewards
from r1pipe.doctor.inputs import Inputs, describe_source
from r1pipe.doctor.machine import Diagnosis
from r1pipe.envs.base import check_environment
from r1pipe.rl.distill_update import find_value
from r1pipe.rl.losses import find_loss
from r1pipe.rollout.scoring import Scorer, name_rewards
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError


def examine_functions(stage: Stage, inputs: Inputs) -> Iterator[Diagnosis]:
    Scorer(stage.rewards_used())
    if isinstance(stage, Grpo):
        find_loss(stage.loss_type)
    if environment := stage.environment_used():
        for _, problems in inputs.load_problems(stage):
            check_environment(environment, problems[0])
        yield Diagnosis("", "ok", f"environment {environment.name}")
    for remark in stage.remarks():
        yield Diagnosis("", "warn", remark)
    if names := name_rewards(stage.rewards_used()):
        yield Diagnosis("", "ok", ", ".join(names))
    for reward in stage.rewards_used():
        if reward.is_judge and "labelled" not in reward.options:
            yield Diagnosis(
                "",
                "warn",
                f"{reward.function}: nobody knows how far {reward.options['model']} agrees with "
                "people: give labelled, rows that they have graded",
            )


def examine_data(stage: Stage, inputs: Inputs) -> Iterator[Diagnosis]:
    for source in stage.problem_sets():
        try:
            loaded = inputs.load(source)
        except UserError as error:
            can_wait = not inputs.about_to_run and is_out_of_reach(error)
            yield Diagnosis("", "skipped" if can_wait else "FAIL", str(error))
            continue
        if loaded is None:
            yield Diagnosis("", "skipped", f'the stage "{source.stage}" has not run')
            continue
        check_solutions(stage, source, loaded.problems)
        trained = stage.training_sets()
        if source in trained and all(p.question in inputs.heldout for p in loaded.problems):
            status = "FAIL" if len(trained) == 1 else "warn"
            what = f"{describe_source(source)}: every problem is one of an eval stage, so left out"
            yield Diagnosis("", status, f"{what}: take another split, or other rows")
            continue
        filtered = len(loaded.problems) < loaded.num_rows
        of_rows = f" ({loaded.describe()})" if filtered else ""
        count = f"{describe_source(source)}: {len(loaded.problems)} problems{of_rows}"
        yield Diagnosis("", "ok", count)


def examine_teachers(stage: Stage, inputs: Inputs) -> Iterator[Diagnosis]:
    """Whether every row of a stage with several teachers has one."""
    if not (isinstance(stage, OnPolicyDistill) and stage.teachers):
        return
    counts = dict.fromkeys(stage.teachers, 0)
    for _, problems in inputs.load_problems(stage):
        for problem in problems:
            counts[find_value(stage, problem)] += 1
    if not any(counts.values()):
        yield Diagnosis("", "skipped", "there are no problems yet")
        return
    told = ", ".join(f"{value} {count}" for value, count in counts.items())
    yield Diagnosis("", "ok" if all(counts.values()) else "warn", f"problems of each: {told}")


def is_out_of_reach(error: BaseException | None) -> bool:
    """Whether the error's root is that the hub cannot be reached."""
    while error is not None and not isinstance(error, ConnectionError):
        error = error.__cause__
    return error is not None


def check_solutions(stage: Stage, source: ProblemSet, problems: Sequence[Problem]) -> None:
    """Raises UserError if the stage is to learn solutions that some problems lack, or to show more
    examples than there are."""
    missing = [problem for problem in problems if not problem.trace_text.strip()]
    if source in stage.learnt_sets() and missing:
        raise UserError(
            f"{describe_source(source)}: {len(missing)} of {len(problems)} problems have no "
            f'solution to train on, first "{missing[0].id}"; '
            + (
                "name the column of the traces as solution in options.columns"
                if source.recipe == "columns"
                else "make traces by a reject stage, or choose data with traces"
            )
        )
    few_shot = getattr(getattr(stage, "traces", None), "few_shot", None)
    if few_shot and source == few_shot.data:
        have = len(problems) - len(missing)
        if have < few_shot.num_examples:
            raise UserError(
                f"few_shot: {describe_source(source)} has {have} of {few_shot.num_examples} "
                "solutions"
            )


def find_rule_rows(stage: Stage, inputs: Inputs) -> Iterator[Diagnosis]:
    """A policy learns to please a judge; where the truth is known, that is not what is wanted."""
    for source, problems in inputs.load_problems(stage):
        if gold := [problem for problem in problems if problem.answer or problem.tests]:
            name = "answer" if gold[0].answer else "tests"
            yield Diagnosis(
                "rewards",
                "FAIL",
                f"{describe_source(source)}: a judge alone rewards what a rule can judge: "
                f'{len(gold)} problems have answer or tests, first "{gold[0].id}" ({name}); add '
                "rewards.math_correct, rewards.code_passes or a rule of your own",
            )


def examine_golds(stage: Stage, inputs: Inputs) -> Iterator[Diagnosis]:
    rewards = stage.rewards_used()
    try:
        judging = pick_judging(rewards)
    except UserError:  # `examine_functions` tells
        return
    try:
        for _, problems in inputs.load_problems(stage):
            try_rewards(rewards, problems[:2])
    except UserError as error:
        yield Diagnosis("rewards", "FAIL", str(error))
        return
    has_judge = any(reward.is_judge for reward in rewards)
    environment = stage.environment_used()
    rewards_itself = environment is not None and environment.name != "tools"
    if has_judge and not judging and not rewards_itself:
        yield from find_rule_rows(stage, inputs)
    settings = inputs.recipe.doctor
    for source, problems in inputs.load_problems(stage) if judging else ():
        name = describe_source(source)
        if has_judge:  # the other rows are for it
            problems = [problem for problem in problems if problem.answer or problem.tests]
        tried = spread(problems, None if inputs.thorough else settings.gold_rows)
        try:
            trial = try_golds(judging, tried)
        except UserError as error:
            yield Diagnosis("", "FAIL", f"{name}: {error}")
            continue
        counts = f"{trial.num_tried} of {len(problems)} golds of {name} tried"
        if not trial.num_tried:
            yield Diagnosis("", "skipped", f"{name}: no row has a gold to be tried")
        elif not trial.refused:
            yield Diagnosis("", "ok", f"{counts}, all score 1")
        else:
            problem, score = trial.refused[0]
            got = ", ".join(f"{name} {value}" for name, value in score.rewards.items())
            gold = repr(problem.answer or problem.trace_text)
            yield Diagnosis(
                "",
                "FAIL" if trial.share < settings.min_gold_share else "warn",
                f'{counts}: {1 - trial.share:.1%} do not score 1, first "{problem.id}": '
                f"{gold[:80]} gets {got}; correct the rows or the reward, or lower "
                "doctor.min_gold_share",
            )
