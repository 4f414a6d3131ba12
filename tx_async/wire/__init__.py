"""Every struct that crosses a border, and nothing else: imports only `errors`."""
