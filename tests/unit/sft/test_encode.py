"""Traces are encoded as the sampler would see them."""

import pytest
from tiny_models import PROBLEMS
from transformers import PreTrainedTokenizerBase

from r1pipe.models.tokenizer import encode_prompt
from r1pipe.sft.encode import encode_traces
from r1pipe.utils.errors import UserError


def test_traces_are_the_sampler_s_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    trace = encode_traces(PROBLEMS[:1], tokenizer, None).rows[0]
    assert trace.prompt_ids.tolist() == encode_prompt(tokenizer, PROBLEMS[0].prompt)
    assert trace.completion_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(trace.completion_ids[:-1]) == PROBLEMS[0].solution


def test_long_traces_are_dropped_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    lengths = [row.num_tokens for row in encode_traces(PROBLEMS, tokenizer, None).rows]
    limit = sorted(lengths)[10]
    traces = encode_traces(PROBLEMS, tokenizer, limit)
    assert len(traces.rows) == sum(length <= limit for length in lengths)
    assert traces.num_too_long == len(lengths) - len(traces.rows)
    least = min(lengths)
    with pytest.raises(UserError, match=rf"max_length 3: .*shortest has {least} tokens: raise"):
        encode_traces(PROBLEMS, tokenizer, 3)
