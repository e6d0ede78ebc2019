"""Celery workers: a supervisor that claims units of work and writes their results, and a compute process that does them.
Only the compute process imports torch; only the supervisor has database credentials."""
