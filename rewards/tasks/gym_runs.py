"""Score an answer with reasoning-gym, in a worker process; the sandbox does the running."""

import json
import os

from rewards.sandbox.client import Limits, SandboxError, Server

MODULE = "reasoning_gym"
_servers: dict[str, Server] = {}


def get_server(mechanism: str, folders: list[str]) -> Server:
    """Return this process's fork-server with reasoning-gym loaded, started if need be."""
    server = _servers.get(mechanism)
    if server is not None and server.process.poll() is not None:
        _servers.pop(mechanism).close()
        server = None
    if server is None:
        server = _servers[mechanism] = Server(mechanism, folders, MODULE)
    return server


def score(
    mechanism: str, folders: list[str], tests: str, answer: str, limits: list
) -> float | None:
    """The scorer's verdict; 0.0 if it raised or was stopped."""
    server = get_server(mechanism, folders)
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
