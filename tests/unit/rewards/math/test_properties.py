"""Properties that hold for every input, tried on inputs that nobody would think of."""

from fractions import Fraction

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rewards
from rewards.math.grading import judge_answer
from rewards.math.numbers import parse_number

STATUSES = {"right", "wrong", "unparseable", "bad_gold", "unread_gold"}

PIECES = [
    *"0123456789.,;:+-*/^_=<>!|()[]{}%'$&~ abixnef，²",
    *("\\frac", "\\sqrt", "\\pm", "\\pi", "\\{", "\\}", "\\text{", "\\left(", "\\right)", "\\\\"),
    *("\\begin{pmatrix}", "\\end{pmatrix}", "\\cup", "\\infty", "\\in", "\\le", "\\sin", "\\log"),
    *(
        "\\sum_{k=1}^{",
        "\\boxed{",
        "\\circ",
        "\\cdot",
        "\\mathbb{R}",
        "\\ldots",
        "\\binom",
        "\\pmod",
    ),
    *(
        "\\overline{",
        " and ",
        " or ",
        " not ",
        "cm",
        "sqrt(",
        "pi",
        "\\mid",
        "\\setminus",
        "<=",
        "**",
    ),
]
latex = st.lists(st.sampled_from(PIECES), max_size=25).map("".join)
anything = st.one_of(latex, st.text(max_size=80))
numbers = st.one_of(
    st.integers(-(10**9), 10**9).map(str),
    st.decimals(-1000, 1000, places=3).map(str),
    st.fractions(-99, 99, max_denominator=50).map(lambda f: f"{f.numerator}/{f.denominator}"),
)
quick = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(anything, anything)
def test_no_string_makes_the_grader_raise(answer, gold):
    assert judge_answer(answer, gold) in STATUSES


@quick
@given(latex)
def test_every_answer_equals_itself_or_is_no_gold(text):
    assert judge_answer(text, text) in {"right", "bad_gold", "unread_gold"}


@quick
@given(anything)
def test_no_string_makes_the_extractor_or_the_shaping_raise(text):
    found = rewards.extract_answer(text)
    assert found is None or found.strip()
    rewards.format([text])
    rewards.repetition([text])
    rewards.language_consistency([text])


@quick
@given(numbers, numbers)
def test_numbers_are_equal_exactly_if_their_values_are(a, b):
    assert (judge_answer(a, b) == "right") == (judge_answer(b, a) == "right")
    if "." not in a + b:
        assert (judge_answer(a, b) == "right") == (Fraction(a) == Fraction(b))


@quick
@given(st.integers(-(10**12), 10**12))
def test_the_fast_path_agrees_with_the_grader(n):
    for dress in (f"{n:,}", f"{n}.0", f"${n}$", f"\\frac{{{2 * n}}}{{2}}", f"{n + 1}"):
        value = parse_number(dress)
        assert value is not None
        assert (value == n) == (judge_answer(dress, str(n)) == "right")


prose = st.text(st.sampled_from("abcdefghijklmnoprstuvwxyz ,\n"), max_size=120).filter(
    lambda text: "answer" not in text and "boxed" not in text
)


@quick
@given(st.integers(0, 99), st.integers(0, 99), prose, prose)
def test_irrelevant_prose_turns_no_wrong_answer_into_a_right_one(value, gold, before, after):
    completion = f"{before} \\boxed{{{value}}} {after}"
    (verdict,) = rewards.judge_math([completion], [str(gold)])
    assert (verdict.status == "right") == (value == gold)


@quick
@given(st.sampled_from(["\\frac{1}{2}", "x^2+1", "(1,2)", "\\{1,2\\}", "A", "[0,1)"]), prose)
def test_prose_in_the_answer_itself_rewards_nothing(gold, words):
    assert judge_answer(f"7 {words}", gold) != "right"
