"""Constants of the method, shared by the plan and the stages. The names of artifacts depend on those that affect them."""

COMPARED_LANDMARKS = 1024
"""Maximum landmarks on which candidate embeddings are compared: enough to distinguish them."""

SCALED_ON = 1024
"""Samples whose text gives the scales that all rows of a pool are embedded with: the first in the order of landmarks."""

MAX_LANDMARKS = 16_384
"""Maximum to which landmarks grow: their kernel matrix then takes 2 GiB."""

MAX_CENTRES = 4096
"""Exact samples that span the regression at most; the others are fitted all the same. Their kernel matrix takes 128 MiB, and a
fit, of which there is one after every round, takes time cubic in them."""

FITS_CHOSEN_ON = 2048
"""Exact samples on which kernel and ridge are chosen, at most."""

LANDMARKS_PER_DIRECTION = 8
"""Directions of curvature are sums of the gradients of this many times their number of landmarks."""

HELD_OUT_FROM = 16
"""Number of targets from which half are held out; half of fewer would be too few."""

VALIDATION_SAMPLES = 16
"""Maximum samples of a validation step, drawn from a larger selection: validation must cost little beside the job."""

KERNEL_ROWS = 4096
"""Samples predicted at a time: bounds the kernel block to so many rows, one column a landmark."""

LEAST_REFINE = 2.0
"""Times the budget that `size: auto` may always refine, whatever `max_cost` leaves: with one budget a selection has about two
thirds of the best one's gain (docs/decisions/0007-landmarks-and-embeddings.md)."""

UNKNOWN_COST_REFINE = 2.4
"""Times the budget that are refined where the cost of a model cannot be counted, so that no cap follows from it."""


def default_token_budget(device: str) -> int:
    """Tokens of a padded batch on `cpu` or another type of device, where the worker's settings name none.

    On a processor few, so that activations tend to stay in its cache (docs/decisions/0002-core-speed.md), on an accelerator
    enough to fill it.
    """
    return 512 if device == "cpu" else 16_384
