"""A server that plays a judge: it reads its own instructions and grades by a rule of the test's."""

import re
from collections.abc import Callable

from teacher_server import Answer, TeacherServer, make_answer

PROMPT_TOKENS, COMPLETION_TOKENS = 50, 10


def read_material(request: dict) -> tuple[str, str]:
    """What a judge that heeds its marks takes for the request and the answer."""
    system, user = (message["content"] for message in request["messages"])
    (mark,) = re.findall(r"lines with the mark (\w+)\.", system)
    pattern = rf"\[request {mark}\]\n(.*)\n\[end of request {mark}\]\n\[answer {mark}\]\n(.*)\n"
    found = re.fullmatch(rf"{pattern}\[end of answer {mark}\]", user, re.DOTALL)
    assert found, user
    return found[1], found[2]


def reply(text: str, **more: str) -> Answer:
    status, body = make_answer(text, **more)
    usage = {"prompt_tokens": PROMPT_TOKENS, "completion_tokens": COMPLETION_TOKENS}
    return status, {**body, "usage": {**usage, "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS}}


def grade_by(server: TeacherServer, rule: Callable[[str], object]) -> None:
    """`rule`: from the answer to the grade."""
    server.answer = lambda number, request: reply(
        f"Some reasons.\nscore: {rule(read_material(request)[1])}"
    )
