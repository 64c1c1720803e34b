"""Splits a streamed completion into thoughts and answer. Imports no torch."""

import re
from collections.abc import Iterator

OPEN = "<think>"
TAG = re.compile(r"(<[^<>/\s][^<>\s]*>|\[[^\[\]/\s]+\]|◁[^◁▷/\s]+▷)\s*$")
ANY_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|◁[^◁▷\s]+▷")
ROLE = re.compile(r"\||assist|model|bot|gpt|agent|user|human|inst|answer|response", re.IGNORECASE)
MIND = re.compile(r"think|thought|reason|reflect|analy|scratch", re.IGNORECASE)


def find_opened_tag(prompt: str, header: str) -> str:
    """The tag that a prompt ends with, and the white space after it, such as "<think>\\n": the part
    of the completion that the chat template writes; empty for most.

    Tags that begin the assistant's turn, such as `<|assistant|>`, are not meant: `header`, which
    the template writes before a given answer, ends with those.
    """
    found = TAG.search(prompt)
    if found is None:
        return ""
    tag = found[1]
    begins_turn = not header or header.rstrip().endswith(tag) or ROLE.search(tag)
    return "" if begins_turn and not MIND.search(tag) else found[0]


def close_tag(tag: str) -> str:
    """</think> for <think>, [/THINK] for [THINK], <|end_of_thought|> for <|begin_of_thought|>."""
    if "begin_of" in tag or "start_of" in tag:
        return tag.replace("begin_of", "end_of").replace("start_of", "end_of")
    return f"{tag[0]}/{tag[1:]}"


def drop_opening(solution: str, opening: str) -> str:
    """A trace to follow a prompt that ends with `opening`: without that tag or, if the trace has
    no thoughts, with the closing tag first."""
    if not opening:
        return solution
    tag = opening.rstrip()
    space = opening.removeprefix(tag)
    text = solution.lstrip()
    if text.startswith(tag):
        text = text.removeprefix(tag)
        return text.removeprefix(space) if text.startswith(space) else text.lstrip()
    if any(MIND.search(other) for other in ANY_TAG.findall(text)):
        return solution
    return f"{close_tag(tag)}\n\n{solution}"


class ThinkingSplitter:
    """Splits a completion that arrives in pieces of any size; a tag may be cut in two.

    A completion starts with thoughts if it begins with `<think>` or the prompt has `opened` a tag.
    """

    def __init__(self, opened: str = ""):
        self._close = close_tag(opened.rstrip() or OPEN)
        self._thinks: bool | None = True if opened else None
        """None until the first characters have arrived."""
        self._held = ""

    def feed(self, piece: str) -> Iterator[tuple[bool, str]]:
        """(whether it is thinking, text), for the text that is certain so far."""
        self._held += piece
        if self._thinks is None:
            start = self._held.lstrip()
            if len(start) < len(OPEN) and OPEN.startswith(start):
                return
            self._thinks = start.startswith(OPEN)
            if self._thinks:
                self._held = start.removeprefix(OPEN)
        if self._thinks and self._close in self._held:
            thought, self._held = self._held.split(self._close, 1)
            self._thinks = False
            if thought:
                yield True, thought
        end = len(self._held) - (self._count_start_of_tag() if self._thinks else 0)
        text, self._held = self._held[:end], self._held[end:]
        if text:
            yield self._thinks, text

    def finish(self) -> Iterator[tuple[bool, str]]:
        """The text held back because it might have been a tag."""
        if self._held:
            yield bool(self._thinks), self._held
        self._held = ""

    def _count_start_of_tag(self) -> int:
        lengths = range(min(len(self._close) - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if self._held.endswith(self._close[:n])), 0)
