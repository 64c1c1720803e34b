"""Traces through the command line, with real vLLM and a real server: filters, mix, resume."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from commands import read_lines, run, start, wait_for
from teacher_server import Answer, make_answer, teacher_server

from r1pipe.config.base import ProblemSet
from r1pipe.data.problems import load_problems

DATA = {"recipe": "arithmetic", "options": {"size": 30, "seed": 7}}
EXAMPLES = {"recipe": "arithmetic", "options": {"size": 5, "seed": 8}}
GENERAL = {"recipe": "arithmetic", "options": {"size": 60, "seed": 9}}
KEY = "sk-very-secret"


def write_recipe(tiny_recipe: Path, url: str, **traces: object) -> Path:
    """Untrained policy -> its own few-shot samples; a teacher's answers -> sft from the base."""
    values = yaml.safe_load(tiny_recipe.read_text())
    stages = {s.get("name", s["kind"]): s for s in values["stages"]}
    own = {
        "kind": "reject",
        "name": "own",
        "from": "random",
        "data": DATA,
        "traces": {
            "num_generations": 16,
            "max_per_problem": 2,
            "sampling": {"max_completion_length": 24},
            "rewards": [{"function": "reward_of_tests.accept_even_lengths"}],
            "few_shot": {"data": EXAMPLES, "num_examples": 1},
            **traces,
        },
        "mix": {"data": GENERAL, "share": 0.25},
    }
    taught = {
        "kind": "reject",
        "name": "taught",
        "teacher": {"base_url": url, "model": "big", "api_key_env": "TEACHER_KEY"},
        "data": DATA,
        "traces": {
            "num_generations": 2,
            "sampling": {"max_completion_length": 100},
            "filters": {"min_language_share": 0.9, "drop_code_blocks": True},
        },
    }
    stages["sft"] |= {"data": {"stage": "taught"}}
    stages["sft"]["train"] |= {"max_steps": 2, "per_device_train_batch_size": 4}
    values["engine"]["max_model_len"] = 256
    second = {**stages["eval"]["data"], "options": {"size": 6, "seed": 101}}
    sets = [stages["eval"]["data"], {**second, "name": "second", "num_samples": 3}]
    stages["eval"] |= {"checkpoints": ["random"], "data": sets}
    stages["eval"]["sampling"]["max_completion_length"] = 24
    values["stages"] = [stages["random"], own, stages["eval"], taught, stages["sft"]]
    values["name"] = "rejecting"
    path = tiny_recipe.with_name("rejecting.yaml")
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def answer_from_the_book() -> Callable[[int, dict], Answer]:
    """Every fourth answer wrong, every fourth with code in its reasoning, the others as written."""
    book = {p.question: p.solution for p in load_problems(ProblemSet(**DATA))}

    def answer(number: int, request: dict) -> Answer:
        solution = book[request["messages"][-1]["content"]]
        if number % 4 == 0:
            return make_answer("<think>\nNo idea.\n</think>\n\\boxed{-1}")
        if number % 4 == 1:
            return make_answer(solution.replace("</think>", "```\n1\n```\n</think>"))
        return make_answer(solution)

    return answer


@pytest.fixture(scope="module")
def rejected(tiny_recipe: Path) -> Iterator[tuple[Path, Path, str]]:
    """The recipe, the run's folder, and what the command said."""
    with teacher_server() as server, pytest.MonkeyPatch.context() as patch:
        server.answer = answer_from_the_book()
        patch.setenv("TEACHER_KEY", KEY)
        recipe = write_recipe(tiny_recipe, f"http://127.0.0.1:{server.server_port}/v1")
        result = run("run", recipe)
        assert result.returncode == 0, result.stderr[-3000:]
        yield recipe, recipe.parent / "runs" / "rejecting", result.stderr


def read_facts(folder: Path, stage: str) -> dict:
    return json.loads((folder / stage / "stage.json").read_text())


def count_ends(facts: dict) -> int:
    return sum(n for key, n in facts.items() if key.startswith("dropped/")) + facts["traces"]


def test_own_few_shot_samples_become_traces(rejected: tuple) -> None:
    _, folder, said = rejected
    facts = read_facts(folder, "own")
    traces = read_lines(folder / "own" / "traces.jsonl")
    own = [row for row in traces if "#" in row["id"]]
    assert facts["samples"] == 30 * 16 == count_ends(facts)
    assert 0 < facts["traces"] == len(own) <= 30 * 2
    assert facts["dropped/wrong"] + facts["dropped/truncated"] > 0
    assert f"own: 480 samples, {facts['dropped/truncated']} truncated" in said
    problems = {row["id"]: row for row in read_lines(folder / "own" / "problems.jsonl")}
    for row in own:
        # The examples were in the prompt that was sampled from, and are not in the trace.
        assert row["prompt"] == problems[row["id"].partition("#")[0]]["prompt"]
        assert len(row["prompt"]) == 1


def test_general_rows_are_a_quarter(rejected: tuple) -> None:
    _, folder, said = rejected
    traces = read_lines(folder / "own" / "traces.jsonl")
    mixed_in = read_facts(folder, "own")["mixed_in"]
    assert mixed_in == sum("-9-" in row["id"] for row in traces)
    assert mixed_in == round(read_facts(folder, "own")["traces"] / 3) > 0
    assert f"own: {mixed_in} rows of arithmetic/train mixed in" in said


def test_teacher_answers_become_the_cold_start(rejected: tuple) -> None:
    _, folder, _ = rejected
    facts = read_facts(folder, "taught")
    assert facts["samples"] == 60 == count_ends(facts)
    assert facts["dropped/wrong"] == facts["dropped/code_block"] == 15
    traces = read_lines(folder / "taught" / "traces.jsonl")
    assert all("```" not in row["solution"] and row["answer"] != "-1" for row in traces)
    trained_on = read_lines(folder / "sft" / "problems.jsonl")
    assert [row["id"] for row in trained_on] == [row["id"] for row in traces]
    for path in folder.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_two_sets_are_evaluated(rejected: tuple) -> None:
    _, folder, _ = rejected
    summary = json.loads((folder / "summary.json").read_text())
    found = [(e["dataset"], e["num_problems"], e["num_samples"]) for e in summary]
    assert found == [("arithmetic/test", 10, 2), ("second", 6, 3)]
    assert [entry["compared_with"] for entry in summary] == [None, None]
    report = (folder / "summary.md").read_text()
    assert report.index("# arithmetic/test") < report.index("# second")
    results = read_lines(folder / "eval" / "results.jsonl")
    assert [row["dataset"] for row in results].count("second") == 6


def test_missing_key_and_wrong_language_are_one_line(rejected: tuple) -> None:
    recipe, _, _ = rejected
    for setting, words in (
        ("stages.taught.teacher.api_key_env=NO_SUCH_KEY", "NO_SUCH_KEY is not set"),
        ("stages.taught.traces.filters.language=klingon", "no such language"),
    ):
        result = run("reject", recipe, "--redo", "--set", setting)
        assert result.returncode == 2, result.stderr
        assert words in result.stderr.splitlines()[-1]


def count_journal_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("journal/**/*.jsonl"))


# (command, its setting that makes it long, a file that it makes)
KILLED = {
    "reject": (["reject"], "stages.own.traces.num_generations=128", "own/traces.jsonl"),
    "eval": (["eval"], "stages.eval.num_samples=256", "eval/samples_1.jsonl"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", KILLED)
def test_killed_sampling_loses_nothing(case: str, rejected: tuple) -> None:
    """SIGKILL, twice, in the middle; the samples are those of a run that nobody has killed."""
    recipe, folder, _ = rejected
    command, longer, file = KILLED[case]
    folders = {name: folder.with_name(f"{name}-{case}") for name in ("whole", "killed")}
    options = {name: ("--set", f"name={f.name}", "--set", longer) for name, f in folders.items()}
    for name in folders:
        result = run("init", recipe, *options[name])
        assert result.returncode == 0, result.stderr[-3000:]
    result = run(*command, recipe, *options["whole"])
    assert result.returncode == 0, result.stderr[-3000:]
    lines = 0
    for _ in range(2):
        wanted = lines + 200
        process = start(*command, recipe, *options["killed"])
        wait_for(lambda wanted=wanted: count_journal_lines(folders["killed"]) > wanted)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=300)
        lines = count_journal_lines(folders["killed"])
    result = run(*command, recipe, *options["killed"])
    assert result.returncode == 0, result.stderr[-3000:]
    assert "samples are on disk already" in result.stderr
    files = [(f / file).read_bytes() for f in folders.values()]
    assert files[0] == files[1]
    assert not list(folders["killed"].rglob("journal"))
