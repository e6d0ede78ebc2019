"""What pictures of a result are drawn from (`service.results.chart_schemas`), made when it is published.

All is made of whole arrays of the pool at some bytes a sample, and of embeddings only the rows that are shown. The same job gives
the same figures: what is drawn is drawn from its seed, and figures are rounded to five significant digits.
"""

from worker.charts.read import read, stages

__all__ = ["read", "stages"]
