from __future__ import annotations

import threading

import pytest

from trueup.builtin.sql import grade, is_commented, is_formatted, make_tasks, same_result
from trueup.builtin.sql.grade import run_query

REFERENCE = "select name, salary from employees where city = '北京' order by salary desc limit 5;"
FORMATTED = """-- 查询员工的姓名和薪水
SELECT
    name,
    salary
FROM employees
WHERE city = '北京'
ORDER BY salary DESC
LIMIT 5;"""


def test_both_spellings_of_every_task_are_right_and_only_one_is_formatted():
    tasks = make_tasks(200, seed=9)
    formatted = grade([task.formatted for task in tasks], tasks)
    bare = grade([task.bare for task in tasks], tasks)
    assert (formatted.all, formatted.right, formatted.count) == (1.0, 1.0, 200)
    assert (bare.formatted, bare.commented, bare.right, bare.all) == (0.0, 0.0, 1.0, 0.0)


@pytest.mark.parametrize(
    "wrong",
    [
        "select salary, name from employees where city = '北京' order by salary desc limit 5;",
        "select name from employees where city = '北京' order by salary desc limit 5;",
        "select name, salary from students where hometown = '北京' order by score desc limit 5;",
        "select name, salary from employees where city = '上海' order by salary desc limit 5;",
        "select name, salary from employees where city != '北京' order by salary desc limit 5;",
        "select name, salary from employees where city = '北京' order by salary asc limit 5;",
        "select name, salary from employees where city = '北京' order by age desc limit 5;",
        "select name, salary from employees where city = '北京' order by salary desc limit 6;",
        "select name, salary from employees where city = '北京' order by salary desc;",
        "select name, salary from employees order by salary desc limit 5;",
        "select name, salary from employees where city = '北京' order by salary desc limit",
        "Sure! Here is the query.",
        "",
    ],
)
def test_a_wrong_query_is_caught(wrong):
    assert same_result(FORMATTED, REFERENCE)
    assert not same_result(wrong, REFERENCE)


@pytest.mark.parametrize(
    ("operator", "others"),
    [(">", (">=", "<", "<=", "=")), (">=", (">", "<")), ("<", ("<=", ">")), ("<=", ("<", ">="))],
)
@pytest.mark.parametrize(("column", "value"), [("salary", 9000), ("age", 35), ("hire_date", "'2021-05-06'")])
def test_a_wrong_comparison_is_caught(column, value, operator, others):
    query = f"select * from employees where {column} {operator} {value}"
    assert same_result(query, query)
    for other in others:
        assert not same_result(query.replace(f" {operator} ", f" {other} "), query)


def test_without_an_order_in_the_reference_rows_may_come_in_any_order():
    assert same_result("select age from employees order by age", "select age from employees")
    assert not same_result("select age from employees", "select age from employees order by age")


@pytest.mark.parametrize(
    "harmful",
    [
        "drop table employees",
        "delete from employees",
        "insert into employees (name) values ('x')",
        "select 1; drop table employees",
        "attach database '/tmp/x.db' as x",
        "pragma query_only = off",
        "select load_extension('x')",
        "select zeroblob(1000000000)",
        "with recursive n(i) as (select 1 union all select i + 1 from n) select i from n",
        "select a.age from employees a, employees b, employees c, employees d order by b.age",
        "select " + "1," * 5000 + "1",
        "select 1 \0",
    ],
)
def test_an_answer_can_only_read_and_only_for_so_long(harmful):
    assert run_query(harmful) is None
    assert len(run_query("select * from employees") or []) == 1200


def test_queries_run_in_any_thread():
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(same_result(FORMATTED, REFERENCE)))
    thread.start()
    thread.join()
    assert found == [True]


def test_formatted_means_a_clause_a_line_capitals_and_indented_columns():
    assert is_formatted(FORMATTED)
    assert is_formatted(FORMATTED.split("\n", 1)[1])
    assert is_formatted("SELECT\n    name\nFROM employees\nWHERE city = 'from where';")
    assert not is_formatted(REFERENCE)
    assert not is_formatted(REFERENCE.upper())
    assert not is_formatted(FORMATTED.lower())
    assert not is_formatted(FORMATTED.replace("    ", ""))
    assert not is_formatted(FORMATTED.replace("\nWHERE", " WHERE"))
    assert not is_formatted("SELECT\n    name")
    assert not is_formatted("-- SELECT")
    assert not is_formatted("")


def test_commented_means_words_after_two_dashes_in_the_requests_language():
    assert is_commented(FORMATTED, "zh")
    assert not is_commented(FORMATTED, "en")
    assert is_commented("-- Get the customer's name\nSELECT 'x'", "en")
    assert not is_commented("select '-- not a comment'")
    assert not is_commented("--\nselect 1")
    assert not is_commented(REFERENCE)


def test_a_reference_that_does_not_run_and_missing_answers_are_errors():
    with pytest.raises(ValueError, match="does not run"):
        same_result("select 1", "selekt 1")
    with pytest.raises(ValueError):
        grade(["select 1"], make_tasks(2, seed=0))
    with pytest.raises(ValueError):
        grade([], [])
