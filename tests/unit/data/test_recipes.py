"""The recipes in data/: every row mapping, on rows of the datasets' own schemas in small files."""

import json
from pathlib import Path

import pytest
from row_files import read, read_one, write_rows

import rewards
from r1pipe.utils.errors import UserError

MATH_ROW = {
    "problem": "What is $1+\\frac{1}{2}$?",
    "level": "Level 3",
    "type": "Algebra",
    "solution": "It is \\boxed{\\frac{3}{2}}.",
}
OPENR1_ROW = {
    "problem": "What is 2+2?",
    "answer": "4",
    "source": "olympiads",
    "uuid": "a",
    "is_reasoning_complete": [False, True, True],
    "generations": ["<think>cut", "<think>5</think>\\boxed{5}", "<think>4</think>\\boxed{4}"],
    "correctness_math_verify": [True, False, True],
}
NUMINA_ROW = {
    "problem": "Find x.",
    "solution": "x is 3.",
    "answer": "3",
    "source": "olympiads",
    "problem_is_valid": "Yes",
    "solution_is_valid": "Yes",
}
TALK = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi."}]
CONTEST_TESTS = {"input": ["1 2\n"], "output": ["3\n"]}
NO_TESTS = {"input": [], "output": []}
# recipe, row, split, options, expected columns of the problem
MAPPINGS = [
    ("math", MATH_ROW, "train", {}, {"answer": "\\frac{3}{2}"}),
    (
        "math_500",
        {**MATH_ROW, "answer": "\\frac{3}{2}", "level": 3, "unique_id": "test/1.json"},
        "test",
        {},
        {"answer": "\\frac{3}{2}", "id": "math-500-test-0"},
    ),
    ("aime", {"id": 60, "problem": "?", "answer": "025"}, "test", {"year": 2024}, {"answer": "25"}),
    ("aime", {"problem": "?", "answer": 70}, "test", {"year": 2025}, {"answer": "70"}),
    ("openr1_math", OPENR1_ROW, "train", {}, {"solution": "<think>4</think>\\boxed{4}"}),
    (
        "mixture_of_thoughts",
        {
            "messages": [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "<think>\nHm.\n</think>\nSo."},
            ],
            "num_tokens": 9,
            "source": "science",
        },
        "train",
        {"max_tokens": 9},
        {"kind": "text", "answer": None, "solution": "<think>\nHm.\n</think>\nSo."},
    ),
    (
        "smoltalk",
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "Hello?"},
                {"role": "assistant", "content": "Hi."},
            ],
            "source": "everyday-conversations",
        },
        "train",
        {},
        {"kind": "text", "answer": None, "solution": "Hi.", "category": "everyday-conversations"},
    ),
    (
        "big_math",
        {"problem": "1+1?", "answer": "2", "source": "orca", "llama8b_solve_rate": 0.5},
        "train",
        {"min_solve_rate": 0.2, "max_solve_rate": 0.8},
        {"answer": "2", "solution": None},
    ),
    (
        "deepscaler",
        {"problem": "1+1?", "answer": "2", "solution": "One more than 1."},
        "train",
        {},
        {"solution": "<think>\nOne more than 1.\n</think>\n\\boxed{2}"},
    ),
    ("numina_math", NUMINA_ROW, "train", {"sources": ["olympiads"]}, {"answer": "3"}),
    (
        "numina_math",
        {"source": "cn_k12", "problem": "Find x.", "solution": "So \\boxed{3}.", "messages": []},
        "train",
        {},
        {"answer": "3"},
    ),
    (
        "countdown",
        {"nums": [3, 4, 5], "target": 17},
        "train",
        {},
        {"kind": "task", "tests": {"numbers": [3, 4, 5], "target": 17}},
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("recipe", "row", "split", "options", "expected"), MAPPINGS, ids=lambda x: str(x)[:20]
)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_row_mapping(
    recipe: str, row: dict, split: str, options: dict, expected: dict, suffix: str, tmp_path: Path
) -> None:
    path = write_rows(tmp_path / f"rows{suffix}", [row])
    problem = read_one(recipe, path, split, **options)
    for column, value in expected.items():
        assert getattr(problem, column) == value, column
    question = row.get("problem") or (row["messages"][-2]["content"] if "messages" in row else "17")
    assert question in problem.question
    if problem.kind == "math" and problem.solution:
        assert rewards.math_correct(completions=[problem.solution], answer=[problem.answer]) == [
            1.0
        ]


# recipe, row, options, right program, wrong program
CODE = [
    (
        "humaneval",
        {
            "task_id": "HumanEval/0",
            "prompt": 'def double(x):\n    """Twice x."""\n',
            "entry_point": "double",
            "canonical_solution": "    return 2 * x\n",
            "test": "def check(candidate):\n    assert candidate(3) == 6\n",
        },
        {},
        "def double(x):\n    return x + x",
        "def double(x):\n    return x",
    ),
    (
        "mbpp",
        {
            "task_id": 1,
            "text": "Write a function to double.",
            "code": "",
            "test_list": ["assert double(3) == 6"],
            "test_setup_code": "",
            "challenge_test_list": [],
        },
        {},
        "def double(x):\n    return x + x",
        "def double(x):\n    return x",
    ),
    (
        "mbpp",
        {
            "task_id": 1,
            "prompt": "Write a function to double.",
            "code": "",
            "test_imports": ["import math"],
            "test_list": ["assert math.isclose(double(3), 6)"],
        },
        {},
        "def double(x):\n    return x + x",
        "def double(x):\n    return x",
    ),
    (
        "code_contests",
        {
            "name": "a",
            "description": "Add two numbers.",
            "public_tests": CONTEST_TESTS,
            "private_tests": {"input": ["5 6"], "output": ["11"]},
            "generated_tests": NO_TESTS,
        },
        {},
        "print(sum(map(int, input().split())))",
        "print(3)",
    ),
    (
        "code_contests",
        {"id": "cc-0", "problem": "Add two numbers.", "inputs": ["1 2\n"], "outputs": ["3\n"]},
        {},
        "print(sum(map(int, input().split())))",
        "print(4)",
    ),
    (
        "verifiable_coding",
        {
            "prompt": "Add two numbers.",
            "gold_standard_solution": "",
            "verification_info": json.dumps(
                {
                    "language": "python",
                    "test_cases": [
                        {"type": "stdin_stdout", "input": "1 2", "output": "3", "fn_name": None}
                    ],
                }
            ),
        },
        {},
        "print(sum(map(int, input().split())))",
        "print(4)",
    ),
]


@pytest.mark.parametrize(
    ("recipe", "row", "options", "right", "wrong"), CODE, ids=lambda x: str(x)[:20]
)
def test_code_row_s_tests_judge_programs(
    recipe: str, row: dict, options: dict, right: str, wrong: str, tmp_path: Path
) -> None:
    problem = read_one(recipe, write_rows(tmp_path / "rows.jsonl", [row]), **options)
    assert problem.kind == "code"
    completions = [f"```python\n{program}\n```" for program in (right, wrong)]
    assert rewards.code_passes(completions=completions, tests=[problem.tests] * 2) == [1.0, 0.0]


# recipe, rows of which the first is kept, options, why the others are not
FILTERS = [
    ("math", [MATH_ROW, {**MATH_ROW, "level": "Level 1"}], {"levels": [3]}, {"other levels"}),
    (
        "openr1_math",
        [
            OPENR1_ROW,
            {**OPENR1_ROW, "correctness_math_verify": [True, False, False]},
            {**OPENR1_ROW, "answer": "proof"},
        ],
        {},
        {"no verified trace", "no final answer"},
    ),
    (
        "numina_math",
        [
            NUMINA_ROW,
            {**NUMINA_ROW, "answer": "notfound"},
            {**NUMINA_ROW, "answer": "proof"},
            {**NUMINA_ROW, "solution_is_valid": "Incomplete"},
            {**NUMINA_ROW, "source": "cn_k12"},
        ],
        {"sources": ["olympiads"]},
        {"no final answer", "not valid", "other sources"},
    ),
    (
        "smoltalk",
        [
            {"messages": TALK, "source": "smol-summarize"},
            {"messages": TALK, "source": "numina-cot-100k"},
        ],
        {},
        {"other sources"},
    ),
    (
        "smoltalk",
        [
            {"messages": TALK, "source": "systemchats-30k"},
            {"messages": TALK, "source": "smol-summarize"},
        ],
        {"sources": ["systemchats-30k"]},
        {"other sources"},
    ),
    (
        "big_math",
        [
            {"problem": "?", "answer": "1", "llama8b_solve_rate": rate}
            for rate in (0.5, 0.0, None, 1.0)
        ],
        {"min_solve_rate": 0.1, "max_solve_rate": 0.9},
        {"solve rate not within 0.1 to 0.9"},
    ),
    (
        "code_contests",
        [
            {"problem": "?", "inputs": ["1"], "outputs": ["1"]},
            {"problem": "?", "inputs": [], "outputs": []},
        ],
        {},
        {"no tests"},
    ),
]


@pytest.mark.parametrize(
    ("recipe", "rows", "options", "reasons"),
    FILTERS,
    ids=lambda x: str(x)[:20] if isinstance(x, str | list) else "",
)
def test_filters_are_counted(
    recipe: str, rows: list[dict], options: dict, reasons: set[str], tmp_path: Path
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", rows)
    loaded = read(recipe, path=str(path), **options)
    assert len(loaded.problems) == 1
    assert loaded.num_rows == len(rows)
    assert sum(loaded.filtered.values()) == len(rows) - 1
    assert set(loaded.filtered) == reasons
    assert list(dict(loaded.steps()).values())[-1] == 1
    assert loaded.describe().startswith(f"{len(rows)} rows, ")


HUB_OPTIONS = {
    "gsm8k": "path, system, size, skip",
    "big_math": "path, system, size, skip, min_solve_rate, max_solve_rate",
    "mbpp": "path, config, system, size, skip",
    "smoltalk": "path, config, size, skip, sources",
}


@pytest.mark.parametrize("recipe", HUB_OPTIONS)
def test_a_hub_recipe_s_options_are_its_own_and_the_shared_ones(recipe: str) -> None:
    with pytest.raises(UserError, match=f'no option "unknown"; there are {HUB_OPTIONS[recipe]}$'):
        read(recipe, unknown=1)


def test_countdown_is_generated_solvable_and_split() -> None:
    train, test = read("countdown", size=200), read("countdown", "test", size=200)
    for problem in train.problems + test.problems:
        assert len(problem.tests["numbers"]) == 4
    keys = [
        {f"{sorted(p.tests['numbers'])} {p.tests['target']}" for p in part.problems}
        for part in (train, test)
    ]
    assert not keys[0] & keys[1]
    right = rewards.countdown_correct(
        completions=[p.solution for p in train.problems], tests=[p.tests for p in train.problems]
    )
    assert right == [1.0] * 200
    with pytest.raises(UserError, match=r"options\.size: there are only \d+ different problems"):
        read("countdown", num_numbers=2, max_number=5, size=1000)


# answer, numbers, target, reward
EXPRESSIONS = [
    ("(3 + 4) * 5", [5, 4, 3], 35, 1.0),
    ("3 \\times 4 = 12", [3, 4], 12, 1.0),
    ("-3 + 4", [3, 4], 1, 1.0),
    ("7 / 2 * 4", [7, 2, 4], 14, 1.0),
    ("3 + 4", [3, 4, 5], 7, 0.0),  # one is left
    ("3 + 4 + 4", [3, 4], 11, 0.0),  # one is used twice
    ("35", [5, 4, 3], 35, 0.0),
    ("3 + 4", [3, 4], 8, 0.0),
    ("4 / (3 - 3)", [4, 3, 3], 1, 0.0),
    ("3 ** 4", [3, 4], 81, 0.0),
    ("__import__('os').getpid()", [3, 4], 7, 0.0),
    ("True + 3", [1, 3], 4, 0.0),
    ("(" * 290, [3, 4], 7, 0.0),
    ("3 + 4", "34", 7, None),
    ("3 + 4", [3, 4], None, None),
]


@pytest.mark.parametrize(("answer", "numbers", "target", "expected"), EXPRESSIONS)
def test_countdown_reward(answer: str, numbers: object, target: object, expected: object) -> None:
    tests = {"numbers": numbers, "target": target}
    completions = [f"<think>hm</think>\\boxed{{{answer}}}"]
    assert rewards.countdown_correct(completions=completions, tests=[tests]) == [expected]
    assert rewards.countdown_correct(completions=completions, tests=[json.dumps(tests)]) == [
        expected
    ]


def test_math_reads_a_folder_per_subject(tmp_path: Path) -> None:
    folders = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra",
               "number_theory", "prealgebra", "precalculus")  # fmt: skip
    for folder in folders:
        write_rows(tmp_path / folder / "train-00000-of-00001.parquet", [MATH_ROW])
    assert len(read("math", path=str(tmp_path)).problems) == 7
