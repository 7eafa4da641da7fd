"""Garbage is collected when we say so, and only then."""

import gc
import logging
import sys
import weakref

import pytest
import torch

from torchtitan.tools.gc import GarbageCollection


class Node:
    pass


def make_cycle(content=None):
    node = Node()
    node.self, node.content = node, content
    return weakref.ref(node)


@pytest.fixture(autouse=True)
def restore_gc():
    was = gc.isenabled()
    yield
    gc.enable() if was else gc.disable()


def test_collects_every_gc_freq_steps_and_not_between():
    gc.enable()
    collector = GarbageCollection(gc_freq=3, debug=False)
    assert not gc.isenabled()
    cycle = make_cycle()
    for step in (1, 2):
        collector.run(step)
        assert cycle() is not None
    collector.run(3)
    assert cycle() is None
    collector.close()
    assert gc.isenabled()


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="other generations from 3.14 on")
def test_garbage_that_is_no_longer_the_youngest_is_collected_too():
    collector = GarbageCollection(gc_freq=2, debug=False)
    node = Node()
    node.self, alive = node, weakref.ref(node)
    gc.collect(0)  # It survives, still in use, and so grows older.
    del node
    collector.run(2)
    assert alive() is None
    collector.close()


def test_close_leaves_a_disabled_collector_disabled():
    gc.disable()
    GarbageCollection(gc_freq=3, debug=False).close()
    assert not gc.isenabled()


def test_debug_collects_each_step_and_names_the_cycle_that_held_a_tensor(caplog):
    collector = GarbageCollection(gc_freq=1000, debug=True)
    cycle = make_cycle(torch.zeros(17, 3))
    with caplog.at_level(logging.WARNING, logger="torchtitan"):
        collector.run(1)
    assert cycle() is None and not gc.garbage
    assert "step 1" in caplog.text and "(17, 3)" in caplog.text and "Node" in caplog.text
    collector.close()


def test_debug_is_silent_about_cycles_without_tensors(caplog):
    collector = GarbageCollection(gc_freq=1000, debug=True)
    cycle = make_cycle()
    with caplog.at_level(logging.WARNING, logger="torchtitan"):
        collector.run(1)
    assert cycle() is None and not caplog.text
    collector.close()
