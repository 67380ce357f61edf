drop function public.purge_old(jsonb);
drop function public.budget_history(jsonb);
drop function public.purge_dead_letters(jsonb);
drop function public.mark_replayed(jsonb);
drop function public.get_dead_letter(jsonb);
drop function public.list_dead_letters(jsonb);
drop function public.atlas_dead_letter(public.dead_letters);
drop function public.wake_run(jsonb);

drop index public.architect_in_age;
drop index public.run_steps_age;
drop index public.outbox_sent;
alter table public.dead_letters drop column replayed_as;

-- As they were in 0004 and 0005.
create or replace function public.atlas_run_record(r public.runs) returns jsonb
language sql stable
as $$
  select to_jsonb(r)
    - 'claim_id' - 'tokens_needed' - 'deferrals' - 'cancel_requested' - 'finished_attempt' - 'requester'
$$;

create or replace function public.list_runs(args jsonb) returns jsonb
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

create or replace function public.get_run(args jsonb) returns jsonb
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

create or replace function public.store_check(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$ select jsonb_build_object('schema_version', 1, 'now', public.atlas_now()) $$;
