"""trueup takes a language model from *can talk* to *answers the way people prefer*."""

__version__ = "0.1.0"
