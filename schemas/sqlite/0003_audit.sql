-- Who did what to which run, checkpoint or key.
CREATE TABLE audit (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record BLOB NOT NULL);
