"""What r1pipe does on this GPU, in seven minutes: figures beside their goals.

    make gpu-check                        # one card, no network
    make gpu-check ARGS="--only 1,4"      # some of the checks
    make gpu-check ARGS="--cpu --quick"   # the same code with tiny models

Checks run in the order of their importance, in one process (common/checks.py); every row is printed
as soon as it is known. gpu-check.json and gpu-check.md in the folder --out are written after every
row.
"""

import time

BEGAN = time.time()  # the limit counts imports, too

import argparse  # noqa: E402
import importlib  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]  # also where r1pipe is not installed

from common.checks import Check, Runner  # noqa: E402

if TYPE_CHECKING:
    from common.card import Card

LIMIT_S = 420
CHECKS = {
    1: ("the machine", 40, "machine.check_machine"),
    2: ("the demo's recipe: sampler = trainer", 110, "small_models.check_demo"),
    3: ("routing replay with vLLM's routes, bf16", 80, "small_models.check_replay"),
    4: ("sleep mode", 120, "large_models.check_sleep"),
    5: ("Qwen3-0.6B's shape, random weights", 100, "large_models.check_dense"),
    6: ("the same in TRL's GRPOTrainer", 110, "large_models.check_beside_trl"),
    7: ("a mixture of 64 experts, 1.0B active", 60, "large_models.check_mixture"),
    8: ("sampling ahead: max_staleness 1", 60, "small_models.check_async"),
    9: ("two runs of one seed", 60, "small_models.check_determinism"),
    10: ("FP8 beside bf16", 90, "large_models.check_fp8"),
}
"""Title, seconds at most of LIMIT_S, function in common/; the most important first."""


def main() -> None:
    options = parse_options()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from common.card import Card

    from r1pipe.utils.errors import UserError

    try:
        card = Card(on_cpu=options.cpu, quick=options.quick)
    except UserError as error:
        print(f"gpu-check: {error}: add --cpu", file=sys.stderr)
        sys.exit(2)
    runner = Runner(
        "gpu-check",
        list_checks(card, options.limit / LIMIT_S, options.only),
        options.out,
        limit_s=options.limit,
        began=options.resume_from or BEGAN,
        resume=options.resume_from is not None,
        clean=partial(clean_up, card),
    )
    try:
        finished = runner.run()
    finally:
        card.close()
    print(f"written: {runner.folder}/gpu-check.md, gpu-check.json")
    sys.stdout.flush()
    # Not by sys.exit: what CUDA libraries do at exit may hang.
    os._exit(0 if finished else 1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cpu", action="store_true", help="on the CPU, though there is a GPU")
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--only", type=read_numbers, metavar="1,4", help="these checks")
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds; also scales each's")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-check"), help="folder")
    parser.add_argument("--resume-from", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def read_numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def list_checks(card: "Card", scale: float, only: list[int] | None) -> list[Check]:
    return [
        Check(number, title, scale * limit, partial(import_and_run, place, card))
        for number, (title, limit, place) in CHECKS.items()
        if only is None or number in only
    ]


def import_and_run(place: str, card: "Card", check: Check) -> None:
    """An import that fails is the check's own failure."""
    module, function = place.split(".")
    getattr(importlib.import_module(f"common.{module}"), function)(card, check)


def clean_up(card: "Card", check: Check) -> None:
    """A check that came to its end leaves the engine and the model to the next."""
    if check.state != "done":
        card.free()


if __name__ == "__main__":
    main()
