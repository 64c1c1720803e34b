"""The one exception for what a user can put right."""


class UserError(Exception):
    """One line: what is wrong, where (file, key, row), what to do. The CLI exits with 2."""
