"""Kept rollouts: exact, whole or not there, found by step, the oldest dropped; read by people."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from report_run import write_episode

from r1pipe.config.recipe import KeptRollouts
from r1pipe.report.rollouts import describe_step, describe_steps
from r1pipe.rollout.store import RolloutFiles, find_rollouts, list_steps, read_facts, read_rollouts
from r1pipe.utils.errors import UserError

FACTS = {"policy_step": 1, "rounds": 1}
ALL = ("completion", "completion_ids", "logprobs", "routes")


def make_rollout_rows(num: int = 4, seed: int = 0) -> list[dict]:
    """Rows of a rollout file: samples of one problem, one unjudged, one not used."""
    generator = np.random.default_rng(seed)
    rows = []
    for sample in range(num):
        length = int(generator.integers(1, 30))
        rows.append(
            {
                "group": 0,
                "problem_id": "p1",
                "sample": sample,
                "prompt": "1+1?",
                "answer": None if sample else "2",
                "completion": f"completion\nof sample {sample} ü",
                "finish_reason": "stop" if sample else "length",
                "num_tokens": length,
                "rewards": {"rewards.math_correct": None if sample == 1 else sample / 3},
                "reward": None if sample == 1 else sample / 3,
                "advantage": float(generator.normal()),
                "used": sample != 2,
                "extra": None if sample else {"verdict": "close", "tries": 2},
                "prompt_ids": [1, 2, 3],
                "completion_ids": generator.integers(0, 99, length).tolist(),
                # As vLLM gives them: Python floats of float32 values.
                "logprobs": generator.normal(size=length).astype(np.float32).tolist(),
                "routes": generator.integers(0, 8, (length + 2, 2, 2), dtype=np.uint8),
            }
        )
    return rows


def test_a_stage_without_rewards(tmp_path: Path) -> None:
    """Parquet has no struct without fields."""
    rows = [{**row, "rewards": {}, "reward": None} for row in make_rollout_rows()]
    RolloutFiles(tmp_path, KeptRollouts()).write(1, rows, FACTS)
    read = list(read_rollouts(tmp_path, columns=("rewards", "reward", "completion")))
    assert [row["rewards"] for row in read] == [{}] * 4
    assert [row["reward"] for row in read] == [None] * 4
    assert [row["completion"] for row in read] == [row["completion"] for row in rows]


def write_steps(folder: Path, steps: range, **settings: object) -> RolloutFiles:
    files = RolloutFiles(folder, KeptRollouts(**settings))
    for step in steps:
        files.write(step, make_rollout_rows(seed=step), FACTS)
    return files


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    rows = make_rollout_rows(seed=2)
    for row, expected in zip(read_rollouts(tmp_path, [2]), rows, strict=True):
        assert row.pop("step") == 2
        assert row == {key: expected[key] for key in row}
        assert "logprobs" not in row
    for row, expected in zip(read_rollouts(tmp_path, [2], ALL), rows, strict=True):
        assert row["logprobs"] == expected["logprobs"]  # to the last bit
        assert row["completion_ids"] == expected["completion_ids"]
        assert row["routes"].dtype == np.uint8
        assert np.array_equal(row["routes"], expected["routes"])
    assert len(list(read_rollouts(tmp_path))) == 12
    assert read_facts(tmp_path, 3) == FACTS


def test_rollouts_of_an_older_version_are_read(tmp_path: Path) -> None:
    """Without a column that came later, and with the names of its time."""
    files = write_steps(tmp_path, range(1, 2))
    files.write(1, make_rollout_rows(), {"made_at": 1, "rounds": 1})
    path = list_steps(tmp_path)[1]
    table = pq.read_table(path, partitioning=None).drop_columns(["extra"])
    names = ["takes_part" if name == "used" else name for name in table.column_names]
    table = table.rename_columns(names).replace_schema_metadata(table.schema.metadata)
    pq.write_table(table, path)
    rows = list(read_rollouts(tmp_path, [1]))
    assert [row["used"] for row in rows] == [True, True, False, True]
    assert "takes_part" not in rows[0]
    assert read_facts(tmp_path, 1) == FACTS


def test_routes_can_be_left_out(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 2), routes=False)
    assert all(row["routes"] is None for row in read_rollouts(tmp_path, [1], ALL))


def test_steps_that_nothing_could_judge_are_read_with_the_others(tmp_path: Path) -> None:
    files = write_steps(tmp_path, range(1, 2))
    rows = [
        {**row, "rewards": {"rewards.math_correct": None}, "reward": None}
        for row in make_rollout_rows()
    ]
    files.write(2, rows, FACTS)
    import pandas

    table = pandas.read_parquet(tmp_path / "rollouts")
    assert table.groupby("step").size().to_dict() == {1: 4, 2: 4}
    assert table["reward"].isna().sum() == 5


def test_the_oldest_steps_go_and_the_newest_stays(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 2))
    size = list_steps(tmp_path)[1].stat().st_size
    write_steps(tmp_path, range(2, 9), keep_gib=3.5 * size / 2**30)
    assert list(list_steps(tmp_path)) == [6, 7, 8]
    write_steps(tmp_path, range(9, 10), keep_gib=1e-9)
    assert list(list_steps(tmp_path)) == [9]


def test_a_resumed_run_drops_what_comes_after_its_checkpoint(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 6))
    files = RolloutFiles(tmp_path, KeptRollouts())
    assert files.position() == 5
    files.cut(3)
    assert list(list_steps(tmp_path)) == [1, 2, 3]
    assert files.position() == 3
    files.write(4, make_rollout_rows(), FACTS)
    assert list(list_steps(tmp_path)) == [1, 2, 3, 4]
    files.cut(None)
    assert list(list_steps(tmp_path)) == []
    assert files.position() == 0


def test_a_half_written_step_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_steps(tmp_path, range(1, 2))

    def fail(table: object, file: object, **options: object) -> None:
        file.write(b"PAR1 and no more")
        raise OSError("No space left on device")

    monkeypatch.setattr("pyarrow.parquet.write_table", fail)
    with pytest.raises(OSError, match="No space"):
        files.write(2, make_rollout_rows(), FACTS)
    assert list(list_steps(tmp_path)) == [1]


def test_errors_name_file_and_steps(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no rollouts are kept"):
        list(read_rollouts(tmp_path))
    write_steps(tmp_path, range(3, 6))
    with pytest.raises(UserError, match="no rollouts of step 9; kept are 3 to 5"):
        list(read_rollouts(tmp_path, [9]))
    path = list_steps(tmp_path)[4]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match=r"step_000004.parquet: cannot be read"):
        list(read_rollouts(tmp_path))


def test_reading_needs_no_torch(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 2))
    code = (
        "import sys, json; from pathlib import Path; import r1pipe.report.rollouts;"
        "from r1pipe.rollout.store import read_rollouts;"
        f"rows = list(read_rollouts(Path({str(tmp_path)!r})));"
        "print(json.dumps([len(rows), 'torch' in sys.modules]))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(out.stdout) == [4, False]


def test_people_read_the_best_and_the_worst(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    samples = [text.partition(":")[0][-8:] for text in describe_step(tmp_path, 2, best=2)]
    assert samples == ["sample 3", "sample 2"]
    (worst,) = describe_step(tmp_path, 2, worst=1)
    assert "sample 1: reward unjudged (math_correct unjudged)" in worst
    assert "completion\n    of sample 1 ü" in worst
    assert len(list(describe_step(tmp_path, 2))) == 4
    assert "not used" in list(describe_step(tmp_path, 2))[2]
    table = describe_steps(tmp_path).splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["1", "2"]


def test_the_stage_is_found(tmp_path: Path) -> None:
    for name in ("grpo", ".rl2.partial", "sft"):
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="no stage of it has kept rollouts"):
        find_rollouts(tmp_path)
    write_steps(tmp_path / "grpo", range(1, 2))
    assert find_rollouts(tmp_path) == find_rollouts(tmp_path / "grpo") == tmp_path / "grpo"
    write_steps(tmp_path / ".rl2.partial", range(1, 2))
    with pytest.raises(UserError, match="choose with --stage: rl2, grpo"):
        find_rollouts(tmp_path)
    assert find_rollouts(tmp_path, "rl2") == tmp_path / ".rl2.partial"


def test_an_episode_is_shown_turn_by_turn(tmp_path: Path) -> None:
    write_episode(tmp_path, 1)
    (text,) = describe_step(tmp_path, 1)
    assert "3 messages, ended: done" in text
    assert "    assistant: <tool_call>0</tool_call>\n    tool: 0, said the tool\n" in text
    assert "completion:" not in text
