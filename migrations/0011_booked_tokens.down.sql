-- As they were in 0006 and 0010.
create or replace function public.atlas_run_record(r public.runs) returns jsonb
language sql stable
as $$ select to_jsonb(r) - 'claim_id' - 'finished_attempt' $$;

create or replace function public.store_check(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$ select jsonb_build_object('schema_version', 5, 'now', public.atlas_now()) $$;
