"""Models that a job may name: registered folders, and Hugging Face Hub repositories pinned to a commit.
Loading them is the worker's task (`worker.loading`)."""
