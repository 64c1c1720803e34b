"""Seeds derived from a recipe's seed and a place in the run."""

import hashlib


def derive_seed(*parts: object) -> int:
    """A 31-bit seed from (run seed, step, problem, sample), the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
