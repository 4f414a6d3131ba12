-- Sampled sequences that their session may train on with stable_reinforce. Their tokens and heads lie in `request_body`, under
-- `recording/<key>`.
CREATE TABLE recording (position bigint GENERATED ALWAYS AS IDENTITY UNIQUE, key text PRIMARY KEY, record bytea NOT NULL);
