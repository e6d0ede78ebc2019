"""The HTTP API and everything that is remembered. Never imports torch and never imports `worker`."""
