"""What is no checkpoint is named as what it is."""

import gzip
import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from utils.checkpoint import read_checkpoint
from utils.errors import UserError


def zipped(*names) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x")
    return file.getvalue()


def tarred(name) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return file.getvalue()


def array() -> bytes:
    file = io.BytesIO()
    np.save(file, np.eye(2))
    return file.getvalue()


FILES = {
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n",
        "a Git LFS pointer, not a checkpoint: fetch the file itself with git lfs pull",
    ),
    "page": (b"<!DOCTYPE html><html></html>", "a web page, as a failed download leaves it"),
    "page, other case": (b"\r\n <HTML><body>404</body></HTML>", "a web page"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a web page"),
    "empty": (b"", "an empty file"),
    "zip": (zipped("notes.txt"), "a zip archive of other files, not"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "a zip archive of other files, not"),
    "program": (zipped("m/data.pkl", "m/constants.pkl"), "a TorchScript program"),
    "json": (json.dumps({"a": 1}).encode(), "damaged, or no checkpoint"),
    "gzip": (gzip.compress(b"x"), "a packed archive, not a checkpoint: unpack it"),
    "tar": (tarred("notes.txt"), "a packed archive, not a checkpoint: unpack it"),
    "pickle": (pickle.dumps({"a": 1}, 4), "a pickle that torch did not write"),
    "array": (array(), "damaged, or no checkpoint"),
    "image": (b"\x89PNG\r\n\x1a\n" + bytes(50), "damaged, or no checkpoint"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "damaged, or no checkpoint"),
    "text": (b"No such bucket, sorry.\n", "a text file"),
    "noise": (bytes(range(128, 256)) * 4, "damaged, or no checkpoint"),
    "zeros": (bytes(1000), "damaged, or no checkpoint"),
}


@pytest.mark.parametrize("name", FILES)
def test_it_is_named_in_one_line(tmp_path, name):
    content, message = FILES[name]
    path = tmp_path / "c.pth"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_checkpoint(str(path))
    said = str(error.value)
    assert said.startswith(f"{path}: {message}"), said
    for unwanted in ("\n", "weights_only", "\x1b", "two options"):
        assert unwanted not in said


def test_a_folder_and_nothing_are_named(tmp_path):
    with pytest.raises(UserError, match="Is a directory"):
        read_checkpoint(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(str(tmp_path / "c.pth"))
