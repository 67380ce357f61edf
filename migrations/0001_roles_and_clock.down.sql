-- The roles stay: they belong to the whole server, and others may use them.

drop function public.atlas_next_midnight();
drop function public.atlas_today();
drop function public.atlas_now();
