"""The embedded stack on one machine: PostgreSQL, Valkey, the API and workers under one process.
Also `winnow demo` and `winnow doctor`."""
