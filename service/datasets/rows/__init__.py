"""From the fields of a row to its canonical sample: the known columns, messages in full, templates over a row.
It knows rows, not the files that they come from, but for batches of columns."""
