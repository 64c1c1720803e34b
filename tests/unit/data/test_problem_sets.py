"""Every set of problems is read once by a process, and no longer than a stage needs it."""

import json
from pathlib import Path

import pytest

from r1pipe.config.base import ProblemSet
from r1pipe.config.recipe import Recipe
from r1pipe.context import StageContext
from r1pipe.data.problem_sets import ProblemSets, list_needed
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.pipeline import run_stages
from r1pipe.runs.folder import RunFolder
from r1pipe.utils.jsonl import write_text

COUNTING = """
from pathlib import Path

def load(split="train"):
    with Path("read.txt").open("a") as file:
        file.write(f"{split}\\n")
    for number in range(3):
        text = {"train": "Add three apples to heap", "test": "How long is river"}[split]
        yield {
            "id": str(number),
            "kind": "math",
            "prompt": [{"role": "user", "content": f"{text} {number}?"}],
            "answer": str(number),
        }
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    Path("counting.py").write_text(COUNTING)
    data = {"recipe": "counting.py"}
    grpo = {"kind": "grpo", "data": data, "max_steps": 1}
    grpo |= {"prompts_per_step": 1, "num_generations": 2, "max_completion_length": 8}
    grpo["rewards"] = [{"function": "rewards.math_correct"}]
    model = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 64}
    model |= {"num_hidden_layers": 1, "num_attention_heads": 2}
    stages = [
        {"kind": "init", "model": model, "tokenizer": {"data": data}},
        {**grpo, "name": "first", "from": "init"},
        {**grpo, "name": "second", "from": "first"},
        {
            "kind": "eval",
            "checkpoints": ["second"],
            "data": {**data, "split": "test"},
            "sampling": {"max_completion_length": 8},
        },
    ]
    return Recipe(name="run", runs_dir="runs", device="cpu", stages=stages)


def test_each_set_is_read_once_and_noted_by_every_stage(recipe: Recipe) -> None:
    def make(stage: object, context: StageContext) -> dict:
        held.append(len(context.problem_sets._loaded))
        build_tokenizer(["?"], 300).save_pretrained(context.folder)
        (context.folder / "config.json").write_text('{"model_type": "llama"}')
        if stage.training_sets():
            # What a stage does with its list is its own matter.
            context.load_training_problems(stage).clear()
        else:
            for source in stage.problem_sets():
                context.load_problems(source).clear()
        return {"rows": 0}

    held: list[int] = []
    with RunFolder(recipe) as run:
        run_stages(run, recipe.stages, make=make)
    assert sorted(Path("read.txt").read_text().split()) == ["test", "train"]
    # The doctor has read both; the last stage holds only its own.
    assert held == [2, 2, 2, 1]
    data = {}
    for stage in recipe.stages:
        lineage = json.loads((run.path / stage.name / "lineage.json").read_text())
        data[stage.name] = {e["source"]["split"]: e["rows"] for e in lineage["inputs"]["data"]}
    both = {"train": 3, "test": 3}
    assert data == {"init": {"train": 3}, "first": both, "second": both, "eval": {"test": 3}}


def test_traces_that_were_made_anew_are_read_anew(tmp_path: Path) -> None:
    sets, traces = ProblemSets(tmp_path), ProblemSet(stage="reject")
    row = {"id": "1", "kind": "text", "prompt": [{"role": "user", "content": "?"}]}
    (tmp_path / "reject").mkdir()
    read = []
    for solution in ("one", "two"):
        path = tmp_path / "reject" / "traces.jsonl"
        write_text(path, json.dumps({**row, "solution": solution}) + "\n")
        read += [sets.load(traces).problems, sets.load(traces).problems]
    assert [problems[0].solution for problems in read] == ["one", "one", "two", "two"]
    assert read[0] is read[1]
    assert read[2] is read[3]


def test_what_no_stage_to_come_reads_is_forgotten(recipe: Recipe) -> None:
    def list_splits(*names: str) -> set[str]:
        stages = map(recipe.stage, names)
        return {source.split for source in list_needed(stages, recipe)}

    assert list_splits("second", "eval") == list_splits("second") == {"train", "test"}
    assert list_splits("eval") == {"test"}
    assert list_splits() == set()
