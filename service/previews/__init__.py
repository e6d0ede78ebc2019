"""The rows of a dataset, also as a model sees them: rendered by a worker, since the API has no tokenizer."""
