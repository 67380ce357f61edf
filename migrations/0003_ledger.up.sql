-- Booking tokens: reserve before a call, close after it.
--
-- LOCK ORDER, for every function of Atlas. A transaction takes row locks in this order only, so no two
-- can wait for each other in a circle:
--   1. runs            one row, or many with SKIP LOCKED (which never waits)
--   2. token_ledger    by id
--   3. token_days      by day, then tenants by name, then 'global'
--   4. outbox          by seq
--   Inserts into architect_in, architect_out, run_steps and dead_letters happen under the run's lock, or
--   wait for nothing but another insert of the same id.
-- 'global' comes last of a day because everybody needs it: it is held for the shortest time.
--
-- CONVENTIONS
--   One argument: args jsonb. A new optional field breaks no caller of the previous release, PostgREST
--   has no overloads to choose from, and every call is a POST with one body.
--   SECURITY DEFINER with an empty search_path: every name is qualified, nothing can be shadowed.
--   lock_timeout: a caller gets an error that it may retry, before its own timeout leaves it guessing.
--   Functions named atlas_* are internal: nobody but the owner may execute them.
--   A refusal is an error PT4nn (PostgREST makes it HTTP 4nn): MESSAGE is a stable code, DETAIL is prose.

-- atlas_tokens(value): a number of tokens as it is booked: at most 10^15, so that no sum overflows.
create function public.atlas_tokens(value jsonb) returns bigint
language sql immutable
as $$
  select case
    when value is null or value = 'null'::jsonb then null
    else least((value #>> '{}')::numeric, 1000000000000000)::bigint
  end
$$;

-- atlas_interval(value): milliseconds as an interval; bounded, so that no sum of times overflows.
create function public.atlas_interval(value jsonb) returns interval
language sql immutable
as $$ select least((value #>> '{}')::numeric, 3155760000000)::double precision * interval '1 millisecond' $$;

-- atlas_account(day, scope): an account as it is, without a lock. A day without a row starts with the
-- scope's last limit.
create function public.atlas_account(p_day date, p_scope text) returns public.token_days
language sql stable
as $$
  select d from (
    select t::public.token_days as d, 0 as rank
      from public.token_days as t where t.day = p_day and t.scope = p_scope
    union all
    select row(
        p_day, p_scope,
        (select t.limit_tokens from public.token_days as t
          where t.scope = p_scope and t.day < p_day order by t.day desc limit 1),
        0, 0
      )::public.token_days, 1
  ) as known
  order by rank limit 1
$$;

-- atlas_lock_account(day, scope): the account, locked until the transaction ends; made if it is missing.
-- Takes: the row in token_days. The caller keeps the order of the accounts.
create function public.atlas_lock_account(p_day date, p_scope text) returns public.token_days
language plpgsql volatile
as $$
declare
  v_account public.token_days;
begin
  select * into v_account from public.token_days where day = p_day and scope = p_scope for update;
  if not found then
    insert into public.token_days (day, scope, limit_tokens)
    values (
      p_day, p_scope,
      (select t.limit_tokens from public.token_days as t
        where t.scope = p_scope and t.day < p_day order by t.day desc limit 1)
    )
    on conflict (day, scope) do nothing;
    select * into strict v_account from public.token_days where day = p_day and scope = p_scope for update;
  end if;
  return v_account;
end
$$;

-- atlas_refuse_fenced(attempt): says that the caller's lease is stale, and rolls back.
create function public.atlas_refuse_fenced(p_attempt integer) returns void
language plpgsql
as $$
begin
  raise exception using
    errcode = 'PT409',
    message = 'fenced',
    detail = format('attempt %s no longer holds the lease of this run', p_attempt);
end
$$;

-- atlas_close(ids, states, prompts, completions): ends reservations, each on the day it was granted for,
-- and moves the accounts with them. reserved -> settled | released | assumed; assumed -> settled |
-- released (a correction); anything else stays as it is, which makes every caller idempotent. What was
-- billed is booked in full, even above the reservation.
-- Takes: token_ledger by id, then token_days in order. The caller holds the runs.
create function public.atlas_close(
  p_ids uuid[], p_states text[], p_prompts bigint[], p_completions bigint[]
) returns void
language plpgsql volatile
as $$
declare
  v_account record;
begin
  if coalesce(cardinality(p_ids), 0) = 0 then
    return;
  end if;
  perform 1 from public.token_ledger where id = any (p_ids) order by id for update;

  for v_account in
    select distinct a.day, a.scope, a.scope = 'global' as is_global
      from public.token_ledger as l
           cross join lateral (values (l.day, l.scope), (l.day, 'global')) as a (day, scope)
     where l.id = any (p_ids)
     order by 1, 3, 2
  loop
    perform public.atlas_lock_account(v_account.day, v_account.scope);
  end loop;

  -- A statement of its own: its snapshot sees everything that was committed before the locks were ours.
  with wanted as (
    select * from unnest(p_ids, p_states, p_prompts, p_completions) as w (id, state, prompt, completion)
  ), before as (
    select l.id, l.day, l.scope, l.reserved, l.actual, l.state,
           w.state as new_state, w.prompt, w.completion,
           case w.state
             when 'settled' then w.prompt + w.completion
             when 'assumed' then l.reserved
             else 0
           end as new_actual
      from public.token_ledger as l join wanted as w on w.id = l.id
     where l.state = 'reserved' or (l.state = 'assumed' and w.state in ('settled', 'released'))
  ), closed as (
    update public.token_ledger as l
       set state = b.new_state,
           actual = b.new_actual,
           tokens_prompt = case b.new_state when 'settled' then b.prompt else 0 end,
           tokens_completion = case b.new_state when 'settled' then b.completion else 0 end,
           closed_at = public.atlas_now()
      from before as b
     where l.id = b.id
    returning b.day, b.scope,
              case b.state when 'reserved' then b.reserved else 0 end as freed,
              b.new_actual - b.actual as booked
  ), moved as (
    select a.day, a.scope, sum(c.freed)::bigint as freed, sum(c.booked)::bigint as booked
      from closed as c
           cross join lateral (select c.day, c.scope union select c.day, 'global') as a (day, scope)
     group by a.day, a.scope
  )
  update public.token_days as d
     set reserved = d.reserved - m.freed, used = d.used + m.booked
    from moved as m
   where d.day = m.day and d.scope = m.scope;
end
$$;

-- atlas_assume_open(tasks): books every open reservation of these runs as spent: whoever held them is gone.
-- Takes: as atlas_close. The caller holds the runs, so no new reservation can appear meanwhile.
create function public.atlas_assume_open(p_tasks uuid[]) returns void
language plpgsql volatile
as $$
declare
  v_ids uuid[];
begin
  select array_agg(id) into v_ids
    from public.token_ledger
   where task_id = any (p_tasks) and state = 'reserved';
  if v_ids is not null then
    perform public.atlas_close(v_ids, array_fill('assumed'::text, array[cardinality(v_ids)]), null, null);
  end if;
end
$$;

-- atlas_refresh_run(task): the billed tokens of a run that is not final, from the books. A final run
-- never changes: what is corrected later is in the ledger only.
-- Takes: nothing new. The caller holds the run.
create function public.atlas_refresh_run(p_task uuid) returns void
language sql volatile
as $$
  update public.runs as r
     set tokens_prompt = s.prompt, tokens_completion = s.completion
    from (
      select coalesce(sum(tokens_prompt), 0)::bigint as prompt,
             coalesce(sum(tokens_completion), 0)::bigint as completion
        from public.token_ledger where task_id = p_task
    ) as s
   where r.task_id = p_task and r.ended_at is null
     and (r.tokens_prompt, r.tokens_completion) is distinct from (s.prompt, s.completion)
$$;

-- atlas_settle(settlement, also_assume): a caller's settlement, together with the assumed end of what else
-- is open, in one pass over the accounts, because two passes could take them out of order.
-- Takes: as atlas_close. The caller holds the run.
create function public.atlas_settle(p_settlement jsonb, p_also_assume uuid[]) returns void
language plpgsql volatile
as $$
declare
  v_id uuid := (p_settlement ->> 'reservation_id')::uuid;
  v_closing jsonb := p_settlement -> 'closing';
  v_rest uuid[];
begin
  if v_closing ->> 'state' = 'settled'
     and not exists (select from public.token_ledger where id = v_id) then
    raise exception using
      errcode = 'PT404',
      message = 'unknown_reservation',
      detail = format('there is no reservation %s to settle', v_id);
  end if;
  select coalesce(array_agg(id), '{}') into v_rest
    from unnest(p_also_assume) as id where id <> v_id;
  perform public.atlas_close(
    array[v_id] || v_rest,
    array[v_closing ->> 'state'] || array_fill('assumed'::text, array[cardinality(v_rest)]),
    array[public.atlas_tokens(v_closing #> '{usage,prompt}')]
      || array_fill(null::bigint, array[cardinality(v_rest)]),
    array[public.atlas_tokens(v_closing #> '{usage,completion}')]
      || array_fill(null::bigint, array[cardinality(v_rest)])
  );
end
$$;

-- atlas_budget(limits): the whole fleet's account of today. A limit that was set for the fleet wins.
create function public.atlas_budget(p_limits jsonb) returns jsonb
language sql stable
as $$
  select jsonb_build_object(
    'day', a.day,
    'limit', coalesce((select daily_limit from public.fleet_settings), public.atlas_tokens(p_limits -> 'daily')),
    'used', a.used,
    'reserved', a.reserved,
    'resets_at', public.atlas_next_midnight()
  )
  from public.atlas_account(public.atlas_today(), 'global') as a
$$;

-- reserve_tokens({id, task_id, attempt, tenant, model, kind, tokens, limits: {daily, run}})
-- Grants or denies. Guarantees: at the moment of a grant used + reserved <= limit for the day, for the
-- tenant and for the run, whoever else is asking; the same id is granted once, however often it is sent;
-- a stale attempt gets nothing.
-- Takes: the run, the tenant's account, the global account. The settings are read after that, so no
-- grant can be made under a limit that was lowered before it.
create function public.reserve_tokens(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_id uuid := (args ->> 'id')::uuid;
  v_task uuid := (args ->> 'task_id')::uuid;
  v_attempt integer := (args ->> 'attempt')::integer;
  v_tokens bigint := public.atlas_tokens(args -> 'tokens');
  v_scope text := 'tenant:' || (args ->> 'tenant');
  v_day date := public.atlas_today();
  v_run public.runs;
  v_tenant public.token_days;
  v_global public.token_days;
  v_settings public.fleet_settings;
  v_state text;
  v_limit bigint;
  v_available bigint;
  v_denied_by text;
begin
  if v_tokens is null or v_tokens < 0 then
    raise exception using errcode = 'PT400', message = 'invalid_tokens', detail = 'tokens must be a number >= 0';
  end if;
  if v_task is not null then
    select * into v_run from public.runs where task_id = v_task for update;
    if v_attempt is not null
       and (v_run.status is distinct from 'running' or v_run.attempt is distinct from v_attempt) then
      perform public.atlas_refuse_fenced(v_attempt);
    end if;
  end if;
  if v_scope is not null then
    v_tenant := public.atlas_lock_account(v_day, v_scope);
  end if;
  v_global := public.atlas_lock_account(v_day, 'global');

  select state into v_state from public.token_ledger where id = v_id;
  if v_state = 'reserved' then
    -- A retry of a call whose answer was lost.
    return jsonb_build_object('outcome', 'granted');
  elsif v_state is not null then
    raise exception using
      errcode = 'PT409',
      message = 'reservation_closed',
      detail = format('reservation %s was closed before; ask with a fresh id', v_id);
  end if;

  select * into strict v_settings from public.fleet_settings;
  if v_task is not null then
    v_limit := coalesce(v_settings.run_limit, public.atlas_tokens(args #> '{limits,run}'));
    select v_limit - coalesce(sum(case state when 'reserved' then reserved else actual end), 0)::bigint
      into v_available
      from public.token_ledger where task_id = v_task;
    if v_tokens > v_available then
      v_denied_by := 'run';
    end if;
  end if;
  if v_denied_by is null and v_scope is not null and v_tenant.limit_tokens is not null then
    v_limit := v_tenant.limit_tokens;
    v_available := v_limit - v_tenant.used - v_tenant.reserved;
    if v_tokens > v_available then
      v_denied_by := 'tenant';
    end if;
  end if;
  if v_denied_by is null then
    v_limit := coalesce(v_settings.daily_limit, public.atlas_tokens(args #> '{limits,daily}'));
    v_available := v_limit - v_global.used - v_global.reserved;
    if v_tokens > v_available then
      v_denied_by := 'day';
    end if;
  end if;
  if v_denied_by is not null then
    return jsonb_build_object(
      'outcome', 'denied',
      'denied_by', v_denied_by,
      'requested', v_tokens,
      'available', greatest(v_available, 0),
      'limit', v_limit,
      'resets_at', case when v_denied_by <> 'run' then public.atlas_next_midnight() end
    );
  end if;

  insert into public.token_ledger (id, day, scope, task_id, attempt, model, kind, reserved, state, created_at)
  values (
    v_id, v_day, coalesce(v_scope, 'global'), v_task, v_attempt, args ->> 'model', args ->> 'kind', v_tokens,
    'reserved', public.atlas_now()
  )
  on conflict (id) do nothing;
  if not found then
    -- A retry that raced its first call across midnight: that one has moved the accounts of its day.
    return jsonb_build_object('outcome', 'granted');
  end if;
  if v_scope is not null then
    update public.token_days set reserved = reserved + v_tokens where day = v_day and scope = v_scope;
  end if;
  -- The limit of the last grant is kept with the account, for whoever reads its history.
  update public.token_days
     set reserved = reserved + v_tokens, limit_tokens = v_limit
   where day = v_day and scope = 'global';
  return jsonb_build_object('outcome', 'granted');
end
$$;

-- close_reservation({reservation_id, closing: {state, usage}})
-- Ends a reservation, also for a caller whose lease is stale: what was billed was billed. Idempotent.
-- Takes: the run, then as atlas_close.
create function public.close_reservation(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  -- The task of a ledger row never changes, so it may be read before the run is locked.
  v_task uuid := (select task_id from public.token_ledger where id = (args ->> 'reservation_id')::uuid);
begin
  perform 1 from public.runs where task_id = v_task for update;
  perform public.atlas_settle(args, '{}');
  perform public.atlas_refresh_run(v_task);
  return '{}';
end
$$;

-- budget_today({limits: {daily}})
-- The whole fleet's account of today. Reads only.
create function public.budget_today(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$ select public.atlas_budget(args -> 'limits') $$;

revoke all on function
  public.atlas_tokens(jsonb), public.atlas_interval(jsonb), public.atlas_account(date, text),
  public.atlas_lock_account(date, text), public.atlas_refuse_fenced(integer),
  public.atlas_close(uuid[], text[], bigint[], bigint[]), public.atlas_assume_open(uuid[]),
  public.atlas_refresh_run(uuid), public.atlas_settle(jsonb, uuid[]), public.atlas_budget(jsonb),
  public.reserve_tokens(jsonb), public.close_reservation(jsonb), public.budget_today(jsonb)
from public, anon, authenticated, service_role;

grant execute on function
  public.reserve_tokens(jsonb), public.close_reservation(jsonb), public.budget_today(jsonb)
to service_role;
