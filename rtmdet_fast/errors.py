"""The one exception for mistakes a user can make: the command line prints it and exits with code 2."""


class UserError(ValueError):
    """Bad input, told in one sentence that names the file or argument and what to do."""
