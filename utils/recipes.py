"""The recipes that come with the code, in ``configs/``."""

import difflib
import os
from pathlib import Path

from utils.errors import UserError

SHIPPED = Path(__file__).parent.parent / "configs"


def recipe_names() -> list[str]:
    """The names that ``--cfg`` takes."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def find_recipe(given: str) -> Path:
    """The shipped recipe for a ``--cfg`` of which there is no such file.

    Args:
        given: ``NAME``, ``NAME.yaml`` or ``configs/NAME.yaml``.

    Raises:
        UserError: there is none; it says the nearest one that there is.
    """
    name = given.removeprefix("configs/").removesuffix(".yaml")
    if name in recipe_names():
        return SHIPPED / f"{name}.yaml"
    beside = {path.stem: str(path) for path in Path(given).parent.glob("*.yaml")}
    known = {name: name for name in recipe_names()} | beside
    close = difflib.get_close_matches(Path(given).stem, known, n=1)
    hint = f"did you mean {known[close[0]]}?" if close else f"recipes are in {SHIPPED}"
    what = "a folder, not a configuration" if os.path.isdir(given) else "no such configuration"
    raise UserError(f"{given}: {what}: {hint}")
