"""HTTP in, validated structs out, and back. One file per resource; it owns no state."""
