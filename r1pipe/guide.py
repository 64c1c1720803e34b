"""What `r1pipe` and every --help tell a newcomer: an example that works, and what comes next.

The examples are parsed by a test, so none can name an option that is gone.
"""

import argparse

FIRST_STEPS = """\
first steps:
  r1pipe doctor configs/demo.yaml   what would go wrong, of this machine and of the recipe
  r1pipe run configs/demo.yaml      the whole recipe: minutes on two cores, no GPU
  r1pipe report runs/demo           curves, cost and every rollout on one page
  r1pipe chat runs/demo             talk to what came out
  r1pipe verify runs/demo           is everything still as it was made?
  r1pipe publish runs/demo --repo user/name --dry-run

Each command has a --help with an example; README.md tells the rest."""

EXAMPLES: dict[str, tuple[str, str]] = {
    "run": (
        "r1pipe run configs/demo.yaml --set seed=1 --set name=seed1",
        "r1pipe report runs/seed1",
    ),
    "init": ("r1pipe init configs/demo.yaml", "r1pipe sft configs/demo.yaml"),
    "sft": ("r1pipe sft configs/demo.yaml", "r1pipe grpo configs/demo.yaml"),
    "grpo": (
        "r1pipe grpo configs/demo.yaml --set stages.grpo.max_steps=8",
        "r1pipe eval configs/demo.yaml",
    ),
    "reject": ("r1pipe reject configs/r1.yaml", "r1pipe sft configs/r1.yaml"),
    "distill": ("r1pipe distill configs/demo.yaml", "r1pipe eval configs/demo.yaml"),
    "eval": (
        "r1pipe eval configs/demo.yaml --compare sft grpo",
        "r1pipe publish runs/demo/grpo --repo user/name --dry-run",
    ),
    "check": ("r1pipe check configs/r1.yaml --devices 8x80GB", "r1pipe run configs/r1.yaml"),
    "doctor": ("r1pipe doctor configs/demo.yaml", "r1pipe run configs/demo.yaml"),
    "cost": ("r1pipe cost runs/demo", "r1pipe publish runs/demo --repo user/name --dry-run"),
    "rollouts": (
        "r1pipe rollouts runs/demo --step 3 --worst",
        "r1pipe grpo configs/demo.yaml --redo --set stages.grpo.max_steps=24",
    ),
    "verify": ("r1pipe verify runs/demo", "r1pipe publish runs/demo --repo user/name --dry-run"),
    "publish": (
        "r1pipe publish runs/demo/distill --repo user/name --dry-run",
        "r1pipe publish runs/demo/distill --repo user/name",
    ),
    "report": ("r1pipe report runs/demo --watch", "r1pipe compare runs/demo runs/seed1"),
    "compare": (
        "r1pipe compare runs/demo runs/seed1 --out compare.html",
        "r1pipe eval configs/demo.yaml --compare sft grpo",
    ),
    "serve": (
        "r1pipe serve runs/demo/grpo --port 8000",
        "r1pipe chat runs/demo/grpo",
    ),
    "chat": (
        "r1pipe chat runs/demo/grpo --temperature 0.6",
        "r1pipe publish runs/demo/grpo --repo user/name --dry-run",
    ),
    "import-gguf": (
        "r1pipe import-gguf model.Q4_1.gguf models/mine",
        "r1pipe run configs/gsm8k_smollm2.yaml --set stages.sft.from=models/mine",
    ),
    "completion": (
        "r1pipe completion bash >> ~/.bashrc",
        "r1pipe <TAB>, in a new shell",
    ),
}
"""By command: an example, and what to do after it."""


def add_examples(parser: argparse.ArgumentParser) -> None:
    """Put the examples below what argparse knows by itself."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = FIRST_STEPS
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                if name in EXAMPLES:
                    example, then = EXAMPLES[name]
                    command.formatter_class = argparse.RawDescriptionHelpFormatter
                    command.epilog = f"example:\n  {example}\n\nnext:\n  {then}"
