"""Python as a tool, in the sandbox that also judges programs."""

from rewards.code.cells import run_cells


class PythonSession:
    """The cells of one episode: each sees the variables of those before it."""

    def __init__(self) -> None:
        self._cells: list[str] = []

    def python(self, code: str) -> str:
        """Run Python code and read what it prints and the value of its last expression. Variables
        stay for the next call; there are no files and no network, and 5 seconds for each call.

        Args:
            code: The code.
        """
        result = run_cells([*self._cells, str(code)])
        if result.ended:
            self._cells.append(str(code))
        return result.output
