"""Files and secrets at rest: the content-addressed artifact store, temporary folders, encryption.
Nothing here knows what the bytes mean."""
