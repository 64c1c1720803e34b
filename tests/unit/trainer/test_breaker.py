"""The circuit breaker's checks by tables, and what it does when one trips."""

import csv
import json
import math
import re
from pathlib import Path

import pytest
from grpo_settings import make_grpo, make_on_policy_distill

from r1pipe.config.breaker import Limit
from r1pipe.config.checks import CHECKS, Facts
from r1pipe.config.recipe import Recipe
from r1pipe.rl.batch import Batch, Group, describe_batch
from r1pipe.runs.folder import RunFolder
from r1pipe.trainer.breaker import Breaker, EventLog
from r1pipe.types import Problem, Rollout, Score
from r1pipe.utils.errors import Tripped
from r1pipe.utils.jsonl import read_jsonl

ROOT = Path(__file__).parents[3]
NAN, INF = math.nan, math.inf


def mean_of(name: str, mean: float, stderr: float = 0.02, low: float = 0.0, high: float = 1.0):
    return {
        f"{name}/mean": mean,
        f"{name}/stderr": stderr,
        f"{name}/low": low,
        f"{name}/high": high,
    }


def total(mean: float, **others: float) -> Facts:
    return mean_of("reward", mean, **others)


def each(right: float, form: float) -> Facts:
    """Two reward functions, named so that the alphabet says nothing."""
    return mean_of("rewards/z", right) | mean_of("rewards/a", form)


# check: (facts now, facts of one step before or None, whether it trips at its own limit)
CASES = {
    "nonfinite_rewards": [
        ({"nonfinite_rewards": 0.0}, None, False),
        ({"nonfinite_rewards": 0.01}, None, True),
    ],
    "unjudged": [
        ({"reward_unjudged": 0.5}, None, False),
        ({"reward_unjudged": 0.51}, None, True),
    ],
    "truncated": [
        ({"completions/truncated": 0.4}, None, False),
        ({"completions/truncated": 0.6}, None, True),
    ],
    "staleness": [
        ({"staleness/mean": 8.0}, None, False),
        ({"staleness/mean": 8.5}, None, True),
        ({}, None, False),
    ],
    "identical_groups": [
        ({"identical_groups": 0.4}, None, False),
        ({"identical_groups": 1.0}, None, True),
    ],
    "same_completion": [
        ({}, None, False),  # too few prompts
        ({"same_completion": 0.5}, None, False),
        ({"same_completion": 1.0}, None, True),
    ],
    "reward_collapse": [
        (total(0.0), None, False),  # nothing before
        (total(0.5), total(0.5), False),
        (total(1.0), total(0.5), False),
        (total(0.3), total(0.5), False),
        (total(0.2), total(0.5), True),
        (total(0.0, stderr=0.0), total(0.5), True),
        (total(0.0, stderr=0.0), total(0.06, stderr=0.03), False),  # chance
        (total(0.0, stderr=0.0), total(0.06, stderr=0.005), True),
        (total(0.2, stderr=INF), total(0.5, stderr=INF), False),  # one prompt: who knows
        # Counted from the lowest reward, whatever its sign.
        (total(-0.3, low=-1.0), total(0.0, low=-1.0), False),
        (total(-0.7, low=-1.0), total(0.0, low=-1.0), True),
        (total(-0.9, low=-1.0, high=0.0), total(-0.5, low=-1.0, high=0.0), True),
        # Nothing was judged, now or before: another check's business.
        ({"reward_unjudged": 1.0}, total(0.5), False),
        (total(0.5), {"reward_unjudged": 1.0}, False),
    ],
    "reward_hacking": [
        (each(0.9, 0.5), None, False),
        (each(0.9, 0.5), each(0.5, 0.5), True),
        (each(0.5, 0.9), each(0.5, 0.5), True),
        (each(0.9, 0.3), each(0.5, 0.5), True),  # at the other's cost
        (each(0.7, 0.5), each(0.5, 0.5), False),  # by less
        (each(0.9, 0.7), each(0.5, 0.5), False),  # both
        (each(0.9, 1.0), each(0.5, 1.0), False),  # the other could not rise
        (each(0.5, 0.5), each(0.9, 0.5), False),
        (total(0.9) | mean_of("rewards/z", 0.9), total(0.5) | mean_of("rewards/z", 0.5), False),
        (
            mean_of("rewards/z", 0.9, stderr=0.2) | mean_of("rewards/a", 0.5),
            mean_of("rewards/z", 0.5, stderr=0.2) | mean_of("rewards/a", 0.5),
            False,  # chance
        ),
    ],
    "nonfinite": [
        ({"loss": 0.1, "grad_norm": 1e9}, None, False),
        ({"loss": NAN, "grad_norm": 1.0}, None, True),
        ({"loss": 0.1, "grad_norm": INF}, None, True),
        ({"entropy": NAN}, None, True),
        ({"loss": 0.1, "kl": INF}, None, True),
    ],
    "logprob_diff": [
        ({}, None, False),
        ({"sampler/logprob_diff_mean": 1e-5}, None, False),
        ({"sampler/logprob_diff_mean": 1e-3}, None, True),
        ({"sampler/logprob_diff_mean": NAN}, None, True),
    ],
    "kl": [({}, None, False), ({"kl": 0.5}, None, False), ({"kl": 2.0}, None, True)],
    "update_kl": [({"update_kl": 0.01}, None, False), ({"update_kl": 0.3}, None, True)],
    "entropy": [({"entropy": 0.01}, None, False), ({"entropy": 1e-4}, None, True)],
    "entropy_collapse": [
        ({"entropy": 0.001}, None, False),
        ({"entropy": 0.3}, {"entropy": 1.0}, False),
        ({"entropy": 0.05}, {"entropy": 1.0}, True),
        ({"entropy": 1e-4}, {"entropy": 0.01}, False),  # was as good as deterministic before
        ({}, {"entropy": 1.0}, False),
    ],
    "steps_in_vain": [
        ({}, None, False),
        ({"steps_in_vain": 0}, None, False),
        ({"steps_in_vain": 1}, None, True),
    ],
    "dead_experts": [
        ({}, None, False),  # a dense model
        ({"experts/dead": 0.25}, None, False),
        ({"experts/dead": 0.75}, None, True),
    ],
}


def test_every_check_has_cases_of_both_kinds() -> None:
    assert CASES.keys() == CHECKS.keys()
    for cases in CASES.values():
        assert {trips for _, _, trips in cases} == {True, False}


@pytest.mark.parametrize(
    ("name", "now", "before", "trips"),
    [(name, *case) for name, cases in CASES.items() for case in cases],
)
def test_check(name: str, now: Facts, before: Facts | None, trips: bool) -> None:
    check = CHECKS[name]
    value = check.measure(now, [before] * 3 if before else [])
    assert (value is not None and check.trips(value, check.limit)) == trips, value


def test_the_base_is_the_median_of_the_steps_before() -> None:
    past = [total(0.8), total(0.8), total(0.1)]
    assert CHECKS["reward_collapse"].measure(total(0.2), past) == pytest.approx(0.75)


def test_the_demo_trips_nothing() -> None:
    """Facts of three seeds of the demo: rewards from 0.5 to 1.1, entropy down to a fifth."""
    with Path(__file__).with_name("demo_steps.csv").open() as file:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert len(rows) == 3 * 16
    for number, row in enumerate(rows):
        first = number - int(row["step"]) + 1
        for name, check in CHECKS.items():
            value = check.measure(row, rows[max(first, number - 8) : number])
            assert value is None or not check.trips(value, check.limit), (name, row["step"], value)


def test_the_documentation_has_every_check() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| .* \| ([0-9.]+) \| (\w+) \|$",
        (ROOT / "docs/reliability.md").read_text(),
        re.M,
    )
    told = {name: (float(limit), action) for name, limit, action in rows}
    assert told == {name: (check.limit, check.action) for name, check in CHECKS.items()}


# --- Facts of a batch ---------------------------------------------------------------------------


def make_batch(
    step: int, groups: list[list[tuple[str, float | None]]], *, policy_step: int | None = None
) -> Batch:
    """Of (completion, reward) pairs, a list for each prompt."""
    made = []
    for number, pairs in enumerate(groups):
        problem = Problem(id=f"p{number}", kind="math", prompt=[], answer="1")
        rollouts = [
            Rollout(problem.id, i, [0], list(text.encode()), [], text, "stop")
            for i, (text, _) in enumerate(pairs)
        ]
        scores = [Score({"z": value}, value) for _, value in pairs]
        made.append(Group(problem, rollouts, scores))
    return Batch(step, step if policy_step is None else policy_step, made, [], 1, {"sample": 1.0})


def test_facts_of_a_batch() -> None:
    facts = describe_batch(
        make_batch(1, [[("a", 1.0), ("a", 0.0)], [("b", 1.0), ("a", None)]]).groups
    )
    for name in ("reward", "rewards/z"):
        assert facts[f"{name}/mean"] == pytest.approx(2 / 3)
        # Group means 1/2 and 1: their standard deviation over the root of 2.
        assert facts[f"{name}/stderr"] == pytest.approx(0.25)
        assert (facts[f"{name}/low"], facts[f"{name}/high"]) == (0.0, 1.0)
    assert facts["identical_groups"] == 0.5
    assert facts["nonfinite_rewards"] == 0.0
    assert "same_completion" not in facts, "of two prompts"
    alone = describe_batch(make_batch(1, [[("a", 1.0)], [("b", 1.0)]]).groups)
    assert "identical_groups" not in alone, "of one sample each"


def test_facts_of_a_batch_with_faults() -> None:
    facts = describe_batch(
        make_batch(1, [[("a", NAN), ("a", INF)]] + [[("a", None), ("b", 0.5)]] * 3).groups
    )
    assert facts["nonfinite_rewards"] == 2 / 8
    assert facts["same_completion"] == 5 / 8
    assert (facts["reward/mean"], facts["reward/low"], facts["reward/high"]) == (0.5, 0.5, 0.5)
    nothing = describe_batch(make_batch(1, [[("a", None), ("b", None)]]).groups)
    assert "reward/mean" not in nothing


# --- What happens then --------------------------------------------------------------------------

GOOD = [[("a", 1.0), ("b", 0.0)]] * 4
METRICS = {"reward_unjudged": 0.0, "completions/truncated": 0.0, "tokens_trained": 8}


def make_breaker(folder: Path, **breaker: object) -> Breaker:
    return Breaker(make_grpo(name="rl", breaker=breaker), EventLog(folder), folder)


def read_events(folder: Path) -> list[dict]:
    return [row for _, row in read_jsonl(folder / "events.jsonl")]


def take_step(
    breaker: Breaker, step: int, update: Facts | None = None, groups: list = GOOD, **metrics: float
) -> tuple[bool, bool]:
    """Whether the rollouts and the update were skipped."""
    batch = make_batch(step, groups)
    skipped = breaker.examine_batch(batch, {**METRICS, **metrics})
    update = {"loss": 0.1, "grad_norm": 1.0} if update is None else update
    update_skipped = breaker.examine_update(update)
    breaker.close_step({**METRICS, **update})
    return skipped, update_skipped


def test_a_good_step_leaves_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    breaker = make_breaker(tmp_path)
    for step in range(1, 20):
        assert take_step(breaker, step) == (False, False)
    assert read_events(tmp_path) == []
    assert capsys.readouterr().err == ""


def test_a_warning_is_told_once_and_written_each_time(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    breaker = make_breaker(tmp_path)
    cut = {"completions/truncated": 0.6}
    for step in (1, 2, 3):
        assert take_step(breaker, step, **cut) == (False, False)
    take_step(breaker, 4)
    take_step(breaker, 5, **cut)
    events = read_events(tmp_path)
    assert [event["step"] for event in events] == [1, 2, 3, 5]
    assert {"check": "truncated", "value": 0.6, "limit": 0.5, "action": "warn"}.items() <= (
        events[0].items()
    )
    assert events[0]["hint"]
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in lines] == [" rl, step 1", " rl, step 5"]
    assert "60% of the completions were cut" in lines[0]


def test_skip_says_so_and_ends_when_it_is_the_rule(tmp_path: Path) -> None:
    breaker = make_breaker(tmp_path, max_skips=2)
    broken = {"loss": NAN, "grad_norm": NAN}
    for step in (1, 2):
        assert take_step(breaker, step, broken) == (False, True)
    assert take_step(breaker, 3) == (False, False)
    for step in (4, 5):
        take_step(breaker, step, broken)
    with pytest.raises(Tripped, match=r"rl, step 6: .* 3 steps in a row .* nonfinite") as error:
        take_step(breaker, 6, broken)
    assert error.value.rollback
    assert breaker.first_suspect == 3, "its weights are those of steps 4 and 5"
    assert read_events(tmp_path)[0]["value"] == 2.0


def test_rollouts_can_be_skipped(tmp_path: Path) -> None:
    breaker = make_breaker(tmp_path, truncated={"limit": 0.1, "action": "skip"})
    assert take_step(breaker, 1, **{"completions/truncated": 0.2}) == (True, False)


@pytest.mark.parametrize("action", ["stop", "rollback"])
def test_the_end_is_one_line_that_says_where_to_look(action: str, tmp_path: Path) -> None:
    breaker = make_breaker(tmp_path, unjudged={"action": action}, truncated={"action": "stop"})
    with pytest.raises(Tripped) as error:
        take_step(breaker, 7, **{"reward_unjudged": 0.75, "completions/truncated": 0.9})
    line = str(error.value)
    assert line.startswith("rl, step 7: the rewards could not judge 75% of the rollouts")
    assert "breaker.unjudged 0.5" in line
    assert line.endswith(f"r1pipe rollouts {tmp_path} --step 7")
    assert "\n" not in line
    assert error.value.rollback == (action == "rollback")
    assert breaker.first_suspect == 6
    assert [event["check"] for event in read_events(tmp_path)] == ["unjudged", "truncated"]


IN_VAIN = [
    ({"tokens_trained": 0}, {}, True),
    ({"tokens_trained": 80, "groups_without_spread": 1.0}, {"beta": 0.1}, True),
    ({"tokens_trained": 80, "groups_without_spread": 0.9}, {}, False),
    ({"tokens_trained": 80}, {}, False),
    ({"tokens_trained": 0, "updates_skipped": 4}, {}, False),
]


@pytest.mark.parametrize(("metrics", "settings", "trips"), IN_VAIN)
def test_a_step_that_teaches_nothing_is_told(
    metrics: Facts, settings: dict, trips: bool, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """From the first one on, because a run may have no more; and they are counted in a row."""
    breaker = Breaker(make_grpo(name="rl", **settings), EventLog(tmp_path), tmp_path)
    for step in (1, 2):
        take_step(breaker, step, {"loss": 0.0, **metrics})
    assert [event["value"] for event in read_events(tmp_path)] == ([1, 2] if trips else [])
    assert capsys.readouterr().err.count("taught nothing") == trips
    take_step(breaker, 3)
    take_step(breaker, 4, {"loss": 0.0, **metrics})
    assert [event["value"] for event in read_events(tmp_path)][2:] == [1] * trips


def test_a_student_without_rewards_learns_all_the_same(tmp_path: Path) -> None:
    stage = make_on_policy_distill(name="rl", num_generations=1)
    breaker = Breaker(stage, EventLog(tmp_path), tmp_path)
    take_step(breaker, 1, {"loss": 0.1, "tokens_trained": 8, "groups_without_spread": 1.0})
    assert read_events(tmp_path) == []


def test_ignore(tmp_path: Path) -> None:
    breaker = make_breaker(tmp_path, unjudged={"action": "ignore"})
    assert take_step(breaker, 1, reward_unjudged=1.0) == (False, False)
    assert read_events(tmp_path) == []


def test_a_fall_is_held_against_the_window(tmp_path: Path) -> None:
    """Not before half of it is there, and after a resume as before."""
    breaker = make_breaker(tmp_path, window=4)
    bad = [[("a", 0.0), ("b", 0.0)]] * 4
    take_step(breaker, 1)
    take_step(breaker, 2, groups=bad)
    take_step(breaker, 3)
    take_step(breaker, 4)
    resumed = make_breaker(tmp_path, window=4)
    resumed.load_state_dict(json.loads(json.dumps(breaker.state_dict())))
    for one in (breaker, resumed):
        with pytest.raises(Tripped, match=r"rl, step 5: .*lost 100%"):
            take_step(one, 5, groups=bad)


def test_what_ended_the_run_stays_on_resume(tmp_path: Path) -> None:
    log = EventLog(tmp_path)
    log.write({"step": 1, "action": "warn"})
    position = log.position()
    log.write({"step": 2, "action": "warn"}, {"step": 2, "action": "rollback"})
    log.cut(position)
    log.write({"step": 2, "action": "skip"})
    kept = [(event["step"], event["action"]) for event in read_events(tmp_path)]
    assert kept == [(1, "warn"), (2, "rollback"), (2, "skip")]


def test_a_stale_sampler_is_no_fault(tmp_path: Path) -> None:
    breaker = make_breaker(tmp_path)
    apart = {"sampler/logprob_diff_mean": 0.1, "entropy": 1.0}
    breaker.examine_batch(make_batch(2, GOOD, policy_step=1), METRICS)
    assert not breaker.examine_update(apart)
    with pytest.raises(Tripped, match="disagree"):
        breaker.examine_sync(0.1, 2)
    breaker.examine_batch(make_batch(3, GOOD), METRICS)
    with pytest.raises(Tripped, match="disagree"):
        breaker.examine_update(apart)


@pytest.mark.parametrize("fp8", ["rollouts", "update", "both"])
def test_rounding_is_no_fault(fp8: str, tmp_path: Path) -> None:
    """Of one side: the probe after a sync, with the same on both, is held to the limit."""
    breaker = Breaker(make_grpo(name="rl", fp8=fp8), EventLog(tmp_path), tmp_path)
    breaker.examine_batch(make_batch(2, GOOD), METRICS)
    assert not breaker.examine_update({"sampler/logprob_diff_mean": 0.01, "entropy": 1.0})
    with pytest.raises(Tripped, match="disagree"):
        breaker.examine_sync(0.01, 2)


def test_a_stale_batch_is_held_to_the_policy_that_sampled_it(tmp_path: Path) -> None:
    """However far the one that trains on it has come since."""
    breaker = make_breaker(tmp_path)
    apart = {"sampler/logprob_diff_mean": 0.1, "entropy": 1.0}
    batch = make_batch(2, GOOD, policy_step=1)
    batch.logprob_diff = 1e-6
    breaker.examine_batch(batch, METRICS)
    assert not breaker.examine_update(apart)
    for wrong in (0.01, float("nan")):
        batch.logprob_diff = wrong
        breaker.examine_batch(batch, METRICS)
        with pytest.raises(Tripped, match="disagree"):
            breaker.examine_update(apart)


def test_a_run_can_resume_with_other_limits(tmp_path: Path) -> None:
    one, other = (
        Recipe(name="x", stages=[make_grpo(**changes)])
        for changes in ({}, {"breaker": {"truncated": {"limit": 0.9}}})
    )
    folders = [RunFolder(recipe) for recipe in (one, other)]
    assert folders[0].settings(one.stages[0]) == folders[1].settings(other.stages[0])


def test_what_a_recipe_leaves_out_is_the_checks_own() -> None:
    stage = make_grpo(breaker={"logprob_diff": {"limit": 0.05}, "truncated": {"action": "stop"}})
    assert stage.breaker.logprob_diff == Limit(limit=0.05, action="stop")
    assert stage.breaker.truncated == Limit(limit=0.5, action="stop")


def test_what_is_seen_too_late_cannot_be_skipped() -> None:
    with pytest.raises(ValueError, match="cannot be skipped"):
        make_grpo(breaker={"dead_experts": {"action": "skip"}})
