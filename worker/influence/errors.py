"""The error that is the user's to mend. A ValueError beside it is a mistake of the code that calls the core."""


class UnusableInput(ValueError):
    """The model, the samples, the optimiser's state or the options cannot be used; the message says why, and what to change."""
