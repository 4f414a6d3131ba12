-- Sampled sequences that their session may train on with stable_reinforce. Their tokens and heads lie in `request_body`, under
-- `recording/<key>`.
CREATE TABLE recording (position INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE, record BLOB NOT NULL);
