"""The exceptions that end a run in one line."""


class UserError(Exception):
    """What a user can put right: what is wrong, where (file, key, row), what to do. The CLI exits
    with 2."""


class LostRank(Exception):
    """Another process of the run is gone, so this one cannot go on. The CLI exits with 1."""
