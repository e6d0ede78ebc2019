"""The compute process: the supervisor's handle on it, and its main loop.
It speaks JSON lines over its standard streams and has no credentials."""
