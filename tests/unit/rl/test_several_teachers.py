"""Several teachers of one student: each teaches its own problems, as if alone with them."""

import copy
import json
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from grpo_settings import make_on_policy_distill
from tiny_models import MODELS, PROBLEMS, TINY, make_rollout
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from r1pipe.config.load import load_recipe
from r1pipe.doctor.memory import Devices, estimate_shape
from r1pipe.doctor.model_config import find_stage_config
from r1pipe.models.model import build_model
from r1pipe.models.shape import GIB, Shape
from r1pipe.models.tokenizer import build_tokenizer
from r1pipe.rl import distill_update
from r1pipe.rl.distill_update import DistillUpdater, TeacherModel, route_problems
from r1pipe.runs.lineage import list_checkpoints
from r1pipe.runs.reader import StageFolder
from r1pipe.trainer.head import MAX_LOGITS
from r1pipe.trainer.packing import Sample
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError

ROOT = Path(__file__).parents[3]
ROUTES = {problem.id: "ab"[number % 3 > 0] for number, problem in enumerate(PROBLEMS[:12])}
BY_FIELD = {"from": None, "teachers": {"a": "x", "b": "z"}, "teacher_field": "subject"}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    """Teachers of another width and kind than the student."""
    tokenizer = build_tokenizer((f"{p.question}\n{p.solution}" for p in PROBLEMS), 400)
    kinds = {"student": TINY, "a": MODELS["deepseek_v3"], "b": {**TINY, "hidden_size": 48}}
    made = {
        name: build_model(kind, tokenizer, seed) for seed, (name, kind) in enumerate(kinds.items())
    }
    samples = [
        Sample(make_rollout(tokenizer, problem, 3 + 7 * number % 38), 0.0)
        for number, problem in enumerate(PROBLEMS[:12])
    ]
    return {**made, "samples": samples}


def take_step(
    models: dict,
    teachers: dict[str, str],
    keep: Callable[[str], bool] = bool,
    micro_batch_tokens: int = 99,
) -> tuple[dict, dict, int]:
    """Metrics, gradients by parameter and sampled tokens of a step on the samples whose value is
    kept. `teachers`: the model by value."""
    by_field = {} if "" in teachers else {**BY_FIELD, "teachers": teachers}
    settings = make_on_policy_distill(
        max_grad_norm=1e9, micro_batch_tokens=micro_batch_tokens, **by_field
    )
    updater = DistillUpdater(
        copy.deepcopy(models["student"]),
        {
            value: TeacherModel(copy.deepcopy(models[name]).requires_grad_(False))
            for value, name in teachers.items()
        },
        settings,
        dtype="float32",
        seed=0,
        routes=ROUTES,
    )
    gradients: dict[str, torch.Tensor] = {}
    updater.optimizer.register_step_pre_hook(
        lambda *args: gradients.update(
            {n: p.grad.clone() for n, p in updater.model.named_parameters() if p.grad is not None}
        )
    )
    samples = [s for s in models["samples"] if keep(ROUTES[s.rollout.problem_id])]
    metrics = updater.step(copy.deepcopy(samples), 1, lambda metrics: None)
    return metrics, gradients, sum(s.rollout.num_tokens for s in samples)


def test_each_teaches_its_own_problems(models: dict) -> None:
    """Loss and gradient are the sums of what each gives alone, by tokens."""
    both, gradients, num_tokens = take_step(models, {"a": "a", "b": "b"})
    alone = {
        name: take_step(models, {"": name}, lambda value, name=name: value == name) for name in "ab"
    }
    losses = {name: metrics["loss"] * count for name, (metrics, _, count) in alone.items()}
    assert both["loss"] == pytest.approx(sum(losses.values()) / num_tokens, rel=1e-5)
    assert both["divergence"] == pytest.approx(both["loss"], rel=1e-5)
    for name, (metrics, _, _) in alone.items():
        assert both[f"divergence/{name}"] == pytest.approx(metrics["divergence"], rel=1e-5)
    assert both["divergence/a"] != pytest.approx(both["divergence/b"], rel=1e-3)
    for name, gradient in gradients.items():
        expected = sum(theirs[name] * count for _, theirs, count in alone.values()) / num_tokens
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)


def test_one_of_several_is_bit_equal_to_one_alone(models: dict) -> None:
    """Also where a teacher has no problems, or two values have one teacher."""
    kept: dict = {"keep": lambda value: value == "a"}
    alone, expected, _ = take_step(models, {"": "a"}, **kept)
    for other in ("b", "a"):
        metrics, gradients, _ = take_step(models, {"b": other, "a": "a"}, **kept)
        assert metrics.pop("divergence/a") == alone["divergence"]
        assert metrics == alone
        assert all(torch.equal(gradients[name], expected[name]) for name in expected)


class LogitsInMemory(TorchDispatchMode):
    """Counts what has a column for each token of the vocabulary: logits, log-probabilities, their
    gradients; not the heads' weights."""

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size, self.most = vocab_size, 0
        self.storages: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Callable, types: object, args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        given = {value.untyped_storage()._cdata for value in find_tensors(args)}
        made = func(*args, **(kwargs or {}))
        for value in find_tensors(made):
            storage = value.untyped_storage()
            if value.shape[-1:] == (self.vocab_size,) and storage._cdata not in given:
                self.storages[StorageWeakRef(storage)] = value.numel()
        self.storages = {ref: size for ref, size in self.storages.items() if not ref.expired()}
        self.most = max(self.most, sum(self.storages.values()))
        return made


def find_tensors(values: object) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def test_logits_of_a_chunk_at_a_time(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Student's and teachers', forward and backward, however long the micro-batch is."""
    chunk = 400 * 3
    monkeypatch.setitem(MAX_LOGITS, "cpu", chunk)
    most = []
    for teachers in ({"": "a"}, {"a": "a", "b": "b"}):
        with LogitsInMemory(400) as counted:
            _, _, num_tokens = take_step(models, teachers, micro_batch_tokens=10_000)
        most.append(counted.most)
    assert most[1] <= most[0]
    assert 2 * chunk < most[0] < 12 * chunk < num_tokens * 400 / 4


def test_one_gathered_head_at_a_time(models: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[weakref.ref] = []

    def gather(weight: torch.Tensor) -> torch.Tensor:
        assert not [ref for ref in gathered if ref() is not None]
        whole = weight.detach().clone()
        gathered.append(weakref.ref(whole))
        return whole

    monkeypatch.setattr(distill_update, "full_tensor", gather)
    take_step(models, {"a": "a", "b": "b"})
    assert len(gathered) == 2


def test_a_problem_that_is_not_in_the_data(models: dict) -> None:
    stage = make_on_policy_distill(name="merged", **BY_FIELD)
    teachers = {name: TeacherModel(copy.deepcopy(models[name])) for name in "ab"}
    updater = DistillUpdater(
        copy.deepcopy(models["student"]), teachers, stage, dtype="float32", seed=0
    )
    with pytest.raises(UserError, match=r'^stage "merged": problem "\S+" is not in its data'):
        updater.step(models["samples"], 1, lambda metrics: None)


def make_problem(**changes: object) -> Problem:
    values = {"id": "p7", "kind": "math", "prompt": [{"role": "user", "content": "1 + 1?"}]}
    return Problem(**{**values, **changes})


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("kind", {"kind": "b"}),
        ("source", {"source": "b"}),
        ("category", {"category": "b"}),
        ("subject", {"extra": {"subject": "b"}}),
    ],
)
def test_columns_that_say_who_teaches(field: str, changes: dict) -> None:
    stage = make_on_policy_distill(**{**BY_FIELD, "teacher_field": field})
    assert route_problems(stage, [make_problem(**changes)]) == {"p7": "b"}
    assert route_problems(make_on_policy_distill(), [make_problem()]) == {}


@pytest.mark.parametrize(
    ("extra", "what"),
    [
        ({"subject": 5}, "no teacher for subject '5'"),
        ({"x": 1}, "no subject"),
        (None, "no subject"),
    ],
)
def test_a_row_without_a_teacher(extra: dict | None, what: str) -> None:
    stage = make_on_policy_distill(name="merged", **BY_FIELD)
    rows = [make_problem(id="p1", extra={"subject": "a"}), make_problem(extra=extra)]
    with pytest.raises(UserError) as error:
        route_problems(stage, rows)
    assert str(error.value) == (
        f'stage "merged": problem "p7": {what}; teachers has a, b: add one, or leave the row out'
    )


def test_all_teachers_are_in_records_and_names(tmp_path: Path) -> None:
    teachers = {"a": "math", "b": "zh", "c": "math"}
    stage = make_on_policy_distill(name="merged", **{**BY_FIELD, "teachers": teachers})
    settings = stage.model_dump(mode="json", by_alias=True)
    assert "from" not in settings
    record = {"stage": "merged", "kind": stage.kind, "settings": json.loads(json.dumps(settings))}
    folder = StageFolder(tmp_path, record)
    assert folder.section == stage
    assert folder.parents == ["y", "math", "zh"]
    assert list_checkpoints(settings) == stage.parents() == ["math", "zh", "y"]
    assert stage.models() == ["math", "zh", "y"]
    alone = make_on_policy_distill().model_dump(mode="json", by_alias=True)
    assert not {"teachers", "teacher_field"} & alone.keys()


def test_the_memory_of_all_teachers_counts() -> None:
    """Weights of all; of several processes one gathered head and layer, of the largest."""
    recipe = load_recipe(ROOT / "configs" / "demo.yaml")
    shapes = {n: Shape.of(find_stage_config(recipe.stage(n), recipe)) for n in ("distill", "grpo")}

    def estimate(count: int, **changes: object) -> float:
        stage = make_on_policy_distill(student="distill", **changes)
        devices = Devices(count, GIB)
        return estimate_shape(stage, recipe, shapes["distill"], devices).parts["teacher"]

    both = {**BY_FIELD, "teachers": {"a": "grpo", "b": "distill"}}
    more = 4 * shapes["distill"].parameters
    assert estimate(1, **both) == estimate(1, **{"from": "grpo"}) + more
    assert estimate(4, **both) == estimate(4, **{"from": "grpo"}) + more / 4
