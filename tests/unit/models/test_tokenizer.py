"""Tokenizers as built and as users have them: end tokens, templates, special tokens."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from tiny_models import change_json, save_llama
from transformers import PreTrainedTokenizerBase

from r1pipe.models.model import load_model
from r1pipe.models.tokenizer import (
    SHOWN,
    build_tokenizer,
    encode_completion,
    encode_next_prompt,
    encode_prompt,
    list_ids,
    load_tokenizer,
    read_end_ids,
    write_answer,
)
from r1pipe.models.weights import save_checkpoint
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.groups import SampleGroup
from r1pipe.sft.encode import encode_traces
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError

CPU = torch.device("cpu")
QUESTION = [{"role": "user", "content": "What is 1 + 2?"}]
TRACE = Problem(
    id="sum", source="test", kind="math", prompt=QUESTION, solution="<think>\n1 + 2\n</think>\n3"
)
EOT = "<|eot|>"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(["What is 1 + 2? <think>"], 300)


def open_sampler(checkpoint: Path) -> Sampler:
    """As far as it goes without an engine."""
    sampler = Sampler.__new__(Sampler)
    sampler.chat_template = None
    sampler.open_tokenizer(str(checkpoint))
    return sampler


def read_completion(sampler: Sampler, completion_ids: list[int]) -> str:
    logprobs = SimpleNamespace(logprobs=[0.0] * len(completion_ids))
    output = SimpleNamespace(
        token_ids=completion_ids, logprobs=logprobs, finish_reason="stop", stop_reason=None
    )
    result = SimpleNamespace(outputs=[output])
    prompt_ids = encode_prompt(sampler.tokenizer, QUESTION)
    return sampler.read(result, SampleGroup(0, TRACE, [], prompt_ids), 0).completion


def test_all_end_tokens_live_on(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As phi and Llama have them: the template ends a turn with a token that only
    generation_config.json knows."""
    tokenizer.add_special_tokens({"additional_special_tokens": [EOT]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", EOT)
    eot = tokenizer.convert_tokens_to_ids(EOT)
    ends = [eot, tokenizer.eos_token_id]
    checkpoint = save_llama(tmp_path / "base", tokenizer, ends)
    model, tokenizer = load_model(str(checkpoint), CPU), load_tokenizer(str(checkpoint))
    # Supervised training ends turns as the template does.
    row = encode_traces([TRACE], tokenizer, None, list_ids(model.generation_config)).rows[0]
    assert row.completion_ids[-1] == eot
    save_checkpoint(model, tokenizer, tmp_path / "trained")
    assert sorted(read_end_ids(str(tmp_path / "trained"))) == sorted(ends)
    sampler = open_sampler(tmp_path / "trained")
    assert sorted(sampler.end_ids) == sorted(ends)
    three = tokenizer.encode("3", add_special_tokens=False)
    assert {read_completion(sampler, [*three, end]) for end in ends} == {"3"}


def test_end_tokens_of_a_model_config(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    checkpoint = save_llama(tmp_path, tokenizer)
    (checkpoint / "generation_config.json").unlink()
    change_json(checkpoint / "config.json", eos_token_id=[4, 1])
    assert read_end_ids(str(checkpoint)) == [4, 1]


def test_end_token_that_the_tokenizer_does_not_name(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    checkpoint = save_llama(tmp_path, tokenizer)
    change_json(checkpoint / "tokenizer_config.json", eos_token=None, pad_token=None)
    loaded = load_tokenizer(str(checkpoint))
    assert (loaded.eos_token, loaded.pad_token) == ("<|end|>", "<|end|>")
    change_json(checkpoint / "generation_config.json", eos_token_id="1")
    with pytest.raises(UserError, match=r"eos_token_id of .*: '1' is not the id of a token"):
        read_end_ids(str(checkpoint))
    change_json(checkpoint / "generation_config.json", eos_token_id=[1, 999])
    with pytest.raises(UserError, match=r"eos_token_id of .*: 999 is not the id of a token"):
        read_end_ids(str(checkpoint))
    change_json(checkpoint / "generation_config.json", eos_token_id=None)
    with pytest.raises(UserError, match="no end token: set eos_token in its tokenizer_config"):
        load_tokenizer(str(checkpoint))


@pytest.mark.parametrize("opening", ["<think>\n", "<think>", "<think>\n\n"])
def test_a_template_that_opens_the_thinking(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, opening: str
) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "<|assistant|>{% endif %}", f"<|assistant|>{opening}{{% endif %}}"
    )
    row = encode_traces([TRACE], tokenizer, None).rows[0]
    text = tokenizer.decode([*row.prompt_ids, *row.completion_ids])
    assert text.count("<think>") == 1
    assert text.endswith("1 + 2\n</think>\n3<|end|>")
    # What is judged, and what becomes a trace, begins where the thinking does.
    sampler = open_sampler(save_llama(tmp_path, tokenizer))
    ids = tokenizer.encode("1 + 2\n</think>\n3", add_special_tokens=False)
    assert read_completion(sampler, ids) == f"{opening}1 + 2\n</think>\n3"


def test_rewards_see_special_tokens_but_ends_and_padding(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert "think" not in tokenizer.decode(tokenizer.encode("<think>"), skip_special_tokens=True)
    sampler = open_sampler(save_llama(tmp_path, tokenizer))
    text = "<think>\n1 + 2\n</think>\n3<|user|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    ends = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    assert read_completion(sampler, [*ids, *ends]) == text


def test_a_template_that_refuses_a_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    system = {"role": "system", "content": "Be brief."}
    refused = Problem(
        id="row-7", source="test", kind="math", prompt=[system, *QUESTION], solution="3"
    )
    with pytest.raises(UserError, match=r'"row-7": .*no system role; .*leave out `system`'):
        encode_traces([TRACE, refused], tokenizer, None)
    tokenizer.chat_template = "{{ messages[0].content + 3 }}"  # no TemplateError
    with pytest.raises(UserError, match="refuses it"):
        encode_prompt(tokenizer, QUESTION)


def test_a_template_for_a_model_without_one(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    own, given = tokenizer.chat_template, "{{ messages[0].content }} ="
    checkpoint = save_llama(tmp_path, tokenizer)
    assert load_tokenizer(str(checkpoint), given).chat_template == own
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no chat template.* give one in the recipe"):
        load_tokenizer(str(checkpoint))
    loaded = load_tokenizer(str(checkpoint), given)
    assert loaded.decode(encode_prompt(loaded, QUESTION)) == "What is 1 + 2? ="
    loaded.save_pretrained(checkpoint)
    assert load_tokenizer(str(checkpoint)).chat_template == given


def test_a_token_without_a_row_in_the_embedding(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    checkpoint = save_llama(tmp_path, tokenizer)
    change_json(checkpoint / "config.json", model_type="qwen2")
    load_tokenizer(str(checkpoint)).save_pretrained(checkpoint)  # with one of transformers' own
    load_tokenizer(str(checkpoint))
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(checkpoint)
    with pytest.raises(UserError, match="the embedding has no row for the token '<extra>'"):
        load_tokenizer(str(checkpoint))


@pytest.mark.parametrize("text", [None, '{"version":'])
def test_a_tokenizer_that_is_missing_or_broken(
    text: str | None, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    checkpoint = save_llama(tmp_path, tokenizer)
    change_json(checkpoint / "config.json", model_type="qwen2")  # whose class makes an empty one
    (checkpoint / "tokenizer_config.json").unlink()
    (checkpoint / "tokenizer.json").unlink()
    if text:
        (checkpoint / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(str(checkpoint))


TEXTS = [
    "Mia has 7 apples.",
    "<think>\n7+3=10\n</think>\n\\boxed{10}",
    "ünï © 数学 \t x",
    "  two  spaces",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_gives_any_text_back(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = encode_completion(tokenizer, text)
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_thinking_marks_are_single_tokens_that_decoding_keeps(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    for mark in ("<think>", "</think>"):
        ids = tokenizer.encode(mark, add_special_tokens=False)
        assert len(ids) == 1
        assert tokenizer.decode(ids, skip_special_tokens=True) == mark


TEMPLATES = Path(trl.__file__).parent / "chat_templates"
USER, TOOL = {"role": "user", "content": "again"}, {"role": "tool", "content": "42"}
NEXT_PROMPTS = {
    ("qwen3", "<|im_end|>"): (
        "\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    ("qwen2_5", "<|im_end|>"): (
        "\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n",
        "\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n",
    ),
    ("llama3_2", "<|eot_id|>"): (
        "<|start_header_id|>user<|end_header_id|>\n\nagain<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        '<|start_header_id|>ipython<|end_header_id|>\n\n"42"<|eot_id|>'
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    ("deepseekv3", "<｜end▁of▁sentence｜>"): (
        "<｜User｜>again<｜Assistant｜><think>\n",
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>42<｜tool▁output▁end｜><｜tool▁outputs▁end｜>",
    ),
}


@pytest.mark.parametrize(("name", "end"), NEXT_PROMPTS)
def test_the_next_turn_adds_only_what_the_template_writes_behind_an_answer(
    tokenizer: PreTrainedTokenizerBase, name: str, end: str
) -> None:
    """For real templates: whatever the answer said, and although some leave out its reasoning."""
    tokenizer.add_special_tokens({"eos_token": end})
    tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    call = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
    answer = {
        "role": "assistant",
        "content": f"<think>\n{SHOWN}\n</think>\nso",
        "tool_calls": [call],
    }
    for added, expected in zip((USER, TOOL), NEXT_PROMPTS[name, end], strict=True):
        messages = [*QUESTION, answer, USER, answer, added]
        ids = encode_next_prompt(tokenizer, messages, [tokenizer.eos_token_id])
        assert tokenizer.decode(ids) == expected, added


CALLS = {
    ("qwen3", "<|im_end|>"): "<think>\n\n</think>\n\nso\n<tool_call>\n"
    '{"name": "add", "arguments": {"x": 1}}\n</tool_call>',
    (
        "qwen2_5",
        "<|im_end|>",
    ): 'so\n<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>',
    ("llama3_2", "<|eot_id|>"): '{"name": "add", "parameters": {"x": 1}}',
    (None, "<|end|>"): 'so<tool_call>{"name":"add","arguments":{"x":1}}</tool_call>',
}


@pytest.mark.parametrize(("name", "end"), CALLS)
def test_a_call_is_written_by_the_template(
    tokenizer: PreTrainedTokenizerBase, name: str | None, end: str
) -> None:
    """Real templates' and our own: what the policy is to say, without what stands around it."""
    if name:
        tokenizer.add_special_tokens({"eos_token": end})
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    answer = {"role": "assistant", "content": "so", "tool_calls": [call]}
    for before in (QUESTION, [*QUESTION, answer, TOOL]):
        said = write_answer(tokenizer, [*before, answer], tokenizer.eos_token_id)
        assert said == CALLS[name, end]
    plain = {"role": "assistant", "content": " so "}
    assert write_answer(tokenizer, [*QUESTION, plain], tokenizer.eos_token_id) == " so "


def test_a_call_that_the_template_writes_elsewhere(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ messages | length }} " + tokenizer.chat_template
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    answer = {"role": "assistant", "content": "", "tool_calls": [call]}
    with pytest.raises(UserError, match="does not write a tool call where an answer begins"):
        write_answer(tokenizer, [*QUESTION, answer], tokenizer.eos_token_id)


def test_tools_have_tokens_of_their_own() -> None:
    """Where some are called: a demo without tools keeps its vocabulary."""
    tokenizer = build_tokenizer(["What is 1 + 2?"], 300, calls_tools=True)
    for mark in ("<|tools|>", "<|tool|>", "<tool_call>", "</tool_call>", "<think>"):
        assert len(tokenizer.encode(mark, add_special_tokens=False)) == 1
    call = "<tool_call>{}</tool_call>"
    assert tokenizer.decode(tokenizer.encode(call), skip_special_tokens=True) == call
    assert "<tool_call>" not in build_tokenizer(["What is 1 + 2?"], 300).get_vocab()


def test_a_template_without_answers_has_no_next_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ messages[0].content }} {{ messages[-1].content }}:"
    messages = [*QUESTION, {"role": "assistant", "content": "3"}, USER]
    with pytest.raises(UserError, match="leaves out an answer that messages follow"):
        encode_next_prompt(tokenizer, messages, [tokenizer.eos_token_id])
