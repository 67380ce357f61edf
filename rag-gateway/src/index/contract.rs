//! What every [`VectorIndex`] promises, run against each adapter.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use atlas_test_support::qdrant::Qdrant;

use super::*;

/// A collection name that no other test uses: servers outlive test runs.
pub(super) fn fresh(name: &str) -> String {
    format!("contract-{name}-{}", Uuid::new_v4().simple())
}

pub(super) fn meta(size: Option<usize>) -> CollectionMeta {
    CollectionMeta {
        embedding_model: size.map(|_| "test-model".to_owned()),
        embedding_size: size,
        avg_len: 12.0,
        weighing: Weighing { k1: 2.0, b: 0.75, heading: 2, pairs: true, folds: true },
    }
}

#[derive(Clone)]
pub(super) struct Builder(pub(super) NewChunk);

/// A chunk of its own document.
pub(super) fn chunk(source: &str, text: &str) -> Builder {
    let record = ChunkRecord {
        doc: format!("doc-{source}"),
        rev: 1,
        hash: "hash".to_owned(),
        cut: "1".to_owned(),
        n: 0,
        of: 1,
        source: source.to_owned(),
        start: 1,
        end: 3,
        text: text.to_owned(),
        terms: meta(None).weighing.terms(&ChunkRecord { text: text.to_owned(), ..ChunkRecord::default() }),
        ..ChunkRecord::default()
    };
    Builder(NewChunk { id: Uuid::new_v5(&Uuid::NAMESPACE_URL, source.as_bytes()), record, dense: None })
}

impl Builder {
    fn with(mut self, change: impl FnOnce(&mut ChunkRecord)) -> Self {
        change(&mut self.0.record);
        let name = format!("{}#{}", self.0.record.source, self.0.record.n);
        self.0.id = Uuid::new_v5(&Uuid::NAMESPACE_URL, name.as_bytes());
        self
    }

    fn dense(mut self, vector: [f32; 3]) -> Self {
        self.0.dense = Some(vector.to_vec());
        self
    }
}

async fn put(index: &dyn VectorIndex, collection: &str, chunks: impl IntoIterator<Item = Builder>) {
    index.upsert(collection, chunks.into_iter().map(|builder| builder.0).collect(), None).await.unwrap();
}

fn lexical(query: &str) -> Search {
    let lexical = meta(None).weighing.query(query);
    Search { dense: None, lexical, selection: Selection::default(), limit: 10 }
}

async fn sources(index: &dyn VectorIndex, collection: &str, search: Search) -> Vec<String> {
    let lists = index.search(collection, search).await.unwrap();
    lists.lexical.into_iter().map(|hit| hit.record.source.clone()).collect()
}

async fn run(index: &dyn VectorIndex) {
    a_collection_keeps_the_meta_it_was_made_with(index).await;
    words_identifiers_and_their_parts_are_found(index).await;
    a_word_that_a_query_repeats_counts_as_often(index).await;
    dense_and_lexical_lists_come_from_one_search(index).await;
    writing_the_same_id_again_replaces_it(index).await;
    selections_select(index).await;
    a_scroll_sees_everything_once(index).await;
    older_revisions_can_be_deleted(index).await;
    where_documents_come_from_is_said_anew(index).await;
    a_collection_can_be_weighed_anew(index).await;
    nothing_is_found_where_nothing_is(index).await;
    what_is_selected_is_counted(index).await;
    a_change_gives_its_collection_another_version(index).await;
    another_generation_takes_the_place_of_the_first_at_once(index).await;
    what_was_paid_for_is_kept_until_it_is_forgotten(index).await;
    index.check().await.unwrap();
}

async fn a_collection_keeps_the_meta_it_was_made_with(index: &dyn VectorIndex) {
    let name = fresh("meta");
    assert_eq!(index.info(&name).await.unwrap(), None);
    assert_eq!(index.meta(&name).await.unwrap(), None);
    assert_eq!(index.ensure(&name, &meta(Some(3))).await.unwrap(), meta(Some(3)));
    assert_eq!(
        index.ensure(&name, &meta(None)).await.unwrap(),
        meta(Some(3)),
        "an existing one keeps its meta"
    );
    let state =
        CollectionState { meta: meta(Some(3)), chunks: 0, generation: Some(names::generation(&name, 1)) };
    assert_eq!(index.info(&name).await.unwrap(), Some(state));
    assert_eq!(index.meta(&name).await.unwrap(), Some(meta(Some(3))));
    assert!(index.collections().await.unwrap().iter().any(|(listed, _)| *listed == name));
    assert!(index.drop_collection(&name).await.unwrap());
    assert!(!index.drop_collection(&name).await.unwrap());
    assert_eq!(index.info(&name).await.unwrap(), None);
}

async fn words_identifiers_and_their_parts_are_found(index: &dyn VectorIndex) {
    let name = fresh("words");
    index.ensure(&name, &meta(None)).await.unwrap();
    put(
        index,
        &name,
        [
            chunk("budget.md", "The daily budget is enforced in the store, by reservations."),
            chunk("index.rs", "struct VectorIndexAdapter; const RAG_GATEWAY_TIMEOUT_MS: u64 = 5;"),
            chunk("queue.md", "Messages are pulled, acked and nacked. Nothing is dropped."),
            chunk("jp.md", "請求書の番号は連番です。"),
            chunk("fr.md", "Les résumés sont envoyés à l’équipe."),
            chunk(
                "de.md",
                "Die Lo\u{308}schung der Rechnungen (Loeschung) ist ausgeschlossen; ask for a resume.",
            ),
        ],
    )
    .await;
    for words in ["equipe", "ÉQUIPE", "équipe"] {
        assert_eq!(sources(index, &name, lexical(words)).await, ["fr.md"], "{words}");
    }
    assert_eq!(sources(index, &name, lexical("résumé")).await.len(), 2, "both ways");
    assert_eq!(sources(index, &name, lexical("Löschung")).await, ["de.md"]);
    assert_eq!(sources(index, &name, lexical("which reservation enforces budgets?")).await, ["budget.md"]);
    assert_eq!(sources(index, &name, lexical("VectorIndexAdapter")).await, ["index.rs"]);
    assert_eq!(sources(index, &name, lexical("vector adapter")).await, ["index.rs"]);
    assert_eq!(sources(index, &name, lexical("gateway timeout")).await, ["index.rs"]);
    for words in ["請求書", "番号", "連番 number", "番号と請求"] {
        assert_eq!(sources(index, &name, lexical(words)).await, ["jp.md"], "{words}");
    }
    assert_eq!(
        sources(index, &name, lexical("the of and")).await,
        Vec::<String>::new(),
        "stop words find nothing"
    );
    assert_eq!(sources(index, &name, lexical("zebra")).await, Vec::<String>::new());
    assert_eq!(sources(index, &name, lexical("")).await, Vec::<String>::new());
    index.drop_collection(&name).await.unwrap();
}

async fn a_word_that_a_query_repeats_counts_as_often(index: &dyn VectorIndex) {
    let name = fresh("repeated");
    index.ensure(&name, &meta(None)).await.unwrap();
    let texts = [
        chunk("apple.md", "An apple that is stored in the cellar."),
        chunk("pear.md", "A pear that is stored in the cellar."),
        chunk("both.md", "An apple, a pear and many other fruits."),
        chunk("none.md", "Nothing that is stored in the cellar."),
    ];
    put(index, &name, texts).await;
    let scores = async |query: &str| -> HashMap<String, f32> {
        let lists = index.search(&name, lexical(query)).await.unwrap();
        lists.lexical.into_iter().map(|hit| (hit.record.source.clone(), hit.score)).collect()
    };
    let (apple, pear) = (scores("apple").await, scores("pear").await);
    let found = scores("apples and an apple, or a pear").await;
    assert_eq!(found.len(), 3, "{found:?}");
    for (source, score) in &found {
        let of = |list: &HashMap<String, f32>| list.get(source).copied().unwrap_or_default();
        let expected = 2.0 * of(&apple) + of(&pear);
        assert!((score - expected).abs() < 1e-4, "{source}: {score}, not {expected}");
    }
    assert_eq!(sources(index, &name, lexical("pear pears apple")).await, ["both.md", "pear.md", "apple.md"]);
}

async fn dense_and_lexical_lists_come_from_one_search(index: &dyn VectorIndex) {
    let name = fresh("dense");
    index.ensure(&name, &meta(Some(3))).await.unwrap();
    put(
        index,
        &name,
        [chunk("x.md", "apple").dense([1.0, 0.0, 0.0]), chunk("y.md", "pear").dense([0.6, 0.8, 0.0])],
    )
    .await;
    let search = Search { dense: Some(vec![2.0, 0.0, 0.0]), ..lexical("pear") };
    let lists = index.search(&name, search).await.unwrap();
    let dense: Vec<_> = lists.dense.iter().map(|hit| (hit.record.source.as_str(), hit.score)).collect();
    assert_eq!(dense.len(), 2);
    assert_eq!(dense[0].0, "x.md");
    assert!((dense[0].1 - 1.0).abs() < 1e-4 && (dense[1].1 - 0.6).abs() < 1e-4, "cosines: {dense:?}");
    assert_eq!(lists.lexical.len(), 1);
    assert_eq!(lists.lexical[0].record.source, "y.md");

    // The cosine of chunks that are named; nothing else is read of them.
    let id = |source: &str| chunk(source, "").0.id;
    let ask = |ids: Vec<Uuid>| index.cosines(&name, vec![2.0, 0.0, 0.0], ids);
    let cosines = ask(vec![id("y.md"), id("nowhere.md")]).await.unwrap();
    assert_eq!(cosines.len(), 1);
    assert!((cosines[&id("y.md")] - 0.6).abs() < 1e-4, "{cosines:?}");
    assert!(ask(Vec::new()).await.unwrap().is_empty(), "no chunks are not all chunks");
    assert!(
        index.cosines(&fresh("nowhere"), vec![1.0, 0.0, 0.0], vec![id("y.md")]).await.unwrap().is_empty()
    );
    index.drop_collection(&name).await.unwrap();
}

async fn writing_the_same_id_again_replaces_it(index: &dyn VectorIndex) {
    let name = fresh("again");
    index.ensure(&name, &meta(None)).await.unwrap();
    put(index, &name, [chunk("a.md", "apple")]).await;
    put(index, &name, [chunk("a.md", "pear")]).await;
    assert_eq!(index.info(&name).await.unwrap().unwrap().chunks, 1);
    assert_eq!(sources(index, &name, lexical("apple")).await, Vec::<String>::new());
    assert_eq!(sources(index, &name, lexical("pear")).await, ["a.md"]);
    index.drop_collection(&name).await.unwrap();
}

async fn selections_select(index: &dyn VectorIndex) {
    let name = fresh("select");
    index.ensure(&name, &meta(None)).await.unwrap();
    put(
        index,
        &name,
        [
            chunk("a.rs", "apple").with(|record| {
                record.lang = Some("rust".to_owned());
                record.repo = "one".to_owned();
            }),
            chunk("b.md", "apple").with(|record| {
                record.tenant = "acme".to_owned();
                record.n = 1;
            }),
        ],
    )
    .await;
    let only = |selection: Selection| Search { selection, ..lexical("apple") };
    for (selection, expected) in [
        (Selection { lang: Some("rust".to_owned()), ..Selection::default() }, "a.rs"),
        (Selection { repo: Some("one".to_owned()), ..Selection::default() }, "a.rs"),
        (Selection { tenants: Some(vec![String::new()]), ..Selection::default() }, "a.rs"),
        (Selection { tenants: Some(vec!["acme".to_owned()]), ..Selection::default() }, "b.md"),
        (Selection { docs: Some(vec!["doc-b.md".to_owned()]), ..Selection::default() }, "b.md"),
        (Selection { first_chunks: true, ..Selection::default() }, "a.rs"),
        (
            Selection {
                ids: Some(vec![chunk("b.md", "").with(|record| record.n = 1).0.id]),
                ..Selection::default()
            },
            "b.md",
        ),
    ] {
        assert_eq!(sources(index, &name, only(selection.clone())).await, [expected], "{selection:?}");
    }
    let none = Selection { docs: Some(Vec::new()), ..Selection::default() };
    assert_eq!(
        sources(index, &name, only(none)).await,
        Vec::<String>::new(),
        "no documents is not all documents"
    );
    index.drop_collection(&name).await.unwrap();
}

async fn a_scroll_sees_everything_once(index: &dyn VectorIndex) {
    let name = fresh("scroll");
    index.ensure(&name, &meta(None)).await.unwrap();
    put(index, &name, (0..7).map(|number| chunk(&format!("{number}.md"), "apple"))).await;
    let (mut seen, mut from) = (Vec::new(), None);
    loop {
        let page = index.scroll(&name, &Selection::default(), from, 3, false).await.unwrap();
        assert!(page.records.iter().all(|(_, record)| record.text.is_empty()), "text was not asked for");
        seen.extend(page.records.into_iter().map(|(_, record)| record.source));
        from = page.next;
        if from.is_none() {
            break;
        }
    }
    seen.sort();
    assert_eq!(seen, (0..7).map(|number| format!("{number}.md")).collect::<Vec<_>>());
    let page = index.scroll(&name, &Selection::default(), None, 1, true).await.unwrap();
    assert_eq!(page.records[0].1.text, "apple");
    index.drop_collection(&name).await.unwrap();
}

async fn older_revisions_can_be_deleted(index: &dyn VectorIndex) {
    let name = fresh("revisions");
    index.ensure(&name, &meta(None)).await.unwrap();
    let now = 1_790_000_000_000_000_i64;
    put(
        index,
        &name,
        [
            chunk("a.md", "apple").with(|record| record.rev = now - 1),
            chunk("a.md", "apple pie").with(|record| {
                record.rev = now;
                record.n = 1;
            }),
        ],
    )
    .await;
    let old =
        Selection { docs: Some(vec!["doc-a.md".to_owned()]), rev_below: Some(now), ..Selection::default() };
    index.delete(&name, old).await.unwrap();
    let left = index.scroll(&name, &Selection::default(), None, 10, true).await.unwrap();
    assert_eq!(left.records.len(), 1);
    assert_eq!(left.records[0].1.text, "apple pie");
    assert!(
        index.delete(&name, Selection::default()).await.is_err(),
        "everything is never deleted by accident"
    );
    index.drop_collection(&name).await.unwrap();
}

async fn where_documents_come_from_is_said_anew(index: &dyn VectorIndex) {
    let name = fresh("restate");
    index.ensure(&name, &meta(Some(3))).await.unwrap();
    let second = chunk("a.md", "apple pie").with(|record| record.n = 1).dense([0.0, 1.0, 0.0]);
    let other = chunk("b.md", "apple cake").dense([0.0, 0.0, 1.0]);
    put(index, &name, [chunk("a.md", "apple").dense([1.0, 0.0, 0.0]), second, other]).await;
    // What was read before may be remembered.
    let near = || Search { dense: Some(vec![0.0, 1.0, 0.0]), ..lexical("pie") };
    assert_eq!(index.search(&name, near()).await.unwrap().dense[0].record.commit, None);

    let docs = || vec!["doc-a.md".to_owned()];
    let origin = Provenance { origin: Some("example.org/shop".to_owned()), commit: None };
    index.restate(&name, docs(), origin).await.unwrap();
    let commit = Provenance { commit: Some("c0ffee".to_owned()), origin: None };
    index.restate(&name, docs(), commit).await.unwrap();

    let all = index.scroll(&name, &Selection::default(), None, 10, true).await.unwrap().records;
    assert_eq!(all.len(), 3);
    for (_, record) in all {
        let of_it = record.doc == "doc-a.md";
        assert_eq!(record.commit.as_deref(), of_it.then_some("c0ffee"), "{}", record.doc);
        assert_eq!(record.origin.as_deref(), of_it.then_some("example.org/shop"), "{}", record.doc);
    }
    let lists = index.search(&name, near()).await.unwrap();
    for hit in [&lists.dense[0], &lists.lexical[0]] {
        assert_eq!((&*hit.record.text, hit.record.commit.as_deref()), ("apple pie", Some("c0ffee")));
    }
    index.drop_collection(&name).await.unwrap();
}

async fn a_collection_can_be_weighed_anew(index: &dyn VectorIndex) {
    let name = fresh("weigh");
    index.ensure(&name, &meta(None)).await.unwrap();
    put(index, &name, [chunk("a.md", "apple tree"), chunk("b.md", "pear")]).await;
    let score = async || index.search(&name, lexical("apple")).await.unwrap().lexical[0].score;
    let before = score().await;
    index.reweigh(&name, 2.0).await.unwrap();
    assert!(score().await < before, "longer than the average counts less");
    assert!((index.info(&name).await.unwrap().unwrap().meta.avg_len - 2.0).abs() < f64::EPSILON);
    index.drop_collection(&name).await.unwrap();
}

async fn another_generation_takes_the_place_of_the_first_at_once(index: &dyn VectorIndex) {
    let name = fresh("generation");
    let (first, second) = (names::generation(&name, 1), names::generation(&name, 2));
    index.ensure(&name, &meta(None)).await.unwrap();
    put(index, &name, [chunk("a.md", "apple"), chunk("b.md", "apple")]).await;

    assert_eq!(index.ensure(&second, &meta(Some(3))).await.unwrap(), meta(Some(3)));
    put(index, &second, [chunk("a.md", "apple").dense([1.0, 0.0, 0.0])]).await;
    assert_eq!(sources(index, &name, lexical("apple")).await.len(), 2, "readers see the first");
    let listed = |all: Vec<(String, CollectionState)>| -> Vec<(String, Option<String>, u64)> {
        let ours = all.into_iter().filter(|(listed, _)| listed.starts_with(&name));
        ours.map(|(listed, state)| (listed, state.generation, state.chunks)).collect()
    };
    assert_eq!(
        listed(index.collections().await.unwrap())
            .into_iter()
            .map(|(listed, generation, _)| (listed, generation))
            .collect::<Vec<_>>(),
        [(name.clone(), Some(first.clone())), (second.clone(), None)]
    );

    // Somebody searches all the time: there is always an answer, from the one or the other.
    let search = async {
        for _ in 0..20 {
            assert_ne!(sources(index, &name, lexical("apple")).await, Vec::<String>::new());
        }
    };
    let switch = async {
        for generation in [&second, &first, &second] {
            index.use_generation(&name, generation).await.unwrap();
            assert_eq!(index.generation(&name).await.unwrap(), *generation);
            assert_eq!(index.resolve(&name).await.unwrap().unwrap().generation, *generation);
        }
    };
    tokio::join!(search, switch);
    assert_eq!(sources(index, &name, lexical("apple")).await, ["a.md"]);
    assert_eq!(index.meta(&name).await.unwrap(), Some(meta(Some(3))));
    assert_eq!(index.info(&name).await.unwrap().unwrap().generation, Some(second.clone()));
    assert_eq!(index.info(&first).await.unwrap().unwrap().chunks, 2, "the old one is kept");
    assert!(index.use_generation(&name, &names::generation(&name, 9)).await.is_err());

    assert_eq!(index.generation(&first).await.unwrap(), first, "a generation stands for itself");

    assert!(index.drop_collection(&first).await.unwrap());
    assert_eq!(sources(index, &name, lexical("apple")).await, ["a.md"]);
    assert!(index.drop_collection(&name).await.unwrap());
    assert_eq!(index.info(&second).await.unwrap(), None, "with what it stood for");
}

async fn what_was_paid_for_is_kept_until_it_is_forgotten(index: &dyn VectorIndex) {
    let ids: Vec<Uuid> = (0..3).map(|_| Uuid::new_v4()).collect();
    assert_eq!(index.kept_vectors(&ids).await.unwrap(), HashMap::new());
    index.forget_vectors(ids.clone()).await.unwrap();
    // Of another length each, because models differ.
    let vectors = [vec![0.25, -1.5], vec![0.1, 0.2, 0.3]];
    let kept: Vec<_> = ids.iter().copied().zip(vectors.iter().cloned()).collect();
    index.keep_vectors(kept.clone()).await.unwrap();
    index.keep_vectors(kept.clone()).await.unwrap();
    assert_eq!(index.kept_vectors(&ids).await.unwrap(), kept.iter().cloned().collect());
    let listed = index.collections().await.unwrap();
    assert!(!listed.iter().any(|(name, _)| name.contains("paid")), "it is no collection: {listed:?}");
    index.forget_vectors(vec![ids[0], ids[2]]).await.unwrap();
    assert_eq!(index.kept_vectors(&ids).await.unwrap(), HashMap::from([kept[1].clone()]));
    index.forget_vectors(ids).await.unwrap();
}

async fn nothing_is_found_where_nothing_is(index: &dyn VectorIndex) {
    let name = fresh("nothing");
    assert_eq!(sources(index, &name, lexical("apple")).await, Vec::<String>::new());
    assert!(index.scroll(&name, &Selection::default(), None, 10, true).await.unwrap().records.is_empty());
    assert!(index.upsert(&name, vec![chunk("a.md", "apple").0], None).await.is_err());
}

async fn what_is_selected_is_counted(index: &dyn VectorIndex) {
    let name = fresh("count");
    assert_eq!(index.count(&name, &Selection::default()).await.unwrap(), 0);
    index.ensure(&name, &meta(None)).await.unwrap();
    let of_acme = |record: &mut ChunkRecord| record.tenant = "acme".to_owned();
    put(index, &name, [chunk("a.md", "apple"), chunk("b.md", "apple").with(of_acme)]).await;
    assert_eq!(index.count(&name, &Selection::default()).await.unwrap(), 2);
    let acme = Selection { tenants: Some(vec!["acme".to_owned()]), ..Selection::default() };
    assert_eq!(index.count(&name, &acme).await.unwrap(), 1);
    index.drop_collection(&name).await.unwrap();
}

async fn a_change_gives_its_collection_another_version(index: &dyn VectorIndex) {
    let names = [fresh("changed"), fresh("unchanged")];
    let before = index.version(&names).await.unwrap();
    assert_eq!(index.version(&names).await.unwrap(), before, "nothing happened");
    assert!(!before.unfinished && !before.epoch.is_nil());

    index.changed(&names[0]).await.unwrap();
    let after = index.version(&names).await.unwrap();
    assert_ne!(after.numbers[0], before.numbers[0]);
    assert_eq!((after.numbers[1], after.epoch), (before.numbers[1], before.epoch));

    let change = index.begin_change(&names[0]).await.unwrap();
    assert_eq!(index.version(&names).await.unwrap().numbers, after.numbers, "nothing is announced yet");
    index.end_change(&names[0], change).await.unwrap();
    let ended = index.version(&names).await.unwrap();
    assert!(!ended.unfinished);
    assert_ne!(ended.numbers[0], after.numbers[0]);

    // Where other gateways can read it, a change that nobody ends shows.
    index.begin_change(&names[1]).await.unwrap();
    let abandoned = index.version(&names[1..]).await.unwrap();
    assert_eq!(abandoned.numbers, before.numbers[1..]);

    index.new_epoch().await.unwrap();
    assert_ne!(index.version(&names).await.unwrap().epoch, before.epoch);
    let listed = index.collections().await.unwrap();
    assert!(listed.iter().all(|(name, _)| !name.contains("versions")), "{listed:?}");
}

#[cfg(feature = "embedded")]
#[tokio::test]
async fn the_embedded_engine_keeps_the_contract() {
    let dir = tempfile::tempdir().unwrap();
    let index = edge::EdgeIndex::open(dir.path(), 0).await.unwrap();
    run(&index).await;
}

#[cfg(feature = "embedded")]
#[tokio::test]
async fn what_was_answered_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let index = edge::EdgeIndex::open(dir.path(), 0).await.unwrap();
    index.ensure("kept", &meta(Some(3))).await.unwrap();
    put(&index, "kept", [chunk("a.md", "apple").dense([1.0, 0.0, 0.0])]).await;
    index.close().await;
    drop(index);
    for _ in 0..2 {
        let index = edge::EdgeIndex::open(dir.path(), 0).await.unwrap();
        assert_eq!(index.info("kept").await.unwrap().unwrap().generation.as_deref(), Some("kept@1"));
        assert_eq!(sources(&index, "kept", lexical("apple")).await, ["a.md"]);
        // An update after a restart must win over what was written before it.
        put(&index, "kept", [chunk("a.md", "apple juice").dense([0.0, 1.0, 0.0])]).await;
        assert_eq!(sources(&index, "kept", lexical("juice")).await, ["a.md"]);
        index.close().await;
    }
}

#[cfg(feature = "embedded")]
#[tokio::test]
async fn a_folder_is_opened_by_one_gateway_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let index = edge::EdgeIndex::open(dir.path(), 0).await.unwrap();
    index.ensure("mine", &meta(None)).await.unwrap();
    let error = edge::EdgeIndex::open(dir.path(), 0).await.err().expect("the folder is taken");
    assert!(error.to_string().contains("another gateway"), "{error}");
    index.close().await;
}

#[cfg(feature = "embedded")]
#[tokio::test]
async fn a_collection_that_nobody_waits_for_is_made_to_its_end_before_the_index_is_closed() {
    use futures::FutureExt as _;

    let dir = tempfile::tempdir().unwrap();
    for _ in 0..10 {
        let index = edge::EdgeIndex::open(dir.path(), 0).await.unwrap();
        // As a job's is, when its gateway stops.
        assert!(index.ensure("cut", &meta(None)).now_or_never().is_none());
        index.close().await;
        drop(index);
        let index = edge::EdgeIndex::open(dir.path(), 0).await.unwrap();
        index.ensure("cut", &meta(None)).await.unwrap();
        let generations = index.collections().await.unwrap();
        assert_eq!(generations.len(), 1, "{generations:?}");
        assert!(index.drop_collection("cut").await.unwrap());
        index.close().await;
    }
}

#[cfg(feature = "embedded")]
#[tokio::test]
async fn readers_and_writers_do_not_disturb_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let index = Arc::new(edge::EdgeIndex::open(dir.path(), 0).await.unwrap());
    index.ensure("busy", &meta(None)).await.unwrap();
    let writers = (0..4).map(|writer| {
        let index = Arc::clone(&index);
        tokio::spawn(async move {
            for number in 0..10 {
                put(&*index, "busy", [chunk(&format!("{writer}-{number}.md"), "apple")]).await;
            }
        })
    });
    let readers = (0..2).map(|_| {
        let index = Arc::clone(&index);
        tokio::spawn(async move {
            for _ in 0..40 {
                index.search("busy", lexical("apple")).await.unwrap();
            }
        })
    });
    for task in writers.chain(readers).collect::<Vec<_>>() {
        task.await.unwrap();
    }
    assert_eq!(index.info("busy").await.unwrap().unwrap().chunks, 40);
}

/// A server for this process: `QDRANT_URL`, else one of its own, else a named skip.
pub(super) async fn a_real_server(test: &str) -> Option<(qdrant::QdrantIndex, Option<Qdrant>)> {
    let timeout = std::time::Duration::from_secs(30);
    if let Ok(url) = std::env::var("QDRANT_URL") {
        let key = std::env::var("QDRANT_API_KEY").ok().map(atlas_shared::Secret::new);
        let url = url.parse().expect("QDRANT_URL is a URL");
        let index = qdrant::QdrantIndex::connect(&url, key.as_ref(), timeout).unwrap();
        return Some((index, None));
    }
    let server = match Qdrant::start().await {
        Ok(server) => server,
        Err(reason) => {
            let test = format!("index::{test}");
            atlas_test_support::skip_everywhere(&test, "a Qdrant server", &reason);
            return None;
        }
    };
    let index = qdrant::QdrantIndex::connect(&server.url().parse().unwrap(), None, timeout).unwrap();
    Some((index, Some(server)))
}

#[tokio::test]
async fn a_real_server_keeps_the_contract() {
    let Some((index, _server)) = a_real_server("contract::a_real_server_keeps_the_contract").await else {
        return;
    };
    run(&index).await;
    a_slower_writer_replaces_nothing_newer(&index).await;
}

/// Two processes write the same documents, and the one that has the older revision comes last.
async fn a_slower_writer_replaces_nothing_newer(index: &dyn VectorIndex) {
    let name = fresh("slower");
    index.ensure(&name, &meta(None)).await.unwrap();
    let now = 1_790_000_000_000_000_i64;
    let write = async |chunks: Vec<Builder>, rev: i64| {
        let chunks = chunks.into_iter().map(|builder| builder.with(|record| record.rev = rev).0).collect();
        let docs = Some(vec!["doc-same.md".to_owned(), "doc-changed.md".to_owned()]);
        let obsolete = Selection { docs, rev_below: Some(rev), ..Selection::default() };
        index.upsert(&name, chunks, Some(obsolete)).await.unwrap();
    };
    let same = || {
        let second = chunk("same.md", "apple pie").with(|record| record.n = 1);
        vec![chunk("same.md", "apple"), second]
    };
    let other = || chunk("changed.md", "pear").with(|record| record.n = 1);
    write([same(), vec![chunk("changed.md", "pear tart")]].concat(), now + 1).await;
    write([same(), vec![chunk("changed.md", "plum"), other()]].concat(), now).await;

    let mut left: Vec<(String, i64)> = index
        .scroll(&name, &Selection::default(), None, 10, true)
        .await
        .unwrap()
        .records
        .into_iter()
        .map(|(_, record)| (record.text, record.rev - now))
        .collect();
    left.sort();
    let expected = ["apple", "apple pie", "pear tart"].map(|text| (text.to_owned(), 1));
    assert_eq!(left, expected);
    index.drop_collection(&name).await.unwrap();
}
