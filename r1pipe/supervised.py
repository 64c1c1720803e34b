"""Supervised training on traces with TRL's SFTTrainer: the cold start and the students."""

import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import TrainOutput
from trl import SFTConfig, SFTTrainer

from r1pipe import distributed
from r1pipe.breaker import EventLog, stop_unless_finite
from r1pipe.checkpoints import Checkpoints, RandomStates
from r1pipe.config import Supervised
from r1pipe.errors import UserError
from r1pipe.models import (
    encode_completion,
    encode_prompt,
    fast_training_kernels,
    find_end_id,
    find_opening,
    list_ids,
    show_turn,
    whole,
)
from r1pipe.moe import ExpertLoad, number_padded
from r1pipe.optimizer import OffloadedAdamW, find_schedule
from r1pipe.progress import Interrupt, StageProgress
from r1pipe.records import Problem, write_text
from r1pipe.runs import MetricsLog, read_metrics
from r1pipe.sharding import (
    computes_by_autocast,
    put_optimizer,
    put_weights,
    take_optimizer,
    take_weights,
)
from r1pipe.stage import StageContext
from r1pipe.thinking import drop_opening

PAD_TO_MULTIPLE_OF = 8


@dataclass(frozen=True)
class Traces:
    """Tokenised traces, and how many rows were too long for `max_length`."""

    rows: list[dict[str, list[int]]]
    num_too_long: int


def encode_traces(
    problems: list[Problem],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    end_ids: Iterable[int] = (),
) -> Traces:
    """Prompt and solution of each problem as the sampler would see them, token by token.

    Tokenised here and not by TRL, so that supervised training and sampling share one encoding;
    only the completion's tokens are trained on, the last of them one of `end_ids`. Raises UserError
    for a row without `solution`, or that the chat template refuses.
    """
    rows, num_too_long = [], 0
    header, _ = show_turn(tokenizer)
    end_id = find_end_id(tokenizer, end_ids)
    for problem in problems:
        if not problem.solution:
            raise UserError(f'problem "{problem.id}" ({problem.source}): no "solution" to train on')
        prompt = encode_prompt(tokenizer, problem.prompt, f'problem "{problem.id}"')
        solution = drop_opening(problem.solution, find_opening(tokenizer, prompt, header))
        completion = encode_completion(tokenizer, solution, end_id)
        if max_length is not None and len(prompt) + len(completion) > max_length:
            num_too_long += 1
            continue
        rows.append(
            {
                "input_ids": prompt + completion,
                "completion_mask": [0] * len(prompt) + [1] * len(completion),
            }
        )
    if not rows:
        raise UserError(f"no row has at most max_length = {max_length} tokens")
    return Traces(rows, num_too_long)


class ReportProgress(TrainerCallback):
    """TRL's log, and the experts' load, into our progress bar and metrics.jsonl."""

    def __init__(self, progress: StageProgress, log: MetricsLog, load: ExpertLoad):
        self.progress, self.log, self.load = progress, log, load
        self.figures: dict[str, float] = {}
        self.num_tokens: int | None = None
        """As TRL counts them, from the stage's beginning."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.progress.total = state.max_steps
        self.progress.start_at(state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.progress.advance(**self.figures)
        if state.global_step == state.max_steps:
            control.should_log = True  # the last steps, too few for a log of their own

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        if logs and "loss" in logs:
            self.figures = {"loss": float(logs["loss"])}
            if self.num_tokens is None:
                rows = read_metrics(self.log.path.parent)  # of the run that this one goes on with
                self.num_tokens = rows[-1]["num_tokens"] if rows else 0
            tokens = {"tokens_trained": logs["num_tokens"] - self.num_tokens}
            self.num_tokens = logs["num_tokens"]
            self.log.write({"step": state.global_step, **logs, **tokens, **self.load.metrics()})


class BalanceExperts(TrainerCallback):
    """Counts the experts' load in TRL's training, and moves the routers' biases after each step."""

    def __init__(self, model: PreTrainedModel, load: ExpertLoad, sequences_per_step: int):
        self.load, self.sequences_per_step = load, sequences_per_step
        if load.routers:
            model.register_forward_pre_hook(self.before_forward, with_kwargs=True)

    def before_forward(self, model: PreTrainedModel, args: tuple, inputs: dict) -> None:
        if model.training:
            self.load.finish()
            self.load.start(number_padded(inputs["attention_mask"]), self.sequences_per_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.load.finish()
        self.load.balance()


LOGGING = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged", "_total_train_tokens")
"""Of TRL's and transformers' trainers: sums that a later line of the log is made from."""


class ResumableTrainer(SFTTrainer):
    """Goes on exactly where a checkpoint of ours was made.

    TRL's loop finds the place in the data and calls what is overridden here at the right moments.
    Its own files are not used: of a sharded model it would save one rank's part, they appear bit by
    bit, and the loss since the last line of the log is not in them.
    """

    checkpoints: Checkpoints
    events: EventLog
    restored: dict[str, Any] | None = None

    def train_on(self, checkpoints: Checkpoints, events: EventLog) -> TrainOutput:
        """Train from the newest whole checkpoint, or from the beginning."""
        self.checkpoints, self.events = checkpoints, events
        self.add_callback(SaveInTime(self))
        done = checkpoints.restore_last_good()
        return self.train(resume_from_checkpoint=self.args.output_dir if done else None)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """TRL asks before each optimizer step, and gets the norm over all ranks."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        stop_unless_finite(
            self.checkpoints.label, self.state.global_step + 1, float(grad_norm), self.events
        )
        return grad_norm

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": take_weights(self.model),
            "optimizer": take_optimizer(self.optimizer.optimizer),
            "scheduler": self.lr_scheduler.state_dict(),
            "trainer": json.dumps(asdict(self.state)),
            "logging": {name: getattr(self, name) for name in LOGGING},
            "metrics": dict(self._metrics["train"]),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Kept until `train` asks for it, piece by piece. The random states are back by now, and
        TRL will draw from them on its way to the place in the data."""
        self.restored = {**state, "random": RandomStates().state_dict()}
        folder = Path(self.args.output_dir)
        folder.mkdir(exist_ok=True)
        write_text(folder / TRAINER_STATE_NAME, state["trainer"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        put_weights(self.model, self.restored.pop("model"))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            put_optimizer(self.optimizer.optimizer, self.restored.pop("optimizer"))
            self.lr_scheduler.load_state_dict(self.restored["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        RandomStates().load_state_dict(self.restored["random"])

    def restore_logging(self) -> None:
        """What was added up since the last line of the log, and in all."""
        if self.restored:
            for name in LOGGING:
                setattr(self, name, self.restored["logging"][name])
            self._tr_loss = self._tr_loss.to(self.args.device)
            self._metrics["train"].update(self.restored["metrics"])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.checkpoints.save(self.state.global_step)
        self.checkpoints.end_if_asked()


class SaveInTime(TrainerCallback):
    """Tells TRL when to save: after it has logged the step."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        self.trainer.restore_logging()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        control.should_save = self.trainer.checkpoints.is_due(state.global_step)


def keep_shards(accelerator: Accelerator) -> None:
    """Let accelerate train a model that is sharded already.

    Why its own FSDP2 is no choice, r1pipe/sharding.py says. What evaluation needs of
    `prepare_model` is what sharded models need: no DDP around them.
    """
    accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)

    def clip(parameters: Iterable[Parameter], max_norm: float, norm_type: float = 2) -> Tensor:
        accelerator.unscale_gradients()
        return whole(clip_grad_norm_(parameters, max_norm, norm_type=norm_type))

    accelerator.clip_grad_norm_ = clip


def offloaded_optimizer(settings: Supervised) -> tuple[type, dict] | None:
    """For TRL, in place of its AdamW, if the settings ask for that."""
    if not settings.offload_optimizer:
        return None
    betas = (0.9, settings.adam_beta2)
    return OffloadedAdamW, {"lr": settings.learning_rate, "betas": betas}


def train_on_traces(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: list[Problem],
    settings: Supervised,
    context: StageContext,
    label: str,
) -> dict[str, float]:
    """Train `model` in place on the problems' solutions. Returns facts for the stage's record."""
    end_ids = list_ids(model.generation_config)
    traces = encode_traces(problems, tokenizer, settings.max_length, end_ids)
    batch_size, accumulation_steps = distributed.share_batch(
        settings.per_device_train_batch_size,
        settings.gradient_accumulation_steps,
        distributed.world_size(),
    )
    schedule, schedule_arguments = find_schedule(settings)
    arguments = SFTConfig(
        output_dir=str(context.folder / "trainer"),
        max_steps=settings.max_steps or -1,
        num_train_epochs=settings.num_train_epochs or 1.0,
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation_steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=schedule_arguments,
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta2=settings.adam_beta2,
        max_grad_norm=settings.max_grad_norm,
        gradient_checkpointing=settings.gradient_checkpointing,
        max_length=None,
        completion_only_loss=True,
        pad_to_multiple_of=PAD_TO_MULTIPLE_OF,
        logging_steps=5,
        logging_nan_inf_filter=False,  # it would log the mean of earlier losses instead
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=model.device.type == "cpu",
        bf16=computes_by_autocast(context.recipe.dtype),
        fp16=False,
        seed=context.recipe.seed,
        data_seed=context.recipe.seed,
        dataloader_pin_memory=model.device.type != "cpu",
    )
    log, events = context.open_log(), EventLog(context.folder)
    load = ExpertLoad(
        model,
        bias_update_rate=settings.bias_update_rate,
        seq_aux_loss_coef=settings.seq_aux_loss_coef,
    )
    with (
        fast_training_kernels(model.device, context.recipe.dtype),
        Interrupt.deferred(settings.save_grace_s),
        context.open_progress(label, settings.max_steps or 1) as progress,
    ):
        trainer = ResumableTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(traces.rows),
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=offloaded_optimizer(settings),
            callbacks=[
                # Of this rank: gradients are means over the ranks.
                BalanceExperts(model, load, batch_size * accumulation_steps),
                ReportProgress(progress, log, load),
            ],
        )
        trainer.remove_callback(PrinterCallback)
        if not distributed.alone():
            keep_shards(trainer.accelerator)
        checkpoints = Checkpoints(
            context.shared_folder,
            settings,
            label,
            parts={"trainer": trainer, "experts": load},
            logs={"metrics": log, "events": events},
        )
        result = trainer.train_on(checkpoints, events)
    model.eval()
    # TRL makes its output folder although nothing is saved there.
    shutil.rmtree(arguments.output_dir, ignore_errors=True)
    return {
        "train_rows": len(traces.rows),
        "rows_too_long": traces.num_too_long,
        "optimizer_steps": result.global_step,
        "train_loss": result.training_loss,
        **checkpoints.facts(),
    }
