"""A hub that does not answer is told in seconds, and asked again later."""

from __future__ import annotations

import socket

import pytest
from huggingface_hub import constants

from trueup import network


@pytest.fixture(autouse=True)
def a_user_with_a_network(monkeypatch):
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(network, "_seen", {})
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(name="answering")
def somebody():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture(name="silent")
def nobody():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return f"http://127.0.0.1:{port}"


def test_where_nobody_answers_the_libraries_go_offline_and_it_is_said_once(silent, monkeypatch, caplog):
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    network.mind_the_hub()
    network.mind_the_hub()
    assert constants.HF_HUB_OFFLINE
    assert caplog.text.count(f"{silent} does not answer") == 1


def test_once_somebody_answers_they_go_online_again(silent, answering, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    network.mind_the_hub()
    monkeypatch.setattr(constants, "ENDPOINT", answering)
    network.mind_the_hub()
    assert not constants.HF_HUB_OFFLINE


def test_what_the_user_says_is_not_doubted(silent, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    network.mind_the_hub()
    assert not constants.HF_HUB_OFFLINE


def test_behind_a_proxy_it_is_the_proxy_that_has_to_answer(silent, answering, monkeypatch):
    monkeypatch.setenv("http_proxy", answering)
    monkeypatch.setenv("no_proxy", "elsewhere")
    assert network.trouble_with("http://hub.invalid") is None
    monkeypatch.setenv("http_proxy", silent)
    assert network.trouble_with("http://other.invalid")


def test_an_answer_is_believed_for_a_while(silent, monkeypatch):
    assert network.trouble_with(silent)
    monkeypatch.setattr(network, "_connect", lambda address: None)
    assert network.trouble_with(silent)
    monkeypatch.setattr(network, "_FRESH_SECONDS", -1.0)
    assert network.trouble_with(silent) is None
