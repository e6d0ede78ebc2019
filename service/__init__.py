"""The HTTP API and everything that is stored: one package for each domain, and the rooms that they share.
Never imports torch and never imports `worker`."""
