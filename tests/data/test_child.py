"""Reading in a child process: its death, silence and appetite are told as a file that cannot be read."""

import pytest

from megagnn.data.foreign import child

READER = '''
"""A reader that does what the file says."""
import os, time

def do(path):
    text = open(path).read()
    yield os.getpid()
    if "crash" in text:
        os.abort()
    if "damage" in text:
        open(path, "w").close()
        os.abort()
    if "long" in text:
        yield from range(300)
    if "sleep" in text:
        time.sleep(60)
    if "eat" in text:
        yield bytearray(1 << 33)
    if "missing" in text:
        import lmdb_that_is_not_there
    if "refuse" in text:
        from megagnn.data.foreign import RefusedError
        raise RefusedError("of another layout; convert it")
    if "array" in text:
        import numpy as np
        yield {"where": "row 7", "values": {"energy": np.array([None])}}
        return
    if "raise" in text:
        raise KeyError("numbers")
    yield from range(1000)
'''


@pytest.fixture
def read(tmp_path, monkeypatch):
    (tmp_path / "reader_of_a_test.py").write_text(READER)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(child, "_idle", [])

    def run(text, **limits):
        (tmp_path / "file").write_text(text)
        return child.read_in_child("reader_of_a_test:do", tmp_path / "file", **limits)

    yield run
    for left in child._idle:
        left.end()


def test_one_child_reads_file_after_file(read):
    first, *rest = read("")
    assert rest == list(range(1000))
    assert next(iter(list(read("")))) == first


def test_two_files_at_once_have_two_children(read):
    one = read("")
    first = next(one)
    other, *_ = read("")
    assert other != first
    assert len(list(one)) == 1000


@pytest.mark.parametrize(
    ("text", "limits", "said"),
    [
        ("crash", {}, r"cannot read .*file: its library crashed \(SIGABRT\); is the file whole\?"),
        ("sleep", {"time_limit": 1.0}, r"cannot read .*file: no answer within 1 s"),
        ("eat", {"memory_limit": 1 << 31}, r"it needs more memory than the 2,147,483,648 B allowed"),
        ("refuse", {}, "cannot read .*file: of another layout; convert it$"),
        ("raise", {}, "cannot read .*file: 'numbers'; is the file whole"),
    ],
)
def test_the_end_of_a_child_is_told(text, limits, said, read):
    with pytest.raises(child.ForeignError, match=said):
        list(read(text, **limits))
    assert len(list(read(""))) == 1001  # the next file is read


def test_arrays_of_objects_are_not_sent(read):
    _, told = read("array")
    assert told == "row 7: an array of type object, which is neither numbers nor text"


def test_a_missing_package_is_told(read):
    with pytest.raises(
        ValueError, match=r"needs the package lmdb_that_is_not_there, .* pip install"
    ) as caught:
        list(read("missing"))
    assert not isinstance(caught.value, child.ForeignError)


def test_a_file_is_not_blamed_for_the_one_before(read):
    (first,) = {next(iter(list(read(""))))}
    again, *rest = read("damage")  # kills the child that read before; the next one finds the file in order
    assert again != first
    assert len(rest) == 1000


def test_a_reader_that_is_left_ends_its_child(read):
    frames = read("long sleep")
    running = child._take(child.MEMORY_LIMIT)
    child._idle.append(running)
    next(frames)
    frames.close()
    assert running.process.poll() is not None
    assert not child._idle
