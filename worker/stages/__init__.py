"""The stages of a job, one file each: a stage reads artifacts, calls the numerical core and writes one artifact.
Which stages a job has is decided in `service.plan`; no stage knows the database."""
