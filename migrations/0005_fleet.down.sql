drop function public.store_check(jsonb);
drop function public.change_fleet(jsonb);
drop function public.fleet_state(jsonb);
drop function public.record_dead_letter(jsonb);
drop function public.outbox_mark_sent(jsonb);
drop function public.outbox_take(jsonb);
