"""The pages: what a person sees of the service in a browser. Rendered here, of what the domains' services answer in process; what
a page changes goes through the same functions as the API's calls. Addresses are below `/`, beside `/v1`, and in no document."""
