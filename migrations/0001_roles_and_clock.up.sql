-- The roles that Supabase has and a plain Postgres lacks, and the one clock that everything goes by.
--
-- Roles belong to the whole server, so they are created where they are missing, never changed where
-- they exist, and never dropped.

do $$
declare
  v_role text;
begin
  foreach v_role in array array['anon', 'authenticated', 'service_role'] loop
    if not exists (select from pg_catalog.pg_roles where rolname = v_role) then
      begin
        execute format('create role %I nologin noinherit', v_role);
      exception
        -- Another database of this server is being migrated at this moment.
        when duplicate_object or unique_violation then null;
      end;
    end if;
  end loop;

  -- The role PostgREST connects as. Without a password nobody can log in with one: set it yourself.
  if not exists (select from pg_catalog.pg_roles where rolname = 'authenticator') then
    begin
      create role authenticator login noinherit;
    exception
      when duplicate_object or unique_violation then null;
    end;
  end if;

  foreach v_role in array array['anon', 'authenticated', 'service_role'] loop
    if not pg_catalog.pg_has_role('authenticator', v_role, 'member') then
      execute format('grant %I to authenticator', v_role);
    end if;
  end loop;
end
$$;

grant usage on schema public to service_role;

-- atlas_now(): the time by which leases, due times and the budget's day are decided. It is the
-- start of the transaction, in the database: a worker's clock decides nothing. Tests replace this
-- one function to move the clock.
create function public.atlas_now() returns timestamptz
language sql stable
as $$ select pg_catalog.now() $$;

-- atlas_today(): the UTC day whose budget a new reservation is booked on.
create function public.atlas_today() returns date
language sql stable
as $$ select (public.atlas_now() at time zone 'UTC')::date $$;

-- atlas_next_midnight(): when the next UTC day begins.
create function public.atlas_next_midnight() returns timestamptz
language sql stable
as $$ select (public.atlas_today() + 1)::timestamp at time zone 'UTC' $$;

revoke all on function public.atlas_now(), public.atlas_today(), public.atlas_next_midnight()
  from public, anon, authenticated, service_role;
