"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """A mistake that the user can mend: one line saying what was wrong, where, and what to do."""
