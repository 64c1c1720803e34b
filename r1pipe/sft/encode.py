"""Traces as token ids: prompts and solutions encoded like the sampler's."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from r1pipe.models.thinking import drop_opening
from r1pipe.models.tokenizer import (
    encode_completion,
    encode_prompt,
    find_answer_frame,
    find_end_id,
    find_opening,
)
from r1pipe.trainer.packing import Sample
from r1pipe.types import Problem, Rollout
from r1pipe.utils.errors import UserError


@dataclass(frozen=True)
class Trace:
    """Token ids as int32: a corpus takes 4 bytes a token."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    def make_sample(self) -> Sample:
        ids = (self.prompt_ids.tolist(), self.completion_ids.tolist())
        return Sample(Rollout("", 0, *ids, [], "", "stop"), advantage=0.0)


@dataclass(frozen=True)
class EncodedTraces:
    """Tokenized traces, and the number of those longer than `max_length`."""

    rows: list[Trace]
    num_too_long: int


def encode_traces(
    problems: list[Problem],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    end_ids: Iterable[int] = (),
) -> EncodedTraces:
    """Prompt and solution of each problem as the sampler would see them; each completion ends with
    one of `end_ids`.

    Raises UserError for a row without `solution` or rejected by the chat template, and if no row is
    left.
    """
    rows: list[Trace] = []
    too_long: list[int] = []
    header, _ = find_answer_frame(tokenizer)
    end_id = find_end_id(tokenizer, end_ids)
    for problem in problems:
        if not problem.solution:
            raise UserError(f'problem "{problem.id}" ({problem.source}): no "solution" to train on')
        prompt = encode_prompt(tokenizer, problem.prompt, f'problem "{problem.id}"')
        solution = drop_opening(problem.solution, find_opening(tokenizer, prompt, header))
        completion = encode_completion(tokenizer, solution, end_id)
        if max_length is not None and len(prompt) + len(completion) > max_length:
            too_long.append(len(prompt) + len(completion))
            continue
        rows.append(Trace(np.array(prompt, np.int32), np.array(completion, np.int32)))
    if not rows:
        raise UserError(
            f"train.max_length {max_length}: no row is that short, the shortest has "
            f"{min(too_long)} tokens: raise it"
        )
    return EncodedTraces(rows, len(too_long))
