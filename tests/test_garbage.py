"""The garbage collector is held back while a program starts, and never afterwards."""

from __future__ import annotations

import gc

import pytest

from trueup.garbage import importing, no_collection


def test_the_collector_rests_and_goes_on():
    assert gc.isenabled()
    with no_collection(), no_collection():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_it_goes_on_after_an_error():
    with pytest.raises(ValueError, match="bad"), no_collection():
        raise ValueError("bad")
    assert gc.isenabled()


def test_who_had_switched_it_off_finds_it_off():
    gc.disable()
    try:
        with no_collection():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_what_is_imported_is_never_searched():
    kept = gc.get_freeze_count()
    try:
        with importing():
            pass
        assert gc.get_freeze_count() > kept
    finally:
        gc.unfreeze()
