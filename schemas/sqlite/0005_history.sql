-- Numbers of each training run's optimizer steps, in blocks of rows.
CREATE TABLE history (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record BLOB NOT NULL);
