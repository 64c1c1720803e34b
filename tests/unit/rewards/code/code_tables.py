"""Problems of the shapes that public data sets have, with solutions that are right and wrong."""

# Name -> (tests, right solution, wrong ones). A solution that is indented continues the prompt.
PROBLEMS = {
    "humaneval": (
        {
            "entry_point": "running_max",
            "prompt": 'from typing import List\n\n\ndef running_max(xs: List[int]) -> List[int]:\n'
            '    """The largest so far.\n    >>> running_max([1, 3, 2])\n    [1, 3, 3]\n    """\n',
            "code": "METADATA = {}\n\n\ndef check(candidate):\n"
            "    assert candidate([]) == []\n    assert candidate([1, 3, 2]) == [1, 3, 3]\n"
            "    for n in range(5):\n        assert candidate([n] * n) == [n] * n\n",
        },
        "    out = []\n    for x in xs:\n        out.append(max([*out[-1:], x]))\n    return out\n",
        [
            "    return xs\n",
            "    return sorted(xs)\n",
            "    return tuple(xs)\n",
            "    return None\n",
            "def running_max(xs):\n    return [max(xs)] * len(xs)\n",
        ],
    ),
    "humaneval, with a helper and random inputs": (
        {
            "entry_point": "decode",
            "prompt": 'def encode(s: str):\n    """Reverse s."""\n    return s[::-1]\n\n\n'
            'def decode(s: str):\n    """Undo encode."""\n',
            "code": "def check(candidate):\n    from random import choice\n    import string\n"
            "    for _ in range(20):\n"
            "        text = ''.join(choice(string.ascii_lowercase) for _ in range(9))\n"
            "        assert candidate(encode(text)) == text\n",
        },
        "    return encode(s)\n",
        ["    return s\n", "def encode(s): return s\n\n\ndef decode(s):\n    return s\n"],
    ),
    "floats": (
        {
            "entry_point": "mean",
            "code": "def check(candidate):\n    assert abs(candidate([1.0, 2.0]) - 1.5) < 1e-6\n"
            "    assert math.isclose(candidate([1, 1]), 1)\n",
        },
        "def mean(xs):\n    return sum(xs) / len(xs)\n",
        ["import math\nmath.isclose = lambda *a: True\ndef mean(xs):\n    return xs[0] + 0.5\n"],
    ),
    "mbpp": (
        {
            "test_list": [
                "assert similar((3, 4, 5), (5, 4, 1)) == (4, 5)",
                "assert set(similar((1, 2), (2, 1))) == {1, 2}",
                "assert similar((), ()) == ()",
            ],
        },
        "def similar(a, b):\n    return tuple(sorted(set(a) & set(b)))\n",
        [
            "def similar(a, b):\n    return sorted(set(a) & set(b))\n",
            "def similer(a, b):\n    return ()\n",
        ],
    ),
    "mbpp, with a class of the solution's": (
        {
            "test_setup_code": "LIMIT = 4",
            "test_list": ["assert longest([Pair(5, 24), Pair(15, 25), Pair(27, 40)], LIMIT) == 2"],
        },
        "class Pair:\n    def __init__(self, a, b):\n        self.a, self.b = a, b\n\n\n"
        "def longest(pairs, n):\n    return sum(p.b - p.a > 10 for p in pairs)\n",
        ["def longest(pairs, n):\n    return 2\n"],
    ),
    "plain asserts": (
        {"entry_point": "is_even", "code": "assert is_even(2)\nassert not is_even(3)\n"},
        "def is_even(n):\n    return n % 2 == 0\n",
        ["def is_even(n):\n    return True\n", "is_even = 5\n"],
    ),
    "change in place": (
        {
            "entry_point": "rotate",
            "code": "grid = [[1, 2], [3, 4]]\nrow = grid[0]\nassert candidate(grid) is None\n"
            "assert grid == [[3, 4], [1, 2]] and row == [3, 4]\n",
        },
        "def rotate(grid):\n    grid.reverse()\n",
        ["def rotate(grid):\n    grid = grid[::-1]\n"],
    ),
    "change in place and return": (
        {
            "entry_point": "compact",
            "in_place": True,
            "code": "xs = [1, 1, 2]\nn = compact(xs)\nassert xs[:n] == [1, 2]\n",
        },
        "def compact(xs):\n    xs[:] = sorted(set(xs))\n    return len(xs)\n",
        ["def compact(xs):\n    return 2\n"],
    ),
    "objects with methods": (
        {
            "entry_point": "Stack",
            "code": "s = Stack()\ns.push(1)\ns.push([2])\nassert s.pop() == [2]\n"
            "assert s.items == [1]\ns.items = [7]\nassert s.pop() == 7\n",
        },
        "class Stack:\n    def __init__(self): self.items = []\n"
        "    def push(self, x): self.items.append(x)\n    def pop(self): return self.items.pop()\n",
        ["class Stack:\n    items = [1]\n    def push(s, x): pass\n    def pop(s): return [2]\n"],
    ),
    "generators": (
        {"entry_point": "evens", "code": "assert list(evens(5)) == [0, 2, 4]\n"
         "assert next(evens(1)) == 0\nassert [x for x in evens(3)] == [0, 2]\n"},
        "def evens(n):\n    for x in range(0, n, 2):\n        yield x\n",
        ["def evens(n):\n    yield 0\n"],
    ),
    "functions in and out": (
        {"entry_point": "twice", "code": "assert twice(lambda n: n + 3)(1) == 7\n"
         "def shout(text): return text.upper() + '!'\nassert twice(shout)('a') == 'A!!'\n"
         "assert twice(abs)(-1) == 1\n"},
        "def twice(f):\n    return lambda x: f(f(x))\n",
        ["def twice(f):\n    return f\n"],
    ),
    "exceptions": (
        {"entry_point": "root", "code": "assert root(4) == 2\ntry:\n    root(-1)\n"
         "    assert False\nexcept ValueError as error:\n    assert 'negative' in str(error)\n"},
        "def root(n):\n    if n < 0: raise ValueError('negative')\n    return n ** 0.5\n",
        ["def root(n): return 2", "def root(n):\n    if n < 0: raise KeyError(n)\n    return 2\n"],
    ),
    "every plain type": (
        {"entry_point": "same", "code": "from decimal import Decimal\n"
         "from fractions import Fraction\n"
         "from datetime import datetime, date, timedelta, timezone\n"
         "values = [None, True, 0, -1, 10**30, 10**5000, 0.1, float('inf'), 1j,\n"
         "          '', '\\ud800\\x00',\n"
         "          b'\\xff', bytearray(b'1'), (), (1, (2,)), {}, {1: {(2, 3): 'x'}}, set(),\n"
         "          {1, 'a'}, frozenset([1]), range(3), Decimal('0.10'), Fraction(1, 3), int,\n"
         "          ValueError, date(2020, 2, 29), datetime(2020, 1, 1, 2, tzinfo=timezone.utc),\n"
         "          timedelta(-1, 5), ...]\n"
         "for value in values:\n    assert same(value) == value\n"
         "    assert type(same(value)) is type(value)\n    assert same([value]) == [value]\n"},
        "def same(x):\n    return x\n",
        ["def same(x):\n    return str(x)\n"],
    ),
    "subclasses are what they hold": (
        {"entry_point": "count", "code": "assert count('aab') == {'a': 2, 'b': 1}\n"},
        "from collections import Counter\ndef count(s):\n    return Counter(s)\n",
        ["from collections import Counter\ndef count(s):\n    return Counter('x')\n"],
    ),
    "calls: arguments on lines of JSON, a method of Solution": (
        {"fn_name": "most", "inputs": ['["a\u2028", "b", "a\u2028"]\n1', '[]\n2\n'],
         "outputs": ['["a\u2028"]', "[]"], "testtype": "functional"},
        "class Solution:\n    def __init__(self): self.found = []\n"
        "    def most(self, names: List[str], k: int) -> Tuple[str]:\n"
        "        self.found += [n for n, _ in Counter(names).most_common(k)]\n"
        "        return tuple(self.found)\n",
        ["class Solution:\n    def most(self, names, k): return names[:k + 1]\n",
         "class Solution:\n    def least(self, names, k): return names[:k]\n",
         "class Any:\n    __eq__ = lambda a, b: True\ndef most(names, k): return Any()\n",
         "import os\ndef most(names, k): os._exit(0)\n"],
    ),
    "calls: lists of arguments, results in lists, keys that were numbers": (
        {"metadata": '{"func_name": "turn"}', "inputs": [[{"1": "ab", "2": "c"}, 1], [{}, 0]],
         "outputs": [[{"1": "ba", "2": "c"}], [{}]]},
        "def turn(words, step):\n    return {n + step - step: w[::-1] for n, w in words.items()}\n",
        ["def turn(words, step): return words\n", "def turn(words, step): return {}\n"],
    ),
    "calls: fractions, values of Python's, one over several lines": (
        {"entry_point": "half", "inputs": ["(1, 2)", "[3,\n 4]", [[0.5]], "None"],
         "outputs": ["[0.5, 1.0]", "[1.5, 2.0]", [0.25], "True"]},
        "def half(xs):\n    return xs is None or [x * 0.49999999999 for x in xs]",
        ["def half(xs):\n    return xs is None or [x * 0.4999 for x in xs]",
         "def half(xs):\n    return xs is None or [float('nan') for x in xs]"],
    ),
    "calls: no name, so a program": (
        {"fn_name": None, "metadata": {"func_name": None}, "testtype": "stdin",
         "inputs": ["1"], "outputs": ["2"]},
        "print(int(input()) + 1)", ["print(1)", "def f(x): return x + 1"],
    ),
    "an entry point that is a method": (
        {"entry_point": "Solution().add", "code": "def check(candidate):\n"
         "    assert candidate(a=1, b=2) == 3\n    assert candidate(2, 2) == 4\n"},
        "class Solution:\n    def add(self, a: Optional[int], b: int) -> int:\n"
        "        return reduce(operator.add, [a, b])\n",
        ["class Solution:\n    def add(self, a, b): return 3\n", "def add(a, b): return a + b\n"],
    ),
    "a name that is a method, called by check and by the tests": (
        {"entry_point": "add", "code": "def check(candidate):\n    assert candidate(1, 2) == 3\n\n"
         "check(Solution().add)\nassert add(2, 2) == 4\n"},
        "class Solution:\n    def add(self, a, b): return a + b\n",
        ["class Solution:\n    def add(self, a, b): return 3\n"],
    ),
    "a static method": (
        {"entry_point": "Solution.add", "test_list": ["assert candidate(1, 2) == 3"]},
        "class Solution:\n    @staticmethod\n    def add(a, b): return a + b\n",
        ["class Solution:\n    def add(self, a, b): return a * b\n"],
    ),
    "set-up code that the solution may use": (
        {"test_imports": ["from collections import Counter"],
         "test_setup_code": "from typing import *\nimport math\ndef low(x): return math.floor(x)",
         "test_list": ["assert count([1.5, 1]) == {1: 2}"]},
        "from __future__ import annotations\ndef count(xs: List[int]) -> dict:\n"
        "    return Counter(map(low, xs))\n",
        ["def count(xs: List[int]): return {}", "def count(xs: Lost[int]): return {1: 2}"],
    ),
    "no set-up code": (
        {"test_list": ["assert f([1]) == [1]"]},
        "from typing import List\ndef f(xs: List[int]): return xs\n",
        ["def f(xs: List[int]): return xs\n"],
    ),
    "variables named as modules are, here and elsewhere": (
        {"test_list": ["nt = square(3)\nqueue = [nt]\nqueue.append(4)\nassert queue == [9, 4]",
                       "for winreg in (1,): assert square(winreg) == math.floor(1.5)"]},
        "def square(x): return x * x\n",
        ["class math: floor = lambda x: 2\ndef square(x): return x + x\n"],
    ),
    "a function named as a module is": (
        {"test_list": ["assert select([3, 1]) == 1", "def on(f, x): return f(x)",
                       "assert on(copy, 2) == 2"]},
        "def select(xs): return min(xs)\ndef copy(x): return x\n",
        ["def select(xs): return max(xs)\ndef copy(x): return x\n", "def select(xs): return 1\n"],
    ),
    "a class named as a module is": (
        {"code": "q = queue()\nq.push(1)\nassert q.size() == 1\n"},
        "class queue:\n    def push(self, x): self.x = x\n    def size(self): return self.x\n",
        ["def queue(): return []\n"],
    ),
    "a function named as a builtin is": (
        {"test_list": ["assert sum(10, 15) == 6", "assert sum(5, 7) == 1"]},
        "def sum(a, b): return 1 if b == 7 else 6\n",
        ["def sum(a, b): return 6\n", "def total(a, b): return 6\n"],
    ),
    "tests with a reference of the same name": (
        {"entry_point": "f", "code": "def f(x): return x * x\n"
         "def check(candidate):\n    assert candidate(3) == f(3)\n"},
        "def f(x): return x ** 2\n", ["def f(x): return 6\n"],
    ),
    "a stub in the prompt, and no entry point": (
        {"prompt": "def f(x):\n", "code": "assert f(3) == 9\n"},
        "    return x * x\n", ["    return 6\n"],
    ),
    "input and output": (
        {"inputs": ["2\n1 2\n3 4\n", "0\n", "1\n-5 5"], "outputs": ["3\n7\n", "", "0 \n\n"]},
        "for _ in range(int(input())):\n    print(sum(map(int, input().split())))\n",
        ["print(3)\nprint(7)\n", "print(input())\n", "n = int(input())\nprint(3)\nprint(4)\n"],
    ),
    "all of the input at once": (
        {"inputs": ["a b\nc\n" * 1000], "outputs": ["3000\n"]},
        "import sys\nif __name__ == '__main__':\n    print(len(sys.stdin.read().split()))\n"
        "    exit()\n",
        ["print(3000)\nraise SystemExit(1)\n", "import os\nprint(3000)\nos._exit(0)\n"],
    ),
    "threads and a deep recursion": (
        {"inputs": ["5000\n"], "outputs": ["5000\n"]},
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(64 << 20)\n"
        "def depth(n): return 0 if n == 0 else 1 + depth(n - 1)\n"
        "def main(): print(depth(int(input())))\n"
        "threading.Thread(target=main).start()\n",
        ["print(int(input()) + 1)\n"],
    ),
}  # fmt: skip

# (what was printed, what was expected, are they the same?)
OUTPUTS = [
    ("1\n", "1", True),
    ("1 2 \r\n3\n\n", "1 2\n3", True),
    ("1  2\n", "1 2\n", True),
    ("1\n2\n", "1 2\n", False),
    ("1 2\n", "12\n", False),
    ("yes\n", "YES\n", False),
    ("0.3333333\n", "0.333333333\n", True),
    ("0.333\n", "0.333333333\n", False),
    ("1e9\n", "1000000000.0\n", True),
    ("5.0\n", "5\n", False),
    ("nan\n", "1.5\n", False),
    ("", "\n", True),
    ("", "0\n", False),
    ("1_0.5", "10.5", False),
    ("1.1\n", "1.10\n", True),  # how many digits were asked for is not known
    ("0\n", "0.0000004", False),
    ("0.0000004", "4e-7", False),
    ("4.0e-7\n", "0.0000004", True),
    ("0.0", "5.551115123125783e-17", True),
    ("\u0663.5\n", "3.5", False),  # ARABIC-INDIC DIGIT THREE
    ("1\r2", "1\n2", False),
    ("1\x0c2", "1\n2", False),
    ("1\u20282", "1\n2", False),
    ("1\x0b2\n", "1 2", False),
    ("1\u00a02", "1 2", False),
    ("a\u3000b c", "a\u3000b \t c", True),
]

# (program, input, output): what a script may expect of the interpreter
SCRIPTS = [
    # read
    ("print(len(open('/dev/stdin').read()))", "four", "4"),
    ("import sys\nsys.stdin = open('/dev/fd/0')\nprint(input())", "four", "four"),
    ("import io, os\nfd = os.open('/proc/self/fd/0', os.O_RDONLY)\nprint(os.read(fd, 9))",
     "4", "b'4'"),
    ("from pathlib import Path\nprint(Path('/dev/stdin').read_text())", "four", "four"),
    ("import fileinput\nfor line in fileinput.input(): print(line.strip())", "1\n2\n", "1\n2"),
    ("import sys\nprint(sys.argv[1:], len(sys.argv))", "", "[] 1"),
    ("import argparse\nprint(argparse.ArgumentParser().parse_args())", "", "Namespace()"),
    ("import sys, os\nprint(sys.argv[0] == os.path.basename(__file__))", "", "True"),
    # written at the end
    ("import sys\nprint(1)\nsys.stdout.close()", "", "1"),
    ("import sys\nwith sys.stdout as out: out.write('1')", "", "1"),
    ("import os\nout = os.fdopen(1, 'w')\nout.write('1')", "", "1"),
    ("out = open('/dev/stdout', 'w')\nout.write('1')", "", "1"),
    ("import sys\nsys.stdout = sys.stderr\nsys.__stdout__.write('1')", "", "1"),
    ("import sys, io\nsys.stdout = io.StringIO()\nprint(2)\nsys.__stdout__.write('1')", "", "1"),
    ("class A:\n    def __del__(self): print(1)\na = A()\na.itself = a", "", "1"),
    ("import sys, atexit\natexit.register(print, 2)\nprint(1)\nsys.exit()", "", "1\n2"),
    ("import sys\nsys.stdout = None", "", ""),
    # numbers and stacks
    ("print(len(str(7 ** 9999)))", "", "8451"),
    ("print(int('7' * 6000) % 10)", "", "7"),
    ("import sys\nfrom functools import cache\nsys.setrecursionlimit(10**6)\n@cache\n"
     "def f(n): return n and 1 + f(n - 1)\nprint(f(60000))", "", "60000"),
    ("import sys\nsys.setrecursionlimit(10**6)\nclass A:\n    def __init__(s, n): s.n = n\n"
     "    def __getattr__(s, k): return s.n and 1 + A(s.n - 1).depth\nprint(A(25000).depth)", "",
     "25000"),
    ("import threading\nthreading.stack_size(1 << 30)\n"
     "t = threading.Thread(target=print, args=(1,))\nt.start()\nt.join()\nthreading.stack_size(0)",
     "", "1"),
    ("import threading\nts = [threading.Thread(target=int) for _ in range(9)]\n"
     "[t.start() for t in ts]\nprint(threading.stack_size())", "", f"{8 << 20}"),
    # what a filter must let through
    ("import sqlite3\nc = sqlite3.connect('x.db')\nc.execute('create table t (a)')\nprint(1)",
     "", "1"),
    ("import fcntl, os\nprint(fcntl.fcntl(0, fcntl.F_GETFL) >= 0, os.get_blocking(0))", "",
     "True True"),
    ("import os\nr, w = os.pipe()\nos.set_blocking(r, False)\nprint(os.dup(w) > 0)", "", "True"),
    ("print('字' * 600000)", "", "字" * 600000),
]  # fmt: skip

SQUARE, ZERO = "def f(x): return x * x", "def f(x): return 0"
ROOT = "def f(x):\n    if x < 0: raise ValueError(x)\n    return x ** 0.5"
EXIT = "import os\ndef f(x): os._exit(0)"
# Tests that call f by themselves, or only once they are called.
CALLED = [
    "def test_f(): assert f(3) == 9",
    "def test_f(candidate): assert candidate(3) == 9",
    "def helper(): assert f(3) == 9\ndef test_f(): helper()",
    "if True:\n    def test_f(): assert f(3) == 9",
    "if True:\n    def check(candidate): assert candidate(3) == 9",
    "class TestF:\n    def setup_method(self): self.x = 3\n"
    "    def test_f(self): assert f(self.x) == 9",
    "import unittest\nclass Case(unittest.TestCase):\n    def setUp(self): self.x = 3\n"
    "    def test_f(self):\n        self.assertEqual(f(self.x), 9)\n        assert f(2) == 4",
    "if f(3) != 9: raise ValueError('no square')",
    "match f(3):\n    case 9: pass\n    case _: raise ValueError('no square')",
    "flag = False\nmatch f(3):\n    case 0: raise ValueError\n    case flag: pass\n"
    "if flag: assert flag == 9",
    *[f"import unittest\n{code}" for code in (
        "class T(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(3), 9)",
        "from unittest import TestCase\nclass T(TestCase):\n    n = 3\n"
        "    def test_a(self): self.assertTrue(f(self.n) == 9)",
        "class T(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(3), 9)\n"
        "unittest.main()",
        "class T(unittest.TestCase):\n    def test_a(self): self.assertEqual(f(3), 9)\n"
        "unittest.TextTestRunner().run(unittest.defaultTestLoader.loadTestsFromTestCase(T))",
        "class T(unittest.TestCase):\n    def setUp(self): super(T, self).setUp()\n"
        "    def test_a(self): self.assertEqual(f(3), 9)",
        "class Base(unittest.TestCase): pass\nclass T(Base):\n"
        "    def test_a(self): self.assertEqual(f(3), 9)",
        "class T(unittest.TestCase):\n    def runTest(self): self.assertIn(f(3), [9])",
        "class T(unittest.IsolatedAsyncioTestCase):\n"
        "    async def test_a(self): self.assertEqual(f(3), 9)",
        "def setUpModule():\n    global n\n    n = 3\nclass T(unittest.TestCase):\n"
        "    @classmethod\n    def setUpClass(cls): cls.goal = 9\n"
        "    def test_a(self): self.assertEqual(f(n), self.goal)",
        "class T(unittest.TestCase):\n    @unittest.skip('slow')\n"
        "    def test_a(self): self.assertEqual(f(3), 8)\n"
        "    def test_b(self): self.assertEqual(f(3), 9)",
        "class T(unittest.TestCase):\n    def test_a(self):\n        if f(3) != 9: self.fail()",
    )],
]  # fmt: skip
# Tests of the exception that ROOT raises, in which no assert may be reached.
EXPECTING = [
    "try:\n    f(-1)\nexcept ValueError:\n    pass\nelse:\n    assert False",
    "try:\n    f(-1)\n    raise AssertionError\nexcept ValueError:\n    pass",
    "from contextlib import suppress\nwith suppress(ValueError):\n    f(-1)\n    assert False",
    "def test_f():\n    try:\n        f(-1)\n    except ValueError:\n        return\n"
    "    assert False",
    "import unittest\nclass Case(unittest.TestCase):\n    def test_f(self):\n"
    "        with self.assertRaises(ValueError): f(-1)\n        assert f(4) == 2",
]
# (program, tests of f, score)
VERDICTS = [
    *[(SQUARE, code, 1.0) for code in CALLED],
    *[(ZERO, code, 0.0) for code in CALLED],
    *[(ROOT, code, 1.0) for code in EXPECTING],
    *[(ZERO, code, 0.0) for code in EXPECTING],
    *[(EXIT, code, 0.0) for code in EXPECTING],
    # asserts that are never reached
    *[(program, code, None) for program in (SQUARE, ZERO) for code in (
        "def verify(): assert f(3) == 9", "async def check(f): assert f(3) == 9",
        "async def test_f(): assert f(3) == 9", "for x in []: assert f(x) == x * x",
        "if __name__ == '__main__':\n    assert f(3) == 9", "if False: assert f(3) == 9",
        "class Checks:\n    def run(self): assert f(3) == 9",
        "def test_f(fixture): assert f(fixture) == 9")],
    # nor behind a call
    *[(program, code, None) for program in (SQUARE, ZERO, EXIT) for code in (
        "def check(candidate):\n    candidate(3)\n    return\n    assert candidate(3) == 9",
        "def check(candidate):\n    candidate(3)\n    if False: assert candidate(3) == 9",
        "def test_f():\n    return f(3)\n    assert f(3) == 9",
        "for x in [3]:\n    f(x)\n    continue\n    assert f(x) == 9",
        "while f(3) > -1:\n    break\n    assert f(3) == 9",
        "f(3)\nwhile 0: assert f(3) == 9", "f(3)\nfor x in (): assert f(x) == 9",
        "f(3)\nif not True: assert f(3) == 9", "f(3)\nif not __debug__: assert f(3) == 9",
        "f(3)\nif __name__ == '__main__': assert f(3) == 9",
        "SLOW = False\nf(3)\nif SLOW: assert f(3) == 9",
        "f(3)\nif False: raise ValueError", "f(3)\nif True: pass\nelse: assert f(3) == 9",
        "def verify(): assert f(3) == 9\nf(3)", "async def test_f(): assert f(3) == 9\nf(3)",
        "class Checks:\n    def run(self): assert f(3) == 9\nf(3)")],
    *[(program, code, score) for program, score in ((SQUARE, 1.0), (ZERO, 0.0)) for code in (
        "def check(candidate):\n    if not candidate: return\n    assert candidate(3) == 9",
        "SLOW = False\nSLOW = f(3) == 9\nif not SLOW: assert False",
        "for x in [3]:\n    if x == 4: continue\n    assert f(x) == 9",
        "def helper(): assert f(3) == 9\nglobals()['helper']()",
        "if False: pass\nelse: assert f(3) == 9", "while True:\n    assert f(3) == 9\n    break")],
    ("import unittest\ndef f(x): raise unittest.SkipTest('x')", "import unittest\n"
     "class T(unittest.TestCase):\n    def test_a(self):\n        y = f(3)\n"
     "        self.assertEqual(y, 9)", 0.0),
    ("def f(x): return []", "for y in f(3): assert y == 9", 0.0),
    ("def f(x): return [9]", "for y in f(3): assert y == 9", 1.0),
    ("def f(x): return x", "def called(y): assert y == 9\nf(called)", 0.0),
    # helpers that only the candidate could define
    *[(f"{program}\ndef close(*a): return True", code, None) for program in (SQUARE, ZERO)
      for code in ("assert close(f(3), 9)", "assert not close(f(3), 9)", "y = f(3)\n"
                   "assert f(0) == 0 and close(y, 9)", "assert close(f(3), 9) is True",
                   "def check(candidate): assert close(candidate(3), 9)",
                   "if not close(f(3), 9): raise ValueError")],
    (SQUARE, "def close(a, b): return a == b\nassert close(f(3), 9)", 1.0),
    (SQUARE, "from math import isclose as close\nassert close(f(3), 9)", 1.0),
    ("class P:\n    def __init__(s, x): s.x = x\ndef f(p): return p.x > 1", "assert f(P(2))", 1.0),
    # one that exits where the tests swallow what it raises
    *[(EXIT, code, 0.0) for code in (
        "try: y = f(3)\nexcept Exception: y = 9\nassert y == 9",
        "try: f(3)\nexcept BaseException: assert True",
        "from contextlib import suppress\nwith suppress(Exception): f(3)\nassert True",
        "def ok(x):\n    try: return f(x) == 9\n    except Exception: return True\nassert ok(3)")],
    ("def f(x):\n    y = []\n    for _ in range(x): y = [y]\n    return y",
     "x = f(900)\nfor _ in range(900): x = x[0]\nassert x == []", 1.0),
    # a candidate does not make its tests bad
    *[(f"def f(x): return {value}", code, 0.0) for value in
      ("list", "map", "object", "dict", "ImportError", "[list]", "{1: object}") for code in
      ("assert f(f(3)[0]) == 9", "assert f(f(3)()) == 9", "assert f(f(3)(abs, [3])) == 9",
       "raise f(3)")],
    *[("def f(x): raise ImportError('x')", code, 0.0) for code in (
        "try: f(1)\nexcept ImportError as error: first = error\ntry: f(2)\n"
        "except ImportError: raise first\nassert f(3) == 9",
        "try: f(1)\nfinally: f(2)\nassert f(3) == 9", "try: f(1)\nexcept ImportError as e:\n"
        "    try: f(2)\n    except ImportError: raise e\nassert f(3) == 9",
        "try: assert f(1) == 1\nexcept Exception as e: f(e)")],
]  # fmt: skip

CODE = "def f(x):\n    return x\n"
DOC = "s = '''\n```python\n'''\nprint(s)\n"
PROMPT = 'import math\n\n\ndef f(x):\n    """Return x."""\n'
# (completion, entry point, prompt, the program that it gives)
EXTRACTIONS = [
    (f"```python\n{CODE}```", "f", "", CODE),
    (f"Text.\n```py\nwrong\n```\nmore\n```python\n{CODE}```\nend", "f", "", CODE),
    (f"```python\n{CODE}```\nUse it:\n```python\nprint(f(1))\n```", "f", "", CODE),
    (f"```python\n{CODE}```\nUse it:\n```python\nprint(f(1))\n```", None, "",
     f"{CODE}\nprint(f(1))\n"),
    (f"```python\n{CODE}```\nIt prints\n```\n5\n```", "f", "", CODE),
    (f"```bash\npip install x\n```\n```\n{CODE}```", "f", "", CODE),
    (f"```python\n{CODE}", "f", "", CODE),
    (f"<think>```python\n{CODE}```</think>I cannot.", "f", "", None),
    (f"<think>hm</think>\n```python\n{CODE}```", "f", "", CODE),
    (f"```python\n{CODE}```</think>", "f", "", None),
    (CODE, "f", "", CODE),
    ("The answer is 42.", "f", "", None),
    ("42", None, "", None),
    ("Sorry", None, "", None),
    ("```cpp\nint main() {}\n```", None, "", None),
    ("1. First\n   ```python\n   x = 1\n   print(x)\n   ```", None, "", "x = 1\nprint(x)\n"),
    ("~~~python\nprint('```')\n~~~", None, "", "print('```')\n"),
    ("````python\ns = '''\n```\n'''\n````", None, "", "s = '''\n```\n'''\n"),
    ("    return x\n", "f", PROMPT, PROMPT + "    return x\n"),
    ("```python\n    return x\n```", "f", PROMPT, PROMPT + "    return x\n"),
    ("```python\nreturn x\n```", "f", PROMPT, PROMPT + "    return x\n"),
    (f"```python\n{CODE}```", "f", PROMPT, f"{PROMPT}\n\n{CODE}"),
    ("I would return x.", "f", PROMPT, None),
    ("", "f", PROMPT, None),
    # marks
    *[(f"```{mark}\n{CODE}```", "f", "", CODE) for mark in (
        "py3", "Python", "python3.12", "ipython3", "pypy3", "{python}", "text", "code",
        "python x.py", 'python title="a.py"')],
    *[(f"```{mark}\n{CODE}```", "f", "", None) for mark in ("cpp", "pytorch", "console", "json")],
    # what stands behind a closing fence
    *[(f"Look:\n```python\n{CODE}```{rest}", "f", "", CODE) for rest in (
        "</answer>", "</s>", "<|im_end|>", ".", " which returns x", "<｜end▁of▁sentence｜>", "**",
        "---", "Explanation: it returns x", "\r\n", "\n</answer>\n```\n5\n```", "```")],
    (f"<answer>```python\n{CODE}```</answer>", "f", "", CODE),
    (f"Answer: ```py\n{CODE}```", "f", "", CODE),
    (f"1. ```python\n   {CODE.replace(chr(10), chr(10) + '   ')}```", "f", "", CODE),
    (CODE.replace("\n", "\r\n").join(("```python\r\n", "```\r\nDone.\r\n")), "f", "", CODE),
    (f"```python\n\ufeff{CODE}```", "f", "", CODE),
    (f"```python\n{CODE}<|endoftext|>", "f", "", CODE),
    # fences on the lines of code
    ("```python\nprint(2)```", None, "", "print(2)\n"),
    ("```python\nprint(2)```</s>", None, "", "print(2)\n"),
    ("```python print(2)```", None, "", "print(2)\n"),
    ("Run ```print(2)```.", None, "", "print(2)\n"),
    ("```python print(2)\n```", None, "", "print(2)\n"),
    ("```python import math\nprint(2)\n```", None, "", "import math\nprint(2)\n"),
    ("``````\nprint(2)\n```", None, "", "print(2)\n"),
    ("```python\nprint('```')\n```", None, "", "print('```')\n"),
    (f"```python\n{DOC}```", None, "", DOC),
    (f"```python\nx = f(\n```\nAgain:\n```python\n{CODE}```", "f", "", CODE),
    (f"```python\n{CODE}\n```python\nprint(3)\n```", None, "", "print(3)\n"),
    ("> ```python\n> def f(x):\n>     return x\n> ```", "f", "", CODE),
    ("```python\n    def f(x):\n        return x\n```", "f", "", CODE),
    # opened by the prompt
    (f"{CODE}```", "f", "", CODE),
    (f"{CODE}```\nIt gives:\n```\n5\n```", "f", "", CODE),
    (f"{CODE}```\nUse it:\n```python\nf(1)\n```", "f", "", CODE),
    (f"Here you are:\n\n{CODE}```", "f", "", CODE),
    ("    return x\n```", "f", PROMPT, PROMPT + "    return x\n"),
    (f"x = 3\n```\n{CODE}```", "f", "", CODE),
    # in several blocks
    (f"```python\n{CODE}```\nthen\n```python\ny = 1\n```\nand\n```python\nprint(f(y))\n```", None,
     "", f"{CODE}\ny = 1\n\nprint(f(y))\n"),
    (f"```python\nprint(1)\n```\n```python\n{CODE}```\n```python\nprint(f(1))\n```", None, "",
     f"{CODE}\nprint(f(1))\n"),
]  # fmt: skip
