-- One table for each record type. `position` is the order of insertion: an update keeps it, a new insertion gets a larger one.
-- `record` is the msgpack of a struct in tx_async/wire/records.py.

CREATE TABLE session (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record BLOB NOT NULL);
CREATE TABLE model (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record BLOB NOT NULL);
CREATE TABLE sampler (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record BLOB NOT NULL);
CREATE TABLE request (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record BLOB NOT NULL);
CREATE TABLE result (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record BLOB NOT NULL);
CREATE TABLE checkpoint (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record BLOB NOT NULL);

-- The body of a request: small ones in `body`, large ones in the file `file` of the payload folder beside the database.
CREATE TABLE request_body (
  key TEXT PRIMARY KEY,
  num_bytes INTEGER NOT NULL,
  checksum BLOB NOT NULL, -- blake2b, 16 bytes
  body BLOB,
  file TEXT,
  CHECK ((body IS NULL) <> (file IS NULL))
);

-- Who serves this journal: one row, for people. The lock file beside the database decides.
CREATE TABLE lease (
  id INTEGER PRIMARY KEY CHECK (id = 1),
  instance TEXT NOT NULL,
  host TEXT NOT NULL,
  pid INTEGER NOT NULL,
  since REAL NOT NULL -- seconds since the epoch
);
