"""Exceptions raised by the package beyond the built-in TypeError, ValueError and RuntimeError."""


class AdapterError(ValueError):
    """An adapter's files or its configuration do not fit, said with the key and what was expected."""
