"""What the server knows, on disk: SQLite or PostgreSQL behind one protocol."""
