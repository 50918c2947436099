"""Fixtures of several of these tests."""

import pytest


@pytest.fixture
def here(place, monkeypatch):
    """The working directory of a test is the ``place`` of its file."""
    monkeypatch.chdir(place)
    return place
