-- The file as Atlas makes it with PRAGMA user_version = 4; kept to test upgrades from it.

-- The store's tables in the embedded file. The same tables and names as in migrations/ (the truth),
-- with SQLite's types: times are microseconds since the epoch, days are 'YYYY-MM-DD' in UTC, JSON and
-- UUIDs are text.

CREATE TABLE IF NOT EXISTS architect_in (
    id         TEXT PRIMARY KEY,
    data       TEXT NOT NULL,
    created_at INTEGER NOT NULL
) STRICT;

CREATE TABLE IF NOT EXISTS architect_out (
    id         TEXT PRIMARY KEY,
    data       TEXT NOT NULL,
    created_at INTEGER NOT NULL
) STRICT;

CREATE TABLE IF NOT EXISTS runs (
    task_id           TEXT PRIMARY KEY,
    status            TEXT NOT NULL CHECK (status IN ('queued', 'running', 'deferred', 'done', 'failed')),
    attempt           INTEGER NOT NULL DEFAULT 0,
    claim_id          TEXT,
    lease_owner       TEXT,
    lease_until       INTEGER,
    not_before        INTEGER,
    tokens_needed     INTEGER,
    deferrals         INTEGER NOT NULL DEFAULT 0,
    cancel_requested  INTEGER NOT NULL DEFAULT 0,
    finished_attempt  INTEGER,
    tenant            TEXT,
    requester         TEXT,
    model             TEXT,
    tokens_prompt     INTEGER NOT NULL DEFAULT 0,
    tokens_completion INTEGER NOT NULL DEFAULT 0,
    created_at        INTEGER NOT NULL,
    started_at        INTEGER,
    ended_at          INTEGER,
    error_code        TEXT,
    error_message     TEXT,
    -- A lease belongs to a running run, and to no other.
    CHECK ((status = 'running') = (lease_until IS NOT NULL)),
    CHECK ((status IN ('done', 'failed')) = (ended_at IS NOT NULL))
) STRICT;

CREATE INDEX IF NOT EXISTS runs_open ON runs (created_at, task_id) WHERE ended_at IS NULL;
CREATE INDEX IF NOT EXISTS runs_newest ON runs (created_at DESC, task_id);

-- Tasks that were cancelled before their message came. Few, and not for long: each one clears old ones away.
CREATE TABLE IF NOT EXISTS early_cancels (
    task_id    TEXT PRIMARY KEY,
    created_at INTEGER NOT NULL
) STRICT;

CREATE INDEX IF NOT EXISTS early_cancels_age ON early_cancels (created_at);

CREATE TABLE IF NOT EXISTS run_steps (
    task_id    TEXT NOT NULL REFERENCES runs (task_id),
    step       TEXT NOT NULL,
    seq        INTEGER NOT NULL,
    input_hash TEXT NOT NULL,
    output     TEXT NOT NULL,
    usage      TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (task_id, step)
) STRICT;

CREATE TABLE IF NOT EXISTS token_days (
    day          TEXT NOT NULL,
    scope        TEXT NOT NULL,
    limit_tokens INTEGER,
    reserved     INTEGER NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    used         INTEGER NOT NULL DEFAULT 0 CHECK (used >= 0),
    PRIMARY KEY (day, scope)
) STRICT;

CREATE INDEX IF NOT EXISTS token_days_scope ON token_days (scope, day DESC);

CREATE TABLE IF NOT EXISTS token_ledger (
    id                TEXT PRIMARY KEY,
    day               TEXT NOT NULL,
    scope             TEXT NOT NULL,
    task_id           TEXT,
    attempt           INTEGER,
    model             TEXT NOT NULL,
    kind              TEXT NOT NULL CHECK (kind IN ('chat', 'embedding')),
    reserved          INTEGER NOT NULL CHECK (reserved >= 0),
    actual            INTEGER NOT NULL DEFAULT 0 CHECK (actual >= 0),
    tokens_prompt     INTEGER NOT NULL DEFAULT 0,
    tokens_completion INTEGER NOT NULL DEFAULT 0,
    state             TEXT NOT NULL CHECK (state IN ('reserved', 'settled', 'released', 'assumed')),
    created_at        INTEGER NOT NULL,
    closed_at         INTEGER
) STRICT;

CREATE INDEX IF NOT EXISTS token_ledger_task ON token_ledger (task_id) WHERE task_id IS NOT NULL;
CREATE INDEX IF NOT EXISTS token_ledger_open ON token_ledger (created_at) WHERE state = 'reserved';

CREATE TABLE IF NOT EXISTS outbox (
    seq        INTEGER PRIMARY KEY AUTOINCREMENT,
    id         TEXT NOT NULL UNIQUE,
    task_id    TEXT NOT NULL,
    attempt    INTEGER,
    final      INTEGER NOT NULL DEFAULT 0,
    topic      TEXT NOT NULL,
    -- '' in a final row since version 4: the answer is in architect_out.
    message    TEXT NOT NULL,
    attributes TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    held_until INTEGER,
    sent_at    INTEGER
) STRICT;

CREATE INDEX IF NOT EXISTS outbox_unsent ON outbox (seq) WHERE sent_at IS NULL;
CREATE INDEX IF NOT EXISTS outbox_task ON outbox (task_id);
CREATE UNIQUE INDEX IF NOT EXISTS outbox_one_final ON outbox (task_id) WHERE final;

CREATE TABLE IF NOT EXISTS dead_letters (
    id          TEXT PRIMARY KEY,
    source      TEXT NOT NULL,
    reason      TEXT NOT NULL,
    detail      TEXT NOT NULL,
    raw         TEXT NOT NULL,
    attributes  TEXT NOT NULL,
    task_id     TEXT,
    received_at INTEGER NOT NULL,
    replayed_at INTEGER,
    replayed_as TEXT
) STRICT;

-- What purge_old walks along, oldest first.
CREATE INDEX IF NOT EXISTS outbox_sent ON outbox (sent_at) WHERE sent_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS run_steps_age ON run_steps (created_at);
CREATE INDEX IF NOT EXISTS architect_in_age ON architect_in (created_at);
CREATE INDEX IF NOT EXISTS token_ledger_day ON token_ledger (day, scope);

CREATE INDEX IF NOT EXISTS dead_letters_waiting ON dead_letters (received_at) WHERE replayed_at IS NULL;

-- One row: what control messages change for the whole fleet. NULL means: each process's own setting.
CREATE TABLE IF NOT EXISTS fleet_settings (
    only_row         INTEGER PRIMARY KEY CHECK (only_row = 1),
    daily_limit      INTEGER,
    run_limit        INTEGER,
    paused           INTEGER NOT NULL DEFAULT 0,
    cache_generation INTEGER NOT NULL DEFAULT 0
) STRICT;

INSERT OR IGNORE INTO fleet_settings (only_row) VALUES (1);
