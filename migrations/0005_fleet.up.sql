-- The fleet as a whole: outbox, dead letters, shared settings. Lock order and conventions: 0003.

-- outbox_take({limit, hold_ms})
-- Lends unsent messages to the caller, oldest first: no other caller gets them until the hold is over. So a
-- message is sent at least once, and seldom twice.
-- Takes: outbox with SKIP LOCKED, by seq.
create function public.outbox_take(args jsonb) returns jsonb
language sql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
  with due as materialized (
    select id from public.outbox
     where sent_at is null and coalesce(held_until, '-infinity') <= public.atlas_now()
     order by seq
     limit least((args ->> 'limit')::numeric, 10000)::integer
       for update skip locked
  ), taken as (
    update public.outbox as o
       set held_until = public.atlas_now() + public.atlas_interval(args -> 'hold_ms')
      from due
     where o.id = due.id
    returning o.*
  )
  select coalesce(
      jsonb_agg(
        jsonb_build_object(
          'id', id, 'task_id', task_id, 'topic', topic, 'message', message, 'attributes', attributes
        ) order by seq
      ),
      '[]'
    )
    from taken
$$;

-- outbox_mark_sent({ids})
-- Notes that these messages are out. Idempotent.
-- Takes: outbox by seq.
create function public.outbox_mark_sent(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_ids uuid[] := array(select jsonb_array_elements_text(args -> 'ids')::uuid);
begin
  perform 1 from public.outbox where id = any (v_ids) and sent_at is null order by seq for update;
  update public.outbox set sent_at = public.atlas_now() where id = any (v_ids) and sent_at is null;
  return '{}';
end
$$;

-- record_dead_letter({id, source, reason, detail, raw_base64, attributes, task_id, fails_run,
--                     announce: [{topic, answer, attributes}], fallback})
-- Keeps a message that nobody can work on, enqueues what is to be said about it, and fails its run if that
-- will never finish. True: the row is new; false: everything of this was done before.
-- Takes: the run, then as atlas_assume_open.
create function public.record_dead_letter(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_task uuid := (args ->> 'task_id')::uuid;
  v_fails_run boolean := coalesce((args ->> 'fails_run')::boolean, false) and v_task is not null;
  v_run public.runs;
  v_result bigint;
  v_row record;
begin
  if v_fails_run then
    select * into v_run from public.runs where task_id = v_task for update;
    v_fails_run := found and v_run.ended_at is null;
  end if;
  insert into public.dead_letters (id, source, reason, detail, raw, attributes, task_id, received_at)
  values (
    (args ->> 'id')::uuid, args ->> 'source', args ->> 'reason', args ->> 'detail',
    decode(args ->> 'raw_base64', 'base64'), args -> 'attributes', v_task, public.atlas_now()
  )
  on conflict (id) do nothing;
  if not found then
    return 'false';
  end if;

  if v_fails_run then
    -- The run's result row is the error that is announced for it.
    select a.nr into v_result
      from jsonb_array_elements(args -> 'announce') with ordinality as a (said, nr)
     where a.said #>> '{answer,msg_type}' = 'error' and (a.said #>> '{answer,task_id}')::uuid = v_task
     order by a.nr limit 1;
    perform public.atlas_end_run(
      v_task, 'failed', null, args ->> 'reason', args ->> 'detail', null,
      coalesce(args #> array['announce', (v_result - 1)::text, 'answer'], args -> 'fallback')
    );
  end if;
  for v_row in
    select a.said, a.nr from jsonb_array_elements(args -> 'announce') with ordinality as a (said, nr) order by a.nr
  loop
    perform public.atlas_put_outbox(
      (v_row.said #>> '{answer,task_id}')::uuid, null, v_row.nr is not distinct from v_result,
      v_row.said ->> 'topic', v_row.said -> 'answer', v_row.said -> 'attributes', null
    );
  end loop;
  return 'true';
end
$$;

-- fleet_state({limits: {daily, run}})
-- What every process of the fleet must know, and operators want to see. Reads only.
create function public.fleet_state(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$
  select jsonb_build_object(
      'paused', s.paused,
      'budget', public.atlas_budget(args -> 'limits'),
      'run_limit', coalesce(s.run_limit, public.atlas_tokens(args #> '{limits,run}')),
      'deferred_runs', r.deferred,
      'queued_runs', r.queued,
      'running_runs', r.running,
      'outbox_unsent', o.unsent,
      'outbox_oldest_seconds',
        greatest(coalesce(floor(extract(epoch from public.atlas_now() - o.oldest)), 0), 0)::bigint,
      'dead_letters', (select count(*) from public.dead_letters where replayed_at is null),
      'cache_generation', s.cache_generation
    )
    from public.fleet_settings as s
         cross join (
           select count(*) filter (where status = 'deferred') as deferred,
                  count(*) filter (where status = 'queued') as queued,
                  count(*) filter (where status = 'running') as running
             from public.runs where ended_at is null
         ) as r
         cross join (
           select count(*) as unsent, min(created_at) as oldest from public.outbox where sent_at is null
         ) as o
$$;

-- change_fleet({change: {daily_limit, run_limit, paused, flush_cache, tenant_limit: {tenant, limit}}, limits})
-- Changes settings for the whole fleet and returns its state. What is not named stays as it is. A limit
-- holds for every grant that is made after this returns.
-- Takes: the settings, then the tenant's account.
create function public.change_fleet(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_change jsonb := args -> 'change';
  v_tenant jsonb := nullif(v_change -> 'tenant_limit', 'null');
  v_account public.token_days;
begin
  update public.fleet_settings
     set daily_limit = coalesce(public.atlas_tokens(v_change -> 'daily_limit'), daily_limit),
         run_limit = coalesce(public.atlas_tokens(v_change -> 'run_limit'), run_limit),
         paused = coalesce((v_change ->> 'paused')::boolean, paused),
         cache_generation = cache_generation
           + case when (v_change ->> 'flush_cache')::boolean then 1 else 0 end;
  if v_tenant is not null then
    v_account := public.atlas_lock_account(public.atlas_today(), 'tenant:' || (v_tenant ->> 'tenant'));
    update public.token_days
       set limit_tokens = public.atlas_tokens(v_tenant -> 'limit')
     where day = v_account.day and scope = v_account.scope;
  end if;
  -- A statement of its own, so that it sees what was just written.
  return public.fleet_state(args);
end
$$;

-- store_check({})
-- Says which schema this is: an older one than a worker needs stops that worker's start. Reads only.
create function public.store_check(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$ select jsonb_build_object('schema_version', 1, 'now', public.atlas_now()) $$;

revoke all on function
  public.outbox_take(jsonb), public.outbox_mark_sent(jsonb), public.record_dead_letter(jsonb),
  public.fleet_state(jsonb), public.change_fleet(jsonb), public.store_check(jsonb)
from public, anon, authenticated, service_role;

grant execute on function
  public.outbox_take(jsonb), public.outbox_mark_sent(jsonb), public.record_dead_letter(jsonb),
  public.fleet_state(jsonb), public.change_fleet(jsonb), public.store_check(jsonb)
to service_role;
