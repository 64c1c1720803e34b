"""A chat-completions server with answers of the test's choice, in a thread of its process."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = tuple[int, dict]


class TeacherServer(ThreadingHTTPServer):
    """Responds with `answer(number of the request, request)`: (status, body)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict] = []
        self.keys: set[str | None] = set()
        self.answer: Callable[[int, dict], Answer] = lambda number, request: answer_right(request)
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = 0


class Handler(BaseHTTPRequestHandler):
    server: TeacherServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            number = len(server.requests)
            server.requests.append({"path": self.path, **request})
            server.keys.add(self.headers["Authorization"])
        status, body = server.answer(number, request)
        with server.lock:
            server.under_way -= 1
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After-Ms", "1")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


def make_answer(content: str, finish_reason: str = "stop", **more: str) -> Answer:
    message = {"role": "assistant", "content": content, **more}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return 200, {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [choice],
    }


def answer_right(request: dict) -> Answer:
    """The answer to "3?" is 3; its thoughts name the seed, so samples differ."""
    number = request["messages"][-1]["content"].rstrip("?")
    return make_answer(f"\\boxed{{{number}}}", reasoning_content=f"seed {request['seed']}")


@contextmanager
def teacher_server() -> Iterator[TeacherServer]:
    server = TeacherServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
