-- Numbers of each training run's optimizer steps, in blocks of rows.
CREATE TABLE history (position bigint GENERATED ALWAYS AS IDENTITY UNIQUE, key text PRIMARY KEY, record bytea NOT NULL);
