"""The report: one HTML file about a run, finished or running.

    r1pipe report runs/demo --watch

Everything is inside the file: it opens without a network. Rollouts are in compressed chunks that
the page opens on demand, so that it loads quickly with 100,000 of them. Imports no torch, and reads
the run's folder without locking it.
"""

import base64
import gzip
import html
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from r1pipe.rollout.store import list_steps, read_rollouts
from r1pipe.runs.ledger import SUMMARY
from r1pipe.runs.lineage import list_checkpoints
from r1pipe.runs.logs import read_metrics, read_rows
from r1pipe.runs.reader import StageFolder, find_stages, read_summary
from r1pipe.utils.errors import FULL, UserError, is_disk_full
from r1pipe.utils.jsonl import read_json, read_jsonl, write_text
from r1pipe.utils.progress import log_line
from r1pipe.utils.timeline import find_idle

PAGE = Path(__file__).with_name("page")
CHUNK = 256
"""Rollouts that are compressed and opened together."""
MAX_ROLLOUTS = 100_000
MAX_POINTS = 1_000
"""Of a curve: more than a screen's pixels."""
MAX_TIMELINES = 100
"""Steps of a stage."""
EVENTS = "events.jsonl"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write RUN/report.html, or `out`. Raises UserError if the folder holds no stage, or the file
    cannot be written."""
    stages = find_stages(run)
    out = out or run / "report.html"
    write_page(out, render(collect(run, stages)))
    return out


def write_page(out: Path, page: str) -> None:
    """Raises UserError."""
    if out.is_dir():
        raise UserError(f"--out {out}: a folder; give the name of a file in it")
    try:
        write_text(out, page)
    except OSError as error:
        why = FULL if is_disk_full(error) else f"cannot be written: {error.strerror}"
        raise UserError(f"{out}: {why}; choose another place with --out") from error


def watch(run: Path, out: Path | None, every_s: float) -> None:
    """Write the report whenever the run has new data, until interrupted."""
    seen: float | None = None
    while True:
        try:
            newest = find_newest(run)
            if newest != seen:
                path = write_report(run, out)
                if seen is None:
                    log_line(f"written: {path}; updated every {every_s:g} s")
                seen = newest
        except (UserError, FileNotFoundError):
            if seen is None:
                raise
            # A finished stage was being moved: it is there the next time.
        time.sleep(every_s)


def find_newest(run: Path) -> float:
    """When anything that the report shows was last written."""
    names = ("metrics.jsonl", "stage.json", EVENTS, "summary.json", "rollouts")
    folders = [run, *(stage.folder for stage in find_stages(run))]
    paths = (folder / name for folder in folders for name in names)
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


# --- Data ---------------------------------------------------------------------------------------


def find_parents(stage: StageFolder) -> list[str]:
    """What the stage starts from, also in runs with settings that this version does not know."""
    own = stage.settings
    data = own.get("data")
    traces = data.get("stage") if isinstance(data, dict) else None
    return [*list_checkpoints(own), *([traces] if isinstance(traces, str) else [])]


def collect(run: Path, stages: list[StageFolder]) -> dict[str, Any]:
    """The page's data."""
    rollouts = Rollouts()
    for stage in stages:
        for row in find_rollouts(stage):
            rollouts.add(**row)
    return {
        "name": run.resolve().name,
        "written": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "running": any(stage.is_running for stage in stages),
        "stages": [describe_stage(stage) for stage in stages],
        "summary": read_summary(run),
        "curves": [curves for stage in stages if (curves := collect_curves(stage))],
        "timelines": [lines for stage in stages if (lines := collect_timelines(stage))],
        "experts": [load for stage in stages if (load := collect_expert_load(stage))],
        "events": [
            {"stage": stage.name, **event}
            for stage in stages
            for event in read_rows(stage.folder / EVENTS)
        ],
        "cost": read_json(run / SUMMARY, missing_ok=True),
        "rollouts": rollouts.pack(),
    }


def describe_stage(stage: StageFolder) -> dict[str, Any]:
    hidden = ("stage", "kind", "settings", "parents")
    return {
        "name": stage.name,
        "kind": stage.kind,
        "state": "running" if stage.is_running else "finished",
        "parents": find_parents(stage),
        "facts": {key: value for key, value in stage.record.items() if key not in hidden},
    }


def collect_curves(stage: StageFolder) -> dict[str, Any] | None:
    """`{"stage", "steps", "series": {name: values}}` with null where there is no number."""
    rows = thin(read_metrics(stage.folder), MAX_POINTS)
    if not rows:
        return None
    names = dict.fromkeys(
        name
        for row in rows
        for name, value in row.items()
        if not isinstance(value, list) and not name.startswith("experts/layer_") and name != "step"
    )
    return {
        "stage": stage.name,
        "kind": stage.kind,
        "steps": [row["step"] for row in rows],
        "series": {name: [shorten(row.get(name)) for row in rows] for name in names},
    }


def collect_timelines(stage: StageFolder) -> dict[str, Any] | None:
    """Who worked when: `steps`, each with its seconds, idle shares by lane, and rows of lane, what,
    begin and end. `behind`: tokens that were sampled 0, 1, ... syncs before."""
    rows = [row for row in read_metrics(stage.folder) if row.get("timeline")]
    steps = [
        {
            "step": row["step"],
            "seconds": row["seconds/step"],
            "idle": find_idle(row),
            "rows": row["timeline"],
            "behind": row.get("staleness/tokens"),
        }
        for row in thin(rows, MAX_TIMELINES)
    ]
    return {"stage": stage.name, "steps": steps} if steps else None


def collect_expert_load(stage: StageFolder) -> dict[str, Any] | None:
    """Each layer's load over the steps, `load[layer][expert][step]`, as a share of an even one."""
    rows = [row for row in read_metrics(stage.folder) if "experts/max_violation" in row]
    rows = thin(rows, MAX_POINTS // 4)
    names = [name for name in (rows[0] if rows else ()) if name.endswith("/load")]
    if not names:
        return None
    return {
        "stage": stage.name,
        "steps": [row["step"] for row in rows],
        "layers": [name.removeprefix("experts/layer_").removesuffix("/load") for name in names],
        "load": [[list(e) for e in zip(*(row[name] for row in rows))] for name in names],
    }


def thin(rows: list, limit: int) -> list:
    """At most `limit` rows, evenly spaced, the last one included."""
    stride = math.ceil(len(rows) / limit) or 1
    return rows[::-1][::stride][::-1]


def shorten(value: Any) -> float | None:
    """To 6 digits; None for what is no finite number."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


# --- Rollouts -----------------------------------------------------------------------------------


def find_rollouts(stage: StageFolder) -> Iterator[dict[str, Any]]:
    """Arguments of `Rollouts.add` for a stage that trains on its samples or evaluates."""
    if steps := list(list_steps(stage.folder)):
        for row in read_rollouts(stage.folder, steps):
            yield {"source": stage.name, "row": row}
    else:
        entries = stage.read_summary()
        several = len({entry["dataset"] for entry in entries}) > 1
        for entry in entries:
            dataset = f" on {entry['dataset']}" if several else ""
            for _, row in read_jsonl(stage.folder / entry["samples"]):
                yield {"source": f"{stage.name}: {entry['stage']}{dataset}", "row": row}


@dataclass
class Rollouts:
    """Columns for filtering, and the text of each rollout in chunks.

    A source is a stage that trains on its samples, or a checkpoint in an eval stage."""

    sources: dict[str, int] = field(default_factory=dict)
    problems: dict[tuple, int] = field(default_factory=dict)
    functions: dict[str, int] = field(default_factory=dict)
    rows: list[list] = field(default_factory=list)
    texts: list[list] = field(default_factory=list)

    def add(self, source: str, row: dict[str, Any]) -> None:
        problem = (row["problem_id"], row["prompt"], row["answer"])
        rewards = [
            [self.functions.setdefault(name, len(self.functions)), shorten(value)]
            for name, value in row["rewards"].items()
        ]
        self.rows.append(
            [
                self.sources.setdefault(source, len(self.sources)),
                self.problems.setdefault(problem, len(self.problems)),
                row.get("step", 0),
                row["sample"],
                shorten(row["reward"]),
                # The first function says whether the answer is right: by convention of the recipes.
                rewards[0][1] if rewards else None,
                shorten(row.get("advantage")),
                row["num_tokens"],
                int(row["finish_reason"] == "length"),
            ]
        )
        episode = row.get("episode")
        turns = [[episode["messages"], episode["ended"]]] if episode else []
        self.texts.append([row["completion"], rewards, *turns])

    def pack(self) -> dict[str, Any]:
        kept = thin(list(range(len(self.rows))), MAX_ROLLOUTS)
        columns = list(zip(*(self.rows[i] for i in kept)))
        names = ("source", "problem", "step", "sample", "reward", "right", "advantage", "tokens")
        return {
            "total": len(self.rows),
            "kept": len(kept),
            "chunk": CHUNK,
            "sources": list(self.sources),
            "functions": list(self.functions),
            "index": compress(
                {
                    "problems": list(self.problems),
                    "columns": dict(zip((*names, "truncated"), columns)),
                }
            ),
            "chunks": [
                compress([self.texts[i] for i in kept[start : start + CHUNK]])
                for start in range(0, len(kept), CHUNK)
            ],
        }


def compress(value: Any) -> str:
    """JSON, gzip, base64: the same bytes for the same value."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


# --- The page -----------------------------------------------------------------------------------


def render(data: dict[str, Any]) -> str:
    """The page with its style, its script and its data inside."""
    chunks = data["rollouts"].pop("chunks")
    parts = {
        "title": html.escape(data["name"]),
        "style": read_part("style.css"),
        "script": read_part("script.js"),
        # A completion may contain "</script>".
        "data": json.dumps(data, separators=(",", ":")).replace("<", "\\u003c"),
        "chunks": "\n".join(
            f'<script type="text/plain" id="chunk-{number}">{chunk}</script>'
            for number, chunk in enumerate(chunks)
        ),
    }
    page = read_part("page.html")
    for name, text in parts.items():
        before, after = page.split(f"<!-- {name} -->")
        page = before + text + after
    return page


def read_part(name: str) -> str:
    return (PAGE / name).read_text(encoding="utf-8")
