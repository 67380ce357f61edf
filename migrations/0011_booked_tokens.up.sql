-- What a run has cost by the ledger, in every list of runs. Conventions: 0003.
--
-- Works with the previous release, which does not look at the new field.

-- atlas_run_record(run): a run as `atlas runs` shows it. `tokens_booked` is what the ledger holds of it, billed
-- and assumed; less than was billed once purge_old has taken its rows.
create or replace function public.atlas_run_record(r public.runs) returns jsonb
language sql stable
as $$
  select to_jsonb(r) - 'claim_id' - 'finished_attempt'
      || jsonb_build_object('tokens_booked', (
           select coalesce(sum(actual), 0)::bigint from public.token_ledger where task_id = r.task_id
         ))
$$;

-- store_check({})
-- Says which schema this is: an older one than a worker needs stops that worker's start. Reads only.
create or replace function public.store_check(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$ select jsonb_build_object('schema_version', 6, 'now', public.atlas_now()) $$;
