-- As they were in 0005 and 0008.
create or replace function public.change_fleet(args jsonb) returns jsonb
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

create or replace function public.store_check(args jsonb) returns jsonb
language sql stable security definer
set search_path = '' set timezone = 'UTC'
as $$ select jsonb_build_object('schema_version', 3, 'now', public.atlas_now()) $$;
