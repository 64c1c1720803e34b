"""Every request to a judge, in an SQLite file: the cache, the budget and the account in one.

A row is written before its request is sent, at the most that it can cost: a killed process, or
another one that shares the file, cannot spend what is not booked.
"""

import sqlite3
import time
from pathlib import Path
from typing import NamedTuple

_SCHEMA = """
create table if not exists requests (
    id integer primary key, key text not null, account text not null, asked real not null,
    answered integer not null default 0, score real, reply text,
    prompt_tokens integer not null default 0, completion_tokens integer not null default 0,
    cost real not null
);
create index if not exists by_key on requests (key);
create index if not exists by_account on requests (account);
"""


class Spent(NamedTuple):
    """What an account has asked for: `cost` in the currency of the prices."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float


class Found(NamedTuple):
    score: float | None


class RequestRecord:
    """Raises OSError if the file cannot be opened."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Processes of one run take turns; no thread of this one is here at the same time.
            self._db = sqlite3.connect(
                path, timeout=60, isolation_level=None, check_same_thread=False
            )
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise OSError(f"{path}: {error}") from error

    def find(self, key: str) -> Found | None:
        """The answer to a request that was asked before."""
        query = "select score from requests where key = ? and answered order by id limit 1"
        row = self._db.execute(query, (key,)).fetchone()
        return Found(row[0]) if row else None

    def reserve(
        self,
        key: str,
        account: str,
        cost: float,
        max_requests: int | None,
        max_cost: float | None,
    ) -> int | None:
        """Book a request; returns its number, or None if the account's budget has no room."""
        self._db.execute("begin immediate")
        try:
            spent = self.add_up(account)
            too_many = max_requests is not None and spent.requests >= max_requests
            too_much = max_cost is not None and spent.cost + cost > max_cost
            if too_many or too_much:
                return None
            row = (key, account, time.time(), cost)
            insert = "insert into requests (key, account, asked, cost) values (?, ?, ?, ?)"
            return self._db.execute(insert, row).lastrowid
        finally:
            self._db.execute("commit")

    def answer(
        self, number: int, score: float | None, reply: str, tokens: tuple[int, int], cost: float
    ) -> None:
        self._db.execute(
            "update requests set answered = 1, score = ?, reply = ?, prompt_tokens = ?, "
            "completion_tokens = ?, cost = ? where id = ?",
            (score, reply, *tokens, cost, number),
        )

    def has_answers(self, account: str) -> bool:
        query = "select 1 from requests where account = ? and answered limit 1"
        return self._db.execute(query, (account,)).fetchone() is not None

    def drop(self, number: int) -> None:
        """Of a request that failed."""
        self._db.execute("delete from requests where id = ?", (number,))

    def add_up(self, account: str) -> Spent:
        query = (
            "select count(*), coalesce(sum(prompt_tokens), 0), "
            "coalesce(sum(completion_tokens), 0), coalesce(sum(cost), 0.0) "
            "from requests where account = ?"
        )
        return Spent(*self._db.execute(query, (account,)).fetchone())

    def close(self) -> None:
        self._db.close()
