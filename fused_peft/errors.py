"""Exceptions raised by the package beyond the built-in TypeError, ValueError and RuntimeError."""


class AdapterError(ValueError):
    """An adapter's files or configuration do not fit; the message says what was expected."""
