drop function public.cancelled_runs(jsonb);

create or replace function public.store_check(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$ select jsonb_build_object('schema_version', 4, 'now', public.atlas_now()) $$;
