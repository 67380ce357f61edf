-- What is stored. Writes go through the functions of the later migrations only; service_role may read
-- the tables, anon and authenticated may do nothing at all. To let an application's users read their
-- own results, add a policy and a grant of your own on architect_out.

-- Requests and results, in the shape that existing readers know: (id, data, created_at). They may be
-- older than Atlas, so they are created only where they are missing.
create table if not exists public.architect_in (
  id         uuid primary key,
  data       jsonb not null,
  created_at timestamptz not null default pg_catalog.now()
);

create table if not exists public.architect_out (
  id         uuid primary key,
  data       jsonb not null,
  created_at timestamptz not null default pg_catalog.now()
);

do $$
declare
  v_table text;
begin
  if not exists (select from pg_catalog.pg_publication where pubname = 'architect_bus') then
    create publication architect_bus;
  end if;
  foreach v_table in array array['architect_in', 'architect_out'] loop
    if not exists (
      select from pg_catalog.pg_publication_tables
       where pubname = 'architect_bus' and schemaname = 'public' and tablename = v_table
    ) then
      execute format('alter publication architect_bus add table public.%I', v_table);
    end if;
  end loop;
end
$$;

-- One row a task. `attempt` is the fencing token: it grows with every claim, and whoever writes names it.
create table public.runs (
  task_id           uuid primary key,
  status            text not null check (status in ('queued', 'running', 'deferred', 'done', 'failed')),
  attempt           integer not null default 0,
  claim_id          uuid,                        -- the delivery that holds the lease: makes a claim's retry safe
  lease_owner       text,
  lease_until       timestamptz,
  not_before        timestamptz,
  tokens_needed     bigint,                      -- what a deferred run was denied
  deferrals         integer not null default 0,  -- attempts that ended as deferred: no failures
  cancel_requested  boolean not null default false,
  finished_attempt  integer,                     -- the attempt that finished it; null: cancelled or dead-lettered
  tenant            text,
  requester         text,
  model             text,
  tokens_prompt     bigint not null default 0,   -- billed; what is only assumed is in token_ledger
  tokens_completion bigint not null default 0,
  created_at        timestamptz not null,
  started_at        timestamptz,
  ended_at          timestamptz,
  error_code        text,
  error_message     text,
  -- A lease belongs to a running run, and to no other.
  constraint runs_lease check ((status = 'running') = (lease_until is not null)),
  constraint runs_final check ((status in ('done', 'failed')) = (ended_at is not null))
);

create index runs_open on public.runs (created_at, task_id) where ended_at is null;
create index runs_newest on public.runs (created_at desc, task_id);
create index runs_ended on public.runs (ended_at) where ended_at is not null;

-- What a run's finished steps brought: a model call that is in here is never paid again.
create table public.run_steps (
  task_id    uuid not null references public.runs (task_id),
  step       text not null,
  seq        integer not null,
  input_hash text not null,
  output     jsonb not null,
  usage      jsonb not null,
  created_at timestamptz not null,
  primary key (task_id, step)
);

-- The accounts: scope `global` counts everything, scope `tenant:NAME` what that tenant used. A tenant
-- without a limit_tokens has no limit; a new day starts with the last one set.
-- The rows are hot: room in the page keeps their updates out of the index.
create table public.token_days (
  day          date not null,
  scope        text not null,
  limit_tokens bigint,
  reserved     bigint not null default 0 check (reserved >= 0),
  used         bigint not null default 0 check (used >= 0),
  primary key (day, scope)
) with (fillfactor = 30);

create index token_days_scope on public.token_days (scope, day desc);

-- The books: one row a model call. Every row counts in the `global` account of its day, and in its
-- tenant's if `scope` names one. The sums of this table equal token_days at every commit.
create table public.token_ledger (
  id                uuid primary key,
  day               date not null,
  scope             text not null,
  task_id           uuid,
  attempt           integer,
  model             text not null,
  kind              text not null check (kind in ('chat', 'embedding')),
  reserved          bigint not null check (reserved >= 0),
  actual            bigint not null default 0 check (actual >= 0),
  tokens_prompt     bigint not null default 0,
  tokens_completion bigint not null default 0,
  state             text not null check (state in ('reserved', 'settled', 'released', 'assumed')),
  created_at        timestamptz not null,
  closed_at         timestamptz
);

create index token_ledger_task on public.token_ledger (task_id) where task_id is not null;
create index token_ledger_open on public.token_ledger (created_at) where state = 'reserved';
create index token_ledger_day on public.token_ledger (day, scope);

-- Messages that wait to be published. At most one final answer a task, by index.
create table public.outbox (
  id         uuid primary key,
  seq        bigint generated always as identity,
  task_id    uuid not null,
  attempt    integer,
  final      boolean not null default false,
  topic      text not null,
  message    jsonb not null,
  attributes jsonb not null,
  created_at timestamptz not null,
  held_until timestamptz,
  sent_at    timestamptz
);

create index outbox_unsent on public.outbox (seq) where sent_at is null;
create index outbox_task on public.outbox (task_id);
create unique index outbox_one_final on public.outbox (task_id) where final;

-- Messages that nobody can work on, byte for byte.
create table public.dead_letters (
  id          uuid primary key,
  source      text not null,
  reason      text not null,
  detail      text not null,
  raw         bytea not null,
  attributes  jsonb not null,
  task_id     uuid,
  received_at timestamptz not null,
  replayed_at timestamptz
);

create index dead_letters_waiting on public.dead_letters (received_at) where replayed_at is null;

-- One row: what control messages change for the whole fleet. Null means: each process's own setting.
create table public.fleet_settings (
  only_row         boolean primary key default true check (only_row),
  daily_limit      bigint,
  run_limit        bigint,
  paused           boolean not null default false,
  cache_generation bigint not null default 0
);

insert into public.fleet_settings default values;

-- What was processed in the last 48 hours, for consumers that dedupe.
create view public.processed_msgs with (security_invoker = true) as
  select task_id as msg_id, status, attempt, ended_at as processed_at
    from public.runs
   where ended_at > pg_catalog.now() - interval '48 hours';

-- Least privilege. Supabase grants everything on new tables to all three roles by default, and relies
-- on row level security; here both must hold, each for itself.
do $$
declare
  v_table text;
begin
  foreach v_table in array array[
    'architect_in', 'architect_out', 'runs', 'run_steps', 'token_days', 'token_ledger', 'outbox',
    'dead_letters', 'fleet_settings'
  ] loop
    execute format('alter table public.%I enable row level security', v_table);
    execute format('revoke all on public.%I from public, anon, authenticated, service_role', v_table);
    execute format('grant select on public.%I to service_role', v_table);
    execute format('drop policy if exists atlas_service_role_reads on public.%I', v_table);
    execute format(
      'create policy atlas_service_role_reads on public.%I for select to service_role using (true)', v_table
    );
  end loop;
end
$$;

revoke all on public.processed_msgs from public, anon, authenticated, service_role;
grant select on public.processed_msgs to service_role;
