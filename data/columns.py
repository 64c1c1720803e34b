"""Your own dataset, its columns named in the YAML: a JSONL, CSV or Parquet file, a folder of them
(one per split), or a dataset on the hub.

    data:
      recipe: columns
      split: train
      options:
        path: my/problems.csv               # or a folder, or a hub id
        columns: {prompt: question, answer: final}

`columns` maps our columns (README.md) to yours. Needed are `prompt` (text, or a list of messages)
and what is judged or learned: `answer` makes the `kind` math, `tests` code, `solution` alone text,
unless `kind` is given. `id`, `source` and `category` are optional.

- Any other name (`difficulty: level`) is a column given to rewards under that name.
- `reward_model.ground_truth` reaches into a column: keys of objects (or of JSON in text), indices
  of lists; -1 is the last.
- `messages` instead of `prompt` is a whole conversation: an assistant's answer at its end is the
  `solution`, with `reasoning_content` or `thinking` in <think> before it; the rest is the prompt.
- Messages are `{role, content}` or ShareGPT's `{from, value}`. `system` is prepended where there is
  no system message.
- `answer_pattern` is a regular expression; group 1 of its last match is the answer. "#### (.+)" for
  GSM8K's; "boxed" takes the last box.
"""

import ast
import json
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from r1pipe.data.formats import BrokenRow
from r1pipe.data.problems import check_extra
from r1pipe.data.rows import ask, describe_missing, last_boxed, load_rows, write_value
from r1pipe.data.tables import read_table

COLUMNS = ("id", "prompt", "messages", "answer", "tests", "solution", "source", "category")
KINDS = {"answer": "math", "tests": "code", "solution": "text", "messages": "text"}
LISTED = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of the thoughts in messages of Qwen, DeepSeek, vLLM and gpt-oss."""
SHAREGPT = {"human": "user", "gpt": "assistant"}


def load(
    split: str = "train",
    *,
    path: str,
    columns: dict,
    config: str | None = None,
    kind: str | None = None,
    system: str | None = None,
    answer_pattern: str | None = None,
    size: int | None = None,
    skip: int = 0,
) -> Iterator:
    check_mapping(columns)
    if kind is None:
        has_answer = answer_pattern is not None
        kind = "math" if has_answer else next(k for ours, k in KINDS.items() if ours in columns)
    if answer_pattern not in (None, "boxed"):
        check_pattern(answer_pattern)

    def make_problem(row: dict) -> dict:
        problem = {ours: find_cell(row, theirs) for ours, theirs in columns.items()}
        if "messages" in problem:
            conversation = read_messages(problem.pop("messages"))
            if conversation and conversation[-1].get("role") == "assistant":
                problem.setdefault("solution", read_trace(conversation.pop()))
            elif kind == "text" and "solution" not in problem:
                raise ValueError("the conversation does not end with the assistant's answer")
            problem["prompt"] = conversation
        problem["prompt"] = read_prompt(problem["prompt"], system)
        if isinstance(problem.get("solution"), list):  # TRL's conversational prompt and completion
            messages = read_messages(problem["solution"])
            roles = [message.get("role") for message in messages]
            if roles != ["assistant"]:
                shown = ", ".join(map(str, roles)) or "none"
                raise ValueError(f"the solution is one message of the assistant (got {shown})")
            problem["solution"] = read_trace(messages[0])
        for ours in ("id", "answer", "solution"):
            if ours in problem:
                problem[ours] = write_value(problem[ours], ours)
        for ours in ("source", "category"):  # optional
            if ours in problem and problem[ours] is not None:
                problem[ours] = write_value(problem[ours], ours)
            else:
                problem.pop(ours, None)
        if answer_pattern is not None:
            text = problem.get("answer") or problem.get("solution")
            problem["answer"] = find_answer(text, answer_pattern)
        return {"kind": kind, **problem}

    rows = check_columns(read_table(path, split, config), columns)
    return load_rows("columns", rows, split, make_problem, size=size, skip=skip, source=path)


def check_mapping(columns: Any) -> None:
    """Raises ValueError for an invalid mapping."""
    if not isinstance(columns, dict) or not all(isinstance(c, str) for c in columns.values()):
        raise ValueError(
            "options.columns: which column of ours is which of yours, such as "
            f"{{prompt: question, answer: final}} (got {columns!r})"
        )
    for ours in columns:
        if ours not in COLUMNS:
            try:
                check_extra(ours)
            except ValueError as error:
                raise ValueError(f"options.columns: {error}") from error
    if ("prompt" in columns) == ("messages" in columns):
        both = ", not both" if "prompt" in columns else ""
        raise ValueError(
            f'options.columns: name the column that is the "prompt" or "messages"{both}'
        )
    if not set(KINDS) & set(columns):
        raise ValueError(
            'options.columns: name the column that is the "answer" (or tests, solution)'
        )


def check_pattern(pattern: str) -> None:
    try:
        groups = re.compile(pattern).groups
    except (re.error, TypeError) as error:
        raise ValueError(f"options.answer_pattern: not a regular expression: {error}") from error
    if groups > 1:
        raise ValueError(f"options.answer_pattern: one group is needed, there are {groups}")


def find_cell(row: dict, name: str) -> Any:
    """A column, or a value inside it. Raises KeyError if there is no such column, ValueError if it
    has no such value."""
    if name in row:
        return row[name]
    value, done = row, ""
    for key in name.split("."):
        if isinstance(value, str) and done:
            value = read_object(value)
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError, ValueError):
            if not done:
                raise KeyError(key) from None
            if value is None:
                raise ValueError(f'the column "{done}" is null') from None
            has = range(len(value)) if isinstance(value, list) else value
            has = has if isinstance(has, dict | range) else ()
            raise ValueError(f'in "{done}": {describe_missing(key, map(str, has))}') from None
        done = f"{done}.{key}" if done else key
    return value


def read_object(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_prompt(value: Any, system: str | None) -> list[dict]:
    value = value.decode() if isinstance(value, bytes) else value
    if isinstance(value, str) and LISTED.match(value):
        value = read_listed(value)
    if not isinstance(value, list):
        return ask(value, system)
    messages = read_messages(value)
    if system and not any(message.get("role") in ("system", "developer") for message in messages):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def read_listed(text: str) -> Any:
    """Messages in a text cell, as JSON or as pandas writes them into CSV."""
    try:
        return json.loads(text)
    except ValueError:
        return ast.literal_eval(text)


def read_messages(values: Any) -> list[dict]:
    """Chat messages or ShareGPT's; text parts of a message are joined."""
    if isinstance(values, str) and LISTED.match(values):
        values = read_listed(values)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError("messages are a list of {role, content}")
    return [read_message(value) for value in values]


def read_message(value: dict) -> dict:
    if "from" in value and "role" not in value:
        role = value["from"]
        value = {"role": SHAREGPT.get(role, role), "content": value.get("value")}
    content = value.get("content")
    if isinstance(content, list):
        kinds = [part.get("type") if isinstance(part, dict) else None for part in content]
        if set(kinds) != {"text"}:
            raise ValueError(f"a message has parts that are not text: {', '.join(map(str, kinds))}")
        content = "".join(part["text"] for part in content)
    return {**value, "content": content}


def read_trace(message: dict) -> str:
    """The answer to learn, after the thoughts if they have a key of their own."""
    if message.get("tool_calls"):
        raise ValueError("the assistant's answer has tool calls, which nobody here can learn")
    content = message["content"]
    thoughts = next((message[key] for key in THOUGHTS if message.get(key)), "")
    if not thoughts or not isinstance(content, str):
        return content
    if not isinstance(thoughts, str):
        raise ValueError(f"the assistant's thoughts are {type(thoughts).__name__}, not text")
    if "</think>" in content:  # the thoughts are there already
        return content
    return f"<think>\n{thoughts.strip()}\n</think>\n\n{content.lstrip()}"


def check_columns(
    rows: Iterator[dict | BrokenRow], columns: dict[str, str]
) -> Iterator[dict | BrokenRow]:
    """The same rows. Raises ValueError for a column that the first one lacks: the YAML is wrong."""
    for row in rows:
        if isinstance(row, dict):
            for ours, theirs in columns.items():
                try:
                    find_cell(row, theirs)
                except KeyError as error:
                    what = describe_missing(error.args[0], row)
                    raise ValueError(f"options.columns.{ours}: {row.place}: {what}") from error
                except ValueError:
                    continue  # only this row is wrong
            yield from chain([row], rows)
            return
        yield row


def find_answer(text: str | None, pattern: str) -> str:
    if pattern == "boxed":
        answer = last_boxed(text or "")
    else:
        found = re.findall(pattern, text or "")
        answer = found[-1] if found else None
    if answer is None:
        raise ValueError(f"the answer column has nothing like answer_pattern {pattern}")
    return write_value(answer, "answer")
