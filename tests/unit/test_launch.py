"""Which of several failed processes is told of."""

import signal

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from r1pipe.launch import explain
from r1pipe.utils.errors import HUNG, LOST

# (exit codes of ranks 0 and 1, in the order of their ends; exit code of the command; words)
FAILURES = [
    ((LOST, -signal.SIGKILL), 1, "rank 1 was killed (SIGKILL"),
    ((-signal.SIGABRT, 2), 2, ""),  # rank 1 has told of the user's error
    ((-signal.SIGABRT, LOST), 1, "rank 0 was killed (SIGABRT)"),
    ((-signal.SIGTERM, -signal.SIGSEGV), 1, "rank 1 was killed (SIGSEGV)"),
    ((HUNG, HUNG), HUNG, ""),  # the first of them has told
    ((130, -signal.SIGALRM), HUNG, ""),
    ((LOST, LOST), 1, "rank 0 lost a rank of another machine"),
]


@pytest.mark.parametrize(("codes", "status", "words"), FAILURES)
def test_the_rank_that_failed_first_is_named(
    codes: tuple[int, int], status: int, words: str, capsys: pytest.CaptureFixture
) -> None:
    failures = {}
    for rank, code in enumerate(codes):
        failures[rank] = ProcessFailure(rank, pid=1, exitcode=code, error_file="none")
        failures[rank].timestamp = rank
    assert explain(failures) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(words)
    assert words in "".join(lines)
