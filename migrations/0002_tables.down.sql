-- architect_in, architect_out and their publication stay: other readers and writers share them, and
-- they may be older than Atlas.

drop view public.processed_msgs;
drop table public.fleet_settings;
drop table public.dead_letters;
drop table public.outbox;
drop table public.token_ledger;
drop table public.token_days;
drop table public.run_steps;
drop table public.runs;
