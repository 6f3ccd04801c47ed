"""The built-in task: requests in Chinese and English, answered with SQL. Torch-free."""

from trueup.builtin.sql.grade import (
    Grade,
    Verdict,
    grade,
    is_commented,
    is_formatted,
    judge,
    same_result,
)
from trueup.builtin.sql.tasks import Task, make_tasks, read_tasks, write_pairs

__all__ = [
    "Grade",
    "Task",
    "Verdict",
    "grade",
    "is_commented",
    "is_formatted",
    "judge",
    "make_tasks",
    "read_tasks",
    "same_result",
    "write_pairs",
]
