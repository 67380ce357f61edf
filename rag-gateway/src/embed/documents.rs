//! Embeds documents that are to be written: in calls of bounded size, several at once.
//!
//! What was paid for is not thrown away, whatever becomes of the other calls:
//!
//! - A document that fits into one call is in one call: it is paid for whole or not at all, and given back, to be
//!   written, as soon as that call is answered.
//! - What the calls of a larger one bring is [kept](Paid) until all of it is there and written, so whoever sends it
//!   again pays for the rest only.
//! - When a call fails for good, or the gateway stops, no other begins. Those under way are waited for.

use std::{collections::HashMap, sync::Arc, time::Duration};

use atlas_shared::{Dependency, UpstreamError};
use futures::{
    StreamExt as _,
    stream::{self, BoxStream},
};
use moka::sync::Cache;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{BookedEmbedder, CONCURRENCY, Embedded, MAX_BATCH_TEXTS, MAX_BATCH_TOKENS, unreadable};
use crate::{error::GatewayError, index::VectorIndex};

/// Names the namespace of the ids of kept vectors.
const PAID_NAMESPACE: Uuid = Uuid::from_u128(0x2f6b_1c0e_8d57_4a35_b1f4_7c59_0e3a_66d8);

/// Kept vectors that this process remembers by itself, in bytes: for an index that does not answer either.
const MAX_REMEMBERED_BYTES: u64 = 64 * 1024 * 1024;

/// How long it does.
const REMEMBERED: Duration = Duration::from_hours(24);

/// Vectors that were paid for and are not in the index yet.
///
/// They are kept beside the index, so that they outlive this process, and are whole where other gateways look too.
pub(crate) struct Paid {
    index: Arc<dyn VectorIndex>,
    remembered: Cache<Uuid, Arc<Vec<f32>>>,
}

impl Paid {
    pub(crate) fn new(index: Arc<dyn VectorIndex>) -> Self {
        let remembered = Cache::builder()
            .max_capacity(MAX_REMEMBERED_BYTES)
            .weigher(|_, vector: &Arc<Vec<f32>>| u32::try_from(size_of_val(&vector[..])).unwrap_or(u32::MAX))
            .time_to_live(REMEMBERED)
            .build();
        Self { index, remembered }
    }

    /// Each tenant pays for its own, and a vector is of a model.
    fn id(model: &str, tenant: Option<&str>, text: &str) -> Uuid {
        let name = format!("{model}\0{}\0{text}", tenant.unwrap_or_default());
        Uuid::new_v5(&PAID_NAMESPACE, name.as_bytes())
    }

    async fn find(&self, ids: &[Uuid]) -> Result<HashMap<Uuid, Vec<f32>>, UpstreamError> {
        let mut found = self.index.kept_vectors(ids).await?;
        for id in ids {
            if let Some(vector) = self.remembered.get(id) {
                found.entry(*id).or_insert_with(|| vector.to_vec());
            }
        }
        Ok(found)
    }

    async fn keep(&self, vectors: Vec<(Uuid, Vec<f32>)>) {
        let number = vectors.len();
        for (id, vector) in &vectors {
            self.remembered.insert(*id, Arc::new(vector.clone()));
        }
        if let Err(error) = self.index.keep_vectors(vectors).await {
            tracing::warn!(
                vectors = number, error_code = error.code(), error = %error,
                "vectors that were paid for are kept in memory only"
            );
        }
    }

    async fn forget(&self, ids: Vec<Uuid>) {
        for id in &ids {
            self.remembered.invalidate(id);
        }
        // The index gives them up by itself after some weeks.
        if let Err(error) = self.index.forget_vectors(ids).await {
            tracing::warn!(error_code = error.code(), error = %error, "vectors are kept that are not needed any more");
        }
    }
}

/// The texts of a document.
pub(crate) struct Texts {
    /// Who pays.
    pub(crate) tenant: Option<String>,
    pub(crate) texts: Vec<String>,
}

/// A document with a vector for each of its texts; none where nothing is embedded.
pub(crate) type Complete = (usize, Vec<Vec<f32>>);

/// Documents that are embedded. Must be [ended](Embedding::end), also after a failure.
pub(crate) struct Embedding {
    documents: Vec<Document>,
    answers: BoxStream<'static, Vec<Answer>>,
    /// No call begins any more.
    halted: CancellationToken,
    paid: Arc<Paid>,
    tokens: u64,
    /// The first failure of a call.
    refused: Option<GatewayError>,
    /// The failure of whoever writes.
    unwritten: Option<GatewayError>,
}

#[derive(Default)]
struct Document {
    /// Of its texts; none where nothing is embedded.
    ids: Vec<Uuid>,
    vectors: Vec<Option<Vec<f32>>>,
    missing: usize,
    /// Some of its vectors are kept.
    kept: bool,
    /// Which are there and not kept.
    unkept: Vec<usize>,
    given: bool,
}

/// Texts that go in one call, each with its document and its position in it.
#[derive(Debug)]
struct Call {
    tenant: Option<String>,
    parts: Vec<(usize, usize)>,
    texts: Vec<String>,
}

/// What became of a call; `None`: it was not sent.
struct Answer {
    parts: Vec<(usize, usize)>,
    result: Option<Result<Embedded, GatewayError>>,
}

impl Embedding {
    /// Begins to embed. Without an embedder all are complete at once.
    pub(crate) async fn begin(
        embedder: Option<&Arc<BookedEmbedder>>,
        paid: &Arc<Paid>,
        texts: Vec<Texts>,
    ) -> Result<Self, GatewayError> {
        let halted = CancellationToken::new();
        let mut this = Self {
            documents: Vec::with_capacity(texts.len()),
            answers: stream::empty().boxed(),
            halted: halted.clone(),
            paid: Arc::clone(paid),
            tokens: 0,
            refused: None,
            unwritten: None,
        };
        let Some(embedder) = embedder else {
            this.documents.resize_with(texts.len(), Document::default);
            return Ok(this);
        };
        for Texts { tenant, texts } in &texts {
            let id = |text: &String| Paid::id(embedder.model(), tenant.as_deref(), text);
            let ids: Vec<Uuid> = texts.iter().map(id).collect();
            let document =
                Document { vectors: vec![None; ids.len()], missing: ids.len(), ids, ..Document::default() };
            this.documents.push(document);
        }
        let ids: Vec<Uuid> =
            this.documents.iter().flat_map(|document| document.ids.iter().copied()).collect();
        let found = if ids.is_empty() { HashMap::new() } else { paid.find(&ids).await? };
        for document in &mut this.documents {
            for (id, vector) in document.ids.iter().zip(&mut document.vectors) {
                *vector = found.get(id).cloned();
            }
            document.missing = document.vectors.iter().filter(|vector| vector.is_none()).count();
            document.kept = document.missing < document.ids.len();
        }
        let weigh = |text: &String| embedder.embedder.tokens_upper_bound(std::slice::from_ref(text)).0;
        let is_missing = |document: usize, at: usize| this.documents[document].vectors[at].is_none();
        let calls = calls(texts, is_missing, weigh);
        let embedder = Arc::clone(embedder);
        this.answers = stream::iter(calls)
            .map(move |Call { tenant, parts, texts }| {
                let (embedder, halted) = (Arc::clone(&embedder), halted.clone());
                async move { Answer { parts, result: embedder.send(texts, tenant.as_deref(), &halted).await } }
            })
            .buffered(CONCURRENCY)
            // What came while others were written is written together.
            .ready_chunks(CONCURRENCY)
            .boxed();
        Ok(this)
    }

    /// The next documents that are complete, in their order; `None`: there will be no more.
    pub(crate) async fn next(&mut self) -> Option<Vec<Complete>> {
        loop {
            if self.unwritten.is_some() {
                return None;
            }
            let complete: Vec<Complete> = self
                .documents
                .iter_mut()
                .enumerate()
                .filter(|(_, document)| document.missing == 0 && !document.given)
                .map(|(at, document)| {
                    document.given = true;
                    (at, document.vectors.iter().flatten().cloned().collect())
                })
                .collect();
            if !complete.is_empty() {
                return Some(complete);
            }
            let answers = self.answers.next().await?;
            self.take(answers).await;
        }
    }

    /// These are in the index.
    pub(crate) async fn written(&mut self, documents: impl IntoIterator<Item = usize>) {
        let mut kept = Vec::new();
        for at in documents {
            let document = std::mem::take(&mut self.documents[at]);
            if document.kept {
                kept.extend(document.ids);
            }
            self.documents[at].given = true;
        }
        if !kept.is_empty() {
            self.paid.forget(kept).await;
        }
    }

    /// What was given could not be written.
    pub(crate) fn not_written(&mut self, error: GatewayError) {
        self.halted.cancel();
        self.unwritten = Some(error);
    }

    /// Waits for the calls under way and keeps what is not written. How many tokens were booked, and why not all is
    /// written.
    pub(crate) async fn end(mut self) -> (u64, Option<GatewayError>) {
        while let Some(answers) = self.answers.next().await {
            self.take(answers).await;
        }
        // Complete, and not written.
        self.keep(|_| true).await;
        (self.tokens, self.unwritten.or(self.refused))
    }

    async fn take(&mut self, answers: Vec<Answer>) {
        for Answer { parts, result } in answers {
            match result {
                Some(Ok(Embedded { vectors, tokens })) => {
                    self.tokens += tokens;
                    for ((document, at), vector) in parts.into_iter().zip(vectors) {
                        let document = &mut self.documents[document];
                        document.vectors[at] = Some(vector);
                        document.unkept.push(at);
                        document.missing -= 1;
                    }
                }
                Some(Err(error)) => {
                    self.refused.get_or_insert(error);
                }
                None => {}
            }
        }
        self.forget_what_does_not_fit().await;
        self.keep(|document| document.missing > 0).await;
    }

    /// Keeps what is there of these documents.
    async fn keep(&mut self, which: impl Fn(&Document) -> bool) {
        let mut vectors = Vec::new();
        for document in self.documents.iter_mut().filter(|document| which(document)) {
            for at in std::mem::take(&mut document.unkept) {
                vectors.extend(document.vectors[at].clone().map(|vector| (document.ids[at], vector)));
                document.kept = true;
            }
        }
        if !vectors.is_empty() {
            self.paid.keep(vectors).await;
        }
    }

    /// A server that gives vectors of another length than it did: what is kept is of no use.
    async fn forget_what_does_not_fit(&mut self) {
        let mut misfits = Vec::new();
        for document in self.documents.iter_mut().filter(|document| document.kept && document.missing == 0) {
            let mut sizes = document.vectors.iter().flatten().map(Vec::len);
            let size = sizes.next();
            if !document.given && sizes.any(|other| Some(other) != size) {
                misfits.append(&mut document.ids);
                *document = Document { given: true, ..Document::default() };
            }
        }
        if !misfits.is_empty() {
            self.halted.cancel();
            let why =
                unreadable("the vectors have another length than those before; send the documents again");
            self.refused.get_or_insert(why.into());
            self.paid.forget(misfits).await;
        }
    }
}

impl BookedEmbedder {
    /// One call, with retries; `None`: not sent, because another one failed before.
    async fn send(
        self: &Arc<Self>,
        texts: Vec<String>,
        tenant: Option<&str>,
        halted: &CancellationToken,
    ) -> Option<Result<Embedded, GatewayError>> {
        // Queries do not wait: they are few, and somebody waits for them.
        let paced = tokio::select! {
            biased;
            () = self.stop.cancelled() => false,
            () = halted.cancelled() => return None,
            () = self.pace(&texts) => true,
        };
        let result = if paced { self.embed_patiently(&texts, tenant).await } else { Err(stopping().into()) };
        if result.is_err() {
            halted.cancel();
        }
        Some(result)
    }
}

fn stopping() -> UpstreamError {
    UpstreamError::transient(Dependency::Gateway, "the gateway is stopping; send the rest again")
}

/// Texts without a vector, in their order, in calls of bounded size. A text that is too large goes alone. A document
/// that fits into one call is not split.
fn calls(
    documents: Vec<Texts>,
    is_missing: impl Fn(usize, usize) -> bool,
    weigh: impl Fn(&String) -> u64,
) -> Vec<Call> {
    let fits = |texts: usize, tokens: u64| texts <= MAX_BATCH_TEXTS && tokens <= MAX_BATCH_TOKENS;
    let mut calls: Vec<Call> = Vec::new();
    let mut tokens = 0;
    for (document, Texts { tenant, texts }) in documents.into_iter().enumerate() {
        let texts: Vec<(usize, String, u64)> = texts
            .into_iter()
            .enumerate()
            .filter(|(at, _)| is_missing(document, *at))
            .map(|(at, text)| {
                let tokens = weigh(&text);
                (at, text, tokens)
            })
            .collect();
        let weight = texts.iter().map(|(_, _, tokens)| tokens).sum();
        let mut begin = calls.last().is_none_or(|call| {
            let together = fits(call.texts.len() + texts.len(), tokens + weight);
            call.tenant != tenant || (fits(texts.len(), weight) && !together)
        });
        for (at, text, more) in texts {
            match calls.last_mut().filter(|call| !begin && fits(call.texts.len() + 1, tokens + more)) {
                Some(call) => {
                    call.parts.push((document, at));
                    call.texts.push(text);
                    tokens += more;
                }
                None => {
                    calls.push(Call {
                        tenant: tenant.clone(),
                        parts: vec![(document, at)],
                        texts: vec![text],
                    });
                    tokens = more;
                }
            }
            begin = false;
        }
    }
    calls
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn calls_are_bounded_lose_nothing_and_split_only_what_does_not_fit(
            documents in prop::collection::vec((any::<bool>(), prop::collection::vec(0_usize..6000, 0..120)), 0..12),
            had in prop::collection::hash_set((0_usize..12, 0_usize..120), 0..40),
        ) {
            let weigh = |text: &String| text.len() as u64;
            let texts: Vec<Texts> = documents
                .iter()
                .map(|(tenant, lengths)| Texts {
                    tenant: tenant.then(|| "acme".to_owned()),
                    texts: lengths.iter().map(|length| "x".repeat(*length)).collect(),
                })
                .collect();
            let calls = calls(texts, |document, at| !had.contains(&(document, at)), weigh);
            let asked: Vec<(usize, usize)> = calls.iter().flat_map(|call| call.parts.iter().copied()).collect();
            let missing: Vec<(usize, usize)> = documents
                .iter()
                .enumerate()
                .flat_map(|(document, (_, lengths))| (0..lengths.len()).map(move |at| (document, at)))
                .filter(|part| !had.contains(part))
                .collect();
            prop_assert_eq!(&asked, &missing);
            let length = |(document, at): (usize, usize)| documents[document].1[at] as u64;
            for call in &calls {
                let tokens: u64 = call.texts.iter().map(weigh).sum();
                prop_assert!(call.texts.len() <= MAX_BATCH_TEXTS);
                prop_assert!(call.texts.len() == 1 || tokens <= MAX_BATCH_TOKENS);
                for (part, text) in call.parts.iter().zip(&call.texts) {
                    prop_assert_eq!(length(*part), text.len() as u64);
                    prop_assert_eq!(documents[part.0].0, call.tenant.is_some());
                }
            }
            for document in 0..documents.len() {
                let own: Vec<_> = missing.iter().filter(|part| part.0 == document).collect();
                let tokens: u64 = own.iter().map(|part| length(**part)).sum();
                if own.len() <= MAX_BATCH_TEXTS && tokens <= MAX_BATCH_TOKENS {
                    let has_some = |call: &&Call| call.parts.iter().any(|part| part.0 == document);
                    prop_assert!(calls.iter().filter(has_some).count() <= 1);
                }
            }
        }
    }
}
