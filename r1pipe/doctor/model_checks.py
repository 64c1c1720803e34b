"""Checks of a stage's models: architecture, memory, files, tokenizer, prompt lengths."""

import contextlib
from collections.abc import Iterator

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from r1pipe.config.base import Sampling, Stage
from r1pipe.config.rl import OnPolicy, OnPolicyDistill
from r1pipe.doctor.inputs import Inputs, count_characters, describe_source
from r1pipe.doctor.machine import Diagnosis
from r1pipe.doctor.memory import Estimate, describe_estimate, make_estimate
from r1pipe.doctor.model_config import find_config, find_stage_config
from r1pipe.envs.base import check_environment, read_first_prompts
from r1pipe.models.adapter import check_targets
from r1pipe.models.model import check_settings, pick_device
from r1pipe.models.mtp import require_mtp_layer
from r1pipe.models.sparse_attention import require_indexer
from r1pipe.models.thinking import OPEN, close_tag
from r1pipe.models.tokenizer import (
    apply_template,
    check_length,
    encode_prompt,
    find_answer_frame,
    find_opening,
    require_same_vocabulary,
)
from r1pipe.models.weights import check_weights
from r1pipe.rollout.vllm_args import (
    check_architecture,
    check_engine,
    check_files,
    read_config,
    require_moe_layers,
    set_environment,
)
from r1pipe.runs.folder import find_mistake
from r1pipe.trainer.attention import find_implementation
from r1pipe.trainer.expert_parallel import require_groups
from r1pipe.trainer.policy import require_trainable
from r1pipe.trainer.sequence_parallel import require_teams
from r1pipe.types import Problem
from r1pipe.utils.errors import UserError

LONGEST_PROMPTS = 100
"""Prompts tokenized by a quick check: the longest by characters."""


def examine_architecture(stage: Stage, inputs: Inputs) -> Iterator[Diagnosis]:
    """Models that the stage trains and samples from. Only a thorough check imports vLLM."""
    recipe = inputs.recipe
    good, missing, layers = [], [], ""
    trains = isinstance(stage, OnPolicy)
    if stage.optimization is not None:
        device = pick_device(recipe.device)
        find_implementation(recipe.attn_implementation, device, recipe.dtype)
        with contextlib.suppress(ValueError):  # a config that is missing is told below
            configs = [find_stage_config(stage, recipe)]
            if trains:
                configs += [find_config(name, recipe) for name in stage.taught_by]
            for config in configs:
                require_trainable(config, recipe.attn_implementation)
            if stage.optimization.adapter:
                check_targets(configs[0], stage.optimization.adapter)
            if stage.optimization.mtp:
                require_mtp_layer(configs[0])
            if stage.optimization.indexer:
                require_indexer(configs[0])
            groups, count = stage.optimization.parallel, inputs.devices.count
            require_groups(configs[0], groups["expert_parallel"], count)
            how = recipe.attn_implementation
            require_teams(configs[0], how, groups["sequence_parallel"], count)
    for name, _ in stage.samplings():
        try:
            config = find_config(name, recipe)
        except ValueError:
            missing.append(name)
            continue
        if trains and stage.routing_replay:
            layers = f"; {len(require_moe_layers(config))} layers replayed"
        device = pick_device(recipe.device)
        check_engine(name, config, recipe.engine, device.type, inputs.devices.count, trains)
        if inputs.thorough:
            set_environment(config, device, recipe.dtype)
            check_architecture(name, config)
        good.append(f"{name} ({config.model_type})")
    if good and inputs.thorough:
        yield Diagnosis("", "ok", f"vLLM runs {', '.join(good)}{layers}")
    elif layers:
        yield Diagnosis("", "ok", f"{good[0]}{layers}")
    if missing:
        yield Diagnosis("", "skipped", f"no config is here of {', '.join(missing)}")


def examine_memory(stage: Stage, inputs: Inputs) -> Iterator[Diagnosis]:
    estimate = make_estimate(stage, inputs.recipe, inputs.devices)
    if estimate is None:
        return
    line, status = estimate, "skipped"
    if isinstance(estimate, Estimate):
        line = describe_estimate(estimate, stage, inputs.recipe)
        status = "ok" if estimate.fits else "FAIL" if estimate.is_hopeless else "warn"
    yield Diagnosis("", status, line.removeprefix(f"{stage.name}: "))


# --- Files --------------------------------------------------------------------------------------


def examine_checkpoints(stage: Stage, inputs: Inputs) -> Iterator[Diagnosis]:
    """Names and files of models that no stage of the recipe makes."""
    if stage.new_model:
        check_settings(stage.new_model)
    sampled = {name for name, _ in stage.samplings()}
    good = []
    for name in stage.models():
        if inputs.recipe.stage(name) is not None:
            continue
        place = None
        try:
            if mistake := find_mistake(name, inputs.recipe):
                raise UserError(mistake)
            if place := inputs.find_checkpoint(name):
                (check_files if name in sampled else check_weights)(place)
                check_trainable(place, read_config(place), stage)
                good.append(name)
        except UserError as error:
            yield Diagnosis("", "FAIL", str(error))
            continue
        if place is None:
            what = f'"{name}" is neither a stage, nor a folder, nor in the cache of the hub'
            status = "FAIL" if inputs.about_to_run else "skipped"
            yield Diagnosis("", status, f"{what}, which does not answer")
    if good:
        yield Diagnosis("", "ok", f"files of {', '.join(good)}")


def check_trainable(place: str, config: PreTrainedConfig, stage: Stage) -> None:
    """Raises UserError for a model whose config says that the stage cannot use it."""
    how = getattr(config, "quantization_config", None)
    if how is not None and stage.optimization is not None:
        method = how.get("quant_method") if isinstance(how, dict) else how.quant_method
        raise UserError(f"{place}: quantised ({method}): take the model that it was made from")
    if config.is_encoder_decoder:
        raise UserError(f"{place}: {config.model_type} is an encoder and a decoder, no such model")


# --- Tokenizers ---------------------------------------------------------------------------------


def examine_tokenizers(stage: Stage, inputs: Inputs) -> Iterator[Diagnosis]:
    good, missing = [], []
    for name in stage.models():
        tokenizer = inputs.find_tokenizer(name)
        if tokenizer is None:
            missing.append(name)
            continue
        try:
            header, behind = find_answer_frame(tokenizer)
        except UserError as error:
            yield Diagnosis("", "FAIL", str(error))
            continue
        ends = tokenizer.convert_ids_to_tokens(inputs.find_end_ids(name))
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
        if problem := find_tag_problem(tokenizer, tag):
            yield Diagnosis("", "warn", f"{name}: {problem}")
    if good:
        yield Diagnosis("", "ok", f"chat template and its end token: {', '.join(good)}")
    if missing:
        yield Diagnosis("", "skipped", f"not here yet: {', '.join(missing)}")


def find_tag_problem(tokenizer: PreTrainedTokenizerBase, tag: str) -> str:
    """Why the rewards cannot see a completion's thinking; "" if they can. `tag`: what the chat
    template opens."""
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


def examine_vocabulary(stage: Stage, inputs: Inputs) -> Iterator[Diagnosis]:
    """Teachers and student of on-policy distillation, whose distributions are compared."""
    for teacher in stage.taught_by if isinstance(stage, OnPolicyDistill) else ():
        names = (teacher, stage.student)
        try:
            pair = [inputs.find_tokenizer(name) for name in names]
        except UserError:
            continue  # `examine_tokenizers` tells
        of_which = f" {teacher}" if stage.teachers else ""
        if None in pair:
            what = f"teacher{of_which} and student are not both here yet"
            yield Diagnosis("", "skipped", what)
            continue
        require_same_vocabulary(stage, teacher, *pair, *map(inputs.find_end_ids, names))
        what = f"{len(pair[0])} tokens, the same of teacher{of_which} and student"
        yield Diagnosis("", "ok", what)


# --- Prompts ------------------------------------------------------------------------------------


def examine_prompts(stage: Stage, inputs: Inputs) -> Iterator[Diagnosis]:
    if not has_environment(stage, inputs):
        return  # `examine_functions` tells
    good = []
    samplings: list[tuple[str, Sampling | None]] = [*stage.samplings()]
    if stage.optimization and stage.weights_from and not samplings:
        samplings.append((stage.weights_from, None))
    for name, sampling in samplings:
        context, problem = find_context(name, inputs)
        try:
            tokenizer = inputs.find_tokenizer(name)
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
        if source := find_dropped_system_prompt(stage, inputs, tokenizer):
            what = f"the chat template leaves out the system prompt of {source}"
            yield Diagnosis("", "warn", f"{name}: {what}: write it into the prompt")
        if problem:
            yield Diagnosis("", "skipped", problem)
            continue
        if sampling is None and (what := find_long_trace(stage, inputs, name, tokenizer)):
            yield Diagnosis("", "warn", what)
        longest = measure_prompts(stage, inputs, tokenizer, sampling, context)
        if longest and sampling:
            good.append(f"{longest} + {sampling.max_completion_length} of {context} ({name})")
        elif longest:
            good.append(f"{longest} before the solution ({name})")
    if good:
        yield Diagnosis("", "ok", f"longest and completion, tokens: {', '.join(good)}")
    elif samplings:
        yield Diagnosis("", "skipped", "no tokenizer and data to measure them by yet")


def has_environment(stage: Stage, inputs: Inputs) -> bool:
    """Whether that of the stage, if it has one, can be made."""
    if environment := stage.environment_used():
        try:
            for _, problems in inputs.load_problems(stage):
                check_environment(environment, problems[0])
        except UserError:
            return False
    return True


def find_context(name: str, inputs: Inputs) -> tuple[int | None, str]:
    """The engine's context for a model in tokens, and why it is not known, or ""."""
    if inputs.recipe.engine.max_model_len is not None:
        return inputs.recipe.engine.max_model_len, ""
    try:
        config = find_config(name, inputs.recipe).get_text_config()
    except ValueError as error:
        return None, str(error)
    return getattr(config, "max_position_embeddings", None), ""


def find_dropped_system_prompt(
    stage: Stage, inputs: Inputs, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """Which of the stage's sets has system prompts that the chat template leaves out."""
    for source, problems in inputs.load_problems(stage):
        for problem in problems[:1]:
            said = [m["content"].strip() for m in problem.prompt if m["role"] == "system"]
            name = f'problem "{problem.id}"'
            text = apply_template(tokenizer, problem.prompt, name, tokenize=False)
            if any(system not in text for system in said):
                return describe_source(source)
    return None


def measure_prompts(
    stage: Stage,
    inputs: Inputs,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling | None,
    context: int | None,
) -> int:
    """Tokens of the longest prompt. Raises UserError for one that does not fit."""
    longest, limit = 0, getattr(stage, "max_prompt_length", None)
    shortest = None
    for _, problems in inputs.load_problems(stage):
        num_left = len(problems) if inputs.thorough else LONGEST_PROMPTS
        for problem in sorted(problems, key=count_characters, reverse=True):
            [(messages, tools)] = read_first_prompts(stage.environment_used(), [problem])
            length = len(encode_prompt(tokenizer, messages, f'problem "{problem.id}"', tools))
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
    stage: Stage, inputs: Inputs, name: str, tokenizer: PreTrainedTokenizerBase
) -> str | None:
    """A warning if the longest row, by characters, exceeds the model's context and is kept."""

    def count(problem: Problem) -> int:
        return count_characters(problem) + len(problem.trace_text)

    try:
        config = find_config(name, inputs.recipe).get_text_config()
    except ValueError:
        return None
    context = getattr(config, "max_position_embeddings", None)
    problems = [p for _, some in inputs.load_problems(stage) for p in some]
    if not problems or not context or stage.longest_sequence:
        return None
    problem = max(problems, key=count)
    length = len(encode_prompt(tokenizer, problem.prompt, f'problem "{problem.id}"'))
    length += len(tokenizer.encode(problem.trace_text, add_special_tokens=False)) + 1
    if length <= context:
        return None
    return (
        f'problem "{problem.id}" and its solution are {length} tokens, and {name} was made for '
        f"{context}: train.max_length drops such rows"
    )
