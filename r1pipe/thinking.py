"""Takes what a model has thought and what it answers apart, as it comes. Imports no torch."""

from collections.abc import Iterator

OPEN, CLOSE = "<think>", "</think>"


class ThinkingSplitter:
    """Splits a completion that arrives in pieces of any size, tags cut in two among them.

    A completion thinks first if it begins with `<think>`, or if `opened`: the prompt ended with it.
    """

    def __init__(self, opened: bool = False):
        self._thinks: bool | None = True if opened else None
        """None until the first signs have come."""
        self._held = ""

    def feed(self, piece: str) -> Iterator[tuple[bool, str]]:
        """(whether it is thinking, text) for all that is certain by now."""
        self._held += piece
        if self._thinks is None:
            start = self._held.lstrip()
            if len(start) < len(OPEN) and OPEN.startswith(start):
                return
            self._thinks = start.startswith(OPEN)
            if self._thinks:
                self._held = start.removeprefix(OPEN)
        if self._thinks and CLOSE in self._held:
            thought, self._held = self._held.split(CLOSE, 1)
            self._thinks = False
            if thought:
                yield True, thought
        end = len(self._held) - (self._count_start_of_tag() if self._thinks else 0)
        text, self._held = self._held[:end], self._held[end:]
        if text:
            yield self._thinks, text

    def finish(self) -> Iterator[tuple[bool, str]]:
        """What was held back because it could have become a tag."""
        if self._held:
            yield bool(self._thinks), self._held
        self._held = ""

    def _count_start_of_tag(self) -> int:
        lengths = range(min(len(CLOSE) - 1, len(self._held)), 0, -1)
        return next((n for n in lengths if self._held.endswith(CLOSE[:n])), 0)
