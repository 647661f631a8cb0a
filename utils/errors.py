"""The exception that a user's mistake raises, and that of a training that diverged."""


class UserError(Exception):
    """A mistake that the user can mend: one line saying what was wrong, where, and what to do.

    Names and reasons from outside may hold line breaks and a terminal's control codes. Lines are
    joined, and codes are escaped.
    """

    def __str__(self) -> str:
        line = " ".join(super().__str__().splitlines())
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


class Diverged(UserError):
    """Training has diverged: what it has learned must not replace the last good checkpoint."""
