"""What must work for the service to work: one list of checks (`checks`), which `/readyz`, `/metrics` and `winnow doctor` run.
It may look into every domain; nothing but the app and the doctor depends on it."""
