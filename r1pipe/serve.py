"""A finished stage to talk to: vLLM's OpenAI-compatible server, or a conversation in the terminal.

r1pipe serve runs/demo/grpo
r1pipe chat runs/demo/grpo
echo "Tom has 3 books. Monday brings 4. Tuesday burns 2. How many books now?" | r1pipe chat demo
"""

import os
import re
import socket
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from r1pipe.config.base import Sampling
from r1pipe.config.recipe import Engine, Speculative
from r1pipe.models.model import pick_device
from r1pipe.models.thinking import ThinkingSplitter
from r1pipe.models.weights import has_mtp_weights
from r1pipe.rollout.engine import Sampler
from r1pipe.rollout.vllm_args import server_command
from r1pipe.runs.lineage import list_stages
from r1pipe.runs.reader import find_finished
from r1pipe.utils.errors import UserError
from r1pipe.utils.progress import log_line
from r1pipe.utils.seeds import derive_seed


@dataclass(frozen=True)
class Served:
    """A checkpoint, what to call it, and in which numbers to run it."""

    checkpoint: str
    name: str
    dtype: str


def find_served(target: str) -> Served:
    """RUN[/STAGE], a checkpoint folder, or a hub id. Raises UserError."""
    default = "bfloat16" if pick_device("auto").type == "cuda" else "float32"
    folder = Path(target).expanduser()
    if (folder / "config.json").exists() and not (folder / "stage.json").exists():
        return Served(str(folder), folder.resolve().name, default)
    looks_like_id = re.fullmatch(r"[\w.-]+/[\w.-]+", target) is not None
    if looks_like_id and not any(path.exists() for path in (folder.parent, "runs" / folder.parent)):
        return Served(target, target, default)
    if not list_stages(folder) and (inside := sorted(folder.glob("*/config.json"))):
        some = ", or ".join(str(file.parent) for file in inside[:3])
        raise UserError(f"{target}: neither a run nor a checkpoint; did you mean {some}?")
    run, stage = find_finished(folder)
    name = f"{run.path.resolve().name}/{stage.name}"
    return Served(str(stage.folder), name, stage.settings.get("dtype", default))


def engine_settings(checkpoint: str, max_model_len: int | None) -> Engine:
    """For a few conversations: a small machine's memory is not to be filled with KV cache. A
    checkpoint's own prediction layer drafts."""
    on_gpu = pick_device("auto").type == "cuda"
    drafts = Speculative(method="mtp", num_speculative_tokens=1, trial=False)
    return Engine(
        max_model_len=max_model_len,
        kv_cache_gib=None if on_gpu else 1.0,
        speculative=drafts if has_mtp_weights(Path(checkpoint)) else None,
    )


def serve(
    target: str, host: str, port: int, max_model_len: int | None, flags: Sequence[str] = ()
) -> None:
    """Become vLLM's server, which ends with Ctrl-C; `flags` are its own. Does not return."""
    served = find_served(target)
    require_free_port(host, port)
    settings = engine_settings(served.checkpoint, max_model_len)
    device = pick_device("auto")
    command = server_command(
        served.checkpoint, settings, served.dtype, device, served.name, host, port
    )
    thinking = "--reasoning-parser" in command
    log_line(
        f"model {served.name} at http://{host}:{port}/v1, ready in a moment; "
        + (
            "thinking comes as `reasoning`, the answer as `content`"
            if thinking
            else "thinking comes within `content`: <think> and </think> are no tokens of this model"
        )
    )
    os.execv(command[0], [*command, *flags])


def require_free_port(host: str, port: int) -> None:
    """Raises UserError; the server would find out when the model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        why = re.sub(r" \(while .*", "", error.strerror)
        raise UserError(f"{host}:{port}: {why}: choose another --host or --port") from error


def chat(
    target: str, max_model_len: int | None, sampling: Sampling, *, show_thinking: bool
) -> None:
    """Answer questions from the terminal, or the one that comes through a pipe. Of the latter only
    the answer goes to stdout, unless `show_thinking`."""
    served = find_served(target)
    at_terminal = sys.stdin.isatty()
    questions = ask_questions() if at_terminal else iter([read_question()])
    settings = engine_settings(served.checkpoint, max_model_len)
    device = pick_device("auto")
    sampler = Sampler(served.checkpoint, settings, served.dtype, device)
    try:
        if at_terminal:
            log_line(
                f"{served.name}: ask; an empty line or Ctrl-D ends, /new forgets what was said"
            )
        history: list[dict[str, str]] = []
        for number, question in enumerate(questions):
            if question == "/new":
                history.clear()
                continue
            history.append({"role": "user", "content": question})
            pieces = sampler.stream(history, sampling, derive_seed("chat", number))
            try:
                answer = show(split(pieces, sampler.opened_tag), show_thinking or at_terminal)
            except UserError as error:
                if not at_terminal:
                    raise
                log_line(f"{error}; /new begins another")
                history.pop()
                continue
            # A model does not see what it has thought before: R1's template drops it, too.
            history.append({"role": "assistant", "content": answer})
    finally:
        sampler.close()


def read_question() -> str:
    """All of standard input. Raises UserError if that is nothing, or no text."""
    try:
        question = sys.stdin.buffer.read().decode().strip()
    except UnicodeDecodeError as error:
        raise UserError("the question on standard input is not UTF-8") from error
    if not question:
        raise UserError("no question on standard input: echo QUESTION | r1pipe chat RUN")
    return question


def ask_questions() -> Iterator[str]:
    import readline  # noqa: F401 input() then knows arrow keys and what was asked before

    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            print()
            return
        except UnicodeDecodeError:
            log_line("this is not UTF-8: once more")
            continue
        if not question:
            return
        yield question


def split(pieces: Iterator[str], opened: str) -> Iterator[tuple[bool, str]]:
    splitter = ThinkingSplitter(opened)
    for piece in pieces:
        yield from splitter.feed(piece)
    yield from splitter.finish()


def show(parts: Iterator[tuple[bool, str]], show_thinking: bool) -> str:
    """Print as it comes, thinking dimmed; returns the answer."""
    console = Console(highlight=False, markup=False, soft_wrap=True)
    answer, thought = "", False
    for thinking, text in parts:
        if thinking:
            thought = True
            if show_thinking:
                console.print(text, end="", style="dim")
            continue
        if not answer:
            text = text.lstrip("\n")
            if thought and show_thinking:
                console.print()
        answer += text
        console.print(text, end="")
    console.print()
    if not answer and thought and not show_thinking:
        raise UserError("the model was still thinking at --max-completion-length; raise it")
    return answer.strip()
