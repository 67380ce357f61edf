-- A worker asks which of its runs are to be stopped, before their leases are renewed. Conventions: 0003.
--
-- Works with the previous release, which is told at its next renewal as before.

-- cancelled_runs({worker})
-- The runs at work on this worker that somebody cancelled, with the attempt that is at work. Reads only.
create function public.cancelled_runs(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$
  select coalesce(jsonb_agg(jsonb_build_object('task_id', task_id, 'attempt', attempt)), '[]')
    from public.runs
   where ended_at is null and cancel_requested and status = 'running' and lease_owner = args ->> 'worker'
$$;

-- store_check({})
-- Says which schema this is: an older one than a worker needs stops that worker's start. Reads only.
create or replace function public.store_check(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$ select jsonb_build_object('schema_version', 5, 'now', public.atlas_now()) $$;

revoke all on function public.cancelled_runs(jsonb) from public, anon, authenticated, service_role;
grant execute on function public.cancelled_runs(jsonb) to service_role;
