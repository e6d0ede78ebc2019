"""Selection jobs as the API sees them: the request and its parameters, creating, reading, streaming and rerunning.
What changes the state of a job is in `service.ledger`."""
