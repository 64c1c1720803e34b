"""GSM8K: 7,473 + 1,319 grade-school word problems (Cobbe et al. 2021, arXiv:2110.14168).

Hub id `openai/gsm8k`, MIT licence; or `path`: a folder with train.jsonl and test.jsonl, or one
JSONL file. Rows have `question` and either the hub's `answer` ("... #### 72") or separate
`solution` and `answer`. Calculator annotations (<<48/2=24>>) are removed from the solution.

Row schema: data/README.md. `solution` puts the worked steps inside <think> and boxes the answer.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

INSTRUCTION = "Reason step by step within <think> and </think>, then give the answer in \\boxed{}."


def load(
    split: str = "train", *, path: str = "openai/gsm8k", size: int | None = None, skip: int = 0
) -> Iterator[dict]:
    """Yield `size` problems (default: all) of a split after the first `skip`."""
    for number, row in enumerate(read_rows(path, split)):
        if number < skip:
            continue
        if size is not None and number >= skip + size:
            return
        worked = row.get("solution") or row["answer"]
        steps, _, marked = worked.partition("####")
        answer = (marked if "solution" not in row else row.get("answer") or "").strip()
        steps = re.sub(r"<<[^>]*>>", "", steps).strip()
        yield {
            "id": f"gsm8k-{split}-{number}",
            "kind": "math",
            "prompt": [
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": row["question"]},
            ],
            "answer": answer.replace(",", ""),
            "solution": f"<think>\n{steps}\n</think>\n\\boxed{{{answer}}}",
            "source": "openai/gsm8k",
        }


def read_rows(path: str, split: str) -> Iterator[dict]:
    local = Path(path).expanduser()
    if local.is_dir():
        local = local / f"{split}.jsonl"
    if local.suffix in (".jsonl", ".json") or local.is_file():
        with local.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{local}: row {number}: not JSON: {error}") from error
        return
    from datasets import load_dataset

    yield from load_dataset(path, "main", split=split)
