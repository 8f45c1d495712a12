"""The HTTP service: `/v1/videos` and its page. Start at `server.run`."""
