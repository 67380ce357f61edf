drop function public.get_index_job(jsonb);
drop function public.report_index_job(jsonb);
drop function public.claim_index_job(jsonb);
drop function public.submit_index_job(jsonb);
drop table public.index_jobs;
