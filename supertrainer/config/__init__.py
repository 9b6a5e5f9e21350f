"""Configuration: composed by Hydra, checked by a schema, handed on as a locked strict dict."""

from supertrainer.config.composition import compose, options, title
from supertrainer.config.strict_dict import LockedConfig, MissingKey, StrictDict, StrictList

__all__ = ["LockedConfig", "MissingKey", "StrictDict", "StrictList", "compose", "options", "title"]
