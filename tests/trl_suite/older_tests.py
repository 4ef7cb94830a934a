"""Plugin of pytest: lets tests be older than the installed TRL, as far as what they import is concerned."""

import re

from trl import import_utils


def _is_available(name: str):
    """An extra that the installed TRL no longer knows: is not there, for the tests that need it to be skipped."""
    if not re.fullmatch(r"is_\w+_available", name):
        raise AttributeError(name)
    return lambda *args, **kwargs: False


import_utils.__getattr__ = _is_available
