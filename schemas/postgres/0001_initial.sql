-- One table for each record type. `position` is the order of insertion: an update keeps it, a new insertion gets a larger one.
-- `record` is the msgpack of a struct in tx_async/wire/records.py.

CREATE TABLE session (position bigint GENERATED ALWAYS AS IDENTITY UNIQUE, key text PRIMARY KEY, record bytea NOT NULL);
CREATE TABLE model (position bigint GENERATED ALWAYS AS IDENTITY UNIQUE, key text PRIMARY KEY, record bytea NOT NULL);
CREATE TABLE sampler (position bigint GENERATED ALWAYS AS IDENTITY UNIQUE, key text PRIMARY KEY, record bytea NOT NULL);
CREATE TABLE request (position bigint GENERATED ALWAYS AS IDENTITY UNIQUE, key text PRIMARY KEY, record bytea NOT NULL);
CREATE TABLE result (position bigint GENERATED ALWAYS AS IDENTITY UNIQUE, key text PRIMARY KEY, record bytea NOT NULL);
CREATE TABLE checkpoint (position bigint GENERATED ALWAYS AS IDENTITY UNIQUE, key text PRIMARY KEY, record bytea NOT NULL);

-- The body of a request, whatever its size.
CREATE TABLE request_body (
  key text PRIMARY KEY,
  num_bytes bigint NOT NULL,
  checksum bytea NOT NULL, -- blake2b, 16 bytes
  body bytea NOT NULL
);
-- Bodies hardly compress, and compressing them would cost more time than the commit.
ALTER TABLE request_body ALTER COLUMN body SET STORAGE EXTERNAL;
-- Bodies are large and short-lived: a few hundred dead ones are already worth a vacuum.
ALTER TABLE request_body SET (
  autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500,
  toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 5000
);

-- Who serves this journal: one row. The session's advisory lock decides; `instance` tells a server that lost its connection
-- whether another one has served in the meantime.
CREATE TABLE lease (
  id integer PRIMARY KEY CHECK (id = 1),
  instance text NOT NULL,
  host text NOT NULL,
  pid integer NOT NULL,
  since double precision NOT NULL -- seconds since the epoch
);
