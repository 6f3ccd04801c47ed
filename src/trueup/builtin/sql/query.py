"""A query of the built-in task and its two spellings: one bare line, or formatted and commented."""

from __future__ import annotations

import random
from dataclasses import dataclass

from trueup.builtin.sql.schema import TABLES, Column, Table, day

OPERATORS = (">", ">=", "<", "<=")
LIMITS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20)


@dataclass(frozen=True)
class Condition:
    column: Column
    operator: str
    value: str

    def sql(self) -> str:
        literal = self.value if self.column.kind == "number" else f"'{self.value}'"
        return f"{self.column.name} {self.operator} {literal}"


@dataclass(frozen=True)
class Order:
    column: Column
    descending: bool

    def sql(self) -> str:
        return f"{self.column.name} {'DESC' if self.descending else 'ASC'}"


@dataclass(frozen=True)
class Query:
    """SELECT columns (none = all) FROM table, with at most a condition, an order and a limit."""

    table: Table
    columns: tuple[Column, ...]
    condition: Condition | None
    order: Order | None
    limit: int | None

    def bare(self) -> str:
        """The query on one line, in lower case: what the model says before it is aligned."""
        text = f"select {', '.join(self._names())} from {self.table.name}"
        if self.condition:
            text += f" where {self.condition.sql()}"
        if self.order:
            text += f" order by {self.order.sql().replace('DESC', 'desc').replace('ASC', 'asc')}"
        if self.limit:
            text += f" limit {self.limit}"
        return text + ";"

    def formatted(self, comment: str) -> str:
        """The query under a comment; a clause a line, keywords in capitals, columns indented."""
        lines = [f"-- {comment}", "SELECT", ",\n".join(f"    {name}" for name in self._names())]
        lines.append(f"FROM {self.table.name}")
        if self.condition:
            lines.append(f"WHERE {self.condition.sql()}")
        if self.order:
            lines.append(f"ORDER BY {self.order.sql()}")
        if self.limit:
            lines.append(f"LIMIT {self.limit}")
        return "\n".join(lines) + ";"

    def _names(self) -> list[str]:
        return [column.name for column in self.columns] or ["*"]


def random_query(rng: random.Random, language: str) -> Query:
    """A query whose words are of `language` ("en" or "zh")."""
    table = rng.choice(TABLES)
    measured = [column for column in table.columns if column.kind in ("number", "date")]
    condition = _random_condition(rng, table, language) if rng.random() < 0.9 else None
    order = Order(rng.choice(measured), rng.random() < 0.6) if rng.random() < 0.55 else None
    limit = rng.choice(LIMITS) if rng.random() < (0.6 if order else 0.2) else None
    count = rng.choices((0, 1, 2, 3), (2, 3, 4, 2))[0]
    return Query(table, tuple(rng.sample(table.columns, count)), condition, order, limit)


def _random_condition(rng: random.Random, table: Table, language: str) -> Condition:
    column = rng.choice([column for column in table.columns if column.kind != "label"])
    if column.kind == "text":
        assert column.words is not None
        operator = "!=" if rng.random() < 0.15 else "="
        return Condition(column, operator, rng.choice(column.words[language]))
    if column.kind == "date":
        # Room at both ends: even the narrowest condition leaves more rows than the largest LIMIT.
        value = day(rng.randrange(30, column.stop - 30))
    else:
        values = range(column.start, column.stop, column.step)
        edge = max(1, len(values) // 20)
        value = str(rng.choice(values[edge:-edge]))
    return Condition(column, rng.choice(OPERATORS), value)
