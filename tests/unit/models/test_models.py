"""Checkpoints as users have them: end tokens, templates, special tokens, damaged files."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from r1pipe.models.model import build_model, load_model
from r1pipe.models.tokenizer import (
    build_tokenizer,
    encode_prompt,
    list_ids,
    load_tokenizer,
    read_end_ids,
)
from r1pipe.models.weights import find_strays, list_weights, save_checkpoint
from r1pipe.rollout.engine import Sampler, read_weights
from r1pipe.rollout.vllm_args import check_files
from r1pipe.sft.encode import encode_traces
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError

CPU = torch.device("cpu")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
QUESTION = [{"role": "user", "content": "What is 1 + 2?"}]
TRACE = Problem(
    id="sum", source="test", kind="math", prompt=QUESTION, solution="<think>\n1 + 2\n</think>\n3"
)
EOT = "<|eot|>"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer(["What is 1 + 2? <think>"], 300)


def save(
    folder: Path, tokenizer: PreTrainedTokenizerBase, end_ids: list[int] | None = None
) -> Path:
    model = build_model(LLAMA, tokenizer, 0)
    if end_ids:
        model.generation_config.eos_token_id = end_ids
    save_checkpoint(model, tokenizer, folder)
    return folder


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
    return sampler._read(result, TRACE, prompt_ids, 0).completion


# End tokens


def test_all_end_tokens_live_on(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """As phi and Llama have them: the template ends a turn with a token that only
    generation_config.json knows."""
    tokenizer.add_special_tokens({"additional_special_tokens": [EOT]})
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", EOT)
    eot = tokenizer.convert_tokens_to_ids(EOT)
    ends = [eot, tokenizer.eos_token_id]
    checkpoint = save(tmp_path / "base", tokenizer, ends)
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
    checkpoint = save(tmp_path, tokenizer)
    (checkpoint / "generation_config.json").unlink()
    change_json(checkpoint / "config.json", eos_token_id=[4, 1])
    assert read_end_ids(str(checkpoint)) == [4, 1]


def test_end_token_that_the_tokenizer_does_not_name(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    checkpoint = save(tmp_path, tokenizer)
    change_json(checkpoint / "tokenizer_config.json", eos_token=None, pad_token=None)
    loaded = load_tokenizer(str(checkpoint))
    assert (loaded.eos_token, loaded.pad_token) == ("<|end|>", "<|end|>")
    change_json(checkpoint / "generation_config.json", eos_token_id="1")
    with pytest.raises(UserError, match=r"eos_token_id of .*: '1' is the number of no token"):
        read_end_ids(str(checkpoint))
    change_json(checkpoint / "generation_config.json", eos_token_id=[1, 999])
    with pytest.raises(UserError, match=r"eos_token_id of .*: 999 is the number of no token"):
        read_end_ids(str(checkpoint))
    change_json(checkpoint / "generation_config.json", eos_token_id=None)
    with pytest.raises(UserError, match="no end token: set eos_token in its tokenizer_config"):
        load_tokenizer(str(checkpoint))


# Thinking


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
    sampler = open_sampler(save(tmp_path, tokenizer))
    ids = tokenizer.encode("1 + 2\n</think>\n3", add_special_tokens=False)
    assert read_completion(sampler, ids) == f"{opening}1 + 2\n</think>\n3"


def test_rewards_see_special_tokens_but_ends_and_padding(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    assert "think" not in tokenizer.decode(tokenizer.encode("<think>"), skip_special_tokens=True)
    sampler = open_sampler(save(tmp_path, tokenizer))
    text = "<think>\n1 + 2\n</think>\n3<|user|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    ends = [tokenizer.pad_token_id, tokenizer.eos_token_id]
    assert read_completion(sampler, [*ids, *ends]) == text


# Templates


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
    checkpoint = save(tmp_path, tokenizer)
    assert load_tokenizer(str(checkpoint), given).chat_template == own
    (checkpoint / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=r"no chat template.* give one in the recipe"):
        load_tokenizer(str(checkpoint))
    loaded = load_tokenizer(str(checkpoint), given)
    assert loaded.decode(encode_prompt(loaded, QUESTION)) == "What is 1 + 2? ="
    loaded.save_pretrained(checkpoint)
    assert load_tokenizer(str(checkpoint)).chat_template == given


# Files


def change_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def point(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"
    (folder / "model.safetensors").write_text(text)


def drop_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    weight_map = {"lm_head.weight": "model-00002-of-00002.safetensors"}
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:8].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def keep_adapter_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text("{}")


def pickle_nonsense(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"nonsense" * 99)


def ask_for_code(folder: Path) -> None:
    auto_map = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    change_json(folder / "config.json", auto_map=auto_map, model_type="own")
    (folder / "code.py").write_text("raise SystemExit('it ran')")


DAMAGES = [
    (truncate, r"model.safetensors: cut off: \d+ of \d+ bytes"),
    (point, "model.safetensors: a Git LFS pointer .*git lfs pull"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "no safetensors: it has 0 bytes"),
    (lambda f: (f / "model.safetensors").write_bytes(b"a" * 99), "no safetensors, or cut off"),
    (lambda f: (f / "model.safetensors").unlink(), r"no weights \(\*.safetensors\)"),
    (drop_shard, "model-00002-of-00002.safetensors: cannot be read: No such file"),
    (drop_tensor, "its weights have no model.layers.0.self_attn.q_proj.weight"),
    (cut_tensor, r"model.norm.weight has the shape \[8\], by its config.json \[32\]"),
    (keep_adapter_only, "an adapter only: merge it"),
    (lambda f: change_json(f / "config.json", model_type=None), "Unrecognized model"),
    (lambda f: (f / "config.json").write_text('{"model_type":'), "not a valid JSON"),
    (lambda f: (f / "config.json").unlink(), "cannot be loaded"),
    (pickle_nonsense, "cannot be loaded: "),
    (lambda f: (f / "config.json").write_text("[]"), "cannot be loaded: "),
    (ask_for_code, "contains custom code"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_a_damaged_checkpoint_is_refused(
    damage: object, message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    damage(save(tmp_path, tokenizer))
    with pytest.raises(UserError, match=message):
        load_model(str(tmp_path), CPU)


def test_a_token_without_a_row_in_the_embedding(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    checkpoint = save(tmp_path, tokenizer)
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
    checkpoint = save(tmp_path, tokenizer)
    change_json(checkpoint / "config.json", model_type="qwen2")  # whose class makes an empty one
    (checkpoint / "tokenizer_config.json").unlink()
    (checkpoint / "tokenizer.json").unlink()
    if text:
        (checkpoint / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(str(checkpoint))


def test_only_a_checkpoint_s_own_files_are_its_weights(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Mistral publishes its own format beside the sharded one."""
    checkpoint = save(tmp_path, tokenizer)
    save_file({"wq": torch.zeros(1)}, checkpoint / "consolidated.safetensors")
    own = checkpoint / "model.safetensors"
    assert list_weights(checkpoint) == [own]
    names = {name for name, _ in read_weights(checkpoint)}
    assert "wq" not in names
    assert "model.norm.weight" in names
    # vLLM would take both where no index says which are meant.
    assert find_strays(checkpoint) == [checkpoint / "consolidated.safetensors"]
    with pytest.raises(UserError, match=r"consolidated.safetensors: vLLM would load it beside"):
        check_files(str(checkpoint))
    index = {"weight_map": dict.fromkeys(names, own.name)}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    check_files(str(checkpoint))


def test_pickled_weights(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    checkpoint = save(tmp_path, tokenizer)
    tensors = load_file(checkpoint / "model.safetensors")
    torch.save(tensors, checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    assert {name for name, _ in read_weights(checkpoint)} == set(tensors)
    load_model(str(checkpoint), CPU)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "t5"}, "t5 is an encoder and a decoder"),
        ({"model_type": "whisper"}, "an encoder and a decoder"),
        (LLAMA | {"hidden_size": 33}, "not a multiple of the number of attention heads"),
        (LLAMA | {"hidden_size": "wide"}, "expected int, got str"),
        (LLAMA | {"num_attention_heads": 0}, "make no llama of this"),
        (LLAMA | {"hidden_act": "nope"}, "KeyError: 'nope'"),
    ],
)
def test_settings_that_make_no_model(
    settings: dict, message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(UserError, match=message):
        build_model(settings, tokenizer, 0)
