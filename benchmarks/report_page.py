"""Time to write the report of a large run, and to open it in chromium.

    .venv/bin/python benchmarks/report_page.py

100,000 different rollouts of about 120 words. Opening is timed five times, from loading the page
until it shows the first rollout.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from r1pipe.config.recipe import KeptRollouts
from r1pipe.report.html import write_report
from r1pipe.rollout.store import RolloutFiles

sys.path.append(str(Path(__file__).parents[1] / "tests"))

from browser import CHROMIUM, Browser
from report_run import add_tokens, describe_sample, write_run

PROMPTS, SAMPLES, WORDS = 125, 8, 120
OPENED = "document.querySelector('#detail .rollout') && document.body.dataset.ready"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="of 1,000 rollouts")
    steps = parser.parse_args().steps
    if CHROMIUM is None:
        sys.exit("no chromium here (Debian's package of that name)")
    # chromium may still be writing into its profile.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run = write_large_run(Path(folder) / "large", steps)
        started = time.perf_counter()
        page = write_report(run)
        written = time.perf_counter() - started
        with Browser(Path(folder) / "profile") as browser:
            seconds = [open_page(browser, page) for _ in range(5)]
            if browser.errors:
                sys.exit(f"the page has errors: {browser.errors}")
        print(
            f"{steps * PROMPTS * SAMPLES:,} rollouts: written in {written:.1f} s, "
            f"{page.stat().st_size / 2**20:.0f} MiB, open in {statistics.median(seconds):.2f} s "
            f"(median of 5; {min(seconds):.2f} to {max(seconds):.2f})"
        )


def write_large_run(run: Path, steps: int) -> Path:
    write_run(run, num_steps=1)
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(3000)]
    files = RolloutFiles(run / "grpo", KeptRollouts())
    for step in range(2, steps + 2):
        rows = []
        for problem in range(PROMPTS):
            for sample in range(SAMPLES):
                row = describe_sample(1000 * step + problem, sample, right=rng.random() < 0.5)
                row["completion"] = " ".join(rng.choices(words, k=WORDS)) + row["completion"]
                rows.append(add_tokens(row))
        files.write(step, rows, {})
    return run


def open_page(browser: Browser, page: Path) -> float:
    started = time.perf_counter()
    browser.open(page.as_uri(), f"document.body && {OPENED}")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
