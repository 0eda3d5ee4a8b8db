"""Errors that a user can put right; commands print their message alone."""


class InputError(ValueError):
    """A wrong argument, file or folder. The message names the value and the remedy."""


class DivergedError(RuntimeError):
    """Training produced a loss that is not finite."""


class ExportError(RuntimeError):
    """An exported network computes something else than the network it was made of."""
