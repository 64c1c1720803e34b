"""Traces as token ids: prompts and solutions encoded like the sampler's."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from r1pipe.models.thinking import drop_opening
from r1pipe.models.tokenizer import (
    encode_completion,
    encode_next_prompt,
    encode_prompt,
    find_answer_frame,
    find_end_id,
    find_opening,
    write_answer,
)
from r1pipe.trainer.packing import Sample
from r1pipe.types import Episode, Problem, Rollout
from r1pipe.utils.errors import UserError


@dataclass(frozen=True)
class Trace:
    """Token ids as int32: a corpus takes 4 bytes a token."""

    prompt_ids: np.ndarray
    completion_ids: np.ndarray
    given: Sequence[list[int]] = ()
    """As of an Episode: what tools said, and the prompts of later turns, which is not trained."""

    @property
    def num_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.completion_ids)

    @property
    def num_targets(self) -> int:
        return len(self.completion_ids) - sum(stop - start for start, stop in self.given)

    def make_sample(self) -> Sample:
        ids = (self.prompt_ids.tolist(), self.completion_ids.tolist())
        episode = Episode(list(self.given), []) if self.given else None
        return Sample(Rollout("", 0, *ids, [], "", "stop", episode=episode), advantage=0.0)


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
    """Prompt and solution of each problem as the sampler would see them; each answer ends with one
    of `end_ids`.

    Raises UserError for a row without `solution` or rejected by the chat template, and if no row is
    left.
    """
    rows: list[Trace] = []
    too_long: list[int] = []
    end_ids = list(end_ids)
    header, _ = find_answer_frame(tokenizer)
    end_id = find_end_id(tokenizer, end_ids)

    def encode(problem: Problem) -> Trace:
        """A path of turns as in an episode: each answer, and what the template adds behind it."""
        name, tools = f'problem "{problem.id}"', problem.tools
        messages = list(problem.prompt)
        prompt = encode_prompt(tokenizer, messages, name, tools)
        ids: list[int] = []
        given: list[list[int]] = []
        for message in problem.trace:
            messages.append(message)
            if message["role"] != "assistant":
                continue
            if ids:
                added = encode_next_prompt(tokenizer, messages[:-1], end_ids, name, tools)
                given.append([len(ids), len(ids) + len(added)])
                ids += added
            answer = write_answer(tokenizer, messages, end_id, name, tools)
            answer = drop_opening(answer, find_opening(tokenizer, [*prompt, *ids], header))
            ids += encode_completion(tokenizer, answer, end_id)
        return Trace(np.array(prompt, np.int32), np.array(ids, np.int32), given)

    for problem in problems:
        if not problem.solution:
            raise UserError(f'problem "{problem.id}" ({problem.source}): no "solution" to train on')
        trace = encode(problem)
        if max_length is not None and trace.num_tokens > max_length:
            too_long.append(trace.num_tokens)
            continue
        rows.append(trace)
    if not rows:
        raise UserError(
            f"train.max_length {max_length}: no row is that short, the shortest has "
            f"{min(too_long)} tokens: raise it"
        )
    return EncodedTraces(rows, len(too_long))
