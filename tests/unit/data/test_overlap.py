"""Held-out problems stay out of training, and a set that did not is refused: on a run's folder."""

import json
from pathlib import Path

import pytest

from r1pipe.config.recipe import Recipe
from r1pipe.context import StageContext
from r1pipe.data.problem_sets import ProblemSets
from r1pipe.runs.folder import RunFolder
from r1pipe.stages.eval import HeldOut, refuse_overlap
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import dump_row, read_jsonl

COPIED = "A farmer has three red barns and 17 sheep in each of them; how many sheep has he got?"
ROWS = [
    {"question": COPIED, "solution": "3 * 17 = 51\n#### 51", "answer": "51"},
    {"question": "How many legs have two dogs?", "solution": "8\n#### 8", "answer": "8"},
    {"question": "What is it?", "solution": f"As in: {COPIED}\n#### 51", "answer": "51"},
    {"question": "How many wings have two birds?", "solution": "4\n#### 4"},
]
HELDOUT = [{"question": COPIED, "answer": "51", "solution": "#### 51"}, ROWS[1] | {"question": "?"}]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    for name, rows in (("train", ROWS), ("test", HELDOUT)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    data = {"recipe": "gsm8k", "options": {"path": str(tmp_path)}, "on_broken_row": "skip"}
    train = {"max_steps": 1}
    stages = [
        {"kind": "sft", "from": "some/model", "data": data, "train": train},
        {"kind": "eval", "checkpoints": ["sft"], "data": {**data, "split": "test"}},
    ]
    return Recipe(name="run", runs_dir=str(tmp_path), stages=stages)


def make_context(recipe: Recipe, run: RunFolder, number: int) -> StageContext:
    stage = recipe.stages[number]
    sets = ProblemSets(run.path)
    return StageContext(recipe, run, stage.name, run.begin(stage), None, None, {}, None, (), sets)


def test_training_loses_the_rows_that_overlap(recipe: Recipe) -> None:
    with RunFolder(recipe) as run:
        context = make_context(recipe, run, 0)
        kept = context.load_training_problems(recipe.stages[0])
    assert [problem.question for problem in kept] == [ROWS[1]["question"]]
    assert context.facts["overlap_dropped"] == 2
    assert context.facts["overlap_dropped_for_trace"] == 1
    assert context.facts["overlap_rate"] == pytest.approx(2 / 3, abs=1e-6)
    assert context.facts["sizes"] == [
        {
            "data": "gsm8k/train",
            "rows": 4,
            "broken rows": 3,
            "training problems without overlap": 1,
        }
    ]
    ((number, reason),) = context.facts["broken_rows"]
    assert (number, "answer" in reason) == (4, True)
    written = [row for _, row in read_jsonl(context.folder / "problems.jsonl")]
    assert len(written) == 1


def test_evaluation_refuses_what_was_trained_on(recipe: Recipe) -> None:
    """A run that was trained before the set was part of its recipe."""
    with RunFolder(recipe) as run:
        context = make_context(recipe, run, 1)
        stage = recipe.stages[1]
        (run.path / "sft").mkdir()
        problems = context.load_set(recipe.stages[0].data[0]).problems
        rows = "".join(dump_row(problem) + "\n" for problem in problems)
        (run.path / "sft" / "problems.jsonl").write_text(rows)
        sets = [HeldOut(source, context) for source in stage.data]
        assert sets[0].overlap.share("sft") is None, "some/model may have seen anything"
        refuse_overlap(stage, sets)
        recipe.stages[0].__dict__["from_"] = "sft"  # as if it came from nowhere else
        assert sets[0].overlap.share("sft") == 0.5
        with pytest.raises(UserError, match=r"50\.0% of gsm8k/test \(max_overlap 0\.0%\)"):
            refuse_overlap(stage, sets)
        refuse_overlap(stage.model_copy(update={"max_overlap": 0.5}), sets)


def write_sums(folder: Path, name: str, count: int) -> dict:
    rows = [{"q": f"{name}: {i} + {i}?", "a": str(2 * i)} for i in range(count)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"prompt": "q", "solution": "a"}
    return {
        "recipe": "columns",
        "options": {"path": str(folder / f"{name}.jsonl"), "columns": columns},
    }


@pytest.mark.parametrize(
    ("weights", "counts"), [((None, None), (30, 10)), ((1, 2), (5, 10)), ((3, 0.5), (30, 5))]
)
def test_several_sets_of_one_stage(weights: tuple, counts: tuple, tmp_path: Path) -> None:
    """Their ids collide; rows stand to each other as the weights."""
    sets = [write_sums(tmp_path, "first", 30), write_sums(tmp_path, "second", 10)]
    data = [dict(s) if w is None else {**s, "weight": w} for s, w in zip(sets, weights)]
    stage = {"kind": "sft", "from": "some/model", "data": data, "train": {"max_steps": 1}}
    recipe = Recipe(name="run", runs_dir=str(tmp_path), stages=[stage])
    assert recipe.stages[0].model_dump(mode="json")["data"][0].get("weight") == weights[0]
    kept = []
    for _ in range(2):
        with RunFolder(recipe) as run:
            context = make_context(recipe, run, 0)
            kept.append(context.load_training_problems(recipe.stages[0]))
    assert kept[0] == kept[1]
    names = [problem.question.partition(":")[0] for problem in kept[0]]
    assert (names.count("first"), names.count("second")) == counts
    assert len({problem.id for problem in kept[0]}) == sum(counts)
    joined = context.facts["sizes"][0]
    assert list(joined.values())[1:] == ([40] if weights[0] is None else [40, sum(counts)])
    assert [entry["rows"] for entry in context.facts["sizes"]] == [40, 30, 10]
