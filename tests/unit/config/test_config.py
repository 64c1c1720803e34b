"""Recipes: every shipped one parses, every mistake is named with its file and key."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import Recipe
from r1pipe.config.rl import Grpo
from r1pipe.utils.errors import UserError

CORRECTION = "vllm_importance_sampling_correction"
ROOT = Path(__file__).parents[3]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
DEMO = ROOT / "configs" / "demo.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_parses(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert any(stage.kind == "eval" for stage in recipe.stages)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_config_names_only_keys_that_exist(path: Path) -> None:
    """Writing the parsed recipe back gives every key of the file: nothing was ignored."""
    given = yaml.safe_load(path.read_text())
    resolved = load_recipe(path).model_dump(mode="json", by_alias=True)

    def assert_within(part: object, whole: object, where: str) -> None:
        if isinstance(part, dict):
            for key, value in part.items():
                assert key in whole, f"{where}.{key}"
                assert_within(value, whole[key], f"{where}.{key}")
        elif isinstance(part, list):
            for i, (a, b) in enumerate(zip(part, whole, strict=True)):
                assert_within(a, b, f"{where}[{i}]")
        else:
            assert part == whole, where

    assert_within(given, resolved, path.name)


def write_demo(tmp_path: Path, **changes: object) -> Path:
    values = yaml.safe_load(DEMO.read_text())
    values.update(changes)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def stages_with(index: int, **changes: object) -> list[dict]:
    """A change of None takes the key out."""
    stages = yaml.safe_load(DEMO.read_text())["stages"]
    stages[index].update(changes)
    stages[index] = {key: value for key, value in stages[index].items() if value is not None}
    return stages


GREEDY = {"max_completion_length": 8, "temperature": 0}
ON_POLICY = {"kind": "on_policy_distill", "from": "sft", "num_generations": 1, "loss_type": None}
ON_POLICY["old_policy"] = None
"""In the place of the demo's grpo stage."""

SEVERAL = {**ON_POLICY, "from": None, "teachers": {"math": "sft"}}


A = {"recipe": "a"}
DRAFTS = {"method": "draft_model", "model": "small", "num_speculative_tokens": 2}

# (what is changed in the demo, words that the one-line error must contain)
MISTAKES = [
    ({"sede": 1}, ["sede", "unknown key", "seed"]),
    ({"dtype": "float16"}, ["dtype", "float32", "float16"]),
    ({"stages": []}, ["stages"]),
    ({"stages": stages_with(2, lerning_rate=1)}, ["stages.grpo.lerning_rate", "learning_rate"]),
    ({"stages": stages_with(2, max_steps=0)}, ["stages.grpo.max_steps", "0"]),
    ({"stages": stages_with(2, num_generations=1)}, ["stages.grpo.num_generations"]),
    ({"stages": stages_with(2, steps_per_generation=3)}, ["steps_per_generation"]),
    ({"stages": stages_with(2, temperature=0.0)}, ["stages.grpo.temperature"]),
    ({"stages": stages_with(2, temperature=0.005)}, ["stages.grpo.temperature", "give 0.01"]),
    ({"stages": stages_with(4, sampling={**GREEDY, "temperature": 0.005})}, ["give 0.01, or 0"]),
    ({"stages": stages_with(2, top_p=0.9)}, ["stages.grpo", "old_policy sampler", "top_p"]),
    ({"stages": stages_with(2, expert_parallel=2)}, ["expert_parallel", "sharding none"]),
    (
        {"stages": stages_with(2, max_staleness=1), "engine": {"tensor_parallel_size": 2}},
        ["stages.grpo.max_staleness", "tensor_parallel_size 1, not 2"],
    ),
    (
        {"stages": stages_with(2, max_staleness=1), "engine": {"sleep": 1}},
        ["stages.grpo.max_staleness", "leave out engine.sleep 1"],
    ),
    ({"stages": stages_with(2, max_staleness=2)}, ["max_staleness 2 needs in_flight"]),
    ({"stages": stages_with(2, in_flight=True)}, ["in_flight needs max_staleness"]),
    (
        {"stages": stages_with(2, max_staleness=1, in_flight=True)},
        ["stages.grpo.in_flight", "sampler.kind fleet"],
    ),
    (
        {"stages": stages_with(2, max_staleness=1, in_flight=True, dynamic_sampling=True)},
        ["in_flight", "dynamic_sampling"],
    ),
    (
        {"stages": stages_with(2, max_staleness=1, in_flight=True, routing_replay=True)},
        ["in_flight", "routing_replay"],
    ),
    (
        {"stages": stages_with(2, adapter={"sync": "alone"}), "sampler": {"kind": "fleet"}},
        ["stages.grpo.adapter.sync", "take merged"],
    ),
    (
        {
            "stages": stages_with(
                2, max_staleness=1, in_flight=True, environment={"name": "my.Game"}
            ),
            "sampler": {"kind": "fleet"},
        },
        ["in_flight", "environment"],
    ),
    ({"sampler": {"kind": "fleet"}, "engine": {"sleep": 1}}, ["sleep", "sampler.kind fleet"]),
    (
        {
            "stages": stages_with(2, rewards=[{"function": "rewards.judge"}]),
            "sampler": {"kind": "fleet", "ray": "auto", "reward_workers": 2},
        },
        ["stages.grpo.rewards: rewards.judge", "sampler.reward_workers"],
    ),
    (
        {"stages": stages_with(2, adapter={"sync": "alone"}), "engine": {"speculative": DRAFTS}},
        ["stages.grpo.adapter.sync", "alone", "engine.speculative"],
    ),
    ({"engine": {"speculative": DRAFTS, "sleep": 2}}, ["engine", "sleep 2", "take sleep 1"]),
    (
        {"engine": {"speculative": {**DRAFTS, "draft_sample_method": "probabilistic"}}},
        ["engine.speculative.draft_sample_method", "unknown key"],
    ),
    ({"engine": {"speculative": {**DRAFTS, "method": "ngram"}}}, ["method", "ngram"]),
    ({"engine": {"speculative": {**DRAFTS, "model": None}}}, ["model is missing"]),
    (
        {"engine": {"speculative": {**DRAFTS, "method": "mtp"}}},
        ["engine.speculative", "model does nothing with mtp"],
    ),
    ({"stages": stages_with(2, kind="ppo")}, ["kind must be one of", "grpo"]),
    ({"stages": stages_with(2, data={"recipe": "a", "stage": "b"})}, ["recipe or stage"]),
    ({"stages": stages_with(1, train={"learning_rate": 1e-3})}, ["stages.sft.train", "max_steps"]),
    ({"stages": stages_with(1, **{"from": "grpo"})}, ["sft", "grpo", "later"]),
    ({"stages": stages_with(3, name="sft")}, ["sft", "two"]),
    ({"stages": stages_with(3, name="a/b")}, ["name", "letters"]),
    ({"stages": stages_with(3, name="x" * 101)}, ["name", "letters", "at most 100"]),
    ({"stages": stages_with(3, name="publish")}, ["another name"]),
    *(
        ({"name": name}, ["name: a run's name", "no / in it"])
        for name in ("", ".", "..", "../x", "/tmp/x", "a/b", "a\\b", ".a", "~a", "-a", " a", "a\nb")
    ),
    ({"name": "x" * 101}, ["at most 100 bytes"]),
    ({"stages": stages_with(1, max_steps=3)}, ["did you mean train.max_steps"]),
    ({"stages": stages_with(2, max_model_len=9)}, ["did you mean engine.max_model_len"]),
    ({"stages": stages_with(2, seed=9)}, ["seed is a key of the recipe itself"]),
    ({"stages": stages_with(2, data={"recipe": "a", "size": 9})}, ["did you mean options.size"]),
    (
        {"stages": stages_with(2, data={"recipe": "a", "splitt": "x"})},
        ["grpo.data.splitt: unknown"],
    ),
    ({"stages": stages_with(2, data=[A, {**A, "weight": 1}])}, ["grpo.data: a set is there twice"]),
    ({"stages": stages_with(2, data={**A, "weight": 1})}, ["says nothing of one set alone"]),
    ({"stages": stages_with(2, data=[A, {"recipe": "b", "weight": 1}])}, ["or none of them"]),
    ({"stages": stages_with(2, data=[A, {"recipe": "b", "wait": 1}])}, ["grpo.data.1.wait: unk"]),
    # What is given already is not what was meant.
    ({"stages": stages_with(2, prompts_a_step=9)}, ["unknown key; known keys: adam_beta2"]),
    ({"stages": stages_with(2, fp8="both", adapter={})}, ["grpo: fp8 is", "without an adapter"]),
    ({"stages": stages_with(2, expert_parallel=2, adapter={})}, ["not go with an adapter"]),
    ({"stages": stages_with(2, expert_parallel=2, fp8="both")}, ["not go with fp8"]),
    ({"stages": stages_with(2, sequence_parallel=2, fp8="update")}, ["not go with fp8"]),
    ({"stages": stages_with(2, sequence_parallel=2, top_p=0.9)}, ["not go with top_p"]),
    (
        {"stages": stages_with(1, train={"max_steps": 5, "fp8": "both"})},
        ['stages.sft.train: fp8 "both"', "give update"],
    ),
    (
        {"stages": stages_with(2, indexer={"phase": "dense"})},
        ["indexer.phase dense", "give sparse"],
    ),
    ({"engine": {"max_num_seq": 3}}, ["engine.max_num_seq", "max_num_seqs"]),
    (
        {"stages": stages_with(3, traces={"num_generations": 1, "sampling": {}})},
        ["max_completion_length", "missing"],
    ),
    (
        {"stages": stages_with(4, data=[{"recipe": "arithmetic", "spilt": "test"}])},
        ["stages.eval.data.0.spilt", "split"],
    ),
    ({"stages": stages_with(4, data=[{"recipe": "arithmetic"}] * 2)}, ["arithmetic/train", "name"]),
    (
        {"stages": stages_with(2, rewards=[{"function": "a.b", "wieght": 1}])},
        ["stages.grpo.rewards.0.wieght", "weight"],
    ),
    (
        {"stages": stages_with(2, rewards=[{"function": "a.b", "weight": float("nan")}])},
        ["stages.grpo.rewards.0.weight", "finite"],
    ),
    ({"seed": 2**70}, ["seed", "less than"]),
    ({"stages": stages_with(4, checkpoints=["sft", "sft"])}, ['"sft" is there twice']),
    (
        {"stages": stages_with(3, student="distill")},
        ["stages", '"distill" starts from "distill"'],
    ),
    (
        {"stages": stages_with(2, **ON_POLICY, student={"model_type": "qwen3"})},
        ["stages.on_policy_distill.student", "random weights", "distill stage first"],
    ),
    (
        {"stages": stages_with(2, **ON_POLICY, student="distill")},
        ['"on_policy_distill" starts from "distill", a later one'],
    ),
    (
        {"stages": stages_with(2, **ON_POLICY, student="sft", top_p=0.9)},
        ["stages.on_policy_distill.top_p", "unknown key"],
    ),
    (
        {"stages": stages_with(2, **ON_POLICY, student="sft", beta=1.5)},
        ["stages.on_policy_distill.beta", "1.5"],
    ),
    (
        {"stages": stages_with(2, **ON_POLICY, student="sft", teachers={"math": "sft"})},
        ["stages.on_policy_distill", "either from or teachers"],
    ),
    (
        {"stages": stages_with(2, **{**ON_POLICY, "from": None}, student="sft")},
        ["stages.on_policy_distill", "either from or teachers"],
    ),
    (
        {"stages": stages_with(2, **SEVERAL, student="sft")},
        ["stages.on_policy_distill", "teacher_field"],
    ),
    (
        {"stages": stages_with(2, **{**SEVERAL, "teachers": {"": "sft"}}, student="sft")},
        ["stages.on_policy_distill", "an empty value"],
    ),
    (
        {"stages": stages_with(2, **ON_POLICY, student="sft", teacher_field="kind")},
        ["stages.on_policy_distill", "teacher_field does nothing without teachers"],
    ),
    (
        {"stages": stages_with(3, train={"max_steps": 5, "adapter": {}})},
        ["stages.distill", "a student from random weights is trained whole"],
    ),
]


def sft_with(**changes: object) -> dict:
    return {"stages": stages_with(1, train={"max_steps": 5, **changes})}


def grpo_with(**changes: object) -> dict:
    """With pi_old by the trainer, beside which all other keys may stand."""
    return {"stages": stages_with(2, **{"old_policy": None, **changes})}


def distill_with(**changes: object) -> dict:
    sampling = {"max_completion_length": 56}
    return {"stages": stages_with(3, traces={"num_generations": 2, "sampling": sampling} | changes)}


def eval_with(**changes: object) -> dict:
    return {"stages": stages_with(4, **changes)}


def sampler_with(**keys: object) -> dict:
    return {"sampler": keys}


MATHS = "rewards.math_correct"
WARMUP = {"phase": "warmup"}
# Keys that do nothing where they stand, and what has to change for them to do something.
IDLE = [
    (sft_with, {"min_lr": 1e-6, "lr_scheduler_type": "linear"}, {"lr_scheduler_type": "cosine"}),
    (sft_with, {"min_lr": 1e-6, "lr_scheduler_type": "constant"}, {"min_lr": 0.0}),
    (sft_with, {"save_total_limit": 5, "save_steps": None}, {"save_steps": 5}),
    (grpo_with, {"kl_estimator": "k1"}, {"beta": 0.1, "use_bias_correction_kl": True}),
    (grpo_with, {"use_bias_correction_kl": True}, {"beta": 0.1}),
    (grpo_with, {"reference_refresh_steps": 5}, {"beta": 0.1}),
    (grpo_with, {"breaker": {"kl": {"limit": 5}}}, {"beta": 0.1}),
    (sft_with, {"bias_update_rate": 0.01, "adapter": {}}, {"adapter": None}),
    (sft_with, {"mtp": {}, "adapter": {}}, {"adapter": None}),
    (sft_with, {"indexer": {"phase": "sparse"}, "adapter": {}}, {"adapter": None}),
    (sft_with, {"learning_rate": 1e-4, "indexer": WARMUP}, {"indexer": {"phase": "dense"}}),
    (sft_with, {"bias_update_rate": 0.01, "indexer": WARMUP}, {"indexer": {"phase": "sparse"}}),
    (sft_with, {"adapter": {"offload_base": True}}, {"adapter": {}}),
    (grpo_with, {"beta": 0.1, "reference_refresh_steps": 5, "adapter": {}}, {"adapter": None}),
    (grpo_with, {"epsilon": 0.1, "loss_type": "cispo", "epsilon_high": 5}, {"loss_type": "dapo"}),
    (grpo_with, {"delta": 4, "loss_type": "cispo", "epsilon_high": 5}, {"loss_type": "grpo"}),
    *(
        (
            grpo_with,
            {f"vllm_importance_sampling_{key}": value, CORRECTION: False},
            {CORRECTION: True},
        )
        for key, value in (("mode", "token_mask"), ("clip_min", 0.5), ("clip_max", 3.0))
    ),
    (grpo_with, {CORRECTION: False, "old_policy": "sampler"}, {"old_policy": "trainer"}),
    (grpo_with, {"max_sampling_rounds": 8}, {"dynamic_sampling": True}),
    (
        grpo_with,
        {"rewards": [{"function": MATHS, "weight": 0}]},
        {"rewards": [{"function": MATHS}]},
    ),
    (grpo_with, {"rewards": []}, {"environment": {"name": "my.Game"}}),
    (grpo_with, {"breaker": {"entropy": {"limit": 1, "action": "ignore"}}}, {"breaker": {}}),
    (grpo_with, {"data": {"stage": "sft", "split": "test"}}, {"data": {"stage": "sft"}}),
    (grpo_with, {"data": {"stage": "sft", "options": {"size": 5}}}, {"data": {"stage": "sft"}}),
    (distill_with, {"choose": "diverse"}, {"max_per_problem": 2}),
    (
        distill_with,
        {"environment": {"name": "my.Game", "weight": 2.0}},
        {"environment": {"name": "my.Game"}, "rewards": []},
    ),
    (
        distill_with,
        {"environment": {"name": "my.Game"}, "few_shot": {"data": {"recipe": "arithmetic"}}},
        {"environment": None},
    ),
    (distill_with, {"rewards": []}, {"environment": {"name": "my.Game"}}),
    (distill_with, {"filters": {"language": "en"}}, {"filters": {"min_language_share": 0.5}}),
    (
        distill_with,
        {"rewards": [{"function": MATHS, "weight": 0}]},
        {"rewards": [{"function": MATHS}]},
    ),
    (distill_with, {"sampling": {**GREEDY, "top_p": 0.9}}, {"sampling": {**GREEDY, "top_p": 1.0}}),
    (eval_with, {"sampling": {**GREEDY, "top_k": 4}}, {"sampling": GREEDY}),
    (eval_with, {"reward": "environment"}, {"environment": {"name": "my.Game"}}),
    (eval_with, {"k": 9, "num_samples": 8}, {"k": 8}),
    (sampler_with, {"engines": 2}, {"kind": "fleet"}),
    (sampler_with, {"ray": "auto"}, {"kind": "fleet"}),
    (sampler_with, {"kind": "fleet", "reward_workers": 2}, {"ray": "auto"}),
    (
        eval_with,
        {"data": [{"recipe": "arithmetic", "num_samples": 2}], "num_samples": 3, "k": 2},
        {"num_samples": None},
    ),
]


@pytest.mark.parametrize(
    ("place", "idle", "change"), IDLE, ids=lambda x: getattr(x, "__name__", str(x))[:50]
)
def test_a_key_that_does_nothing_is_refused(
    place: Callable[..., dict], idle: dict, change: dict, tmp_path: Path
) -> None:
    """And taken where another key has it do something. A recipe that is written down, with every
    key, is read again."""
    with pytest.raises(UserError, match=r"nothing|above num_samples") as error:
        load_recipe(write_demo(tmp_path, **place(**idle)))
    assert "\n" not in str(error.value)
    recipe = load_recipe(write_demo(tmp_path, **place(**idle | change)))
    assert Recipe.model_validate(recipe.model_dump(mode="json", by_alias=True)) == recipe


@pytest.mark.parametrize("check", ["kl", "update_kl"])
def test_a_student_has_no_reference_to_be_held_to(check: str, tmp_path: Path) -> None:
    changes = ON_POLICY | {"student": "sft", "breaker": {check: {"limit": 9}}}
    with pytest.raises(UserError, match=rf"breaker\.{check} does nothing"):
        load_recipe(write_demo(tmp_path, stages=stages_with(2, **changes)))


def test_a_limit_without_an_action_is_refused(tmp_path: Path) -> None:
    """A student's entropy is not looked at: a limit alone would look as if it were."""
    changes = ON_POLICY | {"student": "sft", "breaker": {"entropy": {"limit": 0.1}}}
    with pytest.raises(UserError, match=r"breaker\.entropy: limit does nothing .* action"):
        load_recipe(write_demo(tmp_path, stages=stages_with(2, **changes)))
    changes["breaker"]["entropy"]["action"] = "warn"
    load_recipe(write_demo(tmp_path, stages=stages_with(2, **changes)))


@pytest.mark.parametrize(("changes", "words"), MISTAKES, ids=lambda x: str(x)[:50])
def test_mistake_is_named(changes: dict, words: list[str], tmp_path: Path) -> None:
    path = write_demo(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        load_recipe(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    for word in words:
        assert word in message


def test_missing_file_and_broken_yaml(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("name: [a\nstages: 3\n")
    with pytest.raises(UserError, match=r"broken\.yaml: line 2"):
        load_recipe(broken)
    broken.write_bytes(b"name: a\nseed: \xff")
    with pytest.raises(UserError, match=r"broken\.yaml: line 2: not UTF-8"):
        load_recipe(broken)
    broken.write_text("name: a\nstages: []\nname: b\n")
    with pytest.raises(UserError, match=r'line 3: the key "name" comes twice'):
        load_recipe(broken)


def test_merging_costs_as_many_rollouts_as_the_mixed_run() -> None:
    recipe = load_recipe(ROOT / "configs" / "merge_tiny.yaml")
    *others, mixed = (
        stage.max_steps * stage.prompts_per_step * stage.num_generations
        for stage in map(recipe.stage, ("rl_english", "rl_chinese", "merged", "rl_mixed"))
    )
    assert sum(others) == mixed


def test_a_tokenizer_for_several_sets() -> None:
    """One alone is written as it was given, so that older runs are the same."""
    one = {"recipe": "arithmetic"}
    for given in (one, [one, {"recipe": "countdown"}]):
        key = f"stages.random.tokenizer.data={json.dumps(given)}"
        stage = load_recipe(DEMO, [key]).stage("random")
        written = stage.model_dump(mode="json", exclude_defaults=True)["tokenizer"]["data"]
        rows = written if isinstance(given, list) else [written]
        assert [row["recipe"] for row in rows] == [s.recipe for s in stage.problem_sets()]


def test_merged_mappings_can_be_merged_again(tmp_path: Path) -> None:
    """What YAML merges into a mapping is no key that comes twice."""
    path = tmp_path / "merged.yaml"
    text = DEMO.read_text().replace("{size: 4000, seed: 2}", "&b {<<: *a, seed: 2}")
    text = text.replace("{size: 12000, guess_share: 0.6}", "&a {size: 12000, seed: 1}")
    text = text.replace("{size: 4000, seed: 3}", "{<<: *b, guess_share: 0.5}")
    path.write_text(text)
    recipe = load_recipe(path)
    options = [recipe.stage(name).data[0].options for name in ("grpo", "distill")]
    assert options == [{"size": 12000, "seed": 2}, {"size": 12000, "seed": 2, "guess_share": 0.5}]
    path.write_text(text.replace("{<<: *b, guess", "{<<: *b, guess_share: 0.1, guess"))
    with pytest.raises(UserError, match=r'the key "guess_share" comes twice'):
        load_recipe(path)


def test_overrides() -> None:
    recipe = load_recipe(DEMO, ["seed=3", "stages.grpo.max_steps=2", "engine.max_num_seqs=8"])
    grpo = recipe.stage("grpo")
    assert isinstance(grpo, Grpo)
    assert (recipe.seed, grpo.max_steps, recipe.engine.max_num_seqs) == (3, 2, 8)
    recipe = load_recipe(
        DEMO,
        ["stages.grpo.rewards.0.weight=2", "stages.grpo.rewards[1]={function: a.b}", "name=a b.c"],
    )
    assert [(r.function, r.weight) for r in recipe.stage("grpo").rewards] == [
        ("rewards.math_correct", 2.0),
        ("a.b", 1.0),
    ]
    assert recipe.run_dir == Path("runs/a b.c")
    assert load_recipe(DEMO, ["runs_dir=~/r"]).run_dir == Path.home() / "r" / "demo"
    with pytest.raises(UserError, match='no entry "7" in the list; there are 0 to 1'):
        load_recipe(DEMO, ["stages.grpo.rewards.7.weight=2"])
    with pytest.raises(UserError, match="no stage"):
        load_recipe(DEMO, ["stages.rl.max_steps=2"])
    with pytest.raises(UserError, match="key=value"):
        load_recipe(DEMO, ["seed"])


def test_frozen() -> None:
    recipe = load_recipe(DEMO)
    assert isinstance(recipe, Recipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 2


def test_chat_template_as_text_or_file(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages[0].content }}")
    by_file, by_text = (
        load_recipe(DEMO, [f"chat_template={json.dumps(value)}"])
        for value in (str(file), file.read_text())
    )
    assert by_file == by_text
    with pytest.raises(UserError, match=r"chat_template: neither Jinja nor a file: .*/none.jinja"):
        load_recipe(DEMO, ["chat_template=none.jinja"])
