-- Who did what to which run, checkpoint or key.
CREATE TABLE audit (position bigint GENERATED ALWAYS AS IDENTITY UNIQUE, key text PRIMARY KEY, record bytea NOT NULL);
