"""`trueup doctor`: facts for a bug report, and nothing private in them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from trueup.cli import main
from trueup.inference import doctor


def test_the_report_names_versions_devices_and_room():
    result = CliRunner().invoke(main, ["doctor", "--json"])
    found = json.loads(result.output)["result"]
    assert found["packages"]["torch"]
    assert found["memory_free_gb"] > 0
    assert isinstance(found["precision"]["cpu_bf16"], bool)
    assert found["disk_free_gb"]
    assert "problems" in found


def test_the_table_shows_the_same():
    shown = CliRunner().invoke(main, ["env"]).output
    for word in ("trueup", "python", "packages", "bf16", "memory", "disk", "extras", "problems"):
        assert word in shown


def test_proxies_are_said_to_be_set_and_not_shown(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@host")
    assert doctor.examine()["environment"]["HTTPS_PROXY"] == "set"


def test_versions_with_known_holes_are_named(monkeypatch: pytest.MonkeyPatch):
    versions = {"torch": "2.9.1", "transformers": "5.2.0", "jinja2": "3.1.5"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    found = doctor.problems()
    for name in versions:
        assert any(name in problem and "CVE" in problem for problem in found)


def test_an_extra_is_complete_or_lists_what_it_lacks():
    found = doctor.extras()
    if not found:
        pytest.skip("trueup is run from its sources, so its extras are not known")
    assert found["torch"] == []
    assert {
        "web",
        "serve",
        "quant",
        "vllm",
        "deepspeed",
        "ray",
        "track",
        "eval",
        "gguf",
        "dev",
        "metrics",
    } <= set(found)
