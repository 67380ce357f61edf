-- The life of a run: claim, renew, settle, defer or release, finish. Lock order and conventions: 0003.

-- atlas_put_outbox(task, attempt, final, topic, message, attributes, hold): enqueues a message and returns
-- it as the caller publishes it. A held row is left to its writer for a while before sweepers see it.
-- Takes: nothing that exists.
create function public.atlas_put_outbox(
  p_task uuid, p_attempt integer, p_final boolean, p_topic text, p_message jsonb, p_attributes jsonb,
  p_hold interval
) returns jsonb
language sql volatile
as $$
  insert into public.outbox
    (id, task_id, attempt, final, topic, message, attributes, created_at, held_until)
  values (
    gen_random_uuid(), p_task, p_attempt, p_final, p_topic, p_message, p_attributes, public.atlas_now(),
    public.atlas_now() + p_hold
  )
  returning jsonb_build_object(
    'id', id, 'task_id', task_id, 'topic', topic, 'message', message, 'attributes', attributes
  )
$$;

-- atlas_outbox_of(task, attempt): the final row of a run, or the last one that an attempt wrote.
create function public.atlas_outbox_of(p_task uuid, p_attempt integer) returns jsonb
language sql stable
as $$
  select jsonb_build_object(
      'id', id, 'task_id', task_id, 'topic', topic, 'message', message, 'attributes', attributes
    )
    from public.outbox
   where task_id = p_task and case when p_attempt is null then final else attempt = p_attempt end
   order by seq desc limit 1
$$;

-- atlas_steps(task): the finished steps of a run, in their order.
create function public.atlas_steps(p_task uuid) returns jsonb
language sql stable
as $$
  select coalesce(
      jsonb_agg(
        jsonb_build_object('step', step, 'input_hash', input_hash, 'output', output, 'usage', usage) order by seq
      ),
      '[]'
    )
    from public.run_steps where task_id = p_task
$$;

-- atlas_claimed_run(task, taken_over): what a worker needs to go on with a run that it has just claimed.
-- The parent's spec comes with it: only a finished one, and never another tenant's.
create function public.atlas_claimed_run(p_task uuid, p_taken_over boolean) returns jsonb
language sql stable
as $$
  select jsonb_build_object(
      'lease', jsonb_build_object('task_id', r.task_id, 'attempt', r.attempt, 'lease_until', r.lease_until),
      'message', i.data,
      'steps', public.atlas_steps(p_task),
      'parent', (
        select o.data
          from public.architect_out as o join public.runs as p on p.task_id = o.id
         where o.id = (
             case when i.data #>> '{metadata,parent_id}' ~* '^[0-9a-f]{8}-?([0-9a-f]{4}-?){3}[0-9a-f]{12}$'
               then (i.data #>> '{metadata,parent_id}')::uuid
             end
           )
           and p.status = 'done' and p.tenant is not distinct from r.tenant
      ),
      'spent', (select coalesce(sum(actual), 0)::bigint from public.token_ledger where task_id = p_task),
      'taken_over', p_taken_over,
      'deferrals', r.deferrals,
      'cancel_requested', r.cancel_requested
    )
    from public.runs as r join public.architect_in as i on i.id = r.task_id
   where r.task_id = p_task
$$;

-- atlas_take(tasks, worker, claim, lease): gives the runs to a worker, each as a new attempt. What former
-- attempts left open is booked as assumed spent.
-- Takes: as atlas_assume_open. The caller holds the runs.
create function public.atlas_take(p_tasks uuid[], p_worker text, p_claim uuid, p_lease interval) returns void
language plpgsql volatile
as $$
begin
  perform public.atlas_assume_open(p_tasks);
  update public.runs
     set status = 'running', attempt = attempt + 1, claim_id = p_claim, lease_owner = p_worker,
         lease_until = public.atlas_now() + p_lease, not_before = null, tokens_needed = null,
         started_at = coalesce(started_at, public.atlas_now())
   where task_id = any (p_tasks);
end
$$;

-- atlas_end_run(...): makes a run final and writes its one result row. What is still open is booked as
-- assumed first, because a final run's row never changes again.
-- Takes: as atlas_assume_open. The caller holds the run, and has seen that it is not final.
create function public.atlas_end_run(
  p_task uuid, p_status text, p_model text, p_error_code text, p_error_message text,
  p_finished_attempt integer, p_answer jsonb
) returns void
language plpgsql volatile
as $$
begin
  perform public.atlas_assume_open(array[p_task]);
  perform public.atlas_refresh_run(p_task);
  update public.runs
     set status = p_status, ended_at = public.atlas_now(), model = coalesce(p_model, model),
         error_code = p_error_code, error_message = p_error_message, finished_attempt = p_finished_attempt,
         lease_owner = null, lease_until = null, not_before = null, tokens_needed = null
   where task_id = p_task;
  insert into public.architect_out (id, data, created_at)
  values (p_task, p_answer, public.atlas_now())
  -- Only a row that is older than Atlas can be there: the run is final once.
  on conflict (id) do update set data = excluded.data, created_at = excluded.created_at;
end
$$;

-- atlas_store_step(task, checkpoint): keeps what a step brought. The first one stays.
-- Takes: nothing that exists. The caller holds the run.
create function public.atlas_store_step(p_task uuid, p_checkpoint jsonb) returns void
language sql volatile
as $$
  insert into public.run_steps (task_id, step, seq, input_hash, output, usage, created_at)
  select p_task, p_checkpoint ->> 'step', count(*), p_checkpoint ->> 'input_hash', p_checkpoint -> 'output',
         p_checkpoint -> 'usage', public.atlas_now()
    from public.run_steps where task_id = p_task
  on conflict (task_id, step) do nothing
$$;

-- claim_run({task_id, claim_id, message, tenant, requester, worker, lease_ms})
-- Stores the request if it is new and gives its run to the worker if it is free. Guarantees: at most one
-- live lease a task; a request is durable when this returns, whatever the outcome; the same claim_id gets
-- the same attempt again, so a claim whose answer was lost may be retried.
-- Takes: the run (its insert waits for another insert of the same task), then as atlas_assume_open.
create function public.claim_run(args jsonb) returns jsonb
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
     or (select paused from public.fleet_settings) then
    return jsonb_build_object('outcome', 'held');
  end if;

  perform public.atlas_take(array[v_task], args ->> 'worker', v_claim, v_lease);
  return jsonb_build_object('outcome', 'claimed')
    || public.atlas_claimed_run(v_task, v_run.status = 'running');
end
$$;

-- atlas_fits(...): may a deferred run be tried now? When what it was denied fits today, for the fleet and
-- for its tenant; or when no day's limit can ever fit it and it has waited: then the worker decides.
create function public.atlas_fits(
  p_needed bigint, p_tenant text, p_not_before timestamptz, p_daily bigint, p_available bigint
) returns boolean
language plpgsql stable
as $$
declare
  v_account public.token_days;
begin
  if p_tenant is not null then
    v_account := public.atlas_account(public.atlas_today(), 'tenant:' || p_tenant);
  end if;
  return (
      p_needed <= p_available
      and (v_account.limit_tokens is null
           or p_needed <= v_account.limit_tokens - v_account.used - v_account.reserved)
    ) or (
      coalesce(p_not_before, '-infinity') <= public.atlas_now()
      and (p_needed > p_daily or coalesce(p_needed > v_account.limit_tokens, false))
    );
end
$$;

-- claim_due({worker, limit, lease_ms, limits: {daily}})
-- Takes runs that are due without a message: expired leases, queued ones whose time has come, deferred ones
-- that fit now (no more of them than fit together). Oldest first. Guarantees: no run goes to two callers; a
-- call never waits for another one; none while the fleet is paused. Also books what nobody will ever close.
-- Takes: runs with SKIP LOCKED, then as atlas_close, in one pass for all of them.
create function public.claim_due(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_limit integer := least((args ->> 'limit')::numeric, 10000)::integer;
  v_now timestamptz := public.atlas_now();
  v_settings public.fleet_settings;
  v_global public.token_days;
  v_account public.token_days;
  v_daily bigint;
  v_available bigint;
  v_left jsonb := '{}';       -- what is left to each tenant that has a limit
  v_tenant_left bigint;
  v_run record;
  v_tasks uuid[] := '{}';
  v_taken_over boolean[] := '{}';
  v_orphans uuid[];
begin
  select * into strict v_settings from public.fleet_settings;
  v_daily := coalesce(v_settings.daily_limit, public.atlas_tokens(args #> '{limits,daily}'));
  v_global := public.atlas_account(public.atlas_today(), 'global');
  v_available := v_daily - v_global.used - v_global.reserved;

  if not v_settings.paused then
    for v_run in
      select r.task_id, r.status, r.tenant, r.tokens_needed
        from public.runs as r
       where r.ended_at is null
         and ((r.status = 'running' and r.lease_until <= v_now)
           or (r.status = 'queued' and coalesce(r.not_before, '-infinity') <= v_now)
           or (r.status = 'deferred'
               and public.atlas_fits(r.tokens_needed, r.tenant, r.not_before, v_daily, v_available)))
       order by r.created_at, r.task_id
       limit v_limit
         for update of r skip locked
    loop
      if v_run.status = 'deferred' then
        v_tenant_left := null;
        if v_run.tenant is not null then
          if not v_left ? v_run.tenant then
            v_account := public.atlas_account(public.atlas_today(), 'tenant:' || v_run.tenant);
            v_left := v_left || jsonb_build_object(
              v_run.tenant, v_account.limit_tokens - v_account.used - v_account.reserved
            );
          end if;
          v_tenant_left := (v_left ->> v_run.tenant)::bigint;
        end if;
        if v_run.tokens_needed <= v_available
           and (v_tenant_left is null or v_run.tokens_needed <= v_tenant_left) then
          v_available := v_available - v_run.tokens_needed;
          if v_tenant_left is not null then
            v_left := v_left || jsonb_build_object(v_run.tenant, v_tenant_left - v_run.tokens_needed);
          end if;
        elsif public.atlas_fits(v_run.tokens_needed, v_run.tenant, 'infinity', v_daily,
                                v_daily - v_global.used - v_global.reserved) then
          -- It fits alone, but not beside the older ones of this batch.
          continue;
        end if;
      end if;
      v_tasks := v_tasks || v_run.task_id;
      v_taken_over := v_taken_over || (v_run.status = 'running');
    end loop;
  end if;

  -- Reservations of nobody: open for longer than any call can take, of no run that is at work.
  select array_agg(o.id) into v_orphans
    from (
      select l.id from public.token_ledger as l
       where l.state = 'reserved' and l.created_at <= v_now - interval '1 hour'
         and not exists (select from public.runs as r where r.task_id = l.task_id and r.status = 'running')
       order by l.id limit 100
         for update of l skip locked
    ) as o;
  -- Together with what the taken runs left open: two passes could take the accounts out of order.
  select array_agg(distinct id) into v_orphans
    from (
      select unnest(v_orphans) as id
      union all
      select l.id from public.token_ledger as l where l.task_id = any (v_tasks) and l.state = 'reserved'
    ) as open;
  if v_orphans is not null then
    perform public.atlas_close(
      v_orphans, array_fill('assumed'::text, array[cardinality(v_orphans)]), null, null
    );
  end if;

  perform public.atlas_take(v_tasks, args ->> 'worker', null, public.atlas_interval(args -> 'lease_ms'));
  return coalesce(
    (select jsonb_agg(public.atlas_claimed_run(t.task_id, t.taken_over) order by t.nr)
       from unnest(v_tasks, v_taken_over) with ordinality as t (task_id, taken_over, nr)),
    '[]'
  );
end
$$;

-- renew_lease({task_id, attempt, lease_ms})
-- Extends a lease that is still this attempt's, even if it has expired and nobody took it.
-- Takes: the run.
create function public.renew_lease(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_cancel boolean;
begin
  update public.runs
     set lease_until = public.atlas_now() + public.atlas_interval(args -> 'lease_ms')
   where task_id = (args ->> 'task_id')::uuid and attempt = (args ->> 'attempt')::integer
     and status = 'running'
  returning cancel_requested into v_cancel;
  return jsonb_build_object('held', found, 'cancel_requested', coalesce(v_cancel, false));
end
$$;

-- settle_step({task_id, attempt, settlement, checkpoint})
-- Ends a reservation and keeps what the call brought, in one transaction. With a stale attempt the tokens
-- are booked all the same and the checkpoint is not kept: the outcome `fenced` is a value, because an
-- error would roll the booking back.
-- Takes: the run, then as atlas_close.
create function public.settle_step(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_task uuid := (args ->> 'task_id')::uuid;
  v_run public.runs;
begin
  select * into v_run from public.runs where task_id = v_task for update;
  perform public.atlas_settle(args -> 'settlement', '{}');
  perform public.atlas_refresh_run(v_task);
  if v_run.status is distinct from 'running' or v_run.attempt is distinct from (args ->> 'attempt')::integer then
    return jsonb_build_object('outcome', 'fenced');
  end if;
  perform public.atlas_store_step(v_task, args -> 'checkpoint');
  return jsonb_build_object('outcome', 'stored');
end
$$;

-- finish_run({task_id, attempt, status, answer, topic, attributes, model, error_code, error_message,
--             settlement, checkpoint, hold_ms})
-- Result row, run, ledger, step and outbox in one transaction. Guarantees: a run becomes final once; a
-- stale attempt changes nothing but the ledger (what was billed was billed; outcome `fenced`); the attempt
-- that finished the run gets the same outbox row again when it retries.
-- Takes: the run, then as atlas_close.
create function public.finish_run(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_task uuid := (args ->> 'task_id')::uuid;
  v_attempt integer := (args ->> 'attempt')::integer;
  v_settlement jsonb := nullif(args -> 'settlement', 'null');
  v_checkpoint jsonb := nullif(args -> 'checkpoint', 'null');
  v_run public.runs;
  v_ours boolean;
  v_open uuid[] := '{}';
begin
  select * into v_run from public.runs where task_id = v_task for update;
  v_ours := v_run.status is not distinct from 'running' and v_run.attempt is not distinct from v_attempt;
  if v_settlement is not null then
    if v_ours then
      select coalesce(array_agg(id), '{}') into v_open
        from public.token_ledger where task_id = v_task and state = 'reserved';
    end if;
    perform public.atlas_settle(v_settlement, v_open);
  end if;
  if v_run.finished_attempt = v_attempt then
    -- A retry of a call whose answer was lost.
    return jsonb_build_object('outcome', 'finished', 'outbox', public.atlas_outbox_of(v_task, null));
  elsif not v_ours then
    perform public.atlas_refresh_run(v_task);
    return jsonb_build_object('outcome', 'fenced');
  end if;

  if v_checkpoint is not null then
    perform public.atlas_store_step(v_task, v_checkpoint);
  end if;
  perform public.atlas_end_run(
    v_task, args ->> 'status', args ->> 'model', args ->> 'error_code', args ->> 'error_message', v_attempt,
    args -> 'answer'
  );
  return jsonb_build_object(
    'outcome', 'finished',
    'outbox', public.atlas_put_outbox(
      v_task, v_attempt, true, args ->> 'topic', args -> 'answer', args -> 'attributes',
      public.atlas_interval(args -> 'hold_ms')
    )
  );
end
$$;

-- defer_run({task_id, attempt, tokens_needed, topic, answer, attributes, hold_ms})
-- Puts a run aside until its tokens are available: until UTC midnight, or earlier when a limit is raised.
-- A retry by the same attempt gets the same outbox row.
-- Takes: the run, then as atlas_assume_open.
create function public.defer_run(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_task uuid := (args ->> 'task_id')::uuid;
  v_attempt integer := (args ->> 'attempt')::integer;
  v_run public.runs;
begin
  select * into v_run from public.runs where task_id = v_task for update;
  if v_run.status = 'deferred' and v_run.attempt = v_attempt then
    return public.atlas_outbox_of(v_task, v_attempt);
  elsif v_run.status is distinct from 'running' or v_run.attempt is distinct from v_attempt then
    perform public.atlas_refuse_fenced(v_attempt);
  end if;
  perform public.atlas_assume_open(array[v_task]);
  update public.runs
     set status = 'deferred', not_before = public.atlas_next_midnight(),
         tokens_needed = greatest(public.atlas_tokens(args -> 'tokens_needed'), 1),
         deferrals = deferrals + 1, lease_owner = null, lease_until = null
   where task_id = v_task;
  return public.atlas_put_outbox(
    v_task, v_attempt, false, args ->> 'topic', args -> 'answer', args -> 'attributes',
    public.atlas_interval(args -> 'hold_ms')
  );
end
$$;

-- release_run({task_id, attempt, retry_ms})
-- Gives a run back: sweeps take it after retry_ms, a message at once. Idempotent for the attempt.
-- Takes: the run, then as atlas_assume_open.
create function public.release_run(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_task uuid := (args ->> 'task_id')::uuid;
  v_attempt integer := (args ->> 'attempt')::integer;
  v_run public.runs;
begin
  select * into v_run from public.runs where task_id = v_task for update;
  if v_run.status = 'queued' and v_run.attempt = v_attempt then
    return '{}';
  elsif v_run.status is distinct from 'running' or v_run.attempt is distinct from v_attempt then
    perform public.atlas_refuse_fenced(v_attempt);
  end if;
  perform public.atlas_assume_open(array[v_task]);
  update public.runs
     set status = 'queued', not_before = public.atlas_now() + public.atlas_interval(args -> 'retry_ms'),
         lease_owner = null, lease_until = null
   where task_id = v_task;
  return '{}';
end
$$;

-- cancel_run({task_id, topic, answer, attributes})
-- Fails a run that nobody works on; tells the holder of a live lease at its next renewal. False: unknown
-- or final.
-- Takes: the run, then as atlas_assume_open.
create function public.cancel_run(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_task uuid := (args ->> 'task_id')::uuid;
  v_run public.runs;
begin
  select * into v_run from public.runs where task_id = v_task for update;
  if not found or v_run.ended_at is not null then
    return 'false';
  elsif v_run.status = 'running' and v_run.lease_until > public.atlas_now() then
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

-- atlas_run_record(run): a run as `atlas runs` shows it.
create function public.atlas_run_record(r public.runs) returns jsonb
language sql stable
as $$
  select to_jsonb(r)
    - 'claim_id' - 'tokens_needed' - 'deferrals' - 'cancel_requested' - 'finished_attempt' - 'requester'
$$;

-- list_runs({status, limit})
-- The newest runs first. Reads only.
create function public.list_runs(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$
  select coalesce(jsonb_agg(public.atlas_run_record(r) order by r.created_at desc, r.task_id), '[]')
    from (
      select * from public.runs
       where args ->> 'status' is null or status = args ->> 'status'
       order by created_at desc, task_id
       limit least((args ->> 'limit')::numeric, 10000)::integer
    ) as r
$$;

-- get_run({task_id})
-- One run with everything that is stored of it, or null. Reads only.
create function public.get_run(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$
  select jsonb_build_object(
      'run', public.atlas_run_record(r),
      'request', i.data,
      'answer', (select data from public.architect_out where id = r.task_id and r.ended_at is not null),
      'steps', public.atlas_steps(r.task_id)
    )
    from public.runs as r join public.architect_in as i on i.id = r.task_id
   where r.task_id = (args ->> 'task_id')::uuid
$$;

revoke all on function
  public.atlas_put_outbox(uuid, integer, boolean, text, jsonb, jsonb, interval),
  public.atlas_outbox_of(uuid, integer), public.atlas_steps(uuid), public.atlas_claimed_run(uuid, boolean),
  public.atlas_take(uuid[], text, uuid, interval),
  public.atlas_end_run(uuid, text, text, text, text, integer, jsonb), public.atlas_store_step(uuid, jsonb),
  public.atlas_fits(bigint, text, timestamptz, bigint, bigint), public.atlas_run_record(public.runs),
  public.claim_run(jsonb), public.claim_due(jsonb), public.renew_lease(jsonb), public.settle_step(jsonb),
  public.finish_run(jsonb), public.defer_run(jsonb), public.release_run(jsonb), public.cancel_run(jsonb),
  public.list_runs(jsonb), public.get_run(jsonb)
from public, anon, authenticated, service_role;

grant execute on function
  public.claim_run(jsonb), public.claim_due(jsonb), public.renew_lease(jsonb), public.settle_step(jsonb),
  public.finish_run(jsonb), public.defer_run(jsonb), public.release_run(jsonb), public.cancel_run(jsonb),
  public.list_runs(jsonb), public.get_run(jsonb)
to service_role;
