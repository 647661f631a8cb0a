"""What a data path may have been meant to be; only errors need it."""

import difflib
import os

from data.listing import is_hidden

SPLITS = ("train", "val")


def nearest_path(path: str) -> str:
    """The nearest folder to a path that is not there, as the end of a sentence, or nothing."""
    if os.path.isfile(path):
        return f", did you mean {os.path.dirname(path) or '.'}?"
    below, missing = path.rstrip("/"), ""
    while below and not os.path.isdir(below):
        below, missing = os.path.split(below)
    close = difflib.get_close_matches(missing, _folders(below or "."), n=1)
    return f", did you mean {os.path.join(below, close[0])}?" if close else ""


def nearest_split(root: str, split: str) -> str:
    """What is in a data path in place of the folder of a split, likewise."""
    folders = _folders(root)
    if not folders and all(map(is_hidden, os.listdir(root))):
        return ", which is empty"
    above = os.path.dirname(os.path.abspath(root))
    for other in (above, *(os.path.join(root, name) for name in folders)):
        if os.path.isdir(os.path.join(other, split)):
            return f", did you mean {other}?"
    left = [name for name in folders if name not in SPLITS]
    by_case = {name.lower(): name for name in left}
    if close := difflib.get_close_matches(split, by_case, n=1):
        return f", did you name it {by_case[close[0]]}/?"
    (other,) = set(SPLITS) - {split}
    if other in folders:
        return f", only {other}/; `python -m tools.split_images` makes both from folders of images"
    return ""


def _folders(top: str) -> list[str]:
    try:
        with os.scandir(top) as entries:
            return sorted(e.name for e in entries if not is_hidden(e.name) and e.is_dir())
    except OSError:
        return []
