"""Speculative decoding: how many drafts stood, and whether they pay."""

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from r1pipe.models.tokenizer import load_tokenizer
from r1pipe.utils import distributed
from r1pipe.utils.errors import UserError
from r1pipe.utils.progress import log_line

TRIAL_CALLS = 3
"""Calls with drafts and as many without, in turn, that a trial compares."""
TRIAL_PERIOD = 50
"""Calls from one trial to the next: a policy moves away from a drafter that stays as it is."""


class DraftCounts:
    """Tokens drafted and accepted by this rank's engine since `clear`."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.proposed = self.accepted = 0

    def add(
        self, stats: None, *, num_draft_tokens: int, num_accepted_tokens: int, **others: Any
    ) -> None:
        """In place of vLLM's scheduler's `make_spec_decoding_stats`, which counts nothing where
        statistics are off: called for each request at each step."""
        self.proposed += num_draft_tokens
        self.accepted += num_accepted_tokens

    def acceptance(self) -> float | None:
        """Share of all ranks' drafts that stood; None if nothing was drafted. Every rank must call
        it."""
        proposed, accepted = map(
            sum, zip(*distributed.gather((self.proposed, self.accepted)), strict=True)
        )
        return accepted / proposed if proposed else None


class DraftTrial:
    """Samples with and without drafts in turn, and leaves out what was slower.

    Kept apart by how many requests run together, to a power of two: the more there are, the less a
    policy that is busy with them has to gain. `set_drafting` is called when the engine is idle.
    """

    def __init__(self, set_drafting: Callable[[bool], None]):
        self.set_drafting = set_drafting
        self.drafting = True
        self._num_calls: defaultdict[int, int] = defaultdict(int)
        self._slower: set[int] = set()
        self._tokens: defaultdict[tuple[int, bool], int] = defaultdict(int)
        self._seconds: defaultdict[tuple[int, bool], float] = defaultdict(float)

    def begin(self, num_running: int) -> "TimedCall":
        """The first call warms up and is not counted; then `TRIAL_CALLS` each in turn."""
        band = num_running.bit_length()
        number = self._num_calls[band] % TRIAL_PERIOD
        in_trial = 0 < number <= 2 * TRIAL_CALLS
        drafting = band not in self._slower and not (in_trial and number % 2)
        if drafting != self.drafting:
            self.set_drafting(drafting)
            self.drafting = drafting
        return TimedCall(band, in_trial and band not in self._slower)

    def end(self, call: "TimedCall") -> None:
        """Not called for one that was interrupted."""
        self._num_calls[call.band] += 1
        if not call.counts:
            return
        self._tokens[call.band, self.drafting] += call.num_tokens
        self._seconds[call.band, self.drafting] += call.seconds
        if self._num_calls[call.band] % TRIAL_PERIOD == 2 * TRIAL_CALLS + 1:
            self._decide(call.band)

    def _decide(self, band: int) -> None:
        rates = [
            self._tokens.pop((band, drafting)) / self._seconds.pop((band, drafting))
            for drafting in (True, False)
        ]
        slower = rates[0] < rates[1]
        if slower:
            self._slower.add(band)
        log_line(
            f"speculative: {rates[0]:.0f} tokens/s with drafts, {rates[1]:.0f} without, of "
            f"{2 ** (band - 1)} to {2**band - 1} requests at once"
            f"{': from now on without' if slower else ''}"
        )


class TimedCall:
    """What the engine did in a call, its callers' work not counted."""

    def __init__(self, band: int, counts: bool):
        self.band, self.counts = band, counts
        self.num_tokens, self.seconds = 0, 0.0

    def time(self, step: Callable[[], list[Any]]) -> list[Any]:
        started = time.perf_counter()
        results = step()
        self.seconds += time.perf_counter() - started
        self.num_tokens += sum(len(r.outputs[0].token_ids) for r in results if r.finished)
        return results


def set_drafting(worker: Any, drafting: bool) -> None:
    """Runs inside the engine while it is idle."""
    speculative = worker.speculative_config if drafting else None
    worker.model_runner.speculative_config = speculative


def require_drafter_reads(drafter: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for a draft model to which the policy's token ids mean other tokens."""
    if load_tokenizer(drafter, tokenizer.chat_template).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"engine.speculative.model: {drafter} has another vocabulary than the policy: take a "
            "drafter of the policy's family, or leave out engine.speculative"
        )
