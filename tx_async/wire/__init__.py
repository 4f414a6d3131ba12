"""Every struct that crosses a process border, and nothing else: it imports only `errors`."""
