"""Commands of `winnow` for operators: migrations, API keys, retention, diagnosis.
They read the settings from the environment, as the API and the workers do."""
