"""Errors that a user can put right; commands print their message alone."""


class InputError(ValueError):
    """A wrong argument, file or folder. The message names the value and the remedy."""


class DataError(RuntimeError):
    """Images that cannot be used, found while training."""


class DivergedError(RuntimeError):
    """Training produced a loss that is not finite."""


class DataError(RuntimeError):
    """Data that cannot be used, met while it is read. The message names it and the remedy."""


class ExportError(RuntimeError):
    """An exported network computes something else than the network it was made of."""
