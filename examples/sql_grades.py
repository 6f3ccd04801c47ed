"""What `trueup quickstart` finds out about answers, each by itself, as rewards: 1 for yes, 0 for no.

`rejected` is the right query on one bare line, `language` that of the request, as in the bundled pairs.
"""

from trueup.builtin.sql import is_commented, is_formatted, same_result


def formatted(completions, **_):
    """Clause by clause, indented, keywords in capitals."""
    return [float(is_formatted(sql)) for sql in completions]


def commented(completions, language, **_):
    """With a comment in the language of the request."""
    return [float(is_commented(sql, wanted)) for sql, wanted in zip(completions, language, strict=True)]


def right(completions, rejected, **_):
    """The right rows come out of the built-in database."""
    return [float(same_result(sql, wanted)) for sql, wanted in zip(completions, rejected, strict=True)]


def all_three(completions, language, rejected, **_):
    """All of it."""
    found = formatted(completions), commented(completions, language), right(completions, rejected)
    return [float(all(marks)) for marks in zip(*found, strict=True)]
