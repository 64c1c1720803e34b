"""Score an answer with reasoning-gym, in a worker process; the sandbox does the running."""

import json
import os
from typing import Any

from rewards.sandbox.client import Limits, SandboxError, get_server

MODULE = "reasoning_gym"


def score(
    mechanism: str, folders: list[str], tests: str, answer: str, limits: list[Any]
) -> float | None:
    """The scorer's verdict; 0.0 if it raised or was stopped."""
    server = get_server(mechanism, folders, MODULE)
    payload = {**json.loads(tests), "answer": answer}
    reader, writer = os.pipe()
    try:
        run = server.start("scorer", payload, Limits(*limits), stdout=writer)
    except SandboxError:
        os.close(reader)
        raise
    finally:
        os.close(writer)
    ending = run.wait(reader)
    if ending.code != 0:
        return 0.0
    try:
        return float(json.loads(ending.output.splitlines()[-1])["score"])
    except (ValueError, LookupError, TypeError):
        return 0.0
