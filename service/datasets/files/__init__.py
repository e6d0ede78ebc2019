"""From the bytes of an upload to its rows: what kind of file it is, and its rows one after the other, under budgets.
It knows files, not what a row means."""
