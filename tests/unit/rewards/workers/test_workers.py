"""The worker pool: limits hold, the dead are replaced, and any caller may use it."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

import rewards
from rewards.workers.pool import Pool, WorkerError, configure_workers, run_task

ROOT = Path(rewards.__file__).resolve().parent.parent


@pytest.fixture
def pool():
    pool = Pool(num_workers=2, memory_mb=512)
    yield pool
    pool.close()


def test_results_come_in_the_order_of_the_items(pool):
    results = pool.run("operator:add", [(n, 1) for n in range(50)], limit_s=30)
    assert [r.value for r in results] == list(range(1, 51))
    assert {r.status for r in results} == {"ok"}


def test_a_late_item_is_killed_and_the_others_are_judged(pool):
    pool.run("operator:add", [(1, 1)] * 4, limit_s=30)
    results = pool.run("time:sleep", [(0,), (60,), (0,), (60,), (0,)], limit_s=2)
    assert [r.status for r in results] == ["ok", "timed_out", "ok", "timed_out", "ok"]
    # Left alone they take 60 s.
    assert all(2 <= r.seconds < 30 for r in results if r.status == "timed_out")


def test_python_that_holds_its_lock_is_killed_too(pool):
    # One C call that nothing interrupts; left alone it takes hours.
    (result,) = pool.run("operator:pow", [(7, 10**9)], limit_s=1.0)
    assert result.status in ("timed_out", "crashed")


def test_memory_is_limited_and_the_pool_goes_on(pool):
    results = pool.run("operator:mul", [("a", 10**10), (2, 3)], limit_s=30)
    assert [r.status for r in results] == ["crashed", "ok"]


def test_a_worker_that_ends_itself_is_replaced(pool):
    results = pool.run("os:_exit", [(0,), (1,)], limit_s=30)
    assert [r.status for r in results] == ["crashed", "crashed"]
    assert pool.run("operator:add", [(1, 1)], limit_s=30)[0].value == 2


def test_what_a_task_raises_and_prints_breaks_nothing(pool):
    (failed,) = pool.run("operator:truediv", [(1, 0)], limit_s=30)
    assert (failed.status, failed.value) == ("failed", "ZeroDivisionError: division by zero")
    (printed,) = pool.run("builtins:print", [("\x00\x00\x00\x05noise",)], limit_s=30)
    assert (printed.status, printed.value) == ("ok", None)


def test_many_threads_share_one_pool(pool):
    answers: dict[int, list] = {}

    def work(number: int) -> None:
        items = [(number, n) for n in range(10)]
        answers[number] = [r.value for r in pool.run("operator:add", items, limit_s=30)]

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert answers == {n: [n + k for k in range(10)] for n in range(8)}


def test_idle_workers_that_died_are_replaced(pool):
    pool.run("operator:add", [(1, 1)] * 2, limit_s=30)
    for worker in pool._idle:
        if worker:
            worker.process.kill()
            worker.process.wait()
    assert pool.run("operator:add", [(2, 3)], limit_s=30)[0].value == 5


def test_workers_import_what_is_preloaded_before_the_first_item():
    pool = Pool(num_workers=1, memory_mb=512, preload=("colorsys",))
    try:
        (result,) = pool.run("builtins:eval", [("'colorsys' in __import__('sys').modules",)], 30)
    finally:
        pool.close()
    assert result.value is True


def test_a_closed_pool_says_so(pool):
    pool.close()
    with pytest.raises(WorkerError, match="shut down"):
        pool.run("operator:add", [(1, 1)], limit_s=30)


def test_settings_are_checked():
    with pytest.raises(ValueError, match="limit_s must be positive"):
        configure_workers(limit_s=0)
    with pytest.raises(ValueError, match="num_workers must be at least 1"):
        Pool(num_workers=0)


def test_judging_works_off_the_main_thread():
    verdicts = []
    judge = lambda: verdicts.append(rewards.grade_answer("x+1", "1+x"))  # noqa: E731
    thread = threading.Thread(target=judge)
    thread.start()
    thread.join(timeout=120)
    assert verdicts == [True]


def test_shutting_down_is_not_the_end():
    rewards.shut_down_workers()
    assert run_task("operator:add", [(1, 2)])[0].value == 3


def run_script(code: str, tmp_path: Path) -> subprocess.CompletedProcess:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(code))
    return subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_a_main_without_a_guard_is_run_once(tmp_path):
    done = run_script(
        """
        print("main")
        import rewards
        print(rewards.grade_answer("x+1", "1+x"))
        """,
        tmp_path,
    )
    assert (done.stdout, done.returncode) == ("main\nTrue\n", 0)


def test_a_fork_gets_a_pool_of_its_own(tmp_path):
    done = run_script(
        """
        import os, rewards
        assert rewards.grade_answer("x+1", "1+x")
        child = os.fork()
        assert rewards.grade_answer("x+2", "2+x")
        if child == 0:
            rewards.shut_down_workers()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert rewards.grade_answer("x+3", "3+x")
        print("done")
        """,
        tmp_path,
    )
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


def test_files_beside_the_script_do_not_shadow_modules(tmp_path):
    (tmp_path / "mpmath.py").write_text("raise SystemExit('shadowed')")
    done = run_script('import rewards; print(rewards.grade_answer("x+1", "1+x"))', tmp_path)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
@pytest.mark.parametrize("ending", ["pass", "os.kill(os.getpid(), 9)"])
def test_no_worker_outlives_its_parent(tmp_path, ending):
    done = run_script(
        f"""
        import os, rewards
        from rewards.workers import pool as workers
        assert rewards.grade_answer("x+1", "1+x")
        print(*[w.process.pid for w in workers._pool._idle if w], flush=True)
        {ending}
        """,
        tmp_path,
    )
    (pid,) = done.stdout.split()
    deadline = time.monotonic() + 60
    while Path("/proc", pid).exists() and time.monotonic() < deadline:
        state = Path("/proc", pid, "stat").read_text().split()[2]
        if state == "Z":  # dead, and only waiting for an init that reaps
            return
        time.sleep(0.05)
    assert not Path("/proc", pid).exists()
