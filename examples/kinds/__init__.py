"""The sample kinds of the example data, grouped by flavour."""
