-- As they were in 0004 and 0006.
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

create or replace function public.cancel_run(args jsonb) returns jsonb
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

create or replace function public.store_check(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$ select jsonb_build_object('schema_version', 2, 'now', public.atlas_now()) $$;

drop table public.early_cancels;
