"""The API process behind its edge: the service, its rounds, its queues and the status page."""
