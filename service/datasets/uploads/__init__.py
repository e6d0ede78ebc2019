"""Files that are sent in parts, so that a connection that breaks, or a client or server that ends, costs one part.

What a client sends is in the artifact store, part by part, until `POST /v1/datasets?upload=` makes a dataset of it."""
