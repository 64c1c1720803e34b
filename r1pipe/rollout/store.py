"""Every rollout that a stage sampled to train on, a file per step:
`<stage>/rollouts/step_000012.parquet`.

Parquet: text can be read without the tokens, float32 log-probs stay exact, token ids and routes are
small, and pandas, DuckDB and the hub's viewer open it. With one file per step, a step is complete
or absent, found by name, and dropped by deleting its file. Imports no torch.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from r1pipe.config.recipe import KeptRollouts
from r1pipe.utils.errors import UserError

FOLDER = "rollouts"
TEXT = {
    "step": pa.int32(),
    "group": pa.int32(),
    "problem_id": pa.string(),
    "sample": pa.int32(),
    "prompt": pa.string(),
    "answer": pa.string(),
    "completion": pa.string(),
    "finish_reason": pa.string(),
    "num_tokens": pa.int32(),
    "rewards": None,  # a struct of the stage's reward functions
    "reward": pa.float64(),
    "advantage": pa.float64(),
    "used": pa.bool_(),
    "extra": pa.string(),
    "episode": pa.string(),
}
"""For people. `group` numbers the step's prompts; `rewards` has one value per function, null where
it could not judge, and is null itself in a stage without rewards; `used` is false for groups that
dynamic sampling dropped. JSON: `extra`, what reward functions logged; `episode`, a `types.Episode`,
in files of stages with an environment."""
JSON = ("extra", "episode")
TOKENS = {
    "prompt_ids": pa.list_(pa.int32()),
    "completion_ids": pa.list_(pa.int32()),
    "logprobs": pa.list_(pa.float32()),
    "versions": pa.list_(pa.int32()),
    "routes": pa.binary(),
}
"""For a replay (see `types.Rollout`); routes in numpy's file format, versions in files of stages
with `in_flight`."""
METADATA = b"r1pipe"
RENAMED = {"takes_part": "used", "made_at": "policy_step"}
"""Old names of columns and facts, in rollouts and checkpoints of older runs."""


class RolloutFiles:
    """Writes a stage's rollouts and keeps the newest, up to `settings.keep_gib`.

    On resume it continues in the same folder; `cut` drops steps that will be sampled again.
    """

    def __init__(self, stage_dir: Path, settings: KeptRollouts):
        self.folder, self.settings = stage_dir / FOLDER, settings
        self.folder.mkdir(exist_ok=True)
        self._sizes = {step: path.stat().st_size for step, path in list_steps(stage_dir).items()}

    def write(self, step: int, rows: list[dict[str, Any]], facts: dict[str, Any]) -> None:
        """Write the complete step or nothing. Without rows, as on ranks other than the first,
        nothing.

        `rows` have the columns of TEXT except `step`, and those of TOKENS; `facts` apply to all.
        """
        if not rows:
            return
        names = rows[0]["rewards"]
        # Parquet has no structs without fields.
        rewards = pa.struct([(name, pa.float64()) for name in names]) if names else pa.null()
        kinds = {**TEXT, "rewards": rewards, **TOKENS}
        for name in ("episode", "versions"):
            if not any(row.get(name) for row in rows):
                del kinds[name]
        schema = pa.schema(kinds)
        columns = {
            name: [pack_routes(row[name]) if name == "routes" else row[name] for row in rows]
            for name in schema.names
            if name not in ("step", *JSON)
        }
        for name in set(JSON) & set(kinds):
            columns[name] = [(value := row.get(name)) and json.dumps(value) for row in rows]
        if not names:
            columns["rewards"] = [None] * len(rows)
        if not self.settings.routes:
            columns["routes"] = [None] * len(rows)
        table = pa.table({"step": [step] * len(rows), **columns}, schema=schema)
        table = table.replace_schema_metadata({METADATA: json.dumps(facts)})
        path = self.folder / f"step_{step:06}.parquet"
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        self._sizes[step] = path.stat().st_size
        self._rotate()

    def position(self) -> int:
        """The last step that is kept, 0 if there is none."""
        return max(self._sizes, default=0)

    def cut(self, position: int | None) -> None:
        """Drop the steps after `position`, from which a run resumes. None: all."""
        for later in [step for step in self._sizes if step > (position or 0)]:
            self._drop(later)

    def _rotate(self) -> None:
        """Drop the oldest, but never the step just written."""
        while sum(self._sizes.values()) > self.settings.keep_gib * 2**30 and len(self._sizes) > 1:
            self._drop(min(self._sizes))

    def _drop(self, step: int) -> None:
        (self.folder / f"step_{step:06}.parquet").unlink()
        del self._sizes[step]


def pack_routes(routes: np.ndarray | None) -> bytes | None:
    if routes is None:
        return None
    buffer = BytesIO()
    np.save(buffer, routes)
    return buffer.getvalue()


def list_steps(stage_dir: Path) -> dict[int, Path]:
    """The steps on disk, in order, with their files."""
    paths = (stage_dir / FOLDER).glob("step_*.parquet")
    return dict(sorted((int(path.stem.removeprefix("step_")), path) for path in paths))


def read_rollouts(
    stage_dir: Path, steps: Iterable[int] | None = None, columns: Sequence[str] = tuple(TEXT)
) -> Iterator[dict[str, Any]]:
    """Rows of these steps, or of all on disk, in sampling order.

    Raises UserError for a missing step or a file that cannot be read.
    """
    for path in find_steps(stage_dir, steps):
        rows = list(map(rename, read_table(path, columns).to_pylist()))
        for row in rows:
            if "rewards" in row:
                row["rewards"] = row["rewards"] or {}
            for name in JSON:
                if row.get(name) is not None:
                    row[name] = json.loads(row[name])
            if row.get("routes") is not None:
                row["routes"] = np.load(BytesIO(row["routes"]))
        yield from rows


def read_facts(stage_dir: Path, step: int) -> dict[str, Any]:
    """Facts about all of a step's rows."""
    (path,) = find_steps(stage_dir, [step])
    return rename(json.loads(read_table(path, ()).schema.metadata[METADATA]))


def rename(values: dict[str, Any]) -> dict[str, Any]:
    """Replace old names by today's."""
    return {RENAMED.get(name, name): value for name, value in values.items()}


def find_steps(stage_dir: Path, steps: Iterable[int] | None) -> list[Path]:
    kept = list_steps(stage_dir)
    if not kept:
        raise UserError(f"{stage_dir}: no rollouts are kept there")
    wanted = list(kept) if steps is None else list(steps)
    for step in wanted:
        if step not in kept:
            raise UserError(
                f"{stage_dir}: no rollouts of step {step}; kept are {min(kept)} to {max(kept)}"
            )
    return [kept[step] for step in wanted]


def read_table(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        with pq.ParquetFile(path) as file:
            # Older versions wrote fewer.
            names = rename({name: name for name in file.schema_arrow.names})
            return file.read([names[name] for name in columns if name in names])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from error


def find_rollouts(run_dir: Path, stage: str | None = None) -> Path:
    """The folder of the run's stage with rollouts, finished or running; without `stage`, of the
    only one. `run_dir` may be a stage's own folder.

    Raises UserError if there is none.
    """
    if stage is None and list_steps(run_dir):
        return run_dir
    folders = {
        folder.name.removeprefix(".").removesuffix(".partial"): folder
        # The finished folder of a stage that is running again wins.
        for folder in (*sorted(run_dir.glob(".*.partial")), *sorted(run_dir.glob("[!.]*")))
        if list_steps(folder)
    }
    if not folders:
        raise UserError(f"{run_dir}: no stage of it has kept rollouts")
    if stage is None and len(folders) == 1:
        return next(iter(folders.values()))
    if stage not in folders:
        raise UserError(f"{run_dir}: choose with --stage: {', '.join(folders)} have rollouts")
    return folders[stage]
