"""What is deleted, and when: expired jobs, artifacts that no job needs, abandoned temporary files.
One pass is a function; `service.background` runs it."""
