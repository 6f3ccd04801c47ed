"""Whatever rows say: read = kept + dropped + merged, and what is kept is what is trained or evaluated on."""

from __future__ import annotations

import json
from functools import cache

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.tiny_tokenizers import make_tokenizer
from trueup.data.encode import encode_dataset
from trueup.data.load import load_examples
from trueup.data.report import DataReport
from trueup.data.templates import load_template
from trueup.errors import ConfigError, DataError

texts = st.one_of(st.sampled_from(["", " ", "a", "b", "a ", "c\0", "好", "<|im_end|>"]), st.text("ab ", max_size=80))
answers = st.lists(texts, min_size=1, max_size=3)
SHAPES = {
    "pair": st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}),
    "chat": st.fixed_dictionaries({"instruction": texts, "input": texts, "output": texts}),
    "feedback": st.fixed_dictionaries({"prompt": texts, "completion": texts, "label": st.booleans()}),
    "ranking": st.fixed_dictionaries({"prompt": texts, "responses": answers}).flatmap(
        lambda row: st.tuples(
            st.just(row), st.lists(st.integers(0, 2), min_size=len(row["responses"]), max_size=len(row["responses"]))
        ).map(lambda both: {**both[0], "scores": both[1]})
    ),
    "text": st.fixed_dictionaries({"text": texts}),
}
rows_of_a_kind = st.sampled_from(sorted(SHAPES)).flatmap(
    lambda kind: st.tuples(st.just(kind), st.lists(SHAPES[kind], min_size=1, max_size=8))
)


@cache
def template():
    return load_template(make_tokenizer(), "chatml")


@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows_of_a_kind,
    st.sampled_from(["keep_start", "keep_end", "drop"]),
    st.integers(8, 60),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([None, 1, 5]),
)
def test_every_row_is_kept_dropped_or_merged(tmp_path, given_rows, truncation, cutoff_len, val_size, max_samples):
    kind, rows = given_rows
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    try:
        data = load_examples([str(path)] * 2, kind=kind, val_size=val_size, max_samples=max_samples)
    except (ConfigError, DataError) as error:
        assert "of" in str(error), "the arithmetic of why nothing is left"
        return
    used: set[str] = set()
    for examples in (data.train, *data.eval.values()):
        try:
            encoded = encode_dataset(
                examples, template(), cutoff_len=cutoff_len, truncation=truncation, report=data.report
            )
        except DataError as error:
            assert "0 of" in str(error)
            return
        used.update(encoded.rows)
    for report in (data.report, DataReport.restored(json.loads(json.dumps(data.report.state())))):
        d = report.to_dict()["datasets"]["rows"]
        assert d["read"] == min(len(rows), max_samples or len(rows)) and d["available"] == len(rows)
        assert d["read"] == d["kept"] + d["merged"] + sum(reason["count"] for reason in d["dropped"].values())
        assert d["kept"] == len(used)
        assert max((d[what]["count"] for what in ("duplicates", "reversed_pairs")), default=0) < d["read"]
        assert d["truncated_rows"] <= sum(part["count"] for part in d["truncated"].values())
        assert set(d["tokens"]) >= {"total"} or kind == "text" or not used
        assert report.render() and report.page()
