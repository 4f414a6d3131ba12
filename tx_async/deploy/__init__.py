"""`tx-async deploy`: files that start a server elsewhere, filled in with the settings given."""
