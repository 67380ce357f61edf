-- What operators do, and what old rows are kept for. Lock order and conventions: 0003.
--
-- Works with the previous release: functions that it calls take what they took and answer at least what
-- they answered; columns and indexes are only added.

-- The task that a dead letter went back as; null: its own, or not replayed.
alter table public.dead_letters add column replayed_as uuid;

-- What purge_old walks along, oldest first.
create index outbox_sent on public.outbox (sent_at) where sent_at is not null;
create index run_steps_age on public.run_steps (created_at);
create index if not exists architect_in_age on public.architect_in (created_at);

-- atlas_run_record(run): a run as `atlas runs` shows it.
create or replace function public.atlas_run_record(r public.runs) returns jsonb
language sql stable
as $$ select to_jsonb(r) - 'claim_id' - 'finished_attempt' $$;

-- list_runs({status, tenant, error_code, since, limit})
-- The newest runs first; a filter that is null lets everything through. `since` looks at the end of a
-- finished run and at the start of another one. Reads only.
create or replace function public.list_runs(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$
  select coalesce(jsonb_agg(public.atlas_run_record(r) order by r.created_at desc, r.task_id), '[]')
    from (
      select * from public.runs
       where (args ->> 'status' is null or status = args ->> 'status')
         and (args ->> 'tenant' is null or tenant = args ->> 'tenant')
         and (args ->> 'error_code' is null or error_code = args ->> 'error_code')
         and (args ->> 'since' is null or coalesce(ended_at, created_at) >= (args ->> 'since')::timestamptz)
       order by created_at desc, task_id
       limit least((args ->> 'limit')::numeric, 10000)::integer
    ) as r
$$;

-- get_run({task_id})
-- One run with everything that is stored of it, or null. The request is null once purge_old took it.
-- Reads only.
create or replace function public.get_run(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$
  select jsonb_build_object(
      'run', public.atlas_run_record(r),
      'request', (select data from public.architect_in where id = r.task_id),
      'answer', (select data from public.architect_out where id = r.task_id and r.ended_at is not null),
      'steps', public.atlas_steps(r.task_id),
      'ledger', (
        select coalesce(jsonb_agg(to_jsonb(l) order by l.created_at, l.id), '[]')
          from (
            select id, day, attempt, model, kind, state, reserved, actual, created_at, closed_at
              from public.token_ledger
             where task_id = r.task_id
             order by created_at desc, id desc
             limit 200
          ) as l
      ),
      'unsent', exists (select from public.outbox where task_id = r.task_id and sent_at is null)
    )
    from public.runs as r
   where r.task_id = (args ->> 'task_id')::uuid
$$;

-- wake_run({task_id})
-- Makes a waiting run due now: a deferred one asks for its tokens again, a queued one need not wait for its
-- time. Touches no lease and no final run. Outcome: due, running, final or unknown.
-- Takes: the run.
create function public.wake_run(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_run public.runs;
begin
  select * into v_run from public.runs where task_id = (args ->> 'task_id')::uuid for update;
  if not found then
    return '"unknown"';
  elsif v_run.ended_at is not null then
    return '"final"';
  elsif v_run.status = 'running' then
    -- A sweep takes an expired lease by itself.
    return case when v_run.lease_until > public.atlas_now() then '"running"' else '"due"' end::jsonb;
  end if;
  update public.runs set status = 'queued', not_before = null, tokens_needed = null
   where task_id = v_run.task_id;
  return '"due"';
end
$$;

-- atlas_dead_letter(letter): a dead letter without its bytes.
create function public.atlas_dead_letter(d public.dead_letters) returns jsonb
language sql stable
as $$
  select to_jsonb(d) - 'raw' - 'attributes' || jsonb_build_object('bytes', octet_length(d.raw))
$$;

-- list_dead_letters({reason, replayed, since, limit})
-- The newest first, without their bytes; a filter that is null lets everything through. Reads only.
create function public.list_dead_letters(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$
  select coalesce(jsonb_agg(public.atlas_dead_letter(d) order by d.received_at desc, d.id), '[]')
    from (
      select * from public.dead_letters
       where (args ->> 'reason' is null or reason = args ->> 'reason')
         and (args ->> 'replayed' is null or (replayed_at is not null) = (args ->> 'replayed')::boolean)
         and (args ->> 'since' is null or received_at >= (args ->> 'since')::timestamptz)
       order by received_at desc, id
       limit least((args ->> 'limit')::numeric, 10000)::integer
    ) as d
$$;

-- get_dead_letter({id})
-- One dead letter with its bytes, or null. Reads only.
create function public.get_dead_letter(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$
  select jsonb_build_object(
      'letter', public.atlas_dead_letter(d),
      'raw_base64', replace(encode(d.raw, 'base64'), E'\n', ''),
      'attributes', d.attributes
    )
    from public.dead_letters as d
   where d.id = (args ->> 'id')::uuid
$$;

-- mark_replayed({id, replayed_as})
-- Notes that a dead letter went back to the queue. False: there is none. Idempotent.
-- Takes: the dead letter.
create function public.mark_replayed(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
begin
  update public.dead_letters
     set replayed_at = public.atlas_now(), replayed_as = (args ->> 'replayed_as')::uuid
   where id = (args ->> 'id')::uuid;
  return to_jsonb(found);
end
$$;

-- purge_dead_letters({ids, reason, older_than_ms, unreplayed, dry_run, limit})
-- Deletes dead letters that fit every filter that is not null, the oldest first, and says how many. Ones that
-- were not replayed only if `unreplayed` says so. With dry_run it only counts.
-- Takes: dead letters with SKIP LOCKED.
create function public.purge_dead_letters(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_all uuid[] := case jsonb_typeof(args -> 'ids')
    when 'array' then array(select jsonb_array_elements_text(args -> 'ids')::uuid)
  end;
  v_ids uuid[];
begin
  select array_agg(d.id) into v_ids
    from (
      select id from public.dead_letters
       where (v_all is null or id = any (v_all))
         and (args ->> 'reason' is null or reason = args ->> 'reason')
         and (args ->> 'older_than_ms' is null
              or received_at < public.atlas_now() - public.atlas_interval(args -> 'older_than_ms'))
         and (replayed_at is not null or coalesce((args ->> 'unreplayed')::boolean, false))
       order by received_at, id
       limit least((args ->> 'limit')::numeric, 10000)::integer
         for update skip locked
    ) as d;
  if not coalesce((args ->> 'dry_run')::boolean, false) then
    delete from public.dead_letters where id = any (v_ids);
  end if;
  return to_jsonb(coalesce(cardinality(v_ids), 0));
end
$$;

-- budget_history({days, limits: {daily}})
-- The accounts of the last days, today's included, newest first. `assumed`, `chat` and `embedding` come from
-- the ledger, and are null where purge_old has taken rows of that day. Reads only.
create function public.budget_history(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$
  select coalesce(
      jsonb_agg(
        jsonb_build_object(
          'day', d.day,
          'scope', d.scope,
          'limit', case
            when d.scope = 'global' and d.day = public.atlas_today()
              then coalesce((select daily_limit from public.fleet_settings),
                            public.atlas_tokens(args #> '{limits,daily}'))
            else d.limit_tokens
          end,
          'used', d.used,
          'reserved', d.reserved,
          'assumed', case when l.actual is not distinct from d.used then l.assumed end,
          'chat', case when l.actual is not distinct from d.used then l.chat end,
          'embedding', case when l.actual is not distinct from d.used then l.embedding end
        ) order by d.day desc, d.scope <> 'global', d.scope
      ),
      '[]'
    )
    from public.token_days as d
         cross join lateral (
           select coalesce(sum(b.actual), 0)::bigint as actual,
                  coalesce(sum(b.actual) filter (where b.state = 'assumed'), 0)::bigint as assumed,
                  coalesce(sum(b.actual) filter (where b.kind = 'chat'), 0)::bigint as chat,
                  coalesce(sum(b.actual) filter (where b.kind = 'embedding'), 0)::bigint as embedding
             from public.token_ledger as b
            where b.day = d.day and (d.scope = 'global' or b.scope = d.scope)
         ) as l
   where d.day > public.atlas_today() - least((args ->> 'days')::numeric, 3660)::integer
$$;

-- purge_old({outbox_ms, steps_ms, requests_ms, ledger_ms, dead_letters_ms, limit})
-- Deletes what nobody needs any more, at most `limit` rows of each kind, and says how many of each; a null age
-- keeps that kind for ever. Guarantees: runs, results and day accounts stay, so a run that is final stays final
-- however late its message comes again; nothing of a run that is not final goes; no unsent answer, no open
-- reservation, no dead letter that was not replayed goes.
-- Takes: each kind's rows with SKIP LOCKED, so it never waits and nobody waits long for it.
create function public.purge_old(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_now timestamptz := public.atlas_now();
  v_limit integer := least((args ->> 'limit')::numeric, 10000)::integer;
  v_count bigint;
  v_gone jsonb := '{}';
begin
  with old as (
    select id from public.outbox
     where sent_at < v_now - public.atlas_interval(args -> 'outbox_ms')
     order by sent_at limit v_limit for update skip locked
  )
  delete from public.outbox as o using old where o.id = old.id;
  get diagnostics v_count = row_count;
  v_gone := v_gone || jsonb_build_object('outbox', v_count);

  with old as (
    select s.task_id, s.step
      from public.run_steps as s join public.runs as r on r.task_id = s.task_id
     where s.created_at < v_now - public.atlas_interval(args -> 'steps_ms')
       and r.ended_at < v_now - public.atlas_interval(args -> 'steps_ms')
     order by s.created_at limit v_limit for update of s skip locked
  )
  delete from public.run_steps as s using old where s.task_id = old.task_id and s.step = old.step;
  get diagnostics v_count = row_count;
  v_gone := v_gone || jsonb_build_object('steps', v_count);

  with old as (
    select i.id
      from public.architect_in as i join public.runs as r on r.task_id = i.id
     where i.created_at < v_now - public.atlas_interval(args -> 'requests_ms')
       and r.ended_at < v_now - public.atlas_interval(args -> 'requests_ms')
     order by i.created_at limit v_limit for update of i skip locked
  )
  delete from public.architect_in as i using old where i.id = old.id;
  get diagnostics v_count = row_count;
  v_gone := v_gone || jsonb_build_object('requests', v_count);

  with old as (
    select l.id
      from public.token_ledger as l
     where l.day < ((v_now - public.atlas_interval(args -> 'ledger_ms')) at time zone 'UTC')::date
       and l.state <> 'reserved'
       and not exists (select from public.runs as r where r.task_id = l.task_id and r.ended_at is null)
     order by l.day limit v_limit for update of l skip locked
  )
  delete from public.token_ledger as l using old where l.id = old.id;
  get diagnostics v_count = row_count;
  v_gone := v_gone || jsonb_build_object('ledger', v_count);

  with old as (
    select id from public.dead_letters
     where replayed_at < v_now - public.atlas_interval(args -> 'dead_letters_ms')
     order by replayed_at limit v_limit for update skip locked
  )
  delete from public.dead_letters as d using old where d.id = old.id;
  get diagnostics v_count = row_count;
  return v_gone || jsonb_build_object('dead_letters', v_count);
end
$$;

-- store_check({})
-- Says which schema this is: an older one than a worker needs stops that worker's start. Reads only.
create or replace function public.store_check(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$ select jsonb_build_object('schema_version', 2, 'now', public.atlas_now()) $$;

revoke all on function
  public.atlas_dead_letter(public.dead_letters), public.wake_run(jsonb), public.list_dead_letters(jsonb),
  public.get_dead_letter(jsonb), public.mark_replayed(jsonb), public.purge_dead_letters(jsonb),
  public.budget_history(jsonb), public.purge_old(jsonb)
from public, anon, authenticated, service_role;

grant execute on function
  public.wake_run(jsonb), public.list_dead_letters(jsonb), public.get_dead_letter(jsonb),
  public.mark_replayed(jsonb), public.purge_dead_letters(jsonb), public.budget_history(jsonb),
  public.purge_old(jsonb)
to service_role;
