"""Rules on answers: a point for each that is kept."""

from __future__ import annotations

import sqlite3

import pytest

from trueup.rollout.rules import Rules, is_json, is_sql


@pytest.mark.parametrize(
    "rules, points",
    [
        (Rules(min_chars=3), {"ab": 0, "  ab  ": 0, "abc": 1}),
        (Rules(max_chars=3), {"abc": 1, "abcd": 0, "": 1}),
        (Rules(keywords=("From", "where")), {"FROM x": 0.5, "from where": 1, "": 0}),
        (Rules(forbidden=("sorry",)), {"Sorry!": 0, "fine": 1}),
        (Rules(regex=("^a.*b$", "x")), {"a\nxb": 2, "ab": 1, "y": 0}),
        (Rules(not_regex=(r"\d",)), {"a1": 0, "a": 1}),
        (Rules(format="json"), {'{"a": 1}': 1, "{": 0, "```json\n[1]\n```": 1}),
        (Rules(min_chars=2, format="sql"), {"select 1": 2, "se": 1, "": 0}),
    ],
)
def test_a_point_for_each_rule_kept(rules, points):
    assert rules and rules.score(list(points)) == list(points.values())


def test_no_rules_are_false():
    assert not Rules() and Rules(min_chars=0)


SCHEMA = "CREATE TABLE t (a INTEGER, b TEXT);"


@pytest.mark.parametrize(
    "sql, grammar, schema",
    [
        ("SELECT a FROM t WHERE b = 'x';", True, True),
        ("-- a comment\nSELECT a\nFROM t", True, True),
        ("```sql\nSELECT c FROM t\n```", True, False),
        ("SELECT a FROM nowhere", True, False),
        ("SELEC a FROM t", False, False),
        ("SELECT a FROM t; DROP TABLE t", False, False),
        ("INSERT INTO t VALUES (1, 'x')", True, True),
        ("ATTACH 'other.db' AS o", False, False),
        ("PRAGMA journal_mode = off", False, False),
        ("SELECT '\0'", False, False),
        ("", False, False),
    ],
)
def test_sql_is_prepared_and_never_run(sql, grammar, schema, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (is_sql(sql), is_sql(sql, SCHEMA)) == (grammar, schema)
    assert not list(tmp_path.iterdir())


def test_a_schema_that_does_not_run_is_the_operators_fault():
    with pytest.raises(sqlite3.Error):
        is_sql("SELECT 1", "CREATE TABEL t")


def test_json_of_any_depth_is_an_answer():
    assert not is_json("[" * 100_000)
