"""Built-in rewards: what is right, what is wrong, what no row can say."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from trueup.rollout import verify


@pytest.mark.parametrize(
    "text, number",
    [
        ("the answer is 42.", 42), ("1,234 apples", 1234), ("x = -3.5e2", -350), ("50%", 0.5), ("2 and 3", 3),
        ("#### 7\n(not 8)", 7), (r"\boxed{12} or 13", 12), ("none at all", None), ("", None), (".5", 0.5),
        ("see table2", 2), ("as in e2", 2), ("1,234.56 euros", 1234.56), ("it is 3.", 3), ("1e5", 1e5),
    ],
)  # fmt: skip
def test_the_number_an_answer_ends_with(text, number):
    assert verify.last_number(text) == (None if number is None else pytest.approx(number))


def test_exact_match_numbers_and_patterns():
    assert verify.exact_match([" a  b\n", "a"], ["a b", "b"]) == [1.0, 0.0]
    assert verify.exact_match(["a"], [None]) == [None]
    assert verify.numeric(["it is 0.1", "0.2", "1"], ["1/10 or .1", 0.1, "no number"]) == [1.0, 0.0, None]
    assert verify.regex(["<a>\nx</a>", "b"], ["<a>.*</a>", "^a"]) == [1.0, 0.0]


def test_code_fences_are_taken_off():
    assert verify.unfenced("here:\n```sql\nselect 1\n```\nthere") == "select 1"
    assert verify.unfenced(" select 2 ") == "select 2"


def test_json_schema():
    pytest.importorskip("jsonschema", reason="an optional dependency")
    schema = '{"type": "object", "required": ["a"]}'
    texts = ['{"a": 1}', '```json\n{"a": 2}\n```', '{"b": 1}', "{a"]
    assert verify.json_schema(texts, [schema] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_json_that_is_too_deep_is_wrong_and_schemas_fetch_nothing(monkeypatch):
    pytest.importorskip("jsonschema", reason="an optional dependency")
    assert verify.json_schema(["[" * 100_000], ['{"type": "array"}']) == [0.0]
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("it went to the network"))
    with pytest.raises(Exception, match="Unresolvable"):
        verify.json_schema(["1"], ['{"$ref": "http://127.0.0.1:9/schema"}'])


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "d.sqlite"
    with sqlite3.connect(path) as connection:
        connection.executescript("create table t (a, b); insert into t values (1, 'x'), (2, 'y'), (3, 'z');")
    return path


@pytest.mark.parametrize(
    "sql, right",
    [
        ("select b from t where a > 1 order by a desc", False),
        ("select b from t where a >= 2 order by a", True),
        ("```sql\nSELECT b FROM t WHERE a IN (3, 2) ORDER BY a\n```", True),
        ("select upper(b) from t", False),
        ("delete from t", False),
        ("attach 'other.db' as o", False),
        ("select", False),
        ("with recursive r(n) as (select 1 union all select n + 1 from r) select n from r", False),
    ],
)
def test_queries_are_judged_by_their_rows(database, sql, right):
    answer = "select b from t where a > 1 order by a"
    assert verify.sql_result([sql], [answer], [str(database)]) == [float(right)]
    assert verify.run_sql("select count(*) from t", database) == [(3,)]


def test_a_reference_that_does_not_run_is_an_error_of_the_data(database):
    with pytest.raises(ValueError, match="reference query"):
        verify.same_rows("select 1", "selec 1", database)


def test_queries_that_return_too_much_are_wrong_and_take_little_memory(database, monkeypatch):
    numbers = "with recursive r(n) as (select 1 union all select n + 1 from r limit {}) select {} from r"
    assert len(verify.run_sql(numbers.format(10_000, "n"), database)) == 10_000
    assert verify.run_sql(numbers.format(10_001, "n"), database) is None
    assert verify.run_sql("select zeroblob(1000000000)", database) is None
    monkeypatch.setattr(verify, "_MOST_BYTES", 1_000_000)
    assert verify.run_sql(numbers.format(20, "zeroblob(100000)"), database) is None
    assert verify.sql_result([numbers.format(20, "zeroblob(100000)")], ["select 1"], [str(database)]) == [0.0]
