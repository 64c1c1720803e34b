"""A user's own reward function, found by its dotted name."""


def always_one(completions: list, **columns: object) -> list[float]:
    return [1.0 for _ in completions]


def never_judges(completions: list, **columns: object) -> list[None]:
    return [None for _ in completions]
