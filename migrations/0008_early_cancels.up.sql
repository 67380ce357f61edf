-- A cancel that comes before its request takes hold. Lock order and conventions: 0003.
--
-- Works with the previous release: the functions take what they took; `cancel_run` of an unknown task now says
-- true, because it takes hold.

-- Tasks that were cancelled before their message came. Few, and not for long: each one clears old ones away.
create table public.early_cancels (
  task_id    uuid primary key,
  created_at timestamptz not null
);

create index early_cancels_age on public.early_cancels (created_at);

alter table public.early_cancels enable row level security;
revoke all on public.early_cancels from public, anon, authenticated, service_role;
grant select on public.early_cancels to service_role;
create policy atlas_service_role_reads on public.early_cancels for select to service_role using (true);

-- claim_run({task_id, claim_id, message, tenant, requester, worker, lease_ms})
-- Stores the request if it is new and gives its run to the worker if it is free. Guarantees: at most one
-- live lease a task; a request is durable when this returns, whatever the outcome; the same claim_id gets
-- the same attempt again, so a claim whose answer was lost may be retried; a task that was cancelled before is
-- claimed with cancel_requested, also while the fleet is paused: it is only to be answered.
-- Takes: the run (its insert waits for another insert of the same task), its early cancel, then as
-- atlas_assume_open.
create or replace function public.claim_run(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_task uuid := (args ->> 'task_id')::uuid;
  v_claim uuid := (args ->> 'claim_id')::uuid;
  v_lease interval := public.atlas_interval(args -> 'lease_ms');
  v_now timestamptz := public.atlas_now();
  v_run public.runs;
begin
  insert into public.runs (task_id, status, tenant, requester, created_at)
  values (v_task, 'queued', args ->> 'tenant', args ->> 'requester', v_now)
  on conflict (task_id) do nothing;
  if found then
    insert into public.architect_in (id, data, created_at)
    values (v_task, args -> 'message', v_now)
    on conflict (id) do nothing;
    delete from public.early_cancels where task_id = v_task;
    if found then
      -- From here on the run remembers it.
      update public.runs set cancel_requested = true where task_id = v_task;
    end if;
  end if;
  select * into strict v_run from public.runs where task_id = v_task for update;

  if v_run.ended_at is not null then
    return jsonb_build_object(
      'outcome', 'finished',
      'unsent', exists (select from public.outbox where task_id = v_task and sent_at is null)
    );
  elsif v_run.status = 'running' and v_run.claim_id = v_claim then
    -- A retry of a claim whose answer was lost: the same attempt, with a fresh lease.
    update public.runs set lease_until = v_now + v_lease where task_id = v_task;
    return jsonb_build_object('outcome', 'claimed') || public.atlas_claimed_run(v_task, false);
  elsif (v_run.status = 'running' and v_run.lease_until > v_now)
     or v_run.status = 'deferred'
     or (not v_run.cancel_requested and (select paused from public.fleet_settings)) then
    return jsonb_build_object('outcome', 'held');
  end if;

  perform public.atlas_take(array[v_task], args ->> 'worker', v_claim, v_lease);
  return jsonb_build_object('outcome', 'claimed')
    || public.atlas_claimed_run(v_task, v_run.status = 'running');
end
$$;

-- cancel_run({task_id, topic, answer, attributes})
-- Fails a run that nobody works on; tells the holder of a live lease at its next renewal; remembers the cancel
-- of a task that has no run for 32 days, longer than Pub/Sub keeps a message. False: final.
-- Takes: the run (its insert waits for another insert of the same task), then early cancels with SKIP LOCKED, or
-- as atlas_assume_open.
create or replace function public.cancel_run(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_task uuid := (args ->> 'task_id')::uuid;
  v_now timestamptz := public.atlas_now();
  v_run public.runs;
begin
  select * into v_run from public.runs where task_id = v_task for update;
  if not found then
    -- A row that is gone again when this commits: a claim of the same moment waits for it, or this for the claim.
    -- So whichever comes second sees the first.
    insert into public.runs (task_id, status, created_at) values (v_task, 'queued', v_now)
    on conflict (task_id) do nothing;
    if found then
      delete from public.runs where task_id = v_task;
      insert into public.early_cancels (task_id, created_at) values (v_task, v_now)
      on conflict (task_id) do nothing;
      with old as (
        select task_id from public.early_cancels
         where created_at < v_now - interval '32 days'
         order by created_at limit 100 for update skip locked
      )
      delete from public.early_cancels as c using old where c.task_id = old.task_id;
      return 'true';
    end if;
    select * into strict v_run from public.runs where task_id = v_task for update;
  end if;

  if v_run.ended_at is not null then
    return 'false';
  elsif v_run.status = 'running' and v_run.lease_until > v_now then
    update public.runs set cancel_requested = true where task_id = v_task;
    return 'true';
  end if;
  perform public.atlas_end_run(
    v_task, 'failed', null, 'cancelled',
    case jsonb_typeof(args #> '{answer,content}') when 'string' then args #>> '{answer,content}' end,
    null, args -> 'answer'
  );
  perform public.atlas_put_outbox(
    v_task, null, true, args ->> 'topic', args -> 'answer', args -> 'attributes', null
  );
  return 'true';
end
$$;

-- store_check({})
-- Says which schema this is: an older one than a worker needs stops that worker's start. Reads only.
create or replace function public.store_check(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$ select jsonb_build_object('schema_version', 3, 'now', public.atlas_now()) $$;
