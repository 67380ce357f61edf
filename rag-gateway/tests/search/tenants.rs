//! Tenants cannot read or change each other's documents: every way in is tried.

use crate::support::{Reply, Stand, sources};
use reqwest::{Method, header::HeaderMap};
use serde_json::{Value, json};

const KEYS: &str = "root:key-of-everybody,acme:key-of-acme-caller:acme,zorg:key-of-zorg-caller:zorg";
const ROOT: &str = "key-of-everybody";
const ACME: &str = "key-of-acme-caller";
const ZORG: &str = "key-of-zorg-caller";

/// A gateway with a document of each tenant and one of nobody, in small chunks.
async fn stand() -> Stand {
    let stand =
        Stand::start(&[("API_KEYS", KEYS), ("CHUNK_TOKENS", "32"), ("CHUNK_OVERLAP_TOKENS", "0")]).await;
    let text = |who: &str| {
        format!(
            "# Plan of {who}\n\nThe apple of {who} is ripe.\n\n## Secret\n\nThe vault code of {who} is 1234.\n"
        )
    };
    let documents = json!([
        {"source": "plan.md", "text": text("acme"), "tenant": "acme", "repo": "r"},
        {"source": "plan.md", "text": text("zorg"), "tenant": "zorg", "repo": "r"},
        {"source": "public.md", "text": text("nobody"), "repo": "r"},
    ]);
    ask(&stand, ROOT, Method::PUT, "/v1/documents", json!({"documents": documents})).await.ok();
    stand
}

async fn ask(stand: &Stand, key: &str, method: Method, path: &str, body: Value) -> Reply {
    let request = stand.request(method.clone(), path).bearer_auth(key);
    stand.send(if method == Method::GET { request } else { request.json(&body) }).await
}

async fn query(stand: &Stand, key: &str, body: Value) -> Reply {
    let mut request = json!({"query": "the vault code of the apple plan"});
    request.as_object_mut().unwrap().extend(body.as_object().unwrap().clone());
    ask(stand, key, Method::POST, "/v1/query_chat", request).await
}

#[track_caller]
fn shows_nothing_of(who: &str, text: &str) {
    assert!(!text.contains(who), "{text}");
}

#[tokio::test]
async fn a_bound_key_reads_its_own_and_what_is_nobodys() {
    let stand = stand().await;
    for (key, own, other) in [(ACME, "acme", "zorg"), (ZORG, "zorg", "acme")] {
        for body in [
            json!({}),
            json!({"filter": {"tenant": own}}),
            json!({"passage_tokens": 100_000, "top_k": 1}),
            json!({"passage_tokens": 0, "top_k": 100}),
            json!({"filter": {"path": "**"}}),
            json!({"filter": {"path": "plan.md"}, "collapse_by_file": true}),
            json!({"filter": {"repo": "r"}, "mode": "dense"}),
            json!({"collections": ["atlas"], "diversity": 1.0}),
        ] {
            let reply = query(&stand, key, body.clone()).await;
            shows_nothing_of(other, &reply.text);
            assert!(reply.text.contains(own), "{body}: {}", reply.text);
            reply.ok();
        }
        let public = query(&stand, key, json!({"filter": {"path": "public.md"}})).await.ok();
        assert!(!sources(&public).is_empty());
    }
    // Without a tenant's name, a key that is bound to none reads what is nobody's.
    let everybody = query(&stand, ROOT, json!({})).await;
    shows_nothing_of("acme", &everybody.text);
    shows_nothing_of("zorg", &everybody.text);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_bound_key_cannot_name_another_tenant() {
    let stand = stand().await;
    for tenant in
        ["zorg", "", "ACME", "acme\u{0}", "acme,zorg", "*", "acme\"}, {\"match", "../zorg", "a\u{301}cme"]
    {
        let reply = query(&stand, ACME, json!({"filter": {"tenant": tenant}})).await;
        reply.problem(403, "forbidden");
        shows_nothing_of("zorg is", &reply.text);
        for (method, path, body) in [
            (
                Method::PUT,
                "/v1/documents",
                json!({"documents": [{"source": "x", "text": "x", "tenant": tenant}]}),
            ),
            (Method::POST, "/v1/embed_batch", json!([{"source": "x", "text": "x", "tenant": tenant}])),
            (Method::DELETE, "/v1/documents", json!({"repo": "r", "tenant": tenant, "sources": ["plan.md"]})),
        ] {
            ask(&stand, ACME, method, path, body).await.problem(403, "forbidden");
        }
    }
    for odd in [
        json!({"filter": {"tenant": ["zorg"]}}),
        json!({"filter": {"tenant": {"any": ["zorg"]}}}),
        json!({"filter": {"must": []}}),
    ] {
        query(&stand, ACME, odd).await.problem(422, "invalid_request");
    }
    ask(&stand, ACME, Method::GET, "/v1/documents?tenant=zorg", json!({})).await.problem(403, "forbidden");
    ask(&stand, ACME, Method::POST, "/v1/admin/cache/clear", json!({})).await.problem(403, "forbidden");
    assert!(query(&stand, ZORG, json!({})).await.text.contains("zorg"), "nothing happened to zorg");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_bound_key_is_told_of_its_own_jobs_only() {
    let stand = stand().await;
    let batch = |who: &str| json!([{"source": "job.md", "text": format!("A job of {who}.\n")}]);
    let mut jobs = Vec::new();
    for (key, who) in [(ACME, "acme"), (ZORG, "zorg"), (ROOT, "everybody")] {
        let created = ask(&stand, key, Method::POST, "/v1/embed_batch", batch(who)).await.ok();
        jobs.push((who, format!("/v1/jobs/{}", created["job_id"].as_str().unwrap())));
    }
    let ended = async |key: &str, path: &str| {
        let look = async {
            loop {
                let status = ask(&stand, key, Method::GET, path, json!({})).await.ok();
                if status["state"] == "done" {
                    return status;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(60), look).await.expect("the job ends")
    };
    // While it waits, while it runs, and after it has ended.
    for round in 0..2 {
        for (who, path) in &jobs {
            for (key, caller) in [(ACME, "acme"), (ZORG, "zorg")] {
                let reply = ask(&stand, key, Method::GET, path, json!({})).await;
                if *who == caller {
                    reply.ok();
                } else {
                    reply.problem(404, "unknown_job");
                }
            }
            ask(&stand, ROOT, Method::GET, path, json!({})).await.ok();
            if round == 0 {
                assert_eq!(ended(ROOT, path).await["documents_done"], 1);
            }
        }
    }
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_bound_key_administers_nothing() {
    let stand = stand().await;
    for (method, path, body) in [
        (Method::POST, "/v1/index", json!({"repo": "shop"})),
        (Method::POST, "/v1/collections/atlas/rebuild", json!({})),
        (Method::POST, "/v1/collections/nothing/rebuild", json!({})),
        (Method::PUT, "/v1/collections/atlas/generation", json!({"generation": "atlas@1"})),
        (Method::DELETE, "/v1/collections/atlas", json!({})),
        (Method::DELETE, "/v1/collections/atlas@1", json!({})),
    ] {
        ask(&stand, ACME, method, path, body).await.problem(403, "forbidden");
    }
    let list = ask(&stand, ROOT, Method::GET, "/v1/collections", json!({})).await.ok();
    assert_eq!((&list[0]["name"], &list[0]["generation"]), (&json!("atlas"), &json!("atlas@1")));
    assert_eq!(list.as_array().unwrap().len(), 1, "nothing was made or dropped: {list}");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn filters_are_values_and_never_conditions() {
    let stand = stand().await;
    let inject = "r\" OR tenant:\"zorg";
    for filter in [
        json!({"repo": inject}),
        json!({"lang": inject}),
        json!({"path": "{plan.md,**}", "repo": "r"}),
        json!({"path": "**/*", "lang": "markdown"}),
        json!({"path": "../**"}),
    ] {
        let reply = query(&stand, ACME, json!({"filter": filter})).await;
        shows_nothing_of("zorg", &reply.text);
        reply.ok();
    }
    for collection in ["atlas.versions", "ATLAS", "atlas/../atlas", "*"] {
        let reply = query(&stand, ACME, json!({"collection": collection})).await;
        shows_nothing_of("zorg", &reply.text);
        assert!(reply.status.is_client_error(), "{}", reply.text);
    }
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_write_is_its_tenants_whatever_it_is_called() {
    let stand = stand().await;
    let list = async |key: &str, path: &str| ask(&stand, key, Method::GET, path, json!({})).await.ok();
    let before = list(ZORG, "/v1/documents").await;
    assert_eq!(before["documents"].as_array().unwrap().len(), 1, "its own only");
    assert_eq!(list(ROOT, "/v1/documents?tenant=zorg").await, before);

    // The same name in the same repository is another document.
    let put = json!({"documents": [{"source": "plan.md", "text": "The apple is stolen.\n", "repo": "r"},
        {"source": "public.md", "text": "The apple is defaced.\n", "repo": "r"}]});
    ask(&stand, ACME, Method::PUT, "/v1/documents", put).await.ok();
    assert_eq!(list(ZORG, "/v1/documents").await, before);
    let reply = query(&stand, ZORG, json!({})).await;
    shows_nothing_of("stolen", &reply.text);
    shows_nothing_of("defaced", &reply.text);
    assert!(query(&stand, ROOT, json!({})).await.text.contains("nobody"), "what is nobody's is as it was");

    let delete = json!({"repo": "r", "sources": ["plan.md", "public.md", "never.md"]});
    let gone = ask(&stand, ACME, Method::DELETE, "/v1/documents", delete).await.ok();
    assert_eq!(gone, json!({"deleted": 2}));
    assert_eq!(list(ZORG, "/v1/documents").await, before);
    assert!(query(&stand, ROOT, json!({})).await.text.contains("nobody"));
    let crafted = json!({"repo": "r\u{0}x", "sources": ["plan.md"]});
    ask(&stand, ACME, Method::DELETE, "/v1/documents", crafted).await.problem(422, "invalid_request");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn caches_do_not_mix_tenants() {
    let stand = stand().await;
    for _ in 0..2 {
        for (key, own, other) in [(ACME, "acme", "zorg"), (ZORG, "zorg", "acme")] {
            let reply = query(&stand, key, json!({})).await;
            assert!(reply.text.contains(own));
            shows_nothing_of(other, &reply.text);
        }
        shows_nothing_of("acme", &query(&stand, ROOT, json!({})).await.text);
    }
    assert_eq!(stand.metric("rag_cache_hits_total").await, 3);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn the_list_of_collections_counts_only_what_a_key_may_read() {
    let stand = stand().await;
    let documents = json!([{"source": "x.md", "text": "only zorg", "tenant": "zorg"}]);
    let put = json!({"collection": "of-zorg", "documents": documents});
    ask(&stand, ROOT, Method::PUT, "/v1/documents", put).await.ok();
    let counts = async |key: &str| -> Vec<(String, u64)> {
        let list = ask(&stand, key, Method::GET, "/v1/collections", json!({})).await.ok();
        let line =
            |line: &Value| (line["name"].as_str().unwrap().to_owned(), line["chunks"].as_u64().unwrap());
        list.as_array().unwrap().iter().map(line).collect()
    };
    let all = counts(ROOT).await;
    assert_eq!(all.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["atlas", "of-zorg"]);
    let of_acme = counts(ACME).await;
    assert_eq!(of_acme.len(), 1, "{of_acme:?}");
    assert!(of_acme[0].1 < all[0].1);
    assert_eq!(counts(ZORG).await.len(), 2);
    // What it may not read it does not find there either.
    let found = query(&stand, ACME, json!({"collections": ["atlas", "of-zorg"], "query": "only zorg"})).await;
    shows_nothing_of("only zorg", &found.text);
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn keys_in_a_file_are_hashed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("keys");
    let key = atlas_shared::config::ApiKey::new("acme", ACME, Some("acme"));
    std::fs::write(&path, format!("# callers\n\n{}\n", key.line())).unwrap();
    assert!(!std::fs::read_to_string(&path).unwrap().contains(ACME));
    let file = path.display().to_string();
    let stand = Stand::start(&[("API_KEYS_FILE", file.as_str())]).await;
    let put = json!({"documents": [{"source": "a.md", "text": "an apple"}]});
    ask(&stand, ACME, Method::PUT, "/v1/documents", put).await.ok();
    let list = ask(&stand, ACME, Method::GET, "/v1/documents", json!({})).await.ok();
    assert_eq!(list["documents"].as_array().unwrap().len(), 1);
    ask(&stand, &key.line(), Method::GET, "/v1/documents", json!({})).await.problem(401, "unauthorized");
    let headers: HeaderMap = stand.get("/v1/documents").await.headers;
    assert_eq!(headers["www-authenticate"], "Bearer");
    stand.gateway.shutdown().await;
}

#[tokio::test]
async fn a_bound_key_cannot_tell_anothers_collection_from_none() {
    let stand = stand().await;
    let secret = json!([{"source": "plan.md", "text": "The merger of zorg.\n"}]);
    let put = json!({"collection": "zorg-merger", "documents": secret});
    ask(&stand, ZORG, Method::PUT, "/v1/documents", put).await.ok();

    let write = json!([{"source": "x.md", "text": "x\n"}]);
    let ways = |name: &str| -> Vec<(Method, String, Value)> {
        let first = |name: &str| json!({"query": "merger", "collection": name});
        vec![
            (Method::POST, "/v1/query_chat".to_owned(), first(name)),
            (Method::POST, "/v1/query_chat".to_owned(), first(&format!("{name}@1"))),
            (
                Method::POST,
                "/v1/query_chat".to_owned(),
                json!({"query": "merger", "collections": ["atlas", name]}),
            ),
            (Method::GET, format!("/v1/documents?collection={name}"), Value::Null),
            (Method::GET, format!("/v1/documents?collection={name}@1"), Value::Null),
            (Method::DELETE, "/v1/documents".to_owned(), json!({"collection": name, "sources": ["plan.md"]})),
            (
                Method::PUT,
                "/v1/documents".to_owned(),
                json!({"collection": format!("{name}@1"), "documents": write}),
            ),
            (Method::POST, format!("/v1/embed_batch?collection={name}@1"), write.clone()),
            (Method::DELETE, format!("/v1/collections/{name}"), Value::Null),
            (Method::POST, format!("/v1/collections/{name}/rebuild"), Value::Null),
            (
                Method::PUT,
                format!("/v1/collections/{name}/generation"),
                json!({"generation": format!("{name}@1")}),
            ),
        ]
    };
    let told = async |key: &str, name: &str| {
        let mut told = Vec::new();
        for (method, path, body) in ways(name) {
            let reply = ask(&stand, key, method.clone(), &path, body).await;
            let degraded = reply.header("x-atlas-degraded").map(str::to_owned);
            told.push((reply.status.as_u16(), degraded, reply.text.replace(name, "NAME")));
        }
        told
    };
    assert_eq!(told(ACME, "zorg-merger").await, told(ACME, "nope").await);
    // Nothing of that made one, or touched the other's, and who may see it does.
    let found = json!({"query": "merger", "collection": "zorg-merger"});
    assert_eq!(
        ask(&stand, ZORG, Method::POST, "/v1/query_chat", found.clone()).await.ok()[0]["source"],
        "plan.md"
    );
    let empty = ask(&stand, ROOT, Method::POST, "/v1/query_chat", found).await.ok();
    assert_eq!(empty, json!([]), "a key of nobody's knows that it is there");
    // The default collection is no secret, empty or not.
    let missing = json!({"query": "merger", "collection": "atlas"});
    ask(&stand, ACME, Method::POST, "/v1/query_chat", missing).await.ok();
    stand.gateway.shutdown().await;
}
