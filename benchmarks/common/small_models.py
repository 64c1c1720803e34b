"""Checks with models that build in a second: the demo's recipe and routing replay."""

from pathlib import Path
from typing import Any

import torch
from common.card import PARITY, Card
from common.checks import Check
from routing_replay import MODELS, compare
from safetensors.torch import load_file

from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import Engine, Recipe
from r1pipe.models.weights import list_weights
from r1pipe.pipeline import open_run, run_stages
from r1pipe.runs.logs import read_metrics
from r1pipe.utils.jsonl import read_json

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
TIMES = ("seconds/", "tokens_per_s/", "mfu")


def check_demo(card: Card, check: Check) -> None:
    """Parity of the demo's GRPO steps, in float32 and bf16."""
    for dtype in PARITY:
        folder = run_demo(card, dtype) if dtype == "float32" else run_grpo(card, "bf16", dtype)
        goal = PARITY[dtype]
        for row in read_metrics(folder):
            step, diffs = row["step"], (row["sampler/logprob_diff_mean"], parity_after(row))
            check.add(f"{dtype}, step {step}: mean abs dlogp", diffs[0], at_most=goal)
            check.add(f"{dtype}, step {step}: after its sync", diffs[1], at_most=goal)
        check.add(f"{dtype}: after the last sync", last_parity(folder), at_most=goal)


def check_async(card: Card, check: Check) -> None:
    """Steps whose batch was sampled while the step before trained."""
    folder = run_grpo(card, "async", "float32", max_steps=card.sizes.ahead_steps, max_staleness=1)
    rows = read_metrics(folder)
    staleness = [row["staleness/max"] for row in rows]
    check.add("staleness of the batches, by step", ", ".join(map(str, staleness)))
    ahead = [row["sampler/logprob_diff_ahead"] for row in rows if row["staleness/max"]]
    check.add(
        "mean abs dlogp under the weights that sampled, largest",
        max(ahead, default=float("nan")),
        at_most=PARITY["float32"],
    )
    synced = max(parity_after(row) for row in rows)
    check.add("mean abs dlogp after a sync, largest", synced, at_most=PARITY["float32"])
    check.add("after the last sync", last_parity(folder), at_most=PARITY["float32"])
    waits = sum(row["seconds/wait"] for row in rows) / sum(row["seconds/step"] for row in rows)
    check.add("share of the steps spent waiting for samples", f"{waits:.0%}")


def check_determinism(card: Card, check: Check) -> None:
    """Two runs of one seed; grpo of both starts from the first's sft."""
    first = run_demo(card, "float32")
    again = run_demo(card, "float32", "again", start=first.parent / "sft")
    for stage in ("sft", "grpo"):
        one, other = (folder.parent / stage for folder in (first, again))
        check.add(f"{stage}: weights of two runs of one seed", compare_weights(one, other))
        check.add(f"{stage}: metrics of two runs of one seed", compare_metrics(one, other))


def check_replay(card: Card, check: Check) -> None:
    """Sampler and trainer with the trainer's own routes and with the sampler's."""
    eager = Engine(max_model_len=128, kv_cache_gib=0.25, enforce_eager=True)
    for name in card.sizes.replay_models:
        engines = card.engines(eager, "bfloat16")
        rows = compare(name, MODELS[name], engines, own_routers=False)
        figures = {row.replay: row for row in rows if row.layers == "bf16"}
        off, on = figures["off"], figures["on"]
        routes = f"{off.differing_routes:.2%} → {on.differing_routes:.2%}"
        check.add(f"{name}: differing routes, replay off → on", routes)
        check.add(f"{name}: mean abs dlogp, replay off", off.mean_diff)
        check.add(f"{name}: mean abs dlogp, replay on", on.mean_diff, at_most=PARITY["bfloat16"])
        check.add(f"{name}: KL (k3), replay off → on", f"{off.kl:.1e} → {on.kl:.1e}")
        card.close_engines()


# --- The demo's recipe --------------------------------------------------------------------------


def run_demo(card: Card, dtype: str, name: str = "first", start: Path | None = None) -> Path:
    """init, sft and grpo; returns grpo's folder. `start`: another sft than the run's own."""
    values = {"sft.train.max_steps": card.sizes.demo_sft_steps}
    if start:
        values["grpo.from"] = str(start)
    return run_recipe(card, name, dtype, 3, values)


def run_grpo(card: Card, name: str, dtype: str, **values: Any) -> Path:
    """grpo alone, from the sft of `run_demo`."""
    sft = run_demo(card, "float32").parent / "sft"
    values = {"from": str(sft), **values}
    return run_recipe(card, name, dtype, 1, {f"grpo.{key}": v for key, v in values.items()})


def run_recipe(card: Card, name: str, dtype: str, count: int, values: dict[str, Any]) -> Path:
    """The `count` last of init, sft and grpo, if they are not there yet; grpo's folder."""
    sizes = card.sizes
    values = {
        "grpo.max_steps": 2,
        "grpo.prompts_per_step": sizes.demo_prompts,
        "grpo.num_generations": sizes.demo_generations,
        "grpo.save_steps": "null",
        "grpo.verify_sync": "true",
        # Half right, so that the weights do move: the demo's own rewards are 0 so early.
        "grpo.rewards": "[{function: common.workload.reward_parity}]",
        "grpo.breaker.logprob_diff.action": "ignore",  # what it is comes into the table
        **values,
    }
    overrides = [f"stages.{key}={value}" for key, value in values.items()]
    overrides += [f"name={name}", f"runs_dir={card.folder}", f"dtype={dtype}"]
    overrides += [f"device={card.device.type}", "engine.enforce_eager=true", "phase_timeout_s=null"]
    if sizes.demo_prompts < 64:
        overrides += ["stages.random.tokenizer.data.options.size=300"]
        overrides += [f"stages.{stage}.data.options.size=100" for stage in ("sft", "grpo")]
    recipe = load_recipe(DEMO, overrides)
    recipe = Recipe.model_validate({**dict(recipe), "stages": recipe.stages[3 - count : 3]})
    with open_run(recipe) as run:
        todo = [stage for stage in recipe.stages if not run.is_finished(stage)]
        engines = card.engines(recipe.engine, dtype) if todo else None
        run_stages(run, todo, skip_doctor=True, engines=engines)
        return run.stage_dir("grpo")


def parity_after(row: dict[str, Any]) -> float:
    return row["sync/logprob_diff_mean"]


def last_parity(folder: Path) -> float:
    return read_json(folder / "stage.json")["last_sync/logprob_diff_mean"]


def compare_weights(one: Path, other: Path) -> str:
    differ, largest, count = 0, 0.0, 0
    for file in list_weights(one):
        tensors, others = load_file(file), load_file(other / file.name)
        for name, tensor in tensors.items():
            count += 1
            if not torch.equal(tensor, others[name]):
                differ += 1
                largest = max(largest, float((tensor - others[name]).abs().max()))
    if not differ:
        return "bit-equal"
    return f"{differ} of {count} tensors differ, by at most {largest:.1e}"


def compare_metrics(one: Path, other: Path) -> str:
    """Of every step, without its times."""
    rows, others = read_metrics(one), read_metrics(other)
    differ = {
        key
        for row, mine in zip(rows, others, strict=True)
        for key in row
        if not key.startswith(TIMES) and row[key] != mine.get(key)
    }
    if not differ:
        return "bit-equal"
    return f"{len(differ)} figures differ: {', '.join(sorted(differ)[:4])}"
