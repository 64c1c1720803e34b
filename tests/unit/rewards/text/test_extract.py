"""The one extractor: what is the final answer of a completion, in the stated order."""

import pytest

from rewards import extract_answer
from rewards.text.answers import find_answer
from rewards.text.completions import split_thinking

EXTRACTIONS = [
    # 1. boxes
    ("so \\boxed{3}, which gives \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{\\frac{1}{\\sqrt{2}}} is it", "\\frac{1}{\\sqrt{2}}"),
    ("$\\fbox{7}$", "7"),
    ("\\boxed {7}", "7"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{2}, \\boxed{3} and \\boxed{5}", "2, 3, 5"),
    ("$x = \\boxed{2}$ and $y = \\boxed{3}$", "2, 3"),
    ("\\boxed{4} ... Final answer: \\boxed{5}", "5"),
    ("\\boxed{004}. Final Answer \\boxed{004}", "004"),
    ("we had \\boxed{3} and the box \\boxed{4 is not closed", "3"),
    # 2. answer tags
    ("The answer is 3. <answer> 12 </answer>", "12"),
    ("<answer>12</answer> <answer>13</answer>", "13"),
    ("<answer>12", "12"),
    ("<answer>so \\boxed{3}</answer>", "3"),
    # 3. statements
    ("The answer is 3.5. I hope so.", "3.5"),
    ("**Answer:** 42", "42"),
    ("So the final answer is $\\frac{1}{2}$.", "$\\frac{1}{2}$"),
    ("The answer is $5$ or $6$, I think.", "$5$ or $6$, I think"),
    ("The answer is:\n\\[\n\\frac{1}{2}\n\\]", "\\[\n\\frac{1}{2}\n\\]"),
    ("answer is \\(x = 3.5\\) as above", "\\(x = 3.5\\)"),
    ("Final Answer: The largest $n$ is 34.", "34"),
    ("The answer is 1,234 because of that.", "1,234"),
    ("The answer is for sure D, it can't be A", "D"),
    ("The correct answer is (B).", "(B)"),
    ("some steps\n#### 72", "72"),
    ("答案是：12。", "12"),
    ("La réponse est 12.", "12"),
    ("Ответ: 12", "12"),
    ("Answer: The largest $n$ with $n^2 < 50$ is 7.", "7"),
    ("答えは12です。", "12です"),
    ("Answer: in the end Janet pays 220 $ over 12 months.", "220"),
    ("Answer: there are then 12 of them left.", "12"),
    ("Answer: there are not 12 of them left.", "not 12"),
    ("Answer: there are 12 or 13 of them left.", "12 or 13 of them left"),
    ("the answer is not 5", "not 5"),
    ("The answer is 5 or 6.", "5 or 6"),
    # 4. an option first
    ("D. It can't be A or B", "D"),
    # 5. the last formula or number
    ("we find that $x \\lt 3$.", "x \\lt 3"),
    (
        "the matrix $\\begin{pmatrix}1&0\\\\0&1\\end{pmatrix}$.",
        "\\begin{pmatrix}1&0\\\\0&1\\end{pmatrix}",
    ),
    ("The volume of $ABC$ is 120", "120"),
    ("we get 7 and so 1,250.", "1,250"),
    ("it rises by 100%.", "100%"),
    ("the ratio 13/28", "13/28"),
    ("一共有3 + 10 = 13只鸟", "13"),
    ("it is **92**.", "92"),
    ("Therefore x > 5.", "x > 5"),
    ("They meet at the point (2, 3).", "(2, 3)"),
    ("The domain must be [0, 1).", "[0, 1)"),
    ("Thus there are *17* apples.", "17"),
    ("It was –17 degrees.", "–17 degrees"),
    ("- 5\n- 6", "5, 6"),
    ("we have 7 - 1", None),
    ("the train leaves at 10:30.", "10:30"),
    ("it is x^2", None),
    ("x = 2^3", "x = 2^3"),
    ("B", "B"),
    ("The correct choice is B", "B"),
    ("C is correct.", "C"),
    ("The answer is 42 (six times seven).", "42"),
    ("5 or 6", "5 or 6"),
    ("it is not 6", "not 6"),
    ("nothing to see", None),
    ("", None),
    # what is said of a value is read with it
    ("It cannot be 9.", "not 9"),
    ("9 is not the answer", "not 9"),
    ("The answer is not 9. It is 8.", "8"),
    ("It could be 8, or it could be 9.", "8 or 9"),
    ("Hence a = 8 and b = 9.", "a = 8, b = 9"),
    ("It lasts 3 1/2 hours.", "3 1/2 hours"),
    ("The speed is 7.5 m/s^2.", "7.5 m/s^2"),
    ("It weighs 2e-3 kg.", "2e-3 kg"),
    ("He has $30K.", "$30 thousand"),
    ("It is 9. Shall I explain step 2?", "9"),
    ("I'd pick D.", "D"),
    # what stands around a box
    ("$x = -\\boxed{9}$", "-9"),
    ("- \\boxed{9}", "9"),
    ("\\frac{1}{\\boxed{9}}", "\\frac{1}{{9}}"),
    ("6\\boxed{\\phantom{9}}5 is even if we write \\boxed{4}", "4"),
    ("\\boxed 9", "9"),
    ("\\boxed(8, 9)", "(8, 9)"),
    # thinking is never searched
    ("<thought>\\boxed{3}</thought> \\boxed{4}", "4"),
    ("<think>\\boxed{3}</think> I do not know", None),
    ("<think>\\boxed{3}</think> The answer is 4.", "4"),
    ("\\boxed{3}</think> The answer is 4.", "4"),
    ("<think>\\boxed{3}", None),
    ("I hope it is 12. <|im_end|>user 13", "13"),
]


@pytest.mark.parametrize(("completion", "expected"), EXTRACTIONS)
def test_extract_answer(completion, expected):
    assert extract_answer(completion) == expected


def test_boxes_that_are_not_joined_must_all_be_right():
    found = find_answer("It is \\boxed{3}. Wait. It is \\boxed{4}.")
    assert found.answer == "4"
    assert found.others == ("3",)
    assert find_answer("It is \\boxed{4}. Yes, \\boxed{4}.").others == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think>b", ("a", "b")),
        ("a</think>b", ("a", "b")),  # the prompt ended with <think>
        ("b", ("", "b")),
        ("<think>a", ("a", "")),
        ("x<think>a</think>b<think>c</think>d", ("ac", "xbd")),
        ("a</think>b</think>c", ("a", "bc")),
    ],
)
def test_split_thinking(text, expected):
    assert split_thinking(text) == expected
