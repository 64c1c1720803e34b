"""What a completion says, and which part of it is thinking.

A trainer hands over completions either as strings or as chat messages, and a reasoning model
writes ``<think>...</think>`` before it answers. Everything that reads a completion goes through
the two functions here, so that "the text" and "outside the thinking" mean one thing.
"""

import re
from collections.abc import Mapping, Sequence
from typing import cast

Completion = str | Sequence[Mapping[str, object]]

# R1's tags, and those that others write: [THINK] (Magistral), ◁think▷ (Kimi), ...
_THINK_TAG = re.compile(
    r"[<\[◁](?P<close>/?)(?P<name>think|thinking|thoughts?|reason|reasoning|seed:think|THINK)[>\]▷]"
    r"|<\|(?:begin|(?P<end>end))_of_thought\|>"
)
_TAG_STEMS = ("think", "thought", "reason", "THINK")
# What samplers leave of a chat template: <|im_end|>, <｜end▁of▁sentence｜>, </s>, [EOS].
_SPECIAL_TOKENS = {
    "<": re.compile(
        r"<(?:[|｜][^|｜<>]{1,40}[|｜]>|/?s>|(?:eos|bos|pad|unk|eo[dmt]|end|stop|endoftext|0x[0-9a-f]{2})>"
        r"|(?:start|end)_of_(?:turn|text|sentence)>)",
        re.IGNORECASE,
    ),
    "[": re.compile(r"\[(?:EOS|BOS|PAD|UNK|EOT|END|STOP|SEP|CLS|/?INST)\]"),
}


def completion_text(completion: Completion) -> str:
    """Return the text of one completion.

    A string is returned as it is. For a message list (TRL's conversational format) the contents
    of the assistant's messages are joined; tool results and user turns are not the model's words
    and are left out. Content given as parts (``[{"type": "text", "text": ...}]``) is joined too.
    Anything else raises ``TypeError``.
    """
    if isinstance(completion, str):
        return completion
    if not isinstance(completion, Sequence) or isinstance(completion, bytes):
        raise TypeError(f"a completion is a string or a message list, not {type(completion)}")
    messages = cast("Sequence[Mapping[str, object]]", completion)
    turns = [m for m in messages if m.get("role", "assistant") == "assistant"]
    return "\n".join(_content_text(m.get("content")) for m in turns)


def _content_text(content: object) -> str:
    if content is None:  # a message that only calls a tool
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise TypeError(f"message content is a string or a list of parts, not {type(content)}")
    return "".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))


def split_thinking(text: str) -> tuple[str, str]:
    """Split a completion into ``(thinking, answer)``: the text inside and outside ``<think>``.

    Many chat templates end the prompt with ``<think>``, and samplers return the completion only.
    So a completion whose first tag is ``</think>`` is taken to have begun inside the thinking.
    An unclosed ``<think>`` runs to the end: a completion cut off while thinking has no answer.
    Without any tag all of the text is answer. ``<thinking>``, ``<thought>``, ``<reasoning>`` and
    what other models write count like ``<think>`` where the text closes them.
    """
    may_have_tag = "<" in text or "[THINK]" in text or "◁" in text
    if not may_have_tag or not any(stem in text for stem in _TAG_STEMS):  # fast path
        return "", text
    tags = [
        (tag["name"] or "thought", bool(tag["close"] or tag["end"]), tag)
        for tag in _THINK_TAG.finditer(text)
    ]
    if not tags:
        return "", text
    closed = {"think", "THINK"} | {name for name, closes, _ in tags if closes}
    tags = [tag for tag in tags if tag[0] in closed]
    inside = tags[0][0] if tags and tags[0][1] else ""
    thinking: list[str] = []
    answer: list[str] = []
    position = 0
    for name, closes, tag in tags:
        if inside and name != inside:
            continue
        (thinking if inside else answer).append(text[position : tag.start()])
        inside = "" if closes else name
        position = tag.end()
    (thinking if inside else answer).append(text[position:])
    return "".join(thinking), "".join(answer)


def strip_special_tokens(text: str) -> str:
    """Return ``text`` with a line break in place of each special token of a chat template."""
    text = text.replace("▁", " ")  # a space, as sentencepiece writes it
    for opener, tokens in _SPECIAL_TOKENS.items():
        if opener in text:
            text = tokens.sub("\n", text)
    return text
