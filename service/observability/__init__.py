"""What an operator sees of a running service: metrics, logs and traces. No request and no unit depends on any of it."""
