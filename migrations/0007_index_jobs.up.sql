-- Index jobs of the gateways: kept until they are done, whichever gateway does them. Conventions: 0003.
-- These functions lock nothing but index_jobs, so they are in nobody's lock order.

create table public.index_jobs (
  id         uuid primary key,
  -- Of the caller that asked for it, and may ask how it goes; null: of one that speaks for all tenants.
  tenant     text,
  -- As GET /v1/jobs/{id} answers it.
  status     jsonb not null,
  -- What is to be done, as the gateway wrote it; null once the job has ended.
  work       bytea,
  attempt    integer not null default 0,
  held_until timestamptz,
  created_at timestamptz not null,
  ended_at   timestamptz,
  check ((work is null) = (ended_at is not null))
);

create index index_jobs_open on public.index_jobs (created_at, id) where ended_at is null;
create index index_jobs_ended on public.index_jobs (ended_at desc) where ended_at is not null;

alter table public.index_jobs enable row level security;
revoke all on public.index_jobs from public, anon, authenticated, service_role;
grant select on public.index_jobs to service_role;

-- submit_index_job({id, tenant, work_base64, status, max_active})
-- Queues a job. The number of jobs that have not ended, or null: there were max_active, and it was not queued.
-- A retry of the same id queues nothing again.
-- Takes: an advisory lock, so that no two count at once.
create function public.submit_index_job(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_active bigint;
begin
  perform pg_catalog.pg_advisory_xact_lock(pg_catalog.hashtextextended('atlas.index_jobs', 0));
  select count(*) into v_active from public.index_jobs where ended_at is null;
  if exists (select 1 from public.index_jobs where id = (args ->> 'id')::uuid) then
    return to_jsonb(v_active);
  end if;
  if v_active >= (args ->> 'max_active')::numeric then
    return 'null';
  end if;
  insert into public.index_jobs (id, tenant, status, work, created_at)
  values (
    (args ->> 'id')::uuid, args ->> 'tenant', args -> 'status',
    decode(args ->> 'work_base64', 'base64'), public.atlas_now()
  );
  return to_jsonb(v_active + 1);
end
$$;

-- claim_index_job({lease_ms})
-- Takes the oldest job that nobody holds, or null. A lost answer costs one lease time.
-- Takes: one row, SKIP LOCKED.
create function public.claim_index_job(args jsonb) returns jsonb
language sql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
  with due as materialized (
    select id from public.index_jobs
     where ended_at is null and coalesce(held_until, '-infinity') <= public.atlas_now()
     order by created_at, id
     limit 1
       for update skip locked
  ), taken as (
    update public.index_jobs as j
       set attempt = j.attempt + 1,
           held_until = public.atlas_now() + public.atlas_interval(args -> 'lease_ms')
      from due
     where j.id = due.id
    returning j.*
  )
  select coalesce(
      (select jsonb_build_object(
           'id', id, 'attempt', attempt, 'work_base64', encode(work, 'base64'), 'tenant', tenant,
           'status', status
         ) from taken),
      'null'
    )
$$;

-- report_index_job({id, attempt, status, lease_ms, leave: hold|release|end, remember})
-- Notes how far a job is, and holds it on, gives it back, or ends it. False: another attempt has it, or it
-- has ended. Of ended jobs the newest are remembered.
-- Takes: the row; ended rows with SKIP LOCKED.
create function public.report_index_job(args jsonb) returns jsonb
language plpgsql volatile security definer
set search_path = '' set timezone = 'UTC' set lock_timeout = '5s'
as $$
declare
  v_ends boolean := args ->> 'leave' = 'end';
begin
  update public.index_jobs
     set status = args -> 'status',
         held_until = case when args ->> 'leave' = 'hold'
                           then public.atlas_now() + public.atlas_interval(args -> 'lease_ms') end,
         work = case when not v_ends then work end,
         ended_at = case when v_ends then public.atlas_now() end
   where id = (args ->> 'id')::uuid and attempt = (args ->> 'attempt')::integer and ended_at is null;
  if not found then
    return 'false';
  end if;
  if v_ends then
    delete from public.index_jobs where id in (
      select id from public.index_jobs where ended_at is not null
       order by ended_at desc offset (args ->> 'remember')::bigint
         for update skip locked
    );
  end if;
  return 'true';
end
$$;

-- get_index_job({id}): {tenant, status}, or null.
create function public.get_index_job(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$
  select coalesce(
      (select jsonb_build_object('tenant', tenant, 'status', status)
         from public.index_jobs where id = (args ->> 'id')::uuid),
      'null'
    )
$$;

revoke all on function
  public.submit_index_job(jsonb), public.claim_index_job(jsonb),
  public.report_index_job(jsonb), public.get_index_job(jsonb)
from public, anon, authenticated, service_role;
grant execute on function
  public.submit_index_job(jsonb), public.claim_index_job(jsonb),
  public.report_index_job(jsonb), public.get_index_job(jsonb)
to service_role;

notify pgrst, 'reload schema';
