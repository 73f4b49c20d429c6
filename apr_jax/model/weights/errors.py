"""The error of folders and files that hold no model which this project can run."""

from apr_jax.files import FileError


class HuggingFaceError(FileError):
    """A folder that is not a model which this project can run. The message names the file and what is wrong with it."""
