"""The peers. Each module here runs in an environment of its own, where Headroom is not installed."""
