"""Traces are encoded as the sampler would see them."""

import json

import pytest
import torch
from tiny_models import PROBLEMS
from transformers import PreTrainedTokenizerBase

from r1pipe.config.base import ProblemSet
from r1pipe.data.problems import load_problems
from r1pipe.models.tokenizer import build_tokenizer, encode_next_prompt, encode_prompt
from r1pipe.sft.encode import encode_traces
from r1pipe.trainer.packing import pack
from r1pipe.utils.errors import UserError


def test_traces_are_the_sampler_s_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    trace = encode_traces(PROBLEMS[:1], tokenizer, None).rows[0]
    assert trace.prompt_ids.tolist() == encode_prompt(tokenizer, PROBLEMS[0].prompt)
    assert trace.completion_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(trace.completion_ids[:-1]) == PROBLEMS[0].solution


def test_a_trace_with_a_tool_is_an_episode_s_path() -> None:
    """Given tokens, the tool's and the next prompt's, are in the row and not learnt."""
    problems = load_problems(ProblemSet(recipe="products", options={"size": 20}))
    tokenizer = build_tokenizer([p.trace_text for p in problems], 400, calls_tools=True)
    for problem, trace in zip(problems, encode_traces(problems, tokenizer, None).rows, strict=True):
        shown = f"<|tools|>calculator(expression)<|user|>{problem.question}<|assistant|>"
        assert tokenizer.decode(trace.prompt_ids) == shown
        call, result, _ = problem.trace
        ids = trace.completion_ids.tolist()
        (span,) = trace.given
        messages = [*problem.prompt, call, result]
        given = encode_next_prompt(tokenizer, messages, [tokenizer.eos_token_id])
        assert ids[slice(*span)] == given
        assert tokenizer.decode(given) == f"<|tool|>{problem.answer}<|assistant|>"
        packed = pack([trace.make_sample()], torch.device("cpu"))
        learnt = packed.target_C.tolist()
        assert len(learnt) == trace.num_targets == len(ids) - len(given)
        (written,) = call["tool_calls"]
        arguments = json.dumps(written["function"]["arguments"], separators=(",", ":"))
        assert tokenizer.decode(learnt) == (
            f'<tool_call>{{"name":"calculator","arguments":{arguments}}}</tool_call><|end|>'
            f"\\boxed{{{problem.answer}}}<|end|>"
        )
        assert packed.ids_N[packed.predictor_C + 1].tolist() == learnt


def test_long_traces_are_dropped_and_counted(tokenizer: PreTrainedTokenizerBase) -> None:
    lengths = [row.num_tokens for row in encode_traces(PROBLEMS, tokenizer, None).rows]
    limit = sorted(lengths)[10]
    traces = encode_traces(PROBLEMS, tokenizer, limit)
    assert len(traces.rows) == sum(length <= limit for length in lengths)
    assert traces.num_too_long == len(lengths) - len(traces.rows)
    least = min(lengths)
    with pytest.raises(UserError, match=rf"max_length 3: .*shortest has {least} tokens: raise"):
        encode_traces(PROBLEMS, tokenizer, 3)
