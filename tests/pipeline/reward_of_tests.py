"""A user's own reward function, found by its dotted name."""


def always_one(completions: list, **columns: object) -> list[float]:
    return [1.0 for _ in completions]


def never_judges(completions: list, **columns: object) -> list[None]:
    return [None for _ in completions]


def undecided_for_odd_answers(
    completion_ids: list[list[int]], answer: list[str], **columns: object
) -> list[float]:
    """1 for problems with an even answer, so that their groups are silent; else by chance."""
    return [
        1.0 if int(gold) % 2 == 0 else float(sum(ids) % 2)
        for ids, gold in zip(completion_ids, answer)
    ]


def own_tokens(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """A value that no other completion has: says whose score a score is."""
    return [float(hash(tuple(ids)) % 10**6) for ids in completion_ids]


def raises(completions: list, **columns: object) -> list[float]:
    raise ValueError("broken reward")


def accept_even_lengths(completion_ids: list[list[int]], **columns: object) -> list[float]:
    """An untrained policy is never right: this accepts about half of what it says."""
    return [float(len(ids) % 2 == 0) for ids in completion_ids]
