-- Which base model and which storage this journal belongs to: one row, written before the first run.
CREATE TABLE identity (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record BLOB NOT NULL);

-- Every commit names the epoch of the server that makes it, and counts: 0 rows mean that another server has served this
-- journal since, or that an older state of it was put back.
ALTER TABLE lease ADD COLUMN epoch INTEGER NOT NULL DEFAULT 0;
ALTER TABLE lease ADD COLUMN commits INTEGER NOT NULL DEFAULT 0;
ALTER TABLE lease ADD COLUMN renewed_at REAL NOT NULL DEFAULT 0; -- seconds since the epoch; used where no lock holds
