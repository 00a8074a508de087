"""The error for one sample that cannot be used."""


class BadSample(ValueError):
    """A sample that is skipped, not a reason to stop; its text is the reason in one line."""
