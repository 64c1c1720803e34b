"""What a completion says, and which part of it is thinking.

A trainer hands over completions either as strings or as chat messages, and a reasoning model
writes ``<think>...</think>`` before it answers. Everything that reads a completion goes through
the two functions here, so that "the text" and "outside the thinking" mean one thing.
"""

import re
from collections.abc import Mapping, Sequence

Completion = str | Sequence[Mapping[str, object]]

_THINK_TAG = re.compile(r"<(/?)(think|thinking|thoughts?|reason|reasoning)>")
# What samplers leave of a chat template: <|im_end|>, <｜end▁of▁sentence｜>, </s>, [EOS].
_SPECIAL_TOKENS = {
    "<": re.compile(
        r"<(?:[|｜][^|｜<>]{1,40}[|｜]>|/?s>|(?:eos|bos|pad|unk|eo[td]|endoftext)>"
        r"|(?:start|end)_of_(?:turn|text|sentence)>)",
        re.IGNORECASE,
    ),
    "[": re.compile(r"\[(?:EOS|BOS|PAD|UNK|EOT|SEP|CLS|/?INST)\]"),
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
    turns = [m for m in completion if m.get("role", "assistant") == "assistant"]
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
    Without any tag all of the text is answer. ``<thinking>``, ``<thought>`` and ``<reasoning>``
    are tags like ``<think>`` where the text closes them, too.
    """
    if "<think>" not in text and "</" not in text:  # the quick way for most
        return "", text
    tags = list(_THINK_TAG.finditer(text))
    closed = {"think"} | {tag[2] for tag in tags if tag[1]}
    tags = [tag for tag in tags if tag[2] in closed]
    inside = tags[0][2] if tags and tags[0][1] else ""
    thinking, answer, position = [], [], 0
    for tag in tags:
        closes, name = tag.groups()
        if inside and name != inside:
            continue
        (thinking if inside else answer).append(text[position : tag.start()])
        inside = "" if closes else name
        position = tag.end()
    (thinking if inside else answer).append(text[position:])
    return "".join(thinking), "".join(answer)


def strip_special_tokens(text: str) -> str:
    """Return ``text`` with a line break in place of each special token of a chat template."""
    for opener, tokens in _SPECIAL_TOKENS.items():
        if opener in text:
            text = tokens.sub("\n", text)
    return text
