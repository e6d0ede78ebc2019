"""The database itself: engine, sessions, advisory locks, pages, the loop that listens, migrations.
Tables belong to the domain that owns them, in its `tables.py`."""
