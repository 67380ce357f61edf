//! A witness in the database: triggers that note every step which a guarantee forbids, at the moment it
//! is committed. What a look at the end cannot see (a limit passed for an instant, a finished run that
//! changed and changed back) is seen here.

use anyhow::Context as _;

const TRIGGERS: &str = r"
create schema chaos;
create table chaos.breaches (at timestamptz not null default clock_timestamp(), what text, detail text);
create table chaos.steps (task_id uuid, step text, attempt integer);
create table chaos.grants (fullest numeric);

-- Guarantee 3: at every grant, used + reserved fits the limit in force. What a call billed above its
-- reservation is the one excess that no limit can prevent, so it is counted with the limit.
create function chaos.on_account() returns trigger language plpgsql security definer as $$
begin
  if new.reserved > old.reserved and new.limit_tokens is not null
     and new.used + new.reserved > new.limit_tokens then
    insert into chaos.breaches (what, detail)
    values ('grant above the limit', format('%s %s: %s used, %s reserved, limit %s',
      new.day, new.scope, new.used, new.reserved, new.limit_tokens));
  end if;
  return null;
end $$;
create trigger chaos_account after update on public.token_days
  for each row execute function chaos.on_account();

-- Guarantee 2: a finished run never changes, and a live lease is never taken.
create function chaos.on_run() returns trigger language plpgsql security definer as $$
begin
  if old.ended_at is not null then
    insert into chaos.breaches (what, detail) values ('finished run changed', old.task_id::text);
  elsif old.status = 'running' and old.lease_until > now() and new.attempt > old.attempt then
    insert into chaos.breaches (what, detail) values ('live lease taken', old.task_id::text);
  end if;
  return null;
end $$;
create trigger chaos_run after update on public.runs for each row execute function chaos.on_run();

create function chaos.on_result() returns trigger language plpgsql security definer as $$
begin
  insert into chaos.breaches (what, detail) values ('result row changed', old.id::text);
  return null;
end $$;
create trigger chaos_result after update or delete on public.architect_out
  for each row execute function chaos.on_result();

-- Guarantee 4: which attempt settled which step.
create function chaos.on_step() returns trigger language plpgsql security definer as $$
begin
  insert into chaos.steps
  select new.task_id, new.step, attempt from public.runs where task_id = new.task_id;
  return null;
end $$;
create trigger chaos_step after insert on public.run_steps for each row execute function chaos.on_step();
";

/// Puts the witness into the database.
pub(super) async fn install(database: &tokio_postgres::Client) -> anyhow::Result<()> {
    database.batch_execute(TRIGGERS).await.context("the witness in the database")
}
