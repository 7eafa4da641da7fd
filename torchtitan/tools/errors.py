"""The one exception for mistakes that a user can mend."""


class UserError(ValueError):
    """Wrong config, data, checkpoint or environment.

    The message is one sentence that names the key or file, the value, the rule and the way out.
    `torchtitan.train.main` prints it without a traceback and exits with code 2.
    """
