"""A summary, and how it is shown."""
