"""What recipes in data/ share: mapping the rows of a table to problems.

A row that cannot be mapped becomes a `BrokenRow` with its place; `problems.load_set` stops at it or
skips it, as the recipe's YAML says.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from r1pipe.data.formats import BrokenRow, place_row
from r1pipe.data.tables import hint_at, read_table
from r1pipe.utils.errors import first_line
from rewards.text.answers import find_boxes

MATH_INSTRUCTION = (
    "Reason step by step within <think> and </think>, then give the answer in \\boxed{}."
)
CODE_INSTRUCTION = (
    "Reason step by step within <think> and </think>, then give the program in a ```python block."
)

NO_VALUE = frozenset(
    "nan NaN -nan -NaN null NULL None none <NA> NA N/A n/a #N/A #NA NaT nat".split()  # noqa: SIM905
)
"""What other programs write for a missing value."""


@dataclass(frozen=True)
class FilteredRow:
    """A valid row that the recipe leaves out, such as a proof without an answer."""

    reason: str


class Unwanted(Exception):
    """Raised by `make_problem` for a row that is filtered out; the message is the filter's name."""


def load_rows(
    name: str,
    table: str | Iterable[dict | BrokenRow],
    split: str,
    make_problem: Callable[[dict], dict],
    *,
    config: str | None = None,
    default_config: str | None = None,
    size: int | None = None,
    skip: int = 0,
    source: str,
) -> Iterator[dict | BrokenRow | FilteredRow]:
    """Rows of a table (a path for `read_table`, or the rows) mapped by `make_problem`.

    Yields one item per row, in order: a problem with `id` and `source` filled in, a BrokenRow where
    a column is missing or of a wrong type, a FilteredRow where `make_problem` raises `Unwanted`.
    Yields `size` problems (default: all) after the first `skip`; broken and filtered rows count
    for neither.
    """
    for option, value, least in (("size", size, 1), ("skip", skip, 0)):
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"options.{option}: a whole number from {least} on (got {value!r})")
    num_wanted = 0
    is_path = isinstance(table, str)
    rows = read_table(table, split, config, default_config) if is_path else table
    for number, row in enumerate(rows, 1):
        if size is not None and num_wanted >= skip + size:
            return
        if isinstance(row, BrokenRow):
            yield row
            continue
        place = getattr(row, "place", "")
        try:
            problem = make_problem(row)
        except Unwanted as reason:
            yield FilteredRow(str(reason))
            continue
        except KeyError as error:
            yield BrokenRow(number, describe_missing(str(error.args[0]), row), place)
            continue
        except ValueError as error:
            yield BrokenRow(number, first_line(error), place)
            continue
        except (TypeError, AttributeError, IndexError) as error:
            yield BrokenRow(number, first_line(error, with_type=True), place)
            continue
        num_wanted += 1
        if num_wanted <= skip:
            yield FilteredRow("skipped")
        else:
            problem = {"id": f"{name}-{split}-{number - 1}", "source": source, **problem}
            yield place_row(problem, place)


def make_load(
    name: str,
    hub_id: str,
    make_problem: Callable[..., dict],
    *,
    instruction: str | None = None,
    split: str = "train",
    default_config: str | None = None,
    has_configs: bool = False,
) -> Callable[..., Iterator[dict | BrokenRow | FilteredRow]]:
    """`load(split, **options)` of a dataset on the hub, from `make_problem(row, **options)`.

    Its options are `path`, `size`, `skip` and those of `make_problem`; `config` where the dataset
    `has_configs`; and, with an `instruction`, `system`: the system prompt, by default the
    instruction, before the question that `make_problem` then returns as the "prompt".
    """

    def load(
        split: str = split,
        *,
        path: str = hub_id,
        config: str | None = None,
        system: str | None = instruction,
        size: int | None = None,
        skip: int = 0,
        **options: object,
    ) -> Iterator[dict | BrokenRow | FilteredRow]:
        def make_prompted(row: dict) -> dict:
            problem = make_problem(row, **options)
            if instruction is not None:
                problem["prompt"] = ask(problem["prompt"], system)
            return problem

        return load_rows(
            name,
            path,
            split,
            make_prompted,
            config=config,
            default_config=default_config,
            size=size,
            skip=skip,
            source=hub_id,
        )

    absent = {"options", *([] if has_configs else ["config"]), *([] if instruction else ["system"])}
    shared = [p for p in inspect.signature(load).parameters.values() if p.name not in absent]
    _, *own = inspect.signature(make_problem).parameters.values()
    load.__signature__ = inspect.Signature([*shared, *own])
    return load


def describe_missing(column: str, row: Iterable[str]) -> str:
    """A missing column, and the nearest one that is there."""
    return f'no column "{column}"; {hint_at(column, row)}'


def write_value(value: Any, what: str) -> str:
    """A cell as text, a number in plain decimals. Raises ValueError if it is empty, or if its value
    can be written in several ways: as an answer, "2024-01-01" may be read as 2022."""
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        value = int(value)
    elif isinstance(value, float) and math.isfinite(value):
        value = Decimal(repr(value))
    if isinstance(value, Decimal) and value.is_finite():
        value = format(value, "f")
    text = str(value).strip()
    if value is None or not text or text in NO_VALUE:
        shown = "null" if value is None else text or "empty"
        raise ValueError(f"no {what}: its column is {shown}")
    if isinstance(value, list | dict):
        keys = value if isinstance(value, dict) else range(len(value))
        some = ", ".join(str(key) for key in list(keys)[:5])
        raise ValueError(
            f"the {what} is a {type(value).__name__}: name what in it is meant, as COLUMN.KEY with "
            f"a key of {some or 'it, of which there is none'}"
        )
    if not isinstance(value, str | int) and what in ("answer", "solution"):
        raise ValueError(f"the {what} is {text}, a {type(value).__name__}: write it as text")
    return text


def ask(question: str, system: str | None = None) -> list[dict[str, str]]:
    """A question as chat messages. Raises ValueError if it is not text."""
    if not isinstance(question, str):
        raise ValueError(f"the question is {type(question).__name__}, not text")
    asked = [{"role": "user", "content": question}]
    return [{"role": "system", "content": system}, *asked] if system else asked


def map_conversation(messages: list[dict]) -> dict:
    """Messages as a problem of kind text: the last one is the answer to learn."""
    *prompt, answer = messages
    if answer["role"] != "assistant":
        raise ValueError("the last message is not the assistant's")
    turns = [{"role": m["role"], "content": m["content"]} for m in prompt]
    return {"kind": "text", "prompt": turns, "solution": answer["content"]}


def write_trace(steps: str, answer: str) -> str:
    """A trace: the steps inside <think>, then the answer in a box."""
    return f"<think>\n{steps.strip()}\n</think>\n\\boxed{{{answer}}}"


def last_boxed(text: str) -> str | None:
    """The content of a solution's last `\\boxed{}`."""
    boxes = find_boxes(text)
    return boxes[-1].content if boxes else None
