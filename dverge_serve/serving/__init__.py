"""The HTTP service: routes, requests and responses, batching, reload, observability."""
