"""Tokenizers, chat templates and end tokens; training and sampling encode alike."""

import contextlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from r1pipe.config.rl import OnPolicyDistill
from r1pipe.models.thinking import find_opened_tag
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError, first_line

CHAT_TEMPLATE = (
    # A tool's signature, calculator(expression): its JSON schema would be a hundred tokens more.
    "{% if tools %}<|tools|>{% for tool in tools %}{{ tool.function.name }}"
    "({{ tool.function.parameters.properties | join(', ') }}){% endfor %}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls %}<tool_call>"
    "{{ {'name': call.function.name, 'arguments': call.function.arguments}"
    " | tojson(separators=(',', ':')) }}</tool_call>{% endfor %}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PAD, END, ROLES = "<|pad|>", "<|end|>", ("<|system|>", "<|user|>", "<|assistant|>")
THINK = ("<think>", "</think>")
TOOL_ROLES, CALL = ("<|tools|>", "<|tool|>"), ("<tool_call>", "</tool_call>")
"""Of those who call tools; vLLM's parser `hermes` reads the calls."""
SPECIAL = ("pad", "eos", "bos")

TAIL = 16
"""Tokens at a prompt's end that are searched for an opened tag."""


def build_tokenizer(
    texts: Iterable[str], vocab_size: int, *, calls_tools: bool = False
) -> PreTrainedTokenizerFast:
    """A byte-level BPE with a chat template, an end token and `<think>`/`</think>`; for who
    `calls_tools`, `<tool_call>`/`</tool_call>` as well.

    Words, numbers of up to three digits and single signs are split first, so a frequent number is
    one token. Decoding gives back any text exactly.
    """
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}{1,3}|[^\s\p{L}\p{N}]|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    roles, marks = ((*ROLES, *TOOL_ROLES), THINK + CALL) if calls_tools else (ROLES, THINK)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(marks),
        special_tokens=[PAD, END, *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    # Not special tokens: decoding would drop them, and rewards read them.
    wrapped.add_tokens(list(marks))
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def load_tokenizer(checkpoint: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, with a chat template, an end token and a padding token.

    `chat_template`, Jinja, is used if it has none. Raises UserError if one of them is missing.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise UserError(f"{checkpoint}: no tokenizer: {first_line(error)}") from error
    if not tokenizer.encode("2", add_special_tokens=False):
        # transformers silently makes an empty one of the architecture's class.
        raise UserError(f"{checkpoint}: no tokenizer: no tokenizer.json, or an empty one")
    if lost := find_token_without_row(tokenizer, checkpoint):
        raise UserError(
            f"{checkpoint}: the embedding has no row for the token {lost!r}: take it out of "
            "tokenizer.json, or model.resize_token_embeddings(len(tokenizer)) first"
        )
    tokenizer.chat_template = tokenizer.chat_template or chat_template
    if not tokenizer.chat_template:
        raise UserError(
            f"{checkpoint}: the tokenizer has no chat template, as a base model's: give one in the "
            "recipe (chat_template: FILE.jinja) or in the model's folder, as chat_template.jinja"
        )
    if tokenizer.eos_token_id is None:
        known = [tokenizer.convert_ids_to_tokens(n) for n in read_end_ids(checkpoint)]
        if not any(known):
            raise UserError(
                f"{checkpoint}: no end token: set eos_token in its tokenizer_config.json"
            )
        tokenizer.eos_token = next(filter(None, known))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def find_token_without_row(tokenizer: PreTrainedTokenizerBase, checkpoint: str) -> str | None:
    """A token of the checkpoint whose id is beyond the embedding's rows; None if there is none."""
    try:
        num_rows = AutoConfig.from_pretrained(checkpoint).get_text_config().vocab_size
        stored = Path(cached_file(checkpoint, "tokenizer.json", local_files_only=True))
        tokens = json.loads(stored.read_text(encoding="utf-8"))["added_tokens"]
    except (OSError, ValueError, LookupError, AttributeError):
        return None
    # Except the unknown token: transformers gives every Qwen2 its own <|endoftext|> as one, which
    # a byte-level tokenizer never needs, and saves it with the rest.
    added = (t["content"] for t in tokens if t["content"] != tokenizer.unk_token)
    return next((t for t in added if (tokenizer.convert_tokens_to_ids(t) or 0) >= num_rows), None)


def read_end_ids(checkpoint: str) -> list[int]:
    """End tokens of a checkpoint's generation_config.json or, without that file, config.json. vLLM
    stops at these, and at the tokenizer's own."""
    ids, num_rows = [], None
    with contextlib.suppress(OSError, ValueError):
        config = AutoConfig.from_pretrained(checkpoint)
        ids, num_rows = list_ids(config), getattr(config.get_text_config(), "vocab_size", None)
    with contextlib.suppress(OSError, ValueError):
        ids = list_ids(GenerationConfig.from_pretrained(checkpoint))
    for number in ids:
        if not isinstance(number, int) or number not in range(num_rows or 2**31):
            raise UserError(
                f"{checkpoint}: eos_token_id of its generation_config.json or config.json: "
                f"{number!r} is not the id of a token"
            )
    return ids


def list_ids(config: GenerationConfig | PreTrainedConfig) -> list[int]:
    """`eos_token_id` as a list; it may be one, several or None."""
    ids = getattr(config, "eos_token_id", None)
    return list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]


def join_end_ids(tokenizer: PreTrainedTokenizerBase, others: Iterable[int]) -> list[int]:
    """All tokens that end a completion, the tokenizer's own first."""
    return list(dict.fromkeys([tokenizer.eos_token_id, *others]))


Messages = list[dict[str, Any]]


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    name: str = "the conversation",
    tools: Messages | None = None,
) -> list[int]:
    """Token ids up to where the assistant's turn begins. `tools`: their JSON schemas.

    Raises UserError, with the prompt's `name`, if the chat template rejects it."""
    options = {"tools": tools} if tools else {}
    return apply_template(
        tokenizer, messages, name, add_generation_prompt=True, return_dict=False, **options
    )


def encode_next_prompt(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    end_ids: Iterable[int],
    name: str = "the conversation",
    tools: Messages | None = None,
) -> list[int]:
    """Only what the chat template adds behind the end token of the last answer in `messages`, up to
    where the assistant's next turn begins. To be appended to that answer as it was sampled: encoded
    from its text it may be other tokens, and templates leave out earlier turns' reasoning.

    Raises UserError if the template cannot go on from an answer."""
    place = max(n for n, message in enumerate(messages) if message["role"] == "assistant")
    written = "".join(str(message.get("content")) for message in messages)
    answer = SHOWN
    while answer in written:
        answer += "?"
    # Without calls, and answers as plain text: what stands before the last one's end is not used.
    shown = [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]
    shown[place] = {"role": "assistant", "content": answer}
    options = {"tools": tools} if tools else {}
    text = apply_template(
        tokenizer, shown, name, add_generation_prompt=True, tokenize=False, **options
    )
    _, found, behind = text.rpartition(answer)
    if not found:
        raise UserError(f"{name}: the chat template leaves out an answer that messages follow")
    end = tokenizer.convert_ids_to_tokens(find_end_id(tokenizer, end_ids))
    if end in find_answer_frame(tokenizer)[1]:
        behind = behind.partition(end)[2]
    return tokenizer.encode(behind, add_special_tokens=False)


def write_answer(
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    end_id: int,
    name: str = "the conversation",
    tools: Messages | None = None,
) -> str:
    """The last of `messages` as the policy is to say it: its content or, with calls of tools, what
    the chat template writes, up to its end token.

    Raises UserError for a template that does not write a call where an answer begins."""
    *before, message = messages
    if not message.get("tool_calls"):
        return message["content"]
    options = {"tools": tools} if tools else {}
    asked = apply_template(
        tokenizer, before, name, add_generation_prompt=True, tokenize=False, **options
    )
    header, behind = find_answer_frame(tokenizer)
    asked = asked.removesuffix(find_opened_tag(asked, header))
    whole = apply_template(tokenizer, messages, name, tokenize=False, **options)
    if not whole.startswith(asked):
        raise UserError(
            f"{name}: the chat template does not write a tool call where an answer begins: write "
            "it into the content, as text"
        )
    end = tokenizer.convert_ids_to_tokens(end_id)
    said = whole.removeprefix(asked)
    return said.rpartition(end)[0] if end in behind else said


def apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, name: str, **options: Any
) -> Any:
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # a template is a program: it may raise anything
        hint = ""
        if any(message["role"] == "system" for message in messages):
            hint = "; it may know no system prompt: leave out `system`, or write it into the prompt"
        what = f"{name}: the chat template refuses it: {first_line(error)}{hint}"
        raise UserError(what) from error


ASKED, SHOWN = "Which numbers?", "4 and 2"
"""A conversation to find out what a template writes around an answer."""


def find_answer_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The chat template's text before and after a given answer; two empty strings if it leaves out
    answers. Raises UserError if it fails, or leaves out the user's message."""
    messages = [
        {"role": "user", "content": ASKED},
        {"role": "assistant", "content": SHOWN},
    ]
    name = f"{tokenizer.name_or_path}: a question and its answer"
    text = apply_template(tokenizer, messages, name, tokenize=False)
    if ASKED not in text:
        raise UserError(
            f"{tokenizer.name_or_path}: the chat template leaves out what the user says; one for "
            "content in parts, as of a multimodal model, must take texts as well"
        )
    before, _, behind = text.rpartition(SHOWN)
    return before, behind if before else ""


def find_end_id(tokenizer: PreTrainedTokenizerBase, end_ids: Iterable[int]) -> int:
    """The token that completions are trained to end with: the first of `end_ids` that the chat
    template writes after an answer, by default the tokenizer's own. phi's differs from that."""
    _, behind = find_answer_frame(tokenizer)
    texts = {number: tokenizer.convert_ids_to_tokens(number) for number in end_ids}
    written = [number for number, text in texts.items() if text and text in behind]
    return min(written, key=lambda n: behind.index(texts[n]), default=tokenizer.eos_token_id)


def find_opening(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], header: str) -> str:
    """The part of the completion at the prompt's end, such as "<think>\\n"; mostly empty.

    `header`: the text before an answer (`find_answer_frame`)."""
    return find_opened_tag(tokenizer.decode(prompt_ids[-TAIL:]), header)


def check_length(
    problem: Problem, num_tokens: int, max_completion_length: int, context: int
) -> None:
    """Raises UserError if a prompt of `num_tokens` and a completion exceed the context."""
    if num_tokens + max_completion_length > context:
        raise UserError(
            f'problem "{problem.id}": prompt of {num_tokens} tokens + max_completion_length '
            f"{max_completion_length} do not fit the context of {context}; "
            "raise engine.max_model_len, or, where the stage trains, drop such problems by "
            "max_prompt_length"
        )


def encode_completion(
    tokenizer: PreTrainedTokenizerBase, text: str, end_id: int | None = None
) -> list[int]:
    """Token ids of a completion and its end token, as the sampler would return them."""
    end = tokenizer.eos_token_id if end_id is None else end_id
    return [*tokenizer.encode(text, add_special_tokens=False), end]


def require_same_vocabulary(
    stage: OnPolicyDistill,
    name: str,
    teacher: PreTrainedTokenizerBase,
    student: PreTrainedTokenizerBase,
    teacher_end_ids: list[int],
    student_end_ids: list[int],
) -> None:
    """`name`: the teacher's. Raises UserError naming the first token that differs, or an end token
    of the teacher's at which the student does not stop."""
    if difference := find_difference(teacher, student):
        raise UserError(
            f'stage "{stage.name}": teacher {name} and student {stage.student} have not the '
            f"same vocabulary: {difference}; take a student of the teacher's family, or teach it "
            "off-policy, by a distill stage"
        )
    end = find_end_id(teacher, teacher_end_ids)
    if end not in student_end_ids:
        raise UserError(
            f'stage "{stage.name}": teacher {name} ends with '
            f"{teacher.convert_ids_to_tokens(end)!r}, at which student {stage.student} does not "
            "stop: add it to eos_token_id in the student's generation_config.json"
        )


def find_difference(
    teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> str | None:
    """The first difference between the vocabularies, in words; None if ids mean the same.

    The splitting of text is not compared: the teacher reads the student's ids. Nor are the sizes of
    the embeddings, which may be padded.
    """
    theirs, own = teacher.get_vocab(), student.get_vocab()
    for token in sorted({*theirs, *own}, key=lambda t: (theirs.get(t, own.get(t)), t)):
        if theirs.get(token) != own.get(token):
            return (
                f"{token!r} is {describe_id(theirs.get(token))} of the teacher's and "
                f"{describe_id(own.get(token))} of the student's"
            )
    if teacher.eos_token_id != student.eos_token_id:
        return (
            f"the teacher ends with {teacher.eos_token!r} and the student with "
            f"{student.eos_token!r}"
        )
    return None


def describe_id(number: int | None) -> str:
    return "no token" if number is None else f"token {number}"
