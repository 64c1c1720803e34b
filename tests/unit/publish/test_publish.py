"""`r1pipe publish` with the real client of the hub, against a server on loopback."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import commands
import pyarrow
import pytest
import torch
import yaml
from hub_server import FakeHub, Fault
from pyarrow import parquet
from safetensors.torch import load_file, save_file

from r1pipe.config.recipe import Recipe
from r1pipe.models.model import build_model
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.models.weights import save_checkpoint
from r1pipe.publish.candidate import Candidate
from r1pipe.runs.folder import RunFolder
from r1pipe.runs.reader import find_finished
from r1pipe.serve import find_served
from r1pipe.utils.errors import UserError
from r1pipe.utils.jsonl import write_jsonl, write_text

ROOT = Path(__file__).parents[3]
TOKEN = "hf_TokenOfTheTestsThatMustNotAppear"
PUBLISH = ("publish", "--repo", "ana/mini")
QWEN3 = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
DEEPSEEK = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())["stages"][0]["model"]
ENTRY = {
    "dataset": "arithmetic/test", "num_problems": 40, "num_samples": 2, "temperature": 0.6,
    "top_p": 0.95, "max_completion_length": 8, "pass_at_1": 0.525, "ci_low": 0.44,
    "ci_high": 0.61, "k": 2, "pass_at_k": 0.75, "maj_at_k": 0.5, "format_rate": 0.9,
    "mean_tokens": 6.5, "truncated": 0.125, "unjudged": 0.0, "overlap": 0.0, "wall_s": 3.0,
    "eval_s": 1.0, "compared_with": None, "samples": "samples_1.jsonl",
}  # fmt: skip
PROBLEM = {
    "id": "p1",
    "kind": "math",
    "prompt": [{"role": "user", "content": "What is 3 + 4?"}],
    "answer": "7",
}
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "max_completion_length": 8}
STAGES = [
    {
        "kind": "init",
        "name": "random",
        "model": QWEN3,
        "tokenizer": {"data": {"recipe": "arithmetic"}},
    },
    {
        "kind": "sft",
        "from": "random",
        "data": {"recipe": "arithmetic"},
        "train": {"max_steps": 1},
    },
    {
        "kind": "eval",
        "checkpoints": ["sft"],
        "data": {"recipe": "arithmetic", "split": "test"},
        "num_samples": 2,
        "sampling": SAMPLING,
    },
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = build_tokenizer(["What is 3 + 4? 7"], 300)
    model = build_model(QWEN3, tokenizer, seed=0)
    model.generation_config.eos_token_id = [1, 3]
    save_checkpoint(model, tokenizer, folder)
    return folder


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        hub.accounts[TOKEN] = ("ana", "write")
        yield hub


def make_run(
    folder: Path, checkpoint: Path, stages: list[dict], overlap: float = 0.0, **shared: object
) -> Path:
    """A run of finished stages, as the stages leave them; each checkpoint is the same model."""
    recipe = Recipe.model_validate(
        {"name": "run", "runs_dir": str(folder), "stages": stages, **shared}
    )
    with RunFolder(recipe) as run:
        for stage in recipe.stages:
            partial = run.begin(stage)
            facts: dict[str, object] = {"peak_memory_gib": 1.25}
            if stage.makes_checkpoint:
                shutil.copytree(checkpoint, partial, dirs_exist_ok=True)
            if stage.training_sets():
                facts |= {"train_rows": 3, "overlap_dropped": 1, "overlap_rate": 0.25}
                write_jsonl(partial / "problems.jsonl", [PROBLEM])
                (partial / "rollouts").mkdir()
                rows = pyarrow.table({"completion": ["7", "8"]})
                parquet.write_table(rows, partial / "rollouts" / "step_000001.parquet")
            if stage.kind == "eval":
                entry = {**ENTRY, "checkpoint": "", "overlap": overlap}
                entries = [{"stage": name, **entry} for name in stage.checkpoints]
                write_text(partial / "summary.json", json.dumps(entries))
                write_jsonl(partial / "samples_1.jsonl", [{"completion": "7"}])
            run.finish(stage, partial, facts, wall_s=2.0)
    return recipe.run_dir


@pytest.fixture
def run(tmp_path: Path, checkpoint: Path) -> Path:
    return make_run(tmp_path / "runs", checkpoint, STAGES)


def describe_hub(hub: FakeHub, home: Path, token: str = TOKEN) -> dict[str, str]:
    """The environment, without what an engine of another test in this process has set."""
    foreign = ("HF_", "TORCHDYNAMO_", "VLLM_")
    environment = {name: v for name, v in os.environ.items() if not name.startswith(foreign)}
    return environment | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": token,
    }


def publish(
    hub: FakeHub, target: Path, *options: object, token: str = TOKEN
) -> subprocess.CompletedProcess:
    environment = describe_hub(hub, target.parent / "hf_home", token)
    result = commands.run(*PUBLISH, target, *options, environment=environment, timeout_s=600)
    assert TOKEN not in result.stdout + result.stderr
    return result


def refuse(hub: FakeHub, target: Path, *options: object, token: str = TOKEN) -> str:
    """The one line of a command that must fail."""
    result = publish(hub, target, *options, token=token)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if not line.startswith("written: ")]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("r1pipe: ")
    return lines[0]


def read_card(repo: dict[str, bytes]) -> tuple[dict, str]:
    _, metadata, text = repo["README.md"].decode().split("---\n", 2)
    return yaml.safe_load(metadata), text


def edit_json(path: Path, change: Callable[[dict], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_published_model(hub: FakeHub, run: Path, checkpoint: Path) -> None:
    result = publish(hub, run)
    assert result.returncode == 0, result.stderr
    assert "ana/mini: new private repo" in result.stdout
    assert "+ model.safetensors" in result.stdout
    repo = hub.repos["model", "ana/mini"]
    assert repo.private
    assert len(repo.commits) == 2  # the hub's own first one, and everything in one
    assert repo.files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes()
    generation = json.loads(repo.files["generation_config.json"])
    assert {"do_sample": True, "temperature": 0.6, "top_p": 0.95}.items() <= generation.items()
    assert generation["eos_token_id"] == [1, 3]
    assert json.loads(repo.files["config.json"])["architectures"] == ["Qwen3ForCausalLM"]
    assert not [name for name in repo.files if name in ("stage.json", "problems.jsonl")]

    metadata, text = read_card(repo.files)
    assert metadata["license"] == "apache-2.0"
    assert "base_model" not in metadata
    [result] = metadata["model-index"][0]["results"]
    assert result["dataset"] == {
        "name": "arithmetic/test", "type": "arithmetic", "split": "test"
    }  # fmt: skip
    first = result["metrics"][0]
    assert (first["type"], first["value"]) == ("pass@1", 0.525)
    wanted = {"num_problems": 40, "num_samples": 2, "ci_95_low": 0.44, "ci_95_high": 0.61}
    assert wanted.items() <= first["args"].items()
    for words in (
        "| sft", "52.5%", "44.0% - 61.0%", "40 problems x 2 samples, T = 0.6", "overlap",
        "1 (25.00%)", "random weights", "cc0-1.0", "12.5% of its samples", "max_steps: 1",
        hashlib.sha256((run / "sft" / "lineage.json").read_bytes()).hexdigest(),
    ):  # fmt: skip
        assert words in text, words
    assert "WARNING" not in text


def test_card_states_what_extends_the_context(
    hub: FakeHub, checkpoint: Path, tmp_path: Path
) -> None:
    extended = shutil.copytree(checkpoint, tmp_path / "extended")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    edit_json(extended / "config.json", lambda config: config.update(rope_parameters=yarn))
    result = publish(hub, make_run(tmp_path / "runs", extended, STAGES))
    assert result.returncode == 0, result.stderr
    files = hub.repos["model", "ana/mini"].files
    assert "by YaRN with a factor of 4 over 32:" in read_card(files)[1]
    assert json.loads(files["config.json"])["rope_parameters"] == yarn


def test_same_again_changes_nothing(hub: FakeHub, run: Path) -> None:
    assert publish(hub, run).returncode == 0
    again = publish(hub, run)
    assert again.returncode == 0, again.stderr
    assert "private repo at" in again.stdout
    assert not re.search(r"^[+~-] ", again.stdout, re.MULTILINE)
    assert len(hub.repos["model", "ana/mini"].commits) == 2
    assert hub.count("PUT /lfs/") == 1


def test_dry_run_writes_the_folder_and_shows_what_would_change(hub: FakeHub, run: Path) -> None:
    repo = hub.add_repo("ana/mini", private=True, README__md="# Old\n", notes__txt="mine\n")
    repo.files["model-00001-of-00002.safetensors"] = b"old weights"
    before = dict(repo.files)
    result = publish(hub, run / "sft", "--dry-run")
    assert result.returncode == 0, result.stderr
    assert "~ README.md" in result.stdout
    assert "    -# Old" in result.stdout
    assert "    +# mini" in result.stdout
    assert "- model-00001-of-00002.safetensors" in result.stdout
    assert "notes.txt" not in result.stdout
    assert (run / "publish" / "sft" / "model.safetensors").exists()
    assert repo.files == before
    assert {method for method, _, _ in hub.requests} <= {"GET", "HEAD"}

    assert publish(hub, run / "sft").returncode == 0
    assert "model-00001-of-00002.safetensors" not in repo.files
    assert repo.files["notes.txt"] == b"mine\n"


def test_dry_run_needs_no_hub_and_no_token(run: Path) -> None:
    nowhere = FakeHub()
    nowhere._server.server_close()
    result = publish(nowhere, run, "--dry-run", token="")
    assert result.returncode == 0, result.stderr
    assert "not compared with the hub: ana/mini: the hub cannot be reached" in result.stderr
    assert (run / "publish" / "sft" / "README.md").exists()


def test_interrupted_upload_resumes(hub: FakeHub, tmp_path: Path, checkpoint: Path) -> None:
    """Two files of weights; the process is killed while it sends the second."""
    larger = tmp_path / "larger"
    shutil.copytree(checkpoint, larger)
    save_file({"more": torch.ones(1000)}, larger / "model-2.safetensors")
    run = make_run(tmp_path / "runs", larger, STAGES)
    hub.faults.append(Fault("PUT /lfs/", times=1))
    hub.faults.append(Fault("PUT /lfs/", delay_s=60, times=1))
    environment = describe_hub(hub, tmp_path)
    process = commands.start(*PUBLISH, run, environment=environment)
    deadline = time.monotonic() + 300
    while len(hub.objects) < 1 or sum(fault.times for fault in hub.faults):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    repo = hub.repos["model", "ana/mini"]
    assert list(repo.files) == [".gitattributes"]
    [sent] = hub.objects
    result = publish(hub, run)
    assert result.returncode == 0, result.stderr
    assert len([p for m, p, s in hub.requests if m == "PUT" and p == f"/lfs/{sent}"]) == 1
    assert {"model.safetensors", "model-2.safetensors"} <= set(repo.files)


def test_a_failing_and_a_slow_hub_are_waited_for(hub: FakeHub, run: Path) -> None:
    hub.faults.append(Fault("PUT /lfs/", status=500, message="try again"))
    hub.faults.append(Fault("preupload", delay_s=1.5))
    result = publish(hub, run)
    assert result.returncode == 0, result.stderr
    assert hub.count("PUT /lfs/", status=500) == 1
    assert "model.safetensors" in hub.repos["model", "ana/mini"].files


# (request, status, what the hub says, words of the line)
REFUSALS = [
    ("GET /api/whoami", 401, "Invalid credentials", ["rejects the token (401)"]),
    ("POST /api/repos/create", 403, f"no rights for {TOKEN}", ["403", "<token>", "write access"]),
    ("PUT /lfs/", 403, "expired", ["403"]),
    ("/commit/", 412, "A commit has happened since", ["was changed meanwhile", "412"]),
    ("/commit/", 409, "conflict", ["was changed meanwhile", "409"]),
    ("/commit/", 500, "", ["the hub fails (500", "run the same command again to resume"]),
    ("/validate-yaml", 400, "bad card", ["README.md"]),
]


@pytest.mark.parametrize(("request_", "status", "message", "words"), REFUSALS)
def test_errors_of_the_hub_are_one_line(
    request_: str, status: int, message: str, words: list[str], hub: FakeHub, run: Path
) -> None:
    hub.faults.append(Fault(request_, status=status, message=message, times=9))
    line = refuse(hub, run)
    for word in words:
        assert word in line, line
    repo = hub.repos.get(("model", "ana/mini"))
    assert repo is None or list(repo.files) == [".gitattributes"]


def test_without_a_token_or_with_one_that_may_only_read(hub: FakeHub, run: Path) -> None:
    assert "no token for the hub: set HF_TOKEN" in refuse(hub, run, token="")
    hub.accounts[TOKEN] = ("ana", "read")
    assert "write access" in refuse(hub, run)


def test_a_public_repo_is_filled_only_if_asked(hub: FakeHub, run: Path) -> None:
    hub.add_repo("ana/mini")
    assert "is public on the hub: add --public" in refuse(hub, run)
    assert publish(hub, run, "--public").returncode == 0
    hub.repos["model", "ana/mini"].private = True
    assert publish(hub, run, "--public").returncode == 0
    assert not hub.repos["model", "ana/mini"].private


def test_wrong_targets(run: Path) -> None:
    assert find_finished(run)[1].name == find_finished(run / "sft")[1].name == "sft"
    for target, words in (
        (run / "stf", "stf: no finished stage of that name; did you mean sft?"),
        (run / "eval", "eval: makes no checkpoint; there are random, sft"),
        (run.parent / "none", "none: no such run"),
    ):
        with pytest.raises(UserError, match=words):
            find_finished(target)
    models = run.parent / "models"
    (models / "one").mkdir(parents=True)
    (models / "one/config.json").touch()
    with pytest.raises(UserError, match=r"neither a run nor a checkpoint; did you mean .*one"):
        find_served(str(models))


def test_what_should_not_be_published(hub: FakeHub, run: Path) -> None:
    assert "a repository is user/name" in refuse(hub, run, "--repo", "mini")
    assert "not evaluated since it was made" in refuse(hub, run / "random")
    assert not (run / "publish").exists()


def test_overlap_above_the_limit(hub: FakeHub, tmp_path: Path, checkpoint: Path) -> None:
    run = make_run(tmp_path / "runs", checkpoint, STAGES, overlap=0.05)
    assert "5.00% of arithmetic/test overlaps" in refuse(hub, run)
    assert not (run / "publish").exists()
    assert not (run / "publish").exists()
    assert not Candidate(*find_finished(run)).find_objections(max_overlap=0.05)
    assert publish(hub, run, "--force").returncode == 0
    metadata, text = read_card(hub.repos["model", "ana/mini"].files)
    assert "> [!WARNING]" in text
    assert "5.00% of arithmetic/test overlaps" in text
    assert metadata["model-index"][0]["results"][0]["metrics"][0]["args"]["overlap"] == 0.05


def test_an_evaluation_of_an_older_checkpoint_does_not_count(hub: FakeHub, run: Path) -> None:
    record = run / "sft" / "stage.json"
    edit_json(record, lambda values: values.update(finished="2999-01-01T00:00:00Z"))
    assert "not evaluated since it was made" in refuse(hub, run / "sft")
    assert publish(hub, run / "sft", "--force").returncode == 0
    metadata, text = read_card(hub.repos["model", "ana/mini"].files)
    assert "model-index" not in metadata
    assert "not evaluated since it was made" in text


def test_a_lineage_that_does_not_verify(hub: FakeHub, run: Path) -> None:
    """The weights of the first stage are other ones than the second was trained from."""
    with (run / "random" / "model.safetensors").open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"abcd")
    line = refuse(hub, run)
    assert f"{run}/random: model.safetensors changed" in line
    assert "--force" in line
    assert publish(hub, run, "--force").returncode == 0
    _, text = read_card(hub.repos["model", "ana/mini"].files)
    assert "/random: model.safetensors changed" in text


def test_base_model_and_its_terms(hub: FakeHub, tmp_path: Path, checkpoint: Path) -> None:
    """Trained from a model of the hub: the derivative has its license and license files."""
    stages = [{**STAGES[1], "from": "org/base", "data": {"recipe": "gsm8k"}}, STAGES[2]]
    run = make_run(tmp_path / "runs", checkpoint, stages, dtype="bfloat16")
    assert "base model org/base: its license is not known" in refuse(hub, run)
    hub.add_repo(
        "org/base", README__md="---\nlicense: llama3.1\n---\n", LICENSE="terms", USE_POLICY__md="no"
    )
    result = publish(hub, run)
    assert result.returncode == 0, result.stderr
    files = hub.repos["model", "ana/mini"].files
    metadata, _ = read_card(files)
    assert metadata["license"] == "llama3.1"
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/base", "finetune")
    assert metadata["datasets"] == ["openai/gsm8k"]
    assert (files["LICENSE"], files["USE_POLICY.md"]) == (b"terms", b"no")
    # The master weights of a bfloat16 recipe are float32; what was measured is bfloat16.
    before = load_file(run / "sft" / "model.safetensors")
    after = load_file(run / "publish" / "sft" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name].bfloat16())
    assert json.loads(files["config.json"])["dtype"] == "bfloat16"

    line = refuse(hub, run, "--license", "gsm8k=cc-by-sa-4.0")
    assert "licenses clash: base model org/base is llama3.1, data gsm8k is cc-by-sa-4.0" in line


def test_licenses_in_the_recipe(hub: FakeHub, tmp_path: Path, checkpoint: Path) -> None:
    stages = [{**STAGES[1], "from": "org/base"}, STAGES[2]]
    licenses = {"org/base": "cc-by-nc-4.0"}
    run = make_run(tmp_path / "runs", checkpoint, stages, licenses=licenses)
    assert publish(hub, run).returncode == 0
    metadata, _ = read_card(hub.repos["model", "ana/mini"].files)
    assert metadata["license"] == "cc-by-nc-4.0"


def test_licenses_of_data(hub: FakeHub, tmp_path: Path, checkpoint: Path) -> None:
    """A recipe's own LICENSE is that of its own dataset; other rows have another, or none."""
    mine = tmp_path / "mine.csv"
    mine.touch()
    options = {"columns": {"prompt": "q", "answer": "a"}}
    for path, found in ((str(mine), None), ("org/rows", "cc-by-nc-sa-4.0")):
        data = {"recipe": "columns", "options": {"path": path, **options}}
        stages = [STAGES[0], {**STAGES[1], "data": data}, STAGES[2]]
        run = make_run(tmp_path / "runs" / path.replace("/", "_"), checkpoint, stages)
        if found:
            hub.add_repo(path, "dataset", README__md=f"---\nlicense: {found}\n---\n")
            assert publish(hub, run).returncode == 0
        else:
            assert f"data {path}: its license is not known" in refuse(hub, run)
            assert publish(hub, run, "--license", f"{path}=cc-by-nc-sa-4.0").returncode == 0
        files = hub.repos["model", "ana/mini"].files
        metadata, text = read_card(files)
        assert metadata["license"] == "cc-by-nc-sa-4.0"
        assert metadata.get("datasets") == (["org/rows"] if found else None)
        assert str(tmp_path) not in text


def test_a_base_model_in_a_folder(hub: FakeHub, tmp_path: Path, checkpoint: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(checkpoint, base)
    stages = [{**STAGES[1], "from": str(base)}, STAGES[2]]
    run = make_run(tmp_path / "runs", checkpoint, stages)
    assert f"--license {base}=" in refuse(hub, run)
    (base / "README.md").write_text("---\nlicense: mit\n---\n")
    (base / "LICENSE").write_text("terms")
    assert publish(hub, run, "--base-model", f"{base}=org/base").returncode == 0
    files = hub.repos["model", "ana/mini"].files
    metadata, _ = read_card(files)
    assert (metadata["license"], metadata["base_model"]) == ("mit", "org/base")
    assert files["LICENSE"] == b"terms"


def test_rollouts_and_collection(hub: FakeHub, run: Path) -> None:
    for _ in range(2):
        result = publish(hub, run, "--rollouts", "--collection", "Small students")
        assert result.returncode == 0, result.stderr
    rollouts = hub.repos["dataset", "ana/mini-rollouts"]
    assert rollouts.private
    assert rollouts.files["eval/samples_1.jsonl"] == b'{"completion": "7"}\n'
    assert "sft/rollouts/step_000001.parquet" in rollouts.files
    metadata, _ = read_card(rollouts.files)
    assert metadata["configs"] == [
        {"config_name": "sft-rollouts", "data_files": "sft/rollouts/*.parquet"},
        {"config_name": "eval-samples_1", "data_files": "eval/samples_1.jsonl"},
    ]
    [collection] = hub.collections.values()
    assert [(i["type"], i["id"]) for i in collection["items"]] == [
        ("model", "ana/mini"),
        ("dataset", "ana/mini-rollouts"),
    ]


@pytest.mark.slow
def test_gguf(hub: FakeHub, run: Path) -> None:
    result = publish(hub, run, "--gguf")
    assert result.returncode == 0, result.stderr
    assert re.search(r"^\+ mini-Q8_0.gguf \(\d+", result.stdout, re.MULTILINE)
    files = hub.repos["model", "ana/mini"].files
    assert files["mini-Q8_0.gguf"].startswith(b"GGUF")
    _, text = read_card(files)
    assert hashlib.sha256(files["mini-Q8_0.gguf"]).hexdigest() in text
    assert "llama-cli -hf ana/mini:Q8_0 --jinja --temp 0.6 --top-p 0.95\n" in text
    assert "its `gpt-2` gave the same tokens for 1 prompts and completions" in text
    # Left there, it would be another model's file one day.
    without = publish(hub, run, "--dry-run")
    assert re.search(r"^- mini-Q8_0.gguf", without.stdout, re.MULTILINE)


def test_a_token_in_the_recipe_is_not_published(
    hub: FakeHub, tmp_path: Path, checkpoint: Path
) -> None:
    options = {"recipe": "arithmetic", "options": {"token": "hf_" + "a" * 34}}
    run = make_run(
        tmp_path / "runs", checkpoint, [STAGES[0], {**STAGES[1], "data": options}, STAGES[2]]
    )
    assert re.search(r"README.md: line \d+ holds a token", refuse(hub, run))
    assert ("model", "ana/mini") not in hub.repos


def test_the_token_is_nowhere(hub: FakeHub, run: Path) -> None:
    assert publish(hub, run, "--rollouts", "--collection", "Mine").returncode == 0
    hub.faults.append(Fault("/commit/", status=500, message=TOKEN, times=9))
    edit_json(run / "sft" / "config.json", lambda values: values.update(extra=1))
    refuse(hub, run, "--force")
    for folder in (run, run.parent):
        for file in folder.rglob("*"):
            assert not file.is_file() or TOKEN.encode() not in file.read_bytes(), file
    for repo in hub.repos.values():
        assert all(TOKEN.encode() not in content for content in repo.files.values())


@pytest.mark.parametrize(
    ("number", "model"),
    [
        pytest.param(0, QWEN3, marks=pytest.mark.slow),
        pytest.param(1, QWEN3, marks=pytest.mark.slow),
        pytest.param(1, DEEPSEEK, marks=pytest.mark.slow),
    ],
    ids=["transformers", "vllm", "vllm-moe"],
)
def test_examples_of_the_card_run(
    number: int, model: dict, hub: FakeHub, tmp_path: Path, checkpoint: Path
) -> None:
    """As they stand, transformers' and vLLM's, loading the model from where it was published."""
    if model is not QWEN3:
        checkpoint = tmp_path / "checkpoint"
        tokenizer = build_tokenizer(["What is 3 + 4? 7"], 300)
        save_checkpoint(build_model(model, tokenizer, seed=0), tokenizer, checkpoint)
    run = make_run(tmp_path / "runs", checkpoint, STAGES)
    assert publish(hub, run, "--public").returncode == 0
    _, text = read_card(hub.repos["model", "ana/mini"].files)
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number]
    (tmp_path / "example.py").write_text(code)
    result = subprocess.run(
        [sys.executable, tmp_path / "example.py"],
        env={**describe_hub(hub, tmp_path, token=""), "VLLM_CPU_KVCACHE_SPACE": "1"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout
    assert hub.count("GET /ana/mini/resolve/.*/model.safetensors") == 1
