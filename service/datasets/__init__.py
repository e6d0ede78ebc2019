"""Datasets: receiving an upload, the accepted forms of rows, the canonical files, and the API for them.
A new file format goes to `reader`, a new form of rows to `forms`, a new dialect of messages to `messages`."""
