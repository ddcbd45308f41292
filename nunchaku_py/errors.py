"""The one exception of this package: a sentence that names the tensor, module or file it is about."""


class NunchakuError(ValueError):
    """Something the caller can mend; the message says what was expected and what was found."""
