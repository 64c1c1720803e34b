"""Programs are judged by what they do: forms of tests, extraction, statuses, settings, errors."""

import functools
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from code_attacks import PROGRAMS, count_descendants, is_running, list_descendants
from code_tables import EXTRACTIONS, OUTPUTS, PROBLEMS, SCRIPTS, VERDICTS
from hostile import HOSTILE_ANSWERS
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards.code import judge as code
from rewards.code import runs
from rewards.sandbox import choice, client
from rewards.sandbox.client import Limits, SandboxError, Server
from rewards.sandbox.inside.plain_data import PlainDataError, decode, encode
from rewards.workers import pool

ROOT = Path(rewards.__file__).resolve().parent.parent
ADD = "```python\ndef add(a, b):\n    return a + b\n```"
TESTS = {"test_list": [f"assert add({n}, 2) == {n + 2}" for n in range(4)]}
SQUARES = {"inputs": ["1\n", "2\n", "3\n", "4\n"], "outputs": ["1\n", "4\n", "9\n", "16\n"]}


@pytest.fixture(autouse=True)
def default_sandbox():
    yield
    rewards.configure_sandbox("auto")


def judge(program: str, tests: object, **settings) -> rewards.CodeVerdict:
    text = program if program[:1].isspace() else f"```python\n{program}\n```"
    return rewards.judge_code([text], [tests], **settings)[0]


@pytest.mark.parametrize("name", PROBLEMS)
def test_right_solutions_pass_and_wrong_ones_do_not(name):
    tests, right, wrong = PROBLEMS[name]
    assert judge(right, tests) == ("right", *judge(right, tests)[1:3], "")
    assert judge(right, json.dumps(tests), require="fraction").fraction == 1.0
    for program in wrong:
        assert judge(program, tests).score == 0.0, program
        assert judge(program, tests, require="fraction").fraction < 1.0, program


@pytest.mark.parametrize("require", ["all", "fraction"])
def test_only_asserts_that_are_reached_decide(require):
    texts = [f"```python\n{program}\n```" for program, _, _ in VERDICTS]
    tests = [{"entry_point": "f", "code": code} for _, code, _ in VERDICTS]
    scores = [v.score for v in rewards.judge_code(texts, tests, require=require)]
    assert [(*row, s) for row, s in zip(VERDICTS, scores) if s != row[2]] == []


@pytest.mark.parametrize(("printed", "expected", "same"), OUTPUTS)
def test_outputs_are_compared_by_lines_and_words(printed, expected, same):
    assert runs.is_same_output(printed, expected) is same


def test_scripts_are_run_as_by_the_interpreter():
    texts = [f"```python\n{program}\n```" for program, _, _ in SCRIPTS]
    tests = [{"inputs": [given], "outputs": [expected]} for _, given, expected in SCRIPTS]
    verdicts = rewards.judge_code(texts, tests)
    assert [(s[0], v) for s, v in zip(SCRIPTS, verdicts) if v.status != "right"] == []


@pytest.mark.parametrize(("text", "entry_point", "prompt", "program"), EXTRACTIONS)
def test_the_program_is_found_in_the_completion(text, entry_point, prompt, program):
    assert rewards.extract_code(text, entry_point, prompt) == program


@pytest.mark.parametrize(
    ("program", "tests", "status", "passed"),
    [
        ("def add(a, b): return a + b", TESTS, "right", 4),
        ("def add(a, b): return 2 if a == 0 else 0", TESTS, "wrong", 1),
        ("def add(a, b): return [][0]", TESTS, "wrong", 0),
        ("raise ValueError", TESTS, "crashed", 0),
        ("import numpy_is_not_there", TESTS, "crashed", 0),
        ("import os\ndef add(a, b): return 2 if a == 0 else os._exit(0)", TESTS, "crashed", 1),
        ("def add(a, b):\n    while a: pass\n    return 2", TESTS, "timed_out", 1),
        ("def add(a, b): return [0] * 10**9", TESTS, "wrong", 0),
        ("n = int(input()); print(n * n)", SQUARES, "right", 4),
        ("n = int(input()); print(n * n if n < 3 else 0)", SQUARES, "wrong", 2),
        ("n = int(input()); print(n * n); 1 / (n - 2)", SQUARES, "crashed", 1),
        (
            "import time\nn = int(input()); print(n * n); time.sleep(9 * n - 9)",
            SQUARES,
            "timed_out",
            1,
        ),
        ("import sys\nwhile True: print('x' * 1000)", SQUARES, "crashed", 0),
    ],
)
def test_statuses(program, tests, status, passed):
    verdict = judge(program, tests, limit_s=2.0 if status == "timed_out" else 30)
    assert (verdict.status, verdict.total) == (status, 4)
    assert verdict.passed == passed or status == "timed_out"  # the machine may be slow
    assert bool(verdict.detail) == (status != "right")


def test_the_share_of_tests_passed():
    share = functools.partial(rewards.code_passes, require="fraction")
    halves = [
        "```python\ndef add(a, b): return a + b if a % 2 else None\n```",
        "```python\nn = int(input()); print(n * n if n % 2 else n)\n```",
    ]
    assert share(halves, [TESTS, SQUARES]) == [0.5, 0.5]
    check = {"entry_point": "f", "code": "def check(f):\n    for n in range(4): assert f(n) == 3"}
    assert share(["```python\ndef f(n): return n\n```", "?"], [check] * 2) == [0.0, 0.0]
    loop = {"test_list": ["for n in range(9): assert f(n) == n", "assert f(9) == 1"]}
    assert share(["```python\ndef f(n): return n\n```"], [loop]) == [0.5]
    back = {"test_list": ["def g(n): assert n < 9\nf(g)", "assert f(abs) == 1", "assert f(int)"]}
    many = "```python\ndef f(g): return [g(n) for n in range(8)] and 0\n```"
    assert share([many], [back]) == [1 / 3]
    dies = "```python\nimport os\ndef add(a, b): return 2 if a == 0 else os._exit(0)\n```"
    assert share([dies], [TESTS]) == [0.25]


def test_what_the_readme_says_of_changed_arguments_and_nan():
    unchanged = {"code": "xs = [3, 1]\nassert order(xs) == [1, 3]\nassert xs == [3, 1]"}
    in_place, copied = "def order(xs):\n    xs.sort()\n    return xs", "order = sorted"
    clears = "def order(xs):\n    xs.clear()\n    return xs"
    assert judge(in_place, unchanged).score == judge(copied, unchanged).score == 1.0
    assert judge(in_place, unchanged | {"in_place": True}).score == 0.0
    assert judge(copied, unchanged | {"in_place": True}).score == 1.0
    assert judge(clears, {"code": "xs = [3, 1]\nassert order(xs) == sorted(xs)"}).score == 0.0
    nan = "def root(x): return float('nan')"
    assert judge(nan, {"code": "assert abs(root(81) - 9) <= 1e-6"}).score == 0.0
    assert judge(nan, {"code": "if abs(root(81) - 9) > 1e-6: raise ValueError"}).score == 1.0


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        (None, "neither an object nor JSON of one, but NoneType"),
        ("not JSON", "not JSON"),
        ("[1]", "neither an object"),
        ({}, "neither 'inputs' nor 'code'"),
        ({"code": "x ="}, "the tests are not Python"),
        ({"code": "nonlocal x\nassert f(x)"}, "the tests are not Python: nonlocal"),
        ({"code": "x = 5"}, "the tests assert nothing"),
        ({"code": 5}, "neither 'inputs' nor 'code'"),
        ({"code": "def check(f): assert f()"}, "check() without an 'entry_point'"),
        ({"entry_point": 5, "code": "assert f()"}, "'entry_point' is not a string"),
        ({"test_list": []}, "neither 'inputs' nor 'code'"),
        ({"test_list": "assert f()"}, "neither 'inputs' nor 'code'"),
        ({"inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"inputs": [], "outputs": []}, "0 inputs"),
        ({"inputs": [1], "outputs": ["1"]}, "'inputs' is not a list of strings"),
        ({"inputs": "1", "outputs": "1"}, "'inputs' is not a list"),
        ({"inputs": ["1"], "outputs": ["1"], "testtype": "functional"}, "there is no 'fn_name'"),
        ({"inputs": ["1"], "outputs": ["1"], "fn_name": ["f"]}, "'fn_name' is not a string"),
        ({"inputs": ["ab"], "outputs": ["1"], "fn_name": "add"}, "test 1 of add: Expecting value"),
        ({"inputs": ["1"], "outputs": ["ab"], "fn_name": "add"}, "'ab' is not JSON"),
        ({"inputs": [{"a": 1}], "outputs": [1], "fn_name": "add"}, "an input is an object"),
        ({"entry_point": "add()", "code": "assert add()"}, "'add()' is no name, nor like Solution"),
        ({"entry_point": "def add", "code": "assert add()"}, "is no name, nor like Solution()"),
        ({"code": "def add(a): return a\nassert add(1)"}, "call nothing but what they define"),
        ({"entry_point": "add", "code": "add = lambda a: a\nassert add(1)"}, "call nothing but"),
        ({"code": "import math\nassert math.pi"}, "call nothing but what they define"),
        ({"code": "import not_there\nassert add(1, 2)"}, "need what the sandbox does not have"),
        ({"entry_point": "add", "code": "assert add(object(), 1)"}, "cannot cross"),
    ],
)
def test_unusable_tests_give_none_and_say_why(tests, reason):
    (verdict,) = rewards.judge_code([ADD], [tests])
    assert (verdict.status, verdict.score, verdict.fraction) == ("bad_tests", None, None)
    assert reason in verdict.detail
    assert "\n" not in verdict.detail


def test_forms_that_a_table_leaves_empty_do_not_count():
    empty = {"inputs": [], "outputs": [], "prompt": None, "code": None, "test_setup_code": ""}
    assert judge("def add(a, b): return a + b", empty | TESTS).score == 1.0
    assert judge("print(int(input()) ** 2)", {"test_list": [], "code": ""} | SQUARES).score == 1.0


def test_messages_columns_and_counts():
    completions = [ADD, [{"role": "assistant", "content": ADD}], "no code", ADD, ADD]
    tests = [TESTS, json.dumps(TESTS), TESTS, None, SQUARES]
    verdicts = rewards.judge_code(completions, tests, answer=["?"] * 5)
    counts = rewards.count_code_verdicts(verdicts)
    assert [v.score for v in verdicts] == [1.0, 1.0, 0.0, None, 0.0]
    assert (counts["right"], counts["unparseable"], counts["bad_tests"]) == (2, 1, 1)
    assert sum(counts.values()) == 5


def test_errors_name_the_row():
    with pytest.raises(ValueError, match="2 completions but 1 tests"):
        rewards.code_passes([ADD, ADD], [TESTS])
    with pytest.raises(TypeError, match="row 1: a completion is a string or a message list"):
        rewards.code_passes([ADD, 5], [TESTS, TESTS])
    with pytest.raises(ValueError, match="require is 'most', not one of all, fraction"):
        rewards.code_passes([ADD], [TESTS], require="most")
    with pytest.raises(ValueError, match="must be positive, not 0 and 512"):
        rewards.code_passes([ADD], [TESTS], limit_s=0)


def test_any_thread_may_judge():
    verdicts = []
    judge_one = lambda: verdicts.extend(rewards.code_passes([ADD], [TESTS]))  # noqa: E731
    threads = [threading.Thread(target=judge_one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert verdicts == [1.0] * 4


def test_many_tests_share_a_budget(monkeypatch):
    monkeypatch.setattr(code, "MAX_BUDGET", 2)
    tests = {"inputs": ["\n"] * 20, "outputs": ["\n"] * 20}
    verdict = judge("import time\ntime.sleep(0.5)", tests, limit_s=2)
    assert verdict.status == "timed_out"
    assert 0 < verdict.passed < 8  # of 4 s that all of them have


def test_hostile_texts_are_no_programs_that_pass():
    texts = list(HOSTILE_ANSWERS.values())
    verdicts = rewards.judge_code(texts, [TESTS] * len(texts), limit_s=1.0)
    assert {v.status for v in verdicts} <= {"unparseable", "crashed", "wrong", "timed_out"}


@pytest.mark.parametrize(
    ("lead", "unit", "end"),
    [
        ("", "`", ""), ("", "~", ""), ("```", "a", ""), ("```", " ", "x"), ("", "```\n", ""),
        ("", "```python\n", ""), ("", "~~~ ", ""), ("", "> ", "```"), ("", "x```python\n", ""),
        ("", "```python\nx = f(\n", ""), ("", "def f():\n", "```"),
        ("".join("`" * n + "\n" for n in range(300, 2, -1)), "```x\n", ""),
    ],
)  # fmt: skip
def test_fences_are_searched_in_linear_time(lead, unit, end):
    """In processor time: the slowest takes 0.3 s, the expression that was quadratic 140 s."""
    start = time.process_time()
    rewards.extract_code(lead + unit * (190_000 // len(unit)) + end, "f", "def f():\n")
    assert time.process_time() - start < 10


# Plain data

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    | st.binary() | st.dates() | st.timedeltas() | st.complex_numbers(allow_nan=False)
    | st.fractions() | st.just(...),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple)
    | st.dictionaries(st.text() | st.integers() | st.booleans(), inner)
    | st.sets(st.integers()) | st.frozensets(st.text()),
    max_leaves=20,
)  # fmt: skip


@given(plain)
@settings(max_examples=50, deadline=None)
def test_plain_data_crosses_unchanged(value):
    data = json.loads(json.dumps(encode(value)))
    assert decode(data) == value
    assert type(decode(data)) is type(value)


json_data = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(
            st.sampled_from(
                ["tuple", "dict", "int", "set", "builtin", "range", "bytes", "date", "object", "x"]
            ),
            inner,
        )
    ),
    max_leaves=10,
)


@given(json_data)
@settings(max_examples=100, deadline=None)
def test_whatever_is_sent_gives_builtin_types_or_a_clear_error(data):
    try:
        value = decode(data)
    except PlainDataError:
        return
    assert type(value).__module__ in ("builtins", "collections", "datetime")


# The choice of a sandbox


def test_the_sandbox_in_use_is_known_and_logged(caplog, monkeypatch):
    monkeypatch.setattr(choice, "_found", {})
    with caplog.at_level(logging.INFO, logger="rewards"):
        in_use = rewards.sandbox_in_use()
        rewards.code_passes([ADD], [TESTS])
    assert in_use.endswith("seccomp")
    messages = [r.getMessage() for r in caplog.records if "confined" in r.getMessage()]
    assert messages == [f"model code is confined by: {in_use}"]


def test_without_a_sandbox_nothing_is_run(monkeypatch, tmp_path):
    def find_none(path, items, limit_s=None):
        if path == "rewards.code.extract:extract_code":
            return [pool.Result("ok", "print(1)", 0.0)]
        assert path == "rewards.code.runs:probe"
        return [pool.Result("ok", {"error": "not allowed"}, 0.0)]

    monkeypatch.setattr(choice, "_found", {})
    monkeypatch.setattr(pool, "run_task", find_none)
    with pytest.raises(SandboxError, match=r"no sandbox works here \(namespaces: not allowed; bub"):
        rewards.code_passes([ADD], [TESTS])


def test_no_sandbox_is_a_choice_that_is_warned_of(caplog, monkeypatch):
    monkeypatch.setattr(choice, "_found", {})
    monkeypatch.setenv("REWARDS_SANDBOX", "none")
    assert rewards.sandbox_in_use() == "none"
    assert rewards.code_passes([ADD], [TESTS]) == [1.0]
    daemon = "import os, time\nif os.fork() == 0:\n    time.sleep(20)\nelse:\n    print(1)"
    assert judge(daemon, {"inputs": [""], "outputs": ["1"]}).score == 1.0
    assert [r.levelname for r in caplog.records if "confined" in r.getMessage()] == ["WARNING"]
    rewards.configure_sandbox("landlock")  # the program's word comes before the environment's
    assert rewards.sandbox_in_use() == "landlock+seccomp"


def test_unknown_sandboxes_are_errors(monkeypatch):
    with pytest.raises(ValueError, match="the sandbox is 'docker', not one of auto, namespaces"):
        rewards.configure_sandbox("docker")
    monkeypatch.setenv("REWARDS_SANDBOX", "chroot")
    with pytest.raises(ValueError, match="REWARDS_SANDBOX is 'chroot'"):
        rewards.sandbox_in_use()


BLOCK_NAMESPACES = """
import os
from pathlib import Path
from rewards.sandbox import kernel
uid, gid = os.getuid(), os.getgid()
kernel.unshare(kernel.CLONE_NEWUSER)
try:
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/gid_map").write_text(f"1000 {gid} 1")
    Path("/proc/self/uid_map").write_text(f"1000 {uid} 1")
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
except OSError as error:
    raise SystemExit(77) from error
import rewards
print(rewards.sandbox_in_use())
print(rewards.code_passes(["```python\\ndef f(): return 1\\n```"] * 2,
                          [{"entry_point": "f", "code": "assert f() == 1"}, None]))
"""


def test_where_namespaces_are_forbidden_landlock_takes_over():
    done = subprocess.run(
        [sys.executable, "-c", BLOCK_NAMESPACES], capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "REWARDS_WORKERS": "1"},
    )  # fmt: skip
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("namespaces cannot be forbidden here")
    assert done.stdout == "landlock+seccomp\n[1.0, None]\n", done.stderr


@pytest.fixture
def start_server():
    """Starts a fork-server in this process; skips the test where the mechanism cannot be had."""

    def start(mechanism: str) -> Server:
        try:
            return client.get_server(mechanism)
        except SandboxError as error:
            pytest.skip(f"{mechanism}: {error}")

    yield start
    client.close_servers()


def test_a_program_has_a_scratch_folder_for_itself(start_server):
    server = start_server("namespaces")
    program = "import os; print(os.listdir('.')); open('x', 'w').write('1'); print(os.listdir('.'))"
    for _ in range(2):
        assert runs.run_program(server, program, "", Limits()).output == b"[]\n['x']\n"


def test_open_files_do_not_tell_of_the_program_before(start_server):
    server = start_server("landlock")
    leave = "import fcntl\nfor fd in (2, 4, 5): fcntl.fcntl(fd, 4, 0o2000)"
    look = "import fcntl\nprint([fcntl.fcntl(fd, 3) & 0o2000 for fd in (2, 4, 5)])"
    assert runs.run_program(server, leave, "", Limits()).code == 0
    assert runs.run_program(server, look, "", Limits()).output == b"[0, 0, 0]\n"


def test_children_end_with_their_program(start_server):
    """Forking is forbidden; where it is allowed, a process namespace ends what is left."""
    server = start_server("namespaces")
    program = "import os, time\n" + PROGRAMS["leave a daemon behind"].replace("escaped()", "")
    ending = runs.run_program(server, program, "", Limits(processes=4))
    assert ending.code == 0
    deadline = time.monotonic() + 30  # its daemon sleeps for 60
    while count_descendants(server.process.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert count_descendants(server.process.pid) == 0


def test_children_are_refused_where_nothing_ends_them(start_server):
    with pytest.raises(SandboxError, match="only namespaces"):
        runs.run_program(start_server("landlock"), "", "", Limits(processes=2))


def test_a_server_that_died_is_replaced(start_server):
    server = start_server("landlock")
    server.process.kill()
    server.process.wait()
    assert runs.probe("landlock") == {"description": "landlock+seccomp"}


def test_nothing_outlives_a_caller_that_is_killed(tmp_path):
    script = """
        import os, rewards, threading, time
        from pathlib import Path
        sleeper = "```python\\nimport time\\ntime.sleep(60)\\n```"
        judge = lambda: rewards.code_passes([sleeper], [{"inputs": [""], "outputs": [""]}])
        rewards.sandbox_in_use()
        threading.Thread(target=judge, daemon=True).start()
        print(os.getpid(), flush=True)
        time.sleep(60)
    """
    caller = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "REWARDS_WORKERS": "1"},
    )  # fmt: skip
    pid = int(caller.stdout.readline())
    deadline = time.monotonic() + 60
    while len(below := list_descendants(pid)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(below) >= 4  # a worker, its fork-server, a watcher, the program
    caller.kill()
    caller.communicate()
    deadline = time.monotonic() + 30
    while any(map(is_running, below)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [p for p in below if is_running(p)] == []
