"""Four gloo processes in groups of two: experts, tokens of a row, both."""

import pytest
from test_distributed import compare_with_one_process, run_cases

pytestmark = pytest.mark.slow

NAMES = ("grouped", "teamed", "teamed_moe")


def test_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Groups share their experts by FSDP, teams have other samples; two ranks begin without any."""
    folder, cases = run_cases(tmp_path_factory.mktemp("ranks"), "cpu", NAMES, ranks=4)
    for name in NAMES:
        compare_with_one_process(folder, name, cases[name], tolerance=1e-5)
