"""Which training rows count as copies of held-out problems."""

import pytest

from r1pipe.data.decontamination import OverlapIndex, decontaminate, split_tokens, split_words
from r1pipe.types import Problem


def make_problem(text: str, name: str = "p", solution: str | None = None) -> Problem:
    prompt = [{"role": "user", "content": text}]
    return Problem(id=name, kind="math", prompt=prompt, answer="1", solution=solution)


HELDOUT = make_problem("A farmer has three red barns and 17 sheep in each of them; how many?", "h")
CHINESE = make_problem("一个农夫有三个红色的谷仓，每个谷仓有十七只羊，一共有多少只？", "c")
SHORT = make_problem("Find $\\dfrac{1}{2}+2$.", "short")
TINY = make_problem("$1+1$", "tiny")

# (training prompt, trace, ids of the held-out problems that it overlaps with at 6 words)
OVERLAPS = [
    (HELDOUT.question, "", {"h"}),
    (HELDOUT.question.upper().replace(";", " -"), "", {"h"}),
    ("Yesterday a farmer has three red barns and a goat.", "", {"h"}),
    ("A farmer has three", "red barns and 17 sheep", set()),  # two texts
    ("A farmer has three blue barns and 17 cows in each of the fields", "", set()),
    ("Something else entirely", "", set()),
    ("", "", set()),
    ("How many sheep?", "We have 17 sheep\nin each of them, so", {"h"}),
    ("How many sheep?", "We have 17 sheep, and in each barn", set()),
    (CHINESE.question, "", {"c"}),
    ("另一个农夫有三个红色的谷仓", "", {"c"}),
    ("一个渔夫有两条船", "", set()),
    ("Please find $\\frac{1}{2} + 2$, my friend", "", {"short"}),
    ("Find $\\frac{1}{2}-2$.", "", set()),
    ("Find $\\frac{1}{2}+25$.", "", set()),
    ("Add.", "First:\nFind $\\frac12 + 2$.", set()),  # read as another fraction
    ("Add.", "First:\nFind $\\left.\\frac{1}{2}\\right. + 2$.\nIt is", {"short"}),
    ("Add.", "First, find $\\frac{1}{2} + 2$ as a sum", set()),  # no line of its own
    ("1 + 1", "", {"tiny"}),
    ("Compute 1 + 1.", "1 + 1 = 2", set()),  # too little to mean anything
]


@pytest.mark.parametrize(("prompt", "trace", "expected"), OVERLAPS)
def test_overlap(prompt: str, trace: str, expected: set[str]) -> None:
    index = OverlapIndex([HELDOUT, CHINESE, SHORT, TINY], ngram=6)
    row = make_problem(prompt, solution=trace)
    assert index.find_rows([row]) == [expected]
    # The same in one batch among others as on its own.
    others = [make_problem("Nothing to see here, as it seems, of barns"), row, row]
    result = decontaminate(others, [HELDOUT, CHINESE, SHORT, TINY], ngram=6)
    assert len(result.kept) == (1 if expected else 3)
    assert result.num_dropped == (2 if expected else 0)
    assert result.overlap_rate == pytest.approx(2 / 3 if expected else 0)
    (in_prompt,) = index.find_texts([prompt])
    assert result.num_dropped_for_trace == (2 if expected and not in_prompt else 0)


def test_batches_are_cut_between_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [make_problem(HELDOUT.question if i % 3 == 0 else f"row {i}") for i in range(50)]
    expected = [bool(i % 3 == 0) for i in range(50)]
    for size in (1, 7, 40, 10_000):
        monkeypatch.setattr("r1pipe.data.decontamination.BATCH_WORDS", size)
        found = OverlapIndex([HELDOUT], 6).find_texts([row.question for row in rows])
        assert [bool(ids) for ids in found] == expected


def test_instruction_of_a_set_is_no_overlap() -> None:
    instruction = "Think step by step, then put the final answer into a box at the end."
    questions = [f"{'x' * i} and {i} and {'y' * i}? {instruction}" for i in range(1, 41)]
    heldout = [make_problem(text, str(i)) for i, text in enumerate(questions[:20])]
    training = [make_problem(text, str(i)) for i, text in enumerate(questions)]
    result = decontaminate(training, heldout, ngram=6)
    assert [problem.question for problem in result.kept] == questions[20:]


def test_a_question_that_is_there_five_times_is_no_instruction() -> None:
    question = "A farmer sells a third of his red hens on each of four days in May"
    heldout = [make_problem(f"{question}. How many?", str(i)) for i in range(5)]
    training = make_problem(f"{question}, and buys two back. What is left?")
    assert OverlapIndex(heldout, 13).find_rows([training]) == [set("01234")]


def test_template_with_other_numbers_is_another_problem() -> None:
    def ask(number: int) -> str:
        return (
            f"Make {100 + number} from the numbers {number}, {number * 7 % 50}, 25, 75 with plus, "
            "minus, times and divided by. Use every number exactly once and say it in a box."
        )

    heldout = [make_problem(ask(i), str(i)) for i in range(0, 30)]
    training = [make_problem(ask(i)) for i in range(20, 60)]
    result = decontaminate(training, heldout, ngram=13)
    assert result.num_dropped == 10  # the copies, and only these


def test_words_are_the_same_with_and_without_other_letters() -> None:
    text = "Let x_1 = \\frac{a}{b}; find 2x-1!"
    words = ["let", "x", "1", "frac", "a", "b", "find", "2x", "1"]
    assert split_words(text) == split_words(text + "…") == words
    assert split_words("\\left(A\\right) \\dfrac{1}{2}") == ["a", "frac", "1", "2"]
    assert split_tokens("\\left(A\\right) \\tfrac{1}{2}\\,<3") == ["a", "frac", "1", "2", "<", "3"]
