"""Rewards for requests to be answered with SQL: each takes answers and columns of the data, and returns numbers.

`rejected` is the right query on one bare line, as the bundled pairs have it.
"""

from trueup.builtin.sql import is_formatted, same_result


def right(completions, rejected, **_):
    """1 if the query returns the right rows from the built-in database."""
    return [float(same_result(sql, wanted)) for sql, wanted in zip(completions, rejected, strict=True)]


def formatted(completions, rejected, **_):
    """1 if the query is laid out clause by clause and returns the right rows."""
    return [
        float(is_formatted(sql) and same_result(sql, wanted)) for sql, wanted in zip(completions, rejected, strict=True)
    ]
