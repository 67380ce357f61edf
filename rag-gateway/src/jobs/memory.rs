//! Jobs of a gateway that has no store: they end with it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use atlas_shared::{UpstreamError, gateway_api::JobStatus};
use uuid::Uuid;

use super::store::{Claimed, JobStore, Leave, REMEMBERED, Reported, Work};

#[derive(Default)]
pub(super) struct MemoryJobs(Mutex<State>);

#[derive(Default)]
struct State {
    /// Ids are made in the order of time.
    jobs: BTreeMap<Uuid, Job>,
    ended: VecDeque<Uuid>,
}

struct Job {
    reported: Reported,
    /// `None` once it has ended.
    work: Option<Work>,
    attempt: u32,
    held_until: Option<Instant>,
}

impl MemoryJobs {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl JobStore for MemoryJobs {
    async fn submit(
        &self,
        id: Uuid,
        work: &Work,
        job: &Reported,
        max_active: usize,
    ) -> Result<Option<usize>, UpstreamError> {
        let mut state = self.state();
        let active = state.jobs.values().filter(|job| job.work.is_some()).count();
        if state.jobs.contains_key(&id) {
            return Ok(Some(active));
        }
        if active >= max_active {
            return Ok(None);
        }
        let job = Job { reported: job.clone(), work: Some(work.clone()), attempt: 0, held_until: None };
        state.jobs.insert(id, job);
        Ok(Some(active + 1))
    }

    async fn claim(&self, lease: Duration) -> Result<Option<Claimed>, UpstreamError> {
        let now = Instant::now();
        let mut state = self.state();
        let free = |job: &Job| job.work.is_some() && job.held_until.is_none_or(|until| until <= now);
        let Some((id, job)) = state.jobs.iter_mut().find(|(_, job)| free(job)) else { return Ok(None) };
        let Some(work) = job.work.clone() else { return Ok(None) };
        job.attempt += 1;
        job.held_until = Some(now + lease);
        let Reported { tenant, status } = job.reported.clone();
        Ok(Some(Claimed { id: *id, attempt: job.attempt, work, tenant, status }))
    }

    async fn report(
        &self,
        id: Uuid,
        attempt: u32,
        status: &JobStatus,
        lease: Duration,
        leave: Leave,
    ) -> Result<bool, UpstreamError> {
        let mut state = self.state();
        let Some(job) = state.jobs.get_mut(&id) else { return Ok(false) };
        if job.attempt != attempt || job.work.is_none() {
            return Ok(false);
        }
        job.reported.status = status.clone();
        job.held_until = (leave == Leave::Hold).then(|| Instant::now() + lease);
        if leave == Leave::End {
            job.work = None;
            state.ended.push_back(id);
            while state.ended.len() > REMEMBERED
                && let Some(oldest) = state.ended.pop_front()
            {
                state.jobs.remove(&oldest);
            }
        }
        Ok(true)
    }

    async fn status(&self, id: Uuid) -> Result<Option<Reported>, UpstreamError> {
        Ok(self.state().jobs.get(&id).map(|job| job.reported.clone()))
    }
}
