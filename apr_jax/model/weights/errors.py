"""The error of folders and files that hold no model which this project can run."""


class HuggingFaceError(ValueError):
    """A folder that is not a model which this project can run. The message names the file and what is wrong with it."""
