"""Reading ahead and writing behind: beside the work in between, bounded, in order, nothing lost."""

from __future__ import annotations

import itertools
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream_diffvsr.jobs.overlap import Background, prefetch

WAIT = 60
"""Seconds after which a thread that should have gone on counts as stuck."""


class BrokenError(Exception):
    pass


@given(st.lists(st.integers(), max_size=20), st.integers(0, 5))
def test_the_same_items(items, depth):
    assert list(prefetch(iter(items), depth)) == items


@pytest.mark.parametrize("depth", [1, 3])
def test_items_are_made_while_the_first_is_in_use_and_only_so_many(depth):
    made, enough = [], threading.Event()

    def endless():
        for index in itertools.count():
            made.append(index)
            if index == depth + 1:  # one taken, `depth` waiting, one in the thread's hand
                enough.set()
            yield index

    items = prefetch(endless(), depth)
    assert next(items) == 0
    assert enough.wait(WAIT)
    assert next(items) == 1
    items.close()
    assert len(made) <= depth + 3
    assert "read ahead" not in {thread.name for thread in threading.enumerate()}


def test_an_error_comes_after_the_items_before_it():
    def two():
        yield from (1, 2)
        raise BrokenError

    items = prefetch(two(), 4)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(BrokenError):
        next(items)


def test_the_source_is_closed_in_its_own_thread():
    closed = []

    def source():
        try:
            yield from itertools.count()
        finally:
            closed.append(threading.current_thread().name)

    items = prefetch(source(), 2)
    next(items)
    items.close()
    assert closed == ["read ahead"]


@given(st.integers(0, 20), st.integers(1, 4))
def test_calls_run_in_order(count, depth):
    done = []
    with Background(depth) as writer:
        for index in range(count):
            writer.add(done.append, index)
        writer.wait()
        assert done == list(range(count))


def test_the_caller_goes_on_until_too_many_wait():
    begun, go, added = threading.Event(), threading.Event(), []

    def busy():
        begun.set()
        assert go.wait(WAIT)

    def add_three():
        for index in range(3):
            writer.add(busy)
            added.append(index)

    with Background(2) as writer:
        caller = threading.Thread(target=add_three)
        caller.start()
        assert begun.wait(WAIT)
        caller.join(0.2)
        assert len(added) <= 2 and caller.is_alive()
        go.set()
        caller.join(WAIT)
        assert added == [0, 1, 2]


@pytest.mark.parametrize("last", ["add", "wait"])
def test_an_error_of_a_call_is_raised_later(last):
    def broken():
        raise BrokenError

    with Background(1) as writer:
        writer.add(broken)
        with pytest.raises(BrokenError):
            writer.add(int) if last == "add" else writer.wait()


def test_dropping_forgets_what_waits():
    begun, go, done = threading.Event(), threading.Event(), []

    def busy():
        begun.set()
        assert go.wait(WAIT)
        raise BrokenError

    with Background(3) as writer:
        writer.add(busy)
        writer.add(done.append, 1)
        assert begun.wait(WAIT)
        threading.Timer(0.05, go.set).start()
        writer.drop()
        writer.wait()
    assert done == []
