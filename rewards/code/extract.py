"""Find the program in a completion. One extractor for every kind of test.

In this order, and only outside the thinking:

1. the last fenced block that is marked as Python (``python``, ``py3``, ``python3.11``, ``pypy``...)
   and defines the entry point, if one is known;
2. the last block marked as Python;
3. the last block that is Python and has no mark, or one that names no language (``text``,
   ``code``), entry point first again;
4. a text without any fence that is Python as a whole and does something: more than names,
   numbers and strings, which prose may be, too;
5. with a ``prompt`` (HumanEval), a text that begins with white space and continues it.

Names that the block does not define are taken from the last earlier block that does. A fence may
stand behind other text, close at the end of a line of code, be followed by text, or never close:
then the block runs to the end. Where fences do not pair up and the first one has a program before
it, the prompt has opened that one.

What is found may be a whole program, or, with a prompt, the body of the function that the prompt
begins: then it is put behind it. A program that defines the entry point itself is put behind the
prompt as well, whose imports and helpers it may use; so the prompt's own stub is replaced.

Names that are then still missing are taken from the tests' set-up code, if it has them; those of a
class ``Solution`` also from the modules that LeetCode and its like import for everybody.
"""

import ast
import builtins
import functools
import importlib
import re
import sys
import textwrap
import warnings
from typing import NamedTuple, cast

from rewards.code.spec import JUDGE_SETUP
from rewards.text.completions import split_thinking

MAX_CHARS = 200_000
MAX_TRIES = 24  # attempts to parse a part of the text, to find where code begins or ends

_FENCE = re.compile(r"`{3,}|~{3,}")
_LINE_START = re.compile(r"[ \t]*(?:>[ \t]?)*[ \t]*")
_QUOTE = re.compile(r"[ \t]*(?:>[ \t]?)+")
_MARK = re.compile(r"[ \t]*\{?([\w+.#-]*)\}?[ \t]*(.*)")
_PYTHON_MARK = re.compile(r"(?:[ic]?python|pypy|py)[\d.]*", re.IGNORECASE)
_NO_LANGUAGE = {"", "code", "none", "plain", "plaintext", "raw", "text", "txt"}
_CODE_START = re.compile(r"(?:def|class|import|from|async def)\b|@\w|[A-Za-z_]\w* = ")
_END_TOKENS = re.compile(r"(?:\s*(?:<\|[^|<>\n]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|</s>))+\s*\Z")


class _Block(NamedTuple):
    mark: str
    body: str

    @property
    def is_marked(self) -> bool:
        return _PYTHON_MARK.fullmatch(self.mark) is not None


def extract_code(
    text: str, entry_point: str | None = None, prompt: str = "", setup: str | None = None
) -> str | None:
    """Return the program that a completion gives, ready to be run; None if there is none.

    ``entry_point`` is the name that it has to define, ``prompt`` the code that it may continue,
    ``setup`` the code that missing names come from; None where programs run as they are.
    """
    text = split_thinking(text)[1]
    if len(text) > MAX_CHARS:
        return None
    tail = _END_TOKENS.search(text, max(0, len(text) - 400))
    text = (text[: tail.start()] if tail else text).replace("\r\n", "\n")
    code = _find_code(text, entry_point, prompt)
    if code is None:
        return None
    code = _join(prompt, code, entry_point)
    if setup is not None and re.search(r"^class Solution\b", code, re.MULTILINE):
        setup = f"{JUDGE_SETUP}\n{setup}"
    return _add_setup(code, setup) if setup else code


def _find_code(text: str, entry_point: str | None, prompt: str) -> str | None:
    blocks = _Reader(text, prompt).read()
    marked = [block.body for block in blocks if block.is_marked and block.body.strip()]
    if marked:
        return _choose(marked, entry_point)
    unmarked = [b.body for b in blocks if b.mark in _NO_LANGUAGE and is_program(b.body, prompt)]
    if unmarked:
        return _choose(unmarked, entry_point)
    if blocks:
        return None
    return text if is_program(text, prompt) else None


def _match(pattern: re.Pattern[str], text: str, start: int = 0) -> re.Match[str]:
    """Match a pattern that always matches, if only the empty string."""
    return cast("re.Match[str]", pattern.match(text, start))


class _Reader:
    """Reads a text's fenced blocks line by line, in linear time."""

    def __init__(self, text: str, prompt: str):
        self.lines = text.split("\n")
        self.prompt = prompt
        self.tries = MAX_TRIES
        # For each line, the longest fence that it or a later line starts with: linear time.
        self.longest = {"`": [0] * (len(self.lines) + 1), "~": [0] * (len(self.lines) + 1)}
        for sort, longest in self.longest.items():
            for index in range(len(self.lines) - 1, -1, -1):
                start = _match(_LINE_START, self.lines[index]).end()
                rest = self.lines[index][start : start + 100]
                longest[index] = max(longest[index + 1], len(rest) - len(rest.lstrip(sort)))

    def read(self) -> list[_Block]:
        blocks, index, seen_fence = [], 0, False
        while index < len(self.lines):
            fence = _FENCE.search(self.lines[index])
            if fence is None:
                index += 1
                continue
            if not seen_fence and (opened := self._read_opened_by_prompt(index, fence)):
                blocks.append(opened)
                index += 1
            elif block := self._read_one_line(index, fence):
                blocks.append(block)
                index += 1
            elif self._opens(index, fence):
                block, index = self._read_block(index, fence)
                blocks.append(block)
            else:
                index += 1
            seen_fence = True
        return blocks

    def _read_opened_by_prompt(self, index: int, fence: re.Match[str]) -> _Block | None:
        """Return the program before the text's first fence, if that is there to close it."""
        line = self.lines[index]
        num_fences = sum(len(_FENCE.findall(line)) for line in self.lines)
        if num_fences % 2 == 0 or line[fence.end() :][:1].isalnum():
            return None
        before = [*self.lines[:index], line[: fence.start()]]
        if is_program(text := "\n".join(before).strip("\n") + "\n", self.prompt):
            return _Block("python", text)
        starts = [n for n, text in enumerate(before) if _CODE_START.match(text)]
        for start in starts[:4]:  # after words that announce it
            if is_program(text := "\n".join(before[start:]).rstrip() + "\n"):
                return _Block("python", text)
        return None

    def _read_one_line(self, index: int, fence: re.Match[str]) -> _Block | None:
        rest = self.lines[index][fence.end() :]
        content, closing, _ = rest.partition(fence.group()[:3])
        if not closing or not content.strip():
            return None
        mark, _, code = content.strip().partition(" ")
        if not _PYTHON_MARK.fullmatch(mark):
            mark, code = "", content
        return _Block(mark, code.strip() + "\n")

    def _opens(self, index: int, fence: re.Match[str]) -> bool:
        line = self.lines[index]
        if _match(_LINE_START, line).end() == fence.start():
            return True
        mark, info = _match(_MARK, line, fence.end()).groups()
        return fence.group()[0] == "`" and not info and (not mark or _is_python(mark))

    def _read_block(self, index: int, fence: re.Match[str]) -> tuple[_Block, int]:
        """Return the block that a fence opens, and the number of the first line behind it."""
        opening = self.lines[index]
        mark, info = _match(_MARK, opening, fence.end()).groups()
        sort, length = fence.group()[0], len(fence.group())
        first = index + 1
        if self.longest[sort][first] < length:  # never closed, or by a shorter one
            length = 3
        body, behind = self._read_body(first, sort * length)
        if ">" in opening[: fence.start()]:
            body = [_QUOTE.sub("", line) for line in body]
        text = _tidy("\n".join(body).rstrip("\n"), self.prompt)
        text += "\n" if text else ""
        if info and _is_python(mark) and _is_call_or_import(info):
            text = f"{info}\n{text}"
        return _Block(mark.lower(), text), behind

    def _read_body(self, first: int, fence: str) -> tuple[list[str], int]:
        body: list[str] = []
        for index in range(first, len(self.lines)):
            line = self.lines[index]
            place = line.find(fence)
            if place < 0:
                body.append(line)
                continue
            rest = line[place:].lstrip(fence[0])
            if _match(_LINE_START, line).end() == place:
                if not (rest[:1].isalnum() or rest[:1] in ("{", "_")):
                    return body, index + 1
                if self._is_whole(body):
                    mark, info = _match(_MARK, rest).groups()
                    opens = not info or _is_python(mark)  # the next block; this one is not closed
                    return body, index if opens else index + 1
            elif self._is_whole([*body, line[:place]]):
                return [*body, line[:place]], index + 1
            body.append(line)
        return body, len(self.lines)

    def _is_whole(self, body: list[str]) -> bool:
        """Say whether a block may end here: its body parses."""
        self.tries -= 1
        return self.tries >= 0 and is_program(_tidy("\n".join(body)), self.prompt)


def _is_python(mark: str) -> bool:
    return _PYTHON_MARK.fullmatch(mark) is not None


def _is_call_or_import(info: str) -> bool:
    """Say whether the words behind a mark are the program's first line, not a file's name."""
    tree = _parse(info)
    return tree is not None and all(
        isinstance(s, ast.Import | ast.ImportFrom)
        or (isinstance(s, ast.Expr) and isinstance(s.value, ast.Call))
        for s in tree.body
    )


def _tidy(body: str, prompt: str = "") -> str:
    """Return a block's text without a byte order mark and without an indent of the whole."""
    body = body.removeprefix("\ufeff")
    continues = bool(prompt) and _parse(prompt + body) is not None
    return textwrap.dedent(body) if body[:1] in (" ", "\t") and not continues else body


def _choose(blocks: list[str], entry_point: str | None) -> str:
    """Return the block that defines the entry point, else the last, with what it needs."""
    index = len(blocks) - 1
    if entry_point:
        for is_there in (defines, _has_method):
            found = [n for n, body in enumerate(blocks) if is_there(body, entry_point)]
            if found:
                index = found[-1]
                break
    code = blocks[index]
    for body in blocks[max(0, index - MAX_TRIES) : index][::-1]:
        missing = _find_missing(code)
        if missing and any(defines(body, name) for name in missing):
            code = f"{body.rstrip()}\n\n{code}"
    return code


def _find_missing(code: str) -> set[str]:
    """Return the names that a program uses and neither it nor Python defines."""
    tree = _parse(code)
    if tree is None:
        return set()
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    bound = {name.id for name in names if not isinstance(name.ctx, ast.Load)}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            bound.add(node.name)
        elif isinstance(node, ast.alias):
            bound.add((node.asname or node.name).partition(".")[0])
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            bound.add(node.name)
    for node in ast.walk(tree) if "*" in bound else ():
        if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
            if node.module not in sys.stdlib_module_names:  # it may define anything
                return set()
            bound |= set(_list_public_names(node.module))
    return {name.id for name in names} - bound - set(dir(builtins))


def _add_setup(code: str, setup: str) -> str:
    """Prepend the statements of ``setup`` that define names the program lacks."""
    offered = _read_setup(setup)
    added: dict[str, None] = {}
    for _ in range(4):  # added statements may need others
        missing = _find_missing("\n".join([*added, code])) & offered.keys()
        if not missing:
            break
        needed: dict[str, None] = {}
        for name in sorted(missing):
            is_module = re.search(rf"\b{name}\.", code) is not None
            ways = offered[name]
            needed[next((w for w in ways if w.startswith("import ") == is_module), ways[-1])] = None
        added = needed | added
    if not added:
        return code
    tree, first = _parse(code), 1  # the line to insert at: after __future__ imports
    for statement in tree.body if tree else ():
        if isinstance(statement, ast.ImportFrom) and statement.module == "__future__":
            first = (statement.end_lineno or 0) + 1
    lines = code.split("\n")
    return "\n".join([*lines[: first - 1], *added, *lines[first - 1 :]])


@functools.lru_cache(maxsize=64)
def _read_setup(setup: str) -> dict[str, list[str]]:
    """Return the names that set-up code defines, with the statements that do."""
    tree = _parse(setup)
    offered: dict[str, list[str]] = {}
    for statement in tree.body if tree else ():
        if isinstance(statement, ast.ImportFrom) and statement.names[0].name == "*":
            module = statement.module
            pairs = [(n, f"from {module} import {n}") for n in _list_public_names(module)]
        elif isinstance(statement, ast.Import):
            pairs = [
                ((a.asname or a.name).partition(".")[0], ast.unparse(ast.Import([a])))
                for a in statement.names
            ]
        else:
            pairs = [(name, ast.unparse(statement)) for name in _bound_names(statement)]
        for name, text in pairs:
            offered.setdefault(name, []).append(text)
    return offered


@functools.cache
def _list_public_names(module: str | None) -> tuple[str, ...]:
    """Return what ``from module import *`` brings, of the standard library's modules."""
    if module not in sys.stdlib_module_names:
        return ()
    try:
        found = importlib.import_module(module)
    except ImportError:
        return ()
    public = [name for name in vars(found) if not name.startswith("_")]
    return tuple(getattr(found, "__all__", public))


def _parse(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in strings are theirs
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def is_program(text: str, prompt: str = "") -> bool:
    """Say whether a text is code: Python that does something, or the rest of the prompt."""
    tree = _parse(text)
    if tree is not None:
        return any(not _is_idle(statement) for statement in tree.body)
    return bool(prompt) and text[:1].isspace() and _parse(prompt + text) is not None


def _is_idle(statement: ast.stmt) -> bool:
    """Say whether a statement has no effect, like a line of prose or an answer."""
    if isinstance(statement, ast.AnnAssign):  # "Answer: 42"
        return statement.value is None
    if not isinstance(statement, ast.Expr):
        return False
    return not any(isinstance(node, ast.Call) for node in ast.walk(statement))


def defines(code: str, name: str) -> bool:
    """Say whether ``code`` gives ``name`` a value at its top level."""
    tree = _parse(code)
    return tree is not None and any(name in _bound_names(statement) for statement in tree.body)


def _has_method(code: str, name: str) -> bool:
    """Say whether ``code`` has a class with that method, as LeetCode's ``Solution``."""
    tree = _parse(code)
    classes = [s for s in tree.body if isinstance(s, ast.ClassDef)] if tree else []
    return any(name in _bound_names(statement) for c in classes for statement in c.body)


def _bound_names(statement: ast.stmt) -> set[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {alias.asname or alias.name for alias in statement.names}
    if isinstance(statement, ast.Assign | ast.AnnAssign | ast.If | ast.Try | ast.With):
        return {
            n.id
            for n in ast.walk(statement)
            if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)
        } | {n.name for n in ast.walk(statement) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return set()


def _join(prompt: str, code: str, entry_point: str | None) -> str:
    """Prepend what the code needs of the prompt."""
    if not prompt:
        return code
    if entry_point and (defines(code, entry_point) or _has_method(code, entry_point)):
        return f"{prompt}\n\n{code}" if _parse(prompt) else code
    for body in (code, textwrap.indent(code, "    ")):
        if body[:1].isspace() and _parse(prompt + body):
            return prompt + body
    return code
