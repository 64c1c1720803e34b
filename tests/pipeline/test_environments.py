"""Episodes of several turns, from a real engine: token-exact, seeded, within limits."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from commands import read_lines, run, run_and_kill
from envs_of_tests import AGAIN, HEARD
from samples import sample_all
from test_engine import ARCHITECTURES, CPU, LIMIT, SETTINGS, logprob_diff
from test_resume import assert_equal
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from r1pipe.config.base import Environment, ProblemSet, Reward, Sampling
from r1pipe.data.problems import load_problems
from r1pipe.envs.driver import PATIENCE_S, EpisodeSampler
from r1pipe.envs.tools import ToolEnvironment
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import (
    build_tokenizer,
    encode_completion,
    encode_prompt,
    load_tokenizer,
)
from r1pipe.models.weights import export_weights, save_checkpoint
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.sampling import SamplingJob, read_samples
from r1pipe.rollout.store import TEXT, TOKENS, read_rollouts
from r1pipe.sft.encode import encode_traces
from r1pipe.types import Problem, Rollout
from r1pipe.utils.errors import UserError

PROBLEMS = load_problems(ProblemSet(recipe="arithmetic", options={"size": 8}))
SAMPLING = Sampling(max_completion_length=60)
TALKER = {**ARCHITECTURES["llama"], "initializer_range": 0.1}
TOOLS = {"name": "tools", "tool_parser": "hermes"}
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'


def save_talker(folder: Path, seed: int = 0) -> PreTrainedModel:
    """A random model that ends a turn after eight tokens or so: every eighth is an end token, if
    CALL does without it."""
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
    model = build_model(TALKER, tokenizer, seed)
    model.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        *sorted(set(range(5, len(tokenizer), 8)) - set(tokenizer.encode(CALL))),
    ]
    save_checkpoint(model, tokenizer, folder)
    return model


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Sampler, PreTrainedModel]]:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = save_talker(folder)
    sampler = Sampler(str(folder), SETTINGS, "float32", CPU)
    yield sampler, model
    sampler.close()


def play(
    sampler: Sampler,
    problems: list[Problem] = PROBLEMS,
    max_turns: int = 8,
    max_tool_s: float = 60.0,
    name: str = "Talk",
    **options: object,
) -> list[Rollout]:
    settings = Environment(
        name=f"envs_of_tests.{name}", options=options, max_turns=max_turns, max_tool_s=max_tool_s
    )
    episodes = EpisodeSampler(sampler, settings, problems[0])
    groups = episodes.generate_groups(problems, 4, SAMPLING, (0,))
    return [r for group in sorted(groups, key=lambda g: g.index) for r in group.rollouts]


def test_a_path_is_what_was_sampled_and_what_the_template_adds(opened: tuple) -> None:
    sampler, model = opened
    rollouts = play(sampler)
    added = "<|user|>again<|assistant|>"
    long = [r for r in rollouts if r.episode.ended == "done"]
    assert len(long) > len(rollouts) / 2
    for rollout in rollouts:
        episode, ids = rollout.episode, rollout.completion_ids
        assert [sampler.tokenizer.decode(ids[a:b]) for a, b in episode.given] == [added] * (
            episode.num_turns - 1
        )
        said = [m["content"] for m in episode.messages if m["role"] == "assistant"]
        assert [sampler.decode(rollout.prompt_ids, ids[a:b]) for a, b in rollout.sampled_spans] == (
            said
        )
        assert rollout.completion == "\n\n".join(said)
        assert episode.reward == sum(map(len, said))
        assert rollout.num_tokens <= SAMPLING.max_completion_length
        assert all(value < 0 for value in rollout.pick_sampled(rollout.logprobs))
    assert all(r.episode.num_turns == 3 and r.finish_reason == "stop" for r in long)
    assert all(m == AGAIN for r in long for m in r.episode.messages[1::2])
    assert logprob_diff(model, rollouts) < LIMIT


def test_a_single_turn_is_the_same_to_the_last_bit(opened: tuple) -> None:
    sampler, _ = opened
    alone = sampler.generate(PROBLEMS, 4, SAMPLING, (0,))
    paths = play(sampler, turns=1)
    for path, rollout in zip(paths, alone, strict=True):
        assert path.episode.given == []
        assert replace(path, episode=None, finish_reason=rollout.finish_reason) == rollout


def test_text_encoded_again_is_not_what_was_sampled(opened: tuple) -> None:
    """What the path of token ids avoids: log-probabilities of other tokens."""
    sampler, _ = opened
    rollouts = [r for r in play(sampler) if r.episode.num_turns == 3]
    changed = 0
    for rollout in rollouts:
        spans = [rollout.completion_ids[a:b] for a, b in rollout.sampled_spans]
        again = [
            sampler.tokenizer.encode(sampler.tokenizer.decode(span), add_special_tokens=False)
            for span in spans
        ]
        changed += again != spans
    assert changed > len(rollouts) / 2


def test_turns_do_not_depend_on_when_environments_answer(
    opened: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slow ones join later, beside others; the tokens are those of their seeds."""
    sampler, _ = opened
    monkeypatch.setitem(PATIENCE_S, "cpu", 0.0)
    quick, slow = play(sampler), play(sampler, waits_at=1, wait_s=0.2)
    assert [r.completion_ids for r in slow] == [r.completion_ids for r in quick]
    assert len({tuple(r.completion_ids) for r in quick}) == len(quick)
    turns = [r.completion_ids[a:b] for r in quick for a, b in r.sampled_spans]
    assert len(set(map(tuple, turns))) > 0.9 * len(turns), "each turn has its own seed"


def test_the_engine_goes_on_while_an_environment_is_slow(opened: tuple) -> None:
    sampler, _ = opened
    problems = [
        replace(p, extra={"environment": {"name": "envs_of_tests.Talk", "options": o}})
        for p, o in zip(PROBLEMS, ({"waits_at": 1, "wait_s": 3.0}, *[{}] * 7))
    ]
    ended: list[str] = []
    settings = Environment(name="envs_of_tests.Talk")
    episodes = EpisodeSampler(sampler, settings, problems[0])
    for group in episodes.generate_groups(problems, 2, SAMPLING, (0,)):
        ended.append(group.problem.id)
    assert ended[-1] == problems[0].id
    assert len(ended) == 8


def teach(
    tokenizer: PreTrainedTokenizerBase,
    completion: str,
    problems: list[Problem] = PROBLEMS,
    tools: Sequence[dict] = (),
) -> PreTrainedModel:
    """To answer every problem so, where it is shown these tools."""
    model = build_model(TALKER, tokenizer, 0).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    answer = encode_completion(tokenizer, completion)
    prompts = (encode_prompt(tokenizer, p.prompt, tools=list(tools)) for p in problems)
    rows = [[*prompt, *answer] for prompt in prompts]
    losses: list[float] = []
    while len(losses) < len(rows) or max(losses[-len(rows) :]) > 0.003:
        ids = torch.tensor([rows[len(losses) % len(rows)]])
        logits = model(input_ids=ids).logits[0, -len(answer) - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        assert len(losses) < 1000
    return model.eval()


def play_with(
    policy: PreTrainedModel, opened: tuple[Sampler, PreTrainedModel], settings: Environment
) -> list[Rollout]:
    """Two episodes of each problem by the engine with this policy's weights."""
    sampler, model = opened
    episodes = EpisodeSampler(sampler, settings, PROBLEMS[0])
    sampler.load_weights(export_weights(policy))
    try:
        sampling = Sampling(max_completion_length=160)
        groups = list(episodes.generate_groups(PROBLEMS, 2, sampling, (0,)))
    finally:
        sampler.load_weights(export_weights(model))
    return [rollout for group in groups for rollout in group.rollouts]


def test_a_model_that_calls_a_tool_reads_its_result(opened: tuple) -> None:
    sampler, _ = opened
    caller = teach(sampler.tokenizer, CALL, tools=ToolEnvironment(PROBLEMS[0]).tools)
    played = play_with(caller, opened, Environment(**TOOLS))
    rollouts = [r for r in played if r.episode.num_tool_calls]
    assert len(rollouts) > 8
    for rollout in rollouts:
        assert {"role": "tool", "name": "calculator", "content": "42"} in rollout.episode.messages
        start, stop = rollout.episode.given[0]
        added = sampler.tokenizer.decode(rollout.completion_ids[start:stop])
        assert added == "<|tool|>42<|assistant|>"
    assert logprob_diff(caller, rollouts) < LIMIT


def test_a_malformed_call_is_counted_and_answered(opened: tuple) -> None:
    sampler, _ = opened
    tools = ToolEnvironment(PROBLEMS[0]).tools
    caller = teach(sampler.tokenizer, CALL.replace("}}", ""), tools=tools)
    played = play_with(caller, opened, Environment(**TOOLS, max_turns=2))
    rollouts = [r for r in played if r.episode.num_malformed_calls]
    assert len(rollouts) > 8
    for rollout in rollouts:
        answers = [m for m in rollout.episode.messages if m["role"] == "tool"]
        assert {m["content"] for m in answers} == {"error: not a tool call that can be read"}
        assert 0 < rollout.episode.num_malformed_calls <= 2
        assert rollout.episode.num_tool_calls == 0


def test_a_parser_is_needed_for_tools(opened: tuple) -> None:
    with pytest.raises(UserError, match="which of vLLM's parsers reads this model's tool calls"):
        EpisodeSampler(opened[0], Environment(name="tools"), PROBLEMS[0])


def test_limits_and_errors_end_an_episode(opened: tuple) -> None:
    sampler, _ = opened
    by_limit = play(sampler, turns=100, max_turns=2)
    assert sum(r.episode.ended == "turns" for r in by_limit) > len(by_limit) / 2
    assert all(r.truncated and r.episode.num_turns <= 2 for r in by_limit)

    by_time = play(sampler, PROBLEMS[:2], max_tool_s=0.05, waits_at=2, wait_s=30.0)
    assert "tool_time" in {r.episode.ended for r in by_time}
    assert all(r.episode.num_turns <= 2 for r in by_time)

    by_tokens = play(sampler, turns=100, max_turns=100)
    assert {r.episode.ended for r in by_tokens} == {"tokens"}
    assert all(r.num_tokens > 30 for r in by_tokens)

    failed = play(sampler, PROBLEMS[:2], fails_at=1)
    assert {r.episode.ended for r in failed} == {"error"}
    assert {r.episode.error for r in failed} == {"LookupError: no such place"}
    assert {r.episode.reward for r in failed} == {None}


def test_an_environment_hears_once_what_ended_the_episode(opened: tuple) -> None:
    sampler, _ = opened
    for options in ({}, {"turns": 100, "max_turns": 2}, {"turns": 100, "max_turns": 100}):
        HEARD.clear()
        rollouts = play(sampler, name="Listener", **options)
        assert sorted(HEARD) == sorted((r.problem_id, r.episode.ended) for r in rollouts)
        for rollout in rollouts:
            said = sum(len(m["content"]) for m in rollout.episode.messages if m != AGAIN)
            assert rollout.episode.reward == 1000 + said
    HEARD.clear()
    failed = play(sampler, PROBLEMS[:1], name="Listener", fails_at=1)
    assert [(PROBLEMS[0].id, "error")] * 4 == HEARD
    assert {r.episode.reward for r in failed} == {None}
    failed = play(sampler, PROBLEMS[:1], name="Listener", fails_at=1, end_fails=True)
    assert {r.episode.error for r in failed} == {"LookupError: no such place"}
    failed = play(sampler, PROBLEMS[:1], name="Listener", end_fails=True)
    assert {(r.episode.ended, r.episode.error, r.episode.reward) for r in failed} == {
        ("error", "LookupError: no judge", None)
    }


def test_the_context_ends_an_episode(opened: tuple) -> None:
    sampler, _ = opened
    settings = Environment(name="envs_of_tests.Talk", options={"turns": 100}, max_turns=100)
    sampling = Sampling(max_completion_length=200)
    groups = EpisodeSampler(sampler, settings, PROBLEMS[0]).generate_groups(
        PROBLEMS[:2], 4, sampling, (0,)
    )
    rollouts = [r for group in groups for r in group.rollouts]
    lengths = [len(r.prompt_ids) + len(r.completion_ids) for r in rollouts]
    assert max(lengths) <= sampler.max_model_len
    assert any(r.num_tokens < 200 for r in rollouts)
    assert {r.episode.ended for r in rollouts} == {"tokens"}

    unbegun = play(sampler, PROBLEMS[:2], first="Read this first. " * 200)
    assert {(r.episode.ended, r.num_tokens, r.truncated) for r in unbegun} == {("tokens", 0, True)}


def test_what_cannot_be_opened_is_one_line(opened: tuple) -> None:
    sampler, _ = opened
    for name, options, message in (
        ("envs_of_tests.Tolk", {}, 'has no function "Tolk"; did you mean envs_of_tests.Talk'),
        ("envs_of_tests.Talk", {"moves": 3}, "unexpected keyword argument 'moves'"),
    ):
        with pytest.raises(UserError, match=message):
            EpisodeSampler(sampler, Environment(name=name, options=options), PROBLEMS[0])
    odd = replace(PROBLEMS[0], extra={"environment": 3})
    with pytest.raises(UserError, match="its column environment is a name or"):
        EpisodeSampler(sampler, Environment(name="envs_of_tests.Talk"), odd)


def test_sampled_episodes_are_kept_and_not_sampled_again(opened: tuple, tmp_path: Path) -> None:
    sampler, _ = opened
    settings = Environment(name="envs_of_tests.Talk", weight=2.0)
    job = SamplingJob(
        problems=PROBLEMS,
        num_samples=2,
        sampling=SAMPLING,
        seed_parts=(0,),
        rewards=[Reward(function="rewards.math_correct")],
        origin="talker",
        folder=tmp_path,
        label="test",
        environment=settings,
    )
    rollouts, scores = sample_all(job, lambda: EpisodeSampler(sampler, settings, PROBLEMS[0]))
    for rollout, score in zip(rollouts, scores, strict=True):
        assert score.rewards["environment"] == rollout.episode.reward > 0
        assert score.total == score.rewards["rewards.math_correct"] + 2.0 * rollout.episode.reward
    again, same_scores = sample_all(job, lambda: pytest.fail("sampled again"))
    assert same_scores == scores
    assert again == [replace(r, prompt_ids=[], logprobs=[]) for r in rollouts]
    assert [r for _, r, _ in read_samples(job)] == again
    assert replace(job, environment=None).digest() != job.digest()


@pytest.mark.slow
def test_a_run_killed_between_turns_resumes_bit_equal(tmp_path: Path) -> None:
    save_talker(tmp_path / "talker")
    stage = {
        "kind": "grpo",
        "from": str(tmp_path / "talker"),
        "data": {"recipe": "arithmetic", "options": {"size": 40}},
        "environment": {"name": "envs_of_tests.Talk", "options": {"turns": 2}},
        "difficulty": {"num_samples": 2, "min_pass_rate": 0.5, "refresh_steps": 1},
        "max_steps": 2,
        "save_steps": 1,
        "prompts_per_step": 4,
        "num_generations": 4,
        "max_completion_length": 60,
        "learning_rate": 1e-3,
    }
    engine = {"max_model_len": 256, "max_num_seqs": 16, "kv_cache_gib": 0.1}
    measured = {
        "kind": "eval",
        "checkpoints": ["grpo"],
        "data": {"recipe": "arithmetic", "split": "test", "options": {"size": 4}},
        "num_samples": 2,
        "sampling": {"max_completion_length": 60},
        "environment": {"name": "envs_of_tests.Talk", "options": {"turns": 2}},
        "reward": "environment",
    }
    values = {"runs_dir": str(tmp_path), "engine": engine, "dtype": "float32"}
    values["stages"] = [stage, measured]
    for name in ("whole", "killed"):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"name": name, **values}))
    result = run("grpo", tmp_path / "whole.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    partial = tmp_path / "killed" / ".grpo.partial"
    run_and_kill("turning", 1, 0.0, partial, "grpo", tmp_path / "killed.yaml")
    result = run("grpo", tmp_path / "killed.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "resumes after step 1" in result.stderr
    folder = tmp_path / "whole" / "grpo"
    assert_equal(folder, tmp_path / "killed" / "grpo")

    rates = read_lines(folder / "difficulty.jsonl")
    assert [row["step"] for row in rates] == [0] * 40 + [1] * 40
    assert {row["pass_rate"] for row in rates} <= {0.0, 0.5, 1.0}  # an answer may be empty
    assert sum(row["pass_rate"] for row in rates) > 60
    first, last = read_lines(folder / "metrics.jsonl")
    for row in (first, last):
        assert row["sampler/logprob_diff_mean"] < LIMIT
        assert row["episodes/turns"] > 1.5
        assert row["rewards/environment/mean"] == row["reward"] > 0
    rows = list(read_rollouts(folder, [2]))
    assert {row["episode"]["ended"] for row in rows} >= {"done"}

    result = run("eval", tmp_path / "whole.yaml")
    assert result.returncode == 0, result.stderr[-3000:]
    (entry,) = json.loads((folder.parent / "summary.json").read_text())
    assert (entry["environment"], entry["pass_at_1"]) == ("envs_of_tests.Talk", 1.0)
    samples = read_lines(folder.parent / "eval" / entry["samples"])
    assert all(
        row["episode"]["reward"] == row["reward"] - row["rewards"]["rewards.format"]
        for row in samples
    )

    result = run("grpo", tmp_path / "whole.yaml", "--replay", "1:2")
    assert result.returncode == 0, result.stderr[-3000:]
    replayed = tmp_path / "whole" / "grpo-replay"
    assert [row["loss"] for row in read_lines(replayed / "metrics.jsonl")] == [
        row["loss"] for row in (first, last)
    ]
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, replayed)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_student_learns_in_an_environment(tmp_path: Path) -> None:
    """From the environment's own first prompt on, which is also what `max_prompt_length`, the
    doctor and the comparisons after a sync look at."""
    save_talker(tmp_path / "student")
    save_talker(tmp_path / "teacher", seed=1)
    log = tmp_path / "starts"
    question = "Please say: {question}"
    data = {"recipe": "arithmetic", "options": {"size": 40}}
    tokenizer = load_tokenizer(str(tmp_path / "student"))
    asked = [
        encode_prompt(
            tokenizer, [{"role": "user", "content": question.format(question=p.question)}]
        )
        for p in load_problems(ProblemSet(**data))
    ]
    limit = sorted(map(len, asked))[20]
    stage = {
        "kind": "on_policy_distill",
        "from": str(tmp_path / "teacher"),
        "student": str(tmp_path / "student"),
        "data": data,
        "environment": {
            "name": "envs_of_tests.Talk",
            "options": {"turns": 2, "first": question, "log": str(log)},
        },
        "max_prompt_length": limit,
        "max_steps": 2,
        "prompts_per_step": 8,
        "max_completion_length": 60,
        "max_staleness": 1,
        "learning_rate": 1e-3,
    }
    values = {"runs_dir": str(tmp_path), "name": "taught", "dtype": "float32"}
    engine = {"max_model_len": 256, "max_num_seqs": 16, "kv_cache_gib": 0.1}
    recipe = tmp_path / "taught.yaml"
    recipe.write_text(yaml.safe_dump({**values, "engine": engine, "stages": [stage]}))
    result = run("on_policy_distill", recipe)
    assert result.returncode == 0, result.stderr[-3000:]

    folder = tmp_path / "taught" / "on_policy_distill"
    record = json.loads((folder / "stage.json").read_text())
    assert record["prompts_too_long"] == sum(len(ids) > limit for ids in asked)
    assert 0 < record["prompts_too_long"] < 40
    rows = list(read_rollouts(folder, None, (*TEXT, *TOKENS)))
    assert all(list(row["prompt_ids"]) in asked for row in rows)
    assert {row["episode"]["ended"] for row in rows} == {"done"}
    assert all(row["rewards"] == {"environment": row["reward"]} for row in rows)
    metrics = read_lines(folder / "metrics.jsonl")
    assert metrics[0]["sampler/logprob_diff_mean"] < LIMIT
    for row in metrics:
        assert row["episodes/turns"] == 2
        assert row["sync/logprob_diff_mean"] < LIMIT
        assert row["divergence"] > 0
    assert [row["staleness/max"] for row in metrics] == [0, 1]
    assert metrics[0].keys() ^ metrics[1].keys() == {"sampler/logprob_diff_ahead"}
    assert metrics[1]["sampler/logprob_diff_ahead"] < LIMIT
    assert record["last_sync/logprob_diff_mean"] < LIMIT
    starts = log.read_text().splitlines()
    samples, probes = 2 * 8, 2 * 4 + 8
    assert len(starts) >= 40 + samples + probes


@pytest.mark.slow
def test_episodes_become_traces_to_train_on(tmp_path: Path) -> None:
    """By reject for an sft stage, and within distill."""
    save_talker(tmp_path / "teacher")
    save_talker(tmp_path / "student", seed=1)
    traces = {
        "num_generations": 2,
        "sampling": {"max_completion_length": 60},
        "environment": {
            "name": "envs_of_tests.Talk",
            "options": {"turns": 2, "first": "Please say: {question}"},
        },
        "rewards": [],
    }
    data = {"recipe": "arithmetic", "options": {"size": 6}}
    source = {"from": str(tmp_path / "teacher"), "data": data, "traces": traces}
    train = {"learning_rate": 1e-3, "per_device_train_batch_size": 4, "max_steps": 2}
    learner = {"from": str(tmp_path / "student"), "data": {"stage": "reject"}, "train": train}
    values = {"runs_dir": str(tmp_path), "name": "traced", "dtype": "float32"}
    values["engine"] = {"max_model_len": 256, "max_num_seqs": 16, "kv_cache_gib": 0.1}
    values["stages"] = [
        {"kind": "reject", **source},
        {"kind": "sft", **learner},
        {"kind": "distill", **source, "student": str(tmp_path / "student"), "train": train},
    ]
    recipe = tmp_path / "traced.yaml"
    recipe.write_text(yaml.safe_dump(values))
    result = run("run", recipe)
    assert result.returncode == 0, result.stderr[-3000:]

    folder = tmp_path / "traced"
    tokenizer = load_tokenizer(str(tmp_path / "teacher"))
    problems = {p.id: p for p in load_problems(ProblemSet(**data))}
    for name in ("reject", "distill"):
        record = json.loads((folder / name / "stage.json").read_text())
        rows = read_lines(folder / name / "traces.jsonl")
        assert record["traces"] == len(rows) > 3
        kept = record["samples"] - sum(n for key, n in record.items() if "dropped/" in key)
        assert kept == len(rows)
        for row in rows:
            asked = f"Please say: {problems[row['id'].split('#')[0]].question}"
            assert row["prompt"] == [{"role": "user", "content": asked}]
            assert [message["role"] for message in row["solution"]][::2] == ["assistant"] * 2
            assert row["solution"][1:-1] == [AGAIN]
        encoded = encode_traces([Problem(**row) for row in rows], tokenizer, None)
        for trace in encoded.rows:
            [(start, stop)] = trace.given
            given = tokenizer.decode(trace.completion_ids[start:stop])
            assert given == "<|user|>again<|assistant|>"
    for name in ("sft", "distill"):
        record = json.loads((folder / name / "stage.json").read_text())
        assert record["train_rows"] == len(rows)
        assert [row["step"] for row in read_lines(folder / name / "metrics.jsonl")] == [1, 2]
