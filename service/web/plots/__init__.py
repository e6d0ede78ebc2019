"""Pictures of a result: pure functions from numbers to `Chart`, an accessible inline SVG with its table.

`scales` is below `svg`, and on these stand the kinds of plots: `histogram`, `scatter`, `bars`, `lines`.
"""
