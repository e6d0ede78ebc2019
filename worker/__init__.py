"""Celery workers: a supervisor that holds the lease on a unit, and a compute child that does it."""
