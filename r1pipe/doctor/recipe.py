"""The doctor: looks for what would go wrong, before it does. One line per check:

    r1pipe doctor                                       # what is installed, the GPU, the sandbox
    r1pipe doctor configs/demo.yaml                     # the recipe's data, models, disk as well
    r1pipe doctor configs/demo.yaml --parity            # sampler = trainer; starts an engine

A check is ok, warn, FAIL, or skipped where it cannot be made now: never ok without having looked.
Before stages run, all of them get the checks that take no longer than a few seconds together
(`preflight`); what needs a parent that is not made yet, once more when it is.
"""

import contextlib
import functools
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from r1pipe.config.base import Sampling, Stage
from r1pipe.config.recipe import Recipe
from r1pipe.config.rl import Grpo, OnPolicy
from r1pipe.data.problem_sets import ProblemSets
from r1pipe.data.problems import load_set
from r1pipe.doctor.golds import pick_judging, spread, try_golds, try_rewards
from r1pipe.doctor.inputs import (
    Inputs,
    check_solutions,
    count_characters,
    describe_source,
)
from r1pipe.doctor.machine import Diagnosis, examine_machine, examine_sandbox
from r1pipe.models.thinking import OPEN, close_tag
from r1pipe.rollout.scoring import Scorer, name_rewards
from r1pipe.runs.folder import find_mistake
from r1pipe.runs.tracking import check_tracking
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError
from r1pipe.utils.progress import format_size

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from r1pipe.doctor.memory import Devices


LONGEST_PROMPTS = 100
"""How many are tokenised before a stage: the longest by characters."""
PARITY_PROMPTS, PARITY_TOKENS = 8, 16
GIB = 2**30
TEMPORARY = 100 * 2**20
"""Bytes for temporary files: kernels are compiled there."""


# A recipe


class Doctor:
    """Looks at a recipe. `thorough`: every row, and what takes an import of vLLM. `problem_sets`:
    where others have read, or will read, the same ones."""

    def __init__(
        self,
        recipe: Recipe,
        devices: "Devices",
        thorough: bool,
        problem_sets: ProblemSets | None = None,
    ):
        self.recipe, self.devices, self.thorough = recipe, devices, thorough
        self.inputs = Inputs(recipe, problem_sets)

    def examine(self, stages: list[Stage]) -> Iterator[Diagnosis]:
        """Everything about these stages that can be known now."""
        yield self.examine_folder()
        yield self.examine_disk(stages)
        if any(r.function == "rewards.code_passes" for s in stages for r in s.rewards_used()):
            yield examine_sandbox(is_needed=True)
        for stage in stages:
            for check in (
                self.examine_functions,
                self.examine_data,
                self.examine_golds,
                self.examine_architecture,
                self.examine_memory,
            ):
                yield from self.ask(stage, check)
            yield from self.examine_inputs(stage)

    def examine_inputs(self, stage: Stage) -> Iterator[Diagnosis]:
        """What depends on the checkpoints that the stage starts from."""
        for check in (
            self.examine_checkpoints,
            self.examine_tokenizers,
            self.examine_vocabulary,
            self.examine_prompts,
        ):
            yield from self.ask(stage, check)

    def ask(
        self, stage: Stage, check: Callable[[Stage], Iterator[Diagnosis]]
    ) -> Iterator[Diagnosis]:
        """One check of a stage, under its name; what it raises for the user is a FAIL."""
        what = check.__name__.removeprefix("examine_").replace("functions", "rewards and loss")
        try:
            for diagnosis in check(stage):
                yield replace(diagnosis, what=f"{stage.name}: {diagnosis.what or what}")
        except UserError as error:
            yield Diagnosis(f"{stage.name}: {what}", "FAIL", str(error))

    # Functions, data

    def examine_functions(self, stage: Stage) -> Iterator[Diagnosis]:
        check_functions(stage)
        for remark in stage.remarks():
            yield Diagnosis("", "warn", remark)
        if names := name_rewards(stage.rewards_used()):
            yield Diagnosis("", "ok", ", ".join(names))

    def examine_data(self, stage: Stage) -> Iterator[Diagnosis]:
        for source in stage.problem_sets():
            try:
                loaded = self.inputs.load(source)
            except UserError as error:
                # Before a run it is as good as lost: a later stage would find out in hours.
                can_wait = self.thorough and is_out_of_reach(error)
                yield Diagnosis("", "skipped" if can_wait else "FAIL", str(error))
                continue
            if loaded is None:
                yield Diagnosis("", "skipped", f'the stage "{source.stage}" has not run')
                continue
            check_solutions(stage, source, loaded.problems)
            trained = stage.training_sets()
            if source in trained and all(
                problem.question in self.heldout for problem in loaded.problems
            ):
                status = "FAIL" if len(trained) == 1 else "warn"
                what = (
                    f"{describe_source(source)}: every problem is one of an eval stage, so left out"
                )
                yield Diagnosis("", status, f"{what}: take another split, or other rows")
                continue
            filtered = len(loaded.problems) < loaded.num_rows
            of_rows = f" ({loaded.describe()})" if filtered else ""
            count = f"{describe_source(source)}: {len(loaded.problems)} problems{of_rows}"
            yield Diagnosis("", "ok", count)

    @functools.cached_property
    def heldout(self) -> set[str]:
        """Questions of the recipe's eval stages."""
        measuring = [stage for stage in self.recipe.stages if stage.measures]
        return {
            problem.question
            for stage in measuring
            for _, problems in self.inputs.load_problems(stage)
            for problem in problems
        }

    def examine_golds(self, stage: Stage) -> Iterator[Diagnosis]:
        try:
            rewards = pick_judging(stage.rewards_used())
        except UserError:  # told of the functions already
            return
        try:
            for _, problems in self.inputs.load_problems(stage):
                try_rewards(stage.rewards_used(), problems[:2])
        except UserError as error:
            yield Diagnosis("rewards", "FAIL", str(error))
            return
        settings = self.recipe.doctor
        for source, problems in self.inputs.load_problems(stage) if rewards else ():
            some = spread(problems, None if self.thorough else settings.gold_rows)
            try:
                trial = try_golds(rewards, some)
            except UserError as error:
                yield Diagnosis("", "FAIL", f"{describe_source(source)}: {error}")
                continue
            of_all = (
                f"{trial.num_tried} of {len(problems)} golds of {describe_source(source)} tried"
            )
            if not trial.num_tried:
                yield Diagnosis(
                    "", "skipped", f"{describe_source(source)}: no row has a gold to be tried"
                )
            elif not trial.refused:
                yield Diagnosis("", "ok", f"{of_all}, all score 1")
            else:
                problem, score = trial.refused[0]
                got = ", ".join(f"{name} {value}" for name, value in score.rewards.items())
                gold = repr(problem.answer or problem.solution)
                yield Diagnosis(
                    "",
                    "FAIL" if trial.share < settings.min_gold_share else "warn",
                    f'{of_all}: {1 - trial.share:.1%} do not score 1, first "{problem.id}": '
                    f"{gold[:80]} gets {got}; put the rows or the reward right, or lower "
                    "doctor.min_gold_share",
                )

    # Models

    def examine_architecture(self, stage: Stage) -> Iterator[Diagnosis]:
        """Of the models that the stage samples from. Only a thorough look imports vLLM."""
        from r1pipe.doctor.model_shape import find_config, find_stage_config
        from r1pipe.models.model import pick_device
        from r1pipe.rollout.vllm_args import (
            check_architecture,
            check_engine,
            require_moe_layers,
            set_environment,
        )

        good, missing, layers = [], [], ""
        trains = isinstance(stage, OnPolicy)
        if stage.optimization is not None:
            from r1pipe.trainer.policy import require_trainable

            with contextlib.suppress(ValueError):  # said below
                configs = [find_stage_config(stage, self.recipe)]
                if trains and stage.taught_by:
                    configs.append(find_config(stage.taught_by, self.recipe))
                for config in configs:
                    require_trainable(config, self.recipe.attn_implementation)
        for name, _ in stage.samplings():
            try:
                config = find_config(name, self.recipe)
            except ValueError:
                missing.append(name)
                continue
            if trains and stage.routing_replay:
                layers = f"; {len(require_moe_layers(config))} layers replayed"
            device = pick_device(self.recipe.device)
            engine = self.recipe.engine
            check_engine(name, config, engine, device.type, self.devices.count, trains)
            if self.thorough:
                set_environment(config, device, self.recipe.dtype)
                check_architecture(name, config)
            good.append(f"{name} ({config.model_type})")
        if good and self.thorough:
            yield Diagnosis("", "ok", f"vLLM runs {', '.join(good)}{layers}")
        elif layers:
            yield Diagnosis("", "ok", f"{good[0]}{layers}")
        if missing:
            yield Diagnosis("", "skipped", f"no config is here of {', '.join(missing)}")

    def examine_memory(self, stage: Stage) -> Iterator[Diagnosis]:
        from r1pipe.doctor.memory import Estimate, describe_estimate, make_estimate

        estimate = make_estimate(stage, self.recipe, self.devices)
        if estimate is None:
            return
        line, status = estimate, "skipped"
        if isinstance(estimate, Estimate):
            line = describe_estimate(estimate, stage, self.recipe)
            status = "ok" if estimate.fits else "FAIL" if estimate.is_hopeless else "warn"
        yield Diagnosis("", status, line.removeprefix(f"{stage.name}: "))

    def examine_checkpoints(self, stage: Stage) -> Iterator[Diagnosis]:
        """Names and files of what the stage reads from elsewhere."""
        from r1pipe.models.model import check_settings
        from r1pipe.models.weights import check_weights
        from r1pipe.rollout.vllm_args import check_files, read_config

        if stage.new_model:
            check_settings(stage.new_model)
        sampled = {name for name, _ in stage.samplings()}
        good = []
        for name in stage.models():
            if self.recipe.stage(name) is not None:
                continue
            place = None
            try:
                if mistake := find_mistake(name, self.recipe):
                    raise UserError(mistake)
                if place := self.inputs.find_checkpoint(name):
                    (check_files if name in sampled else check_weights)(place)
                    check_trainable(place, read_config(place), stage)
                    good.append(name)
            except UserError as error:
                yield Diagnosis("", "FAIL", str(error))
                continue
            if place is None:
                what = f'"{name}" is neither a stage, nor a folder, nor in the cache of the hub'
                status = "skipped" if self.thorough else "FAIL"
                yield Diagnosis("", status, f"{what}, which does not answer")
        if good:
            yield Diagnosis("", "ok", f"files of {', '.join(good)}")

    def examine_tokenizers(self, stage: Stage) -> Iterator[Diagnosis]:
        from r1pipe.models.tokenizer import encode_prompt, find_opening, show_turn

        good, missing = [], []
        for name in stage.models():
            tokenizer = self.inputs.find_tokenizer(name)
            if tokenizer is None:
                missing.append(name)
                continue
            try:
                header, behind = show_turn(tokenizer)
            except UserError as error:
                yield Diagnosis("", "FAIL", str(error))
                continue
            ends = tokenizer.convert_ids_to_tokens(self.inputs.find_end_ids(name))
            written = next((end for end in ends if end and end in behind), None)
            if written is None:
                yield Diagnosis(
                    "",
                    "warn",
                    f"{name}: the chat template ends a turn with {behind.strip() or 'nothing'!r}, "
                    f"sampling ends at {' or '.join(map(repr, ends))}: a policy that keeps to its "
                    "template does not stop; set eos_token in tokenizer_config.json, or "
                    "eos_token_id in generation_config.json",
                )
            else:
                good.append(f"{name} ({written})")
            ids = encode_prompt(tokenizer, [{"role": "user", "content": "?"}])
            tag = find_opening(tokenizer, ids, header).strip()
            if problem := find_unthinkable(tokenizer, tag):
                yield Diagnosis("", "warn", f"{name}: {problem}")
        if good:
            yield Diagnosis("", "ok", f"chat template and its end token: {', '.join(good)}")
        if missing:
            yield Diagnosis("", "skipped", f"not here yet: {', '.join(missing)}")

    def examine_vocabulary(self, stage: Stage) -> Iterator[Diagnosis]:
        """Of teacher and student, whose distributions are compared."""
        if not (isinstance(stage, OnPolicy) and stage.taught_by):
            return
        from r1pipe.models.tokenizer import require_same_vocabulary

        names = (stage.taught_by, stage.policy)
        try:
            pair = [self.inputs.find_tokenizer(name) for name in names]
        except UserError:
            return  # `examine_tokenizers` tells
        if None in pair:
            yield Diagnosis("", "skipped", "teacher and student are not both here yet")
            return
        require_same_vocabulary(stage, *pair, *map(self.inputs.find_end_ids, names))
        yield Diagnosis("", "ok", f"{len(pair[0])} tokens, the same of teacher and student")

    def examine_prompts(self, stage: Stage) -> Iterator[Diagnosis]:
        from r1pipe.doctor.model_shape import find_config

        good = []
        samplings: list[tuple[str, Sampling | None]] = [*stage.samplings()]
        if stage.optimization and stage.weights_from and not samplings:
            samplings.append((stage.weights_from, None))
        for name, sampling in samplings:
            context, problem = self.recipe.engine.max_model_len, ""
            if context is None:
                try:
                    config = find_config(name, self.recipe).get_text_config()
                    context = getattr(config, "max_position_embeddings", None)
                except ValueError as error:
                    problem = str(error)
            try:
                tokenizer = self.inputs.find_tokenizer(name)
            except UserError:
                continue  # `examine_tokenizers` tells
            if tokenizer is None:
                if sampling and context and sampling.max_completion_length >= context:
                    raise UserError(
                        f"max_completion_length {sampling.max_completion_length} leaves no room "
                        f"for a prompt in the context of {context}: lower it, or raise "
                        "engine.max_model_len"
                    )
                continue
            if forgotten := self.find_forgotten_system(stage, tokenizer):
                what = f"the chat template leaves out the system prompt of {forgotten}"
                yield Diagnosis("", "warn", f"{name}: {what}: write it into the prompt")
            if problem:
                yield Diagnosis("", "skipped", problem)
                continue
            if sampling is None and (what := self.find_long_trace(stage, name, tokenizer)):
                yield Diagnosis("", "warn", what)
            longest = self.measure_prompts(stage, tokenizer, sampling, context)
            if longest and sampling:
                good.append(f"{longest} + {sampling.max_completion_length} of {context} ({name})")
            elif longest:
                good.append(f"{longest} before the solution ({name})")
        if good:
            yield Diagnosis("", "ok", f"longest and completion, tokens: {', '.join(good)}")
        elif samplings:
            yield Diagnosis("", "skipped", "no tokenizer and data to measure them by yet")

    def find_forgotten_system(
        self, stage: Stage, tokenizer: "PreTrainedTokenizerBase"
    ) -> str | None:
        """Which of the stage's sets has system prompts that no model is shown."""
        from r1pipe.models.tokenizer import use_template

        for source, problems in self.inputs.load_problems(stage):
            for problem in problems[:1]:
                said = [m["content"].strip() for m in problem.prompt if m["role"] == "system"]
                name = f'problem "{problem.id}"'
                text = use_template(tokenizer, problem.prompt, name, tokenize=False)
                if any(system not in text for system in said):
                    return describe_source(source)
        return None

    def measure_prompts(
        self,
        stage: Stage,
        tokenizer: "PreTrainedTokenizerBase",
        sampling: Sampling | None,
        context: int | None,
    ) -> int:
        """Tokens of the longest prompt. Raises UserError for one that does not fit."""
        from r1pipe.models.tokenizer import check_length, encode_prompt

        longest, limit = 0, getattr(stage, "max_prompt_length", None)
        shortest = None
        for _, problems in self.inputs.load_problems(stage):
            num_left = len(problems) if self.thorough else LONGEST_PROMPTS
            for problem in sorted(problems, key=count_characters, reverse=True):
                length = len(encode_prompt(tokenizer, problem.prompt, f'problem "{problem.id}"'))
                if limit is not None and length > limit:
                    shortest = min(length, shortest or length)
                    continue  # dropped
                if sampling and context:
                    check_length(problem, length, sampling.max_completion_length, context)
                longest = max(longest, length)
                num_left -= 1
                if not num_left:
                    break
        if shortest and not longest:
            raise UserError(
                f"max_prompt_length {limit}: no prompt is that short, the shortest has {shortest} "
                "tokens: raise it"
            )
        return longest

    def find_long_trace(
        self, stage: Stage, name: str, tokenizer: "PreTrainedTokenizerBase"
    ) -> str | None:
        """Whether the longest row, by characters, is longer than the model's context, and kept."""
        from r1pipe.doctor.model_shape import find_config
        from r1pipe.models.tokenizer import encode_prompt

        def count(problem: Problem) -> int:
            return count_characters(problem) + len(problem.solution or "")

        try:
            config = find_config(name, self.recipe).get_text_config()
        except ValueError:
            return None
        context = getattr(config, "max_position_embeddings", None)
        problems = [p for _, some in self.inputs.load_problems(stage) for p in some]
        if not problems or not context or stage.longest_sequence:
            return None
        problem = max(problems, key=count)
        length = len(encode_prompt(tokenizer, problem.prompt, f'problem "{problem.id}"'))
        length += len(tokenizer.encode(problem.solution or "", add_special_tokens=False)) + 1
        if length <= context:
            return None
        return (
            f'problem "{problem.id}" and its solution are {length} tokens, and {name} was made for '
            f"{context}: train.max_length drops such rows"
        )

    # Disk

    def examine_folder(self) -> Diagnosis:
        folder = find_ancestor(self.recipe.run_dir)
        places = (self.recipe.run_dir, *self.recipe.run_dir.parents)
        if file := next((place for place in places if place.is_file()), None):
            return Diagnosis("run folder", "FAIL", f"{file} is a file, not a folder; set runs_dir")
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            return Diagnosis(
                "run folder",
                "FAIL",
                f"{self.recipe.run_dir}: cannot be written: {error.strerror}; set runs_dir",
            )
        return Diagnosis("run folder", "ok", f"{self.recipe.run_dir} can be written")

    def examine_disk(self, stages: list[Stage]) -> Diagnosis:
        """Room for every stage's checkpoint, and for what the largest one saves to go on from."""
        from r1pipe.doctor.memory import estimate_files

        kept, meanwhile, unknown = 0.0, 0.0, []
        for stage in stages:
            try:
                files = estimate_files(stage, self.recipe)
            except Exception:  # whatever a model's config may lack; the stage's own checks tell
                unknown.append(stage.name)
                continue
            kept, meanwhile = kept + files.kept, max(meanwhile, files.meanwhile)
        free = shutil.disk_usage(find_ancestor(self.recipe.run_dir)).free
        rest = self.recipe.doctor.free_disk_gib * GIB
        line = (
            f"{format_size(free)} free; checkpoints take about {format_size(kept)}, and "
            f"{format_size(meanwhile)} while a stage runs"
        )
        if unknown:
            line += f", besides those of {', '.join(unknown)}, whose size is not known"
        try:
            # Which vLLM's and torch's compilers write to.
            temporary = Path(tempfile.gettempdir())
            left = shutil.disk_usage(temporary).free
        except OSError as error:
            return Diagnosis("disk", "FAIL", f"no folder for temporary files: {error.strerror}")
        if left < TEMPORARY:
            what = f"{temporary}: {format_size(left)} free for temporary files, "
            what += f"{format_size(TEMPORARY)} are needed: make room or set TMPDIR"
            return Diagnosis("disk", "FAIL", what)
        if free < kept + meanwhile + rest:
            what = f"{line}; {format_size(rest)} are to be left: make room or set runs_dir"
            return Diagnosis("disk", "FAIL", what)
        return Diagnosis("disk", "ok", line)

    # Sampler and trainer

    def examine_parity(self, stage: Stage) -> Iterator[Diagnosis]:
        """The gate of a stage that trains on its samples, on a few tokens of the checkpoint that it
        starts from."""
        if not isinstance(stage, OnPolicy):
            return
        from r1pipe.models.model import pick_device
        from r1pipe.rl.loop import measure_mismatch
        from r1pipe.rl.update import Updater
        from r1pipe.rollout.engine import Engines
        from r1pipe.trainer.fsdp import load_sharded
        from r1pipe.trainer.policy import Policy

        recipe = self.recipe
        place = self.inputs.find_checkpoint(stage.policy)
        if place is None:
            yield Diagnosis("", "skipped", f'"{stage.policy}" is not here yet')
            return
        problems = [problem for _, some in self.inputs.load_problems(stage) for problem in some]
        if not problems:
            yield Diagnosis("", "skipped", "its data is not here")
            return
        device = pick_device(recipe.device)
        engines = Engines(recipe.engine, recipe.dtype, device, recipe.chat_template)
        try:
            sampler = engines.open(place, with_routes=stage.routing_replay)
            source = (place, device, recipe.attn_implementation, Policy)
            model = load_sharded(*source, dtype=recipe.dtype)
            updater = Updater(model, None, stage, dtype=recipe.dtype, seed=recipe.seed)
            length = min(PARITY_TOKENS, stage.max_completion_length)
            sampling = stage.sampling.model_copy(update={"max_completion_length": length})
            some = spread(problems, PARITY_PROMPTS)
            seed_parts = (recipe.seed, stage.name, "doctor")
            diff = measure_mismatch(stage, updater, sampler, some, sampling, seed_parts)
        finally:
            engines.close()
        line = f"sampler = trainer on {len(some)} x {length} tokens: mean |dlogp| {diff:.1e}"
        gate = stage.breaker.logprob_diff
        if diff <= gate.limit:
            yield Diagnosis("", "ok", line)
        else:
            what = f"{line} > breaker.logprob_diff.limit {gate.limit:.0e}"
            yield Diagnosis("", "warn" if gate.action == "warn" else "FAIL", what)


def check_trainable(place: str, config: "PreTrainedConfig", stage: Stage) -> None:
    """Raises UserError for what no stage can train, as far as its config tells."""
    how = getattr(config, "quantization_config", None)
    if how is not None and stage.optimization is not None:
        method = how.get("quant_method") if isinstance(how, dict) else how.quant_method
        raise UserError(f"{place}: quantised ({method}): take the model that it was made from")
    if config.is_encoder_decoder:
        raise UserError(f"{place}: {config.model_type} is an encoder and a decoder, no such model")


def find_unthinkable(tokenizer: "PreTrainedTokenizerBase", tag: str) -> str:
    """Why no completion can think so that the rewards see it; nothing if one can. `tag`: what the
    chat template opens."""
    if tag not in ("", OPEN):
        return (
            f"the chat template opens {tag}, and rewards and data of r1pipe know {OPEN} alone: "
            "they take such thinking for the answer; change the template, or the rewards"
        )
    thought = f"{OPEN}1{close_tag(OPEN)}"
    ids = tokenizer.encode(thought, add_special_tokens=False)
    unsaid = {tokenizer.eos_token_id, tokenizer.pad_token_id}
    said = tokenizer.decode([n for n in ids if n not in unsaid])
    if any(tag not in said for tag in (OPEN, close_tag(OPEN))):
        return f"the tokenizer makes {said!r} of {thought!r}: rewards.format cannot be met"
    return ""


# What commands call


def diagnose(
    recipe: Recipe | None, devices: str | None = None, parity: bool = False
) -> Iterator[Diagnosis]:
    """`r1pipe doctor`: everything, thoroughly. `devices` as in "8x80GB"; None: this machine's."""
    yield from examine_machine()
    if recipe is None:
        yield examine_sandbox()
        return
    from r1pipe.doctor.memory import Devices

    given = Devices.parse(devices) if devices else Devices.here(recipe.device)
    yield examine_hub()
    doctor = Doctor(recipe, given, thorough=True)
    yield from doctor.examine(recipe.stages)
    if parity:
        for stage in recipe.stages:
            yield from doctor.ask(stage, doctor.examine_parity)
    elif any(isinstance(stage, OnPolicy) for stage in recipe.stages):
        yield Diagnosis("parity", "skipped", "takes an engine: add --parity")


def examine_hub() -> Diagnosis:
    from huggingface_hub import constants

    from r1pipe.models.hub_cache import reaches_hub

    if reaches_hub():
        return Diagnosis("hub", "ok", f"{constants.ENDPOINT} answers")
    # Whoever asks it from now on would try again for half a minute.
    constants.HF_HUB_OFFLINE = True
    return Diagnosis(
        "hub", "skipped", f"no answer from {constants.ENDPOINT}: only its cache counts"
    )


def is_out_of_reach(error: BaseException | None) -> bool:
    """Whether it is the hub that is to blame."""
    while error is not None and not isinstance(error, ConnectionError):
        error = error.__cause__
    return error is not None


def find_ancestor(folder: Path) -> Path:
    """The folder itself, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def check_recipe(recipe: Recipe, devices: str | None = None) -> Iterator[str]:
    """One line per stage, and one about the memory of each that trains, on such devices ("8x80GB")
    or this machine. Raises UserError at the first thing that is wrong."""
    from r1pipe.doctor.memory import Devices, estimate_stage

    check_tracking(recipe)
    given = Devices.parse(devices) if devices else Devices.here(recipe.device)
    yield f"{recipe.name}: {len(recipe.stages)} stages, run folder {recipe.run_dir}"
    for stage in recipe.stages:
        if line := estimate_stage(stage, recipe, given):
            yield line
    for stage in recipe.stages:
        yield check_stage(stage)


def check_stage(stage: Stage) -> str:
    check_functions(stage)
    counts = []
    for source in stage.problem_sets():
        if source.recipe is not None:
            loaded = load_set(source)
            check_solutions(stage, source, loaded.problems)
            filtered = len(loaded.problems) < loaded.num_rows
            of_rows = f" ({loaded.describe()})" if filtered else ""
            counts.append(
                f"{source.recipe}/{source.split}: {len(loaded.problems)} problems{of_rows}"
            )
    return f"{stage.name}: {', '.join(counts) or 'ok'}"


def check_functions(stage: Stage) -> None:
    """Raises UserError for a reward or loss that does not exist or take its options."""
    Scorer(stage.rewards_used())
    if isinstance(stage, Grpo):
        from r1pipe.rl.losses import find_loss

        find_loss(stage.loss_type)
