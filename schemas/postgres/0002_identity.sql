-- Which base model and which storage this journal belongs to: one row, written before the first run.
CREATE TABLE identity (position bigint GENERATED ALWAYS AS IDENTITY UNIQUE, key text PRIMARY KEY, record bytea NOT NULL);

-- Every commit names the epoch of the server that makes it, and counts: 0 rows mean that another server has served this
-- journal since, or that an older state of it was put back.
ALTER TABLE lease ADD COLUMN epoch bigint NOT NULL DEFAULT 0;
ALTER TABLE lease ADD COLUMN commits bigint NOT NULL DEFAULT 0;
ALTER TABLE lease ADD COLUMN renewed_at double precision NOT NULL DEFAULT 0; -- seconds since the epoch; used where no lock holds
