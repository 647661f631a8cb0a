"""Pickles from outside: plain data is read, anything else is refused unrun."""

import os
import pickle
import resource
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from utils.errors import UserError
from utils.unpickle import load_plain_pickle

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False) | st.frozensets(st.integers()) | st.sets(st.text()),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)  # fmt: skip
ARRAYS = npst.arrays(
    st.sampled_from(["?", "u1", "<i4", ">i4", "<i8", "<f4", ">f8", "<c16", "S3", "<U2", ">U2"]),
    npst.array_shapes(min_dims=0, min_side=0, max_side=4),
)


def write(tmp_path, content):
    path = str(tmp_path / "data.pkl")
    with open(path, "wb") as file:
        file.write(content)
    return path


@settings(deadline=None)  # other work on the machine is no failure
@given(value=PLAIN, protocol=st.integers(0, 5))
def test_plain_data(tmp_path_factory, value, protocol):
    path = write(tmp_path_factory.getbasetemp(), pickle.dumps(value, protocol))
    assert load_plain_pickle(path) == value


@settings(deadline=None)
@given(array=ARRAYS, protocol=st.integers(0, 5), layout=st.sampled_from("CFT"))
def test_arrays(tmp_path_factory, array, protocol, layout):
    if layout == "T" and array.ndim:
        array = array.swapaxes(0, -1)
    content = pickle.dumps(
        {"data": [np.array(array, order="F" if layout == "F" else "K")]}, protocol
    )
    expected = pickle.loads(content)["data"][0]
    loaded = load_plain_pickle(write(tmp_path_factory.getbasetemp(), content))["data"][0]
    assert loaded.dtype == expected.dtype
    np.testing.assert_array_equal(loaded, array)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", [np.float64(0.5), np.int16(-3), np.bool_(True), np.str_("año")])
def test_scalars(tmp_path, value, protocol):
    loaded = load_plain_pickle(write(tmp_path, pickle.dumps(value, protocol)))
    assert loaded == value
    assert loaded.dtype == value.dtype


@pytest.mark.parametrize("old", [True, False])
def test_numpy_1_and_2_name_their_modules_differently(tmp_path, old):
    content = pickle.dumps(np.arange(5), 2)
    assert b"numpy._core.multiarray" in content or b"numpy.core.multiarray" in content
    content = content.replace(b"numpy._core", b"numpy.core")
    content = content if old else content.replace(b"numpy.core", b"numpy._core")
    np.testing.assert_array_equal(load_plain_pickle(write(tmp_path, content)), np.arange(5))


def test_python_2_strings(tmp_path):
    # what Python 2 wrote for {'data': array([200, 7], uint8), 'name': '\xe9'} in protocol 2
    content = (
        b"\x80\x02}(U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85"
        b"U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x02\xc8\x07tb"
        b"U\x04nameU\x01\xe9u."
    )
    path = write(tmp_path, content)
    latin = load_plain_pickle(path, "latin1")
    assert latin["data"].tolist() == [200, 7]
    assert latin["name"] == "é"
    raw = load_plain_pickle(path, "bytes")
    assert raw[b"data"].tolist() == [200, 7]
    assert raw[b"name"] == b"\xe9"
    with pytest.raises(UserError, match="not a pickle of plain data"):
        load_plain_pickle(path)


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    "function, argument",
    [
        (os.system, "touch {}"),
        (eval, "open({!r}, 'w')"),
        (exec, "open({!r}, 'w')"),
        (open, "{}"),
        (subprocess.check_call, "touch {}"),
        (np.memmap, "{}"),
        (np.load, "{}"),
        (np.fromfile, "{}"),
        (getattr, "{}"),
        (__import__, "this"),
    ],
)
def test_a_hostile_pickle_is_refused_unrun(tmp_path, function, argument, protocol):
    victim = tmp_path / "victim"
    call = Call(function, argument.format(str(victim)))
    path = write(tmp_path, pickle.dumps({"data": [1, call]}, protocol))
    with pytest.raises(UserError, match=r"not a pickle of plain data \(it names") as caught:
        load_plain_pickle(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not victim.exists()


@pytest.mark.parametrize(
    "value",
    [
        np.array([os.system], dtype=object),
        np.zeros(2, dtype=[("a", "i4"), ("b", "O")]),
        np.zeros(2, dtype=[("a", "i4")]),
        np.array(["2020-01-01"], dtype="M8[D]"),
        UserError("an exception"),
        UserError,
        print,
    ],
    ids=str,
)
def test_objects_and_records_are_refused(tmp_path, value):
    path = write(tmp_path, pickle.dumps(value, 4))
    with pytest.raises(UserError, match="it names"):
        load_plain_pickle(path)


def array_pickle(shape: bytes, dtype: bytes, content: bytes) -> bytes:
    """A protocol 2 pickle of an array with a forged shape, type state or content."""
    return (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01" + shape + dtype + b"\x89" + content + b"tb."
    )


U1 = (
    b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
)


@pytest.mark.parametrize(
    "content",
    [
        array_pickle(b"K\x03\x85", U1, b"U\x02ab"),  # three elements, two bytes
        array_pickle(b"J\xff\xff\xff\xffJ\xfe\xff\xff\xff\x86", U1, b"U\x02ab"),  # -1 x -2
        array_pickle(b"\x8a\x09" + b"\xff" * 8 + b"\x00\x85", U1, b"U\x02ab"),  # 2^64 - 1
        array_pickle(b"K\x02\x85", U1.replace(b"u1", b"O8"), b"U\x10" + b"a" * 16),
        array_pickle(b"K\x02\x85", b"cnumpy\nndarray\nK\x02\x85\x81", b"U\x02ab"),
        b"\x80\x02c_codecs\nencode\nU\x01aU\x03zip\x86R.",
        pickle.dumps(list(range(1000)))[:-7],
        b"",
        b"no pickle",
        b"\x89PNG\r\n\x1a\n",
    ],
)
def test_a_damaged_or_forged_pickle_is_refused(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(UserError, match="not a pickle of plain data") as caught:
        load_plain_pickle(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_forged_flags_of_a_type_are_not_believed(tmp_path):
    # an item size of 0 and the flags of objects, which numpy's own __setstate__ would take over
    forged = U1.replace(b"u1", b"S2").replace(
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00", b"K\x00K\x01K\x3f"
    )
    loaded = load_plain_pickle(write(tmp_path, array_pickle(b"K\x01\x85", forged, b"U\x02ab")))
    assert loaded.dtype == np.dtype("S2")
    assert loaded.tolist() == [b"ab"]


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02K\x01r\xff\xff\xff\x7f.",  # the memo's place 2^31 - 1, 16 GiB away
        b"\x80\x02I1\np4000000000\n.",
        b"\x80\x04\x8e" + b"\xff" * 4 + b"\x0f\0\0\0ab.",  # 64 GiB of bytes
        b"\x80\x04\x95" + b"\xff" * 4 + b"\x0f\0\0\0K\x01.",  # a frame of 64 GiB
    ],
)
def test_a_small_file_takes_little_memory(tmp_path, content):
    path = write(tmp_path, content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="not a pickle of plain data"):
        load_plain_pickle(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + 2**16  # of KiB


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_plain_pickle(str(tmp_path / "absent.pkl"))
