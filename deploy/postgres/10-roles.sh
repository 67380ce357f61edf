#!/usr/bin/env bash
# The roles a Supabase project has, made when the database is created. The tables come from migrations/.
set -euo pipefail

# In a variable of psql, quoted by it: no password is ever pasted into SQL.
psql --username postgres --dbname postgres --no-psqlrc --set ON_ERROR_STOP=1 \
    --set password="$(cat /run/secrets/authenticator_password)" <<'SQL'
CREATE ROLE anon NOLOGIN NOINHERIT;
CREATE ROLE authenticated NOLOGIN NOINHERIT;
CREATE ROLE service_role NOLOGIN NOINHERIT BYPASSRLS;

-- PostgREST logs in as this one and becomes the role that the caller's JWT names.
CREATE ROLE authenticator LOGIN NOINHERIT PASSWORD :'password';
GRANT anon, authenticated, service_role TO authenticator;

-- Supabase's defaults are wider than ours: what anon may do is for the migrations to say.
GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role;
SQL
